#!/usr/bin/env bash
# The script for the day a GPU is there; each line is rehearsed on a CPU with --rehearse (tests/test_gpu.py).
#
#     bash bench/gpu.sh check                                       # is it right?
#     bash bench/gpu.sh speed [--peer=../nanoGPT]                   # how fast is it?
#     bash bench/gpu.sh write 10 config/micro.py text.jsonl.xz      # train for ten minutes in all, measure, write
#     bash bench/gpu.sh full                                        # config/full.py on one card, killed and resumed
#
# Settings of bench/gpu.py may follow, such as --out=FOLDER.
set -euo pipefail
names=(stage minutes config text)
args=()
for name in "${names[@]}"; do
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
        args+=("--$name=$1")
        shift
    fi
done
exec "$(command -v python || command -v python3)" "$(dirname "$0")/gpu.py" "${args[@]+"${args[@]}"}" "$@"
