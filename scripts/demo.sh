#!/bin/sh
# The whole way on a real model: export, prove, ask, measure, compare. Argument: where the bundle goes.
set -eu
bundle=${1:-bundles/demo}
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

say edgelm export demo:smollm2 --target laptop --quant Q4_K_M -o "$bundle" --force
# Its own default system prompt leads a model of this size astray, in llama.cpp as well; this one does not.
say edgelm run "$bundle" "What is the capital of France?" --system "Answer in one short sentence."
say edgelm bench "$bundle" -p 256 -n 64 -r 3 -o "$bundle.report.json"
say edgelm compare "$bundle.report.json" --target raspberry-pi-5-4gb
