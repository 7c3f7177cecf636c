#!/usr/bin/env bash
# Everything that only a GPU can tell, below 9 minutes on one H100 or H200: checks, training steps, re-ranking.
#
#   benchmarks/gpu.sh FOLDER             # tables, logs and a summary in FOLDER; then commit FOLDER/*.json
#   benchmarks/gpu.sh FOLDER --tiny      # towers of two layers: tries the script out on a CPU
#
# Each part has a time limit of its own, and its table is written as soon as a number is there: a part that fails or
# runs out of time leaves the others be. The exit code is 0 where all parts ended well. Needed: Python with torch,
# transformers, accelerate, datasets and pyarrow (PYTHON=... names one); DeepSpeed is checked where it is there.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?give the folder for the tables}
tiny=${2:-}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
failed=0

part() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 began=$SECONDS code
    shift 2
    timeout --kill-after=10 "$seconds" "$python" "$@" >"$out/$name.log" 2>&1
    code=$?
    if ((code == 0)); then
        echo "$name: $(tail -n 1 "$out/$name.log") ($((SECONDS - began)) s)"
    else
        failed=1
        echo "$name: exit code $code after $((SECONDS - began)) s of $seconds (124: out of time); the end of $out/$name.log:"
        tail -n 5 "$out/$name.log"
    fi
}

if [[ $tiny == --tiny ]]; then
    part checks 300 benchmarks/gpu_checks.py --only step,fp32,pipeline --json "$out/gpu_checks.json"
    part steps 120 benchmarks/gpu_steps.py --tiny --only 0,3 --steps 1 --json "$out/gpu_steps.json"
    part rerank 60 benchmarks/bench_full.py --tiny --num_images 30 --num_texts 20 --k 4 --unit 8 \
        --json "$out/gpu_rerank.json"
else
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm --format=csv,noheader
    part checks 110 benchmarks/gpu_checks.py --json "$out/gpu_checks.json"
    part steps 150 benchmarks/gpu_steps.py --seconds 110 --json "$out/gpu_steps.json"
    part rerank_tenth 60 benchmarks/bench_full.py --num_images 5000 --num_texts 2000 --json "$out/gpu_rerank_tenth.json"
    part rerank 200 benchmarks/bench_full.py --json "$out/gpu_rerank.json"
fi
"$python" benchmarks/gpu_summary.py "$out" | tee "$out/summary.md"
exit "$failed"
