#!/bin/sh
# The whole way on a real model: export, prove, ask, measure, compare. Argument: where the bundle goes.
set -eu
bundle=${1:-bundles/demo}
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

say edgelm export demo:smollm2 --target laptop --quant Q4_K_M -o "$bundle" --force
# At 135M parameters the template's own system prompt leads the model astray (llama.cpp gives the same answer); this one does not.
say edgelm run "$bundle" "What is the capital of France?" --system "You are a helpful assistant."
say edgelm bench "$bundle" -p 256 -n 64 -r 3 -o "$bundle.report.json"
say edgelm compare "$bundle.report.json" --target raspberry-pi-5-4gb
