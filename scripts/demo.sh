#!/bin/sh
# The whole way on a real model: export, prove, ask, measure, compare. Argument: where the bundle goes.
set -eu
bundle=${1:-bundles/demo}
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

say edgelm export demo:smollm2 --target laptop --quant Q4_K_M -o "$bundle" --force
say edgelm run "$bundle" "What is the capital of France?" --temperature 0
say edgelm bench "$bundle" -p 256 -n 64 -r 3 -o "$bundle.report.json"
say edgelm compare "$bundle.report.json" --target raspberry-pi-5-4gb
