#!/usr/bin/env bash
# All that only a card can tell, in order of use: bash benchmarks/card.sh 10|25|45   (minutes; results in $OUT)
# No network, no model files. Each block stands alone: a run that is cut short keeps what was written before.
# Try it on a machine without a card first: SHAPE=tiny bash benchmarks/card.sh 10
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OUT=${OUT:-card_output}
minutes=${1:-10} shape=${SHAPE:-3b} python=${PYTHON:-python3}
case $minutes in 10 | 25 | 45) ;; *) echo "usage: bash benchmarks/card.sh 10|25|45" >&2; exit 2 ;; esac
mkdir -p "$OUT"

block() {  # seconds, command: one that is too slow or fails does not end the rest
  echo "== ${*:2}" | tee -a "$OUT/log"
  timeout "$1" "${@:2}" 2>&1 | tee -a "$OUT/log" | grep -v Warning | cut -c1-230
}
probe() {  # seconds, arguments, by which its file is named: no later run may overwrite it
  local name="card ${*:2}"; name=${name//--shape /}; name=${name// --/ }; name=${name// /-}
  block "$1" "$python" -m benchmarks.card_probe "${@:2}" --json "$OUT/$name.json"
}
tests() { block "$1" "$python" -m pytest -q -p no:cacheprovider "${@:2}"; }

if command -v nvidia-smi > /dev/null; then
  nvidia-smi -L
  # for this card alone: a third of nvcc's time
  chip=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  PMC_FAST_CHIPS=$chip PMC_FAST_CUDA=1 "$python" -m pip install -q -e . --no-deps --no-build-isolation 2>&1 | tail -2 || exit 1
fi

# 10 minutes: what can crash or be wrong, then a step's time and memory, then a short run
tests 110 tests/cuda_graphs tests/data/test_packing.py tests/ops/test_scaled.py tests/rollout/test_rollout_graphs.py \
  -k "gpu or varlen or scaled"
probe 100 step --shape "$shape" --quick
probe 110 memory --shape "$shape" --quick
probe 100 run --shape "$shape" --epochs 1
probe 60 head --shape "$shape" --quick
probe 60 trainer --shape "$shape"
[ "$minutes" = 10 ] && exit

# to 25
lora=$shape small=$shape; [ "$shape" = 3b ] && lora=8b small=135m
probe 60 attention --shape "$shape" --quick
[ "$small" = "$shape" ] || probe 60 attention --shape "$small" --quick
probe 120 lora --shape "$lora" --quick
probe 120 pass --shape "$shape" --quick
probe 100 rollout --shape "$shape" --quick
tests 200 tests/ops tests/models/test_fused_layers.py tests/rollout/test_engine.py
probe 90 profile --shape "$shape"
probe 240 peers --quick --shape "$shape"
probe 90 step --shape "$small"
[ "$minutes" = 25 ] && exit

# to 45: all epochs of a run, races and bounds, then the tables of README and docs/
probe 400 run --shape "$shape" --epochs 30
probe 240 decode --shape "$shape" --quick
if command -v compute-sanitizer > /dev/null; then
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 block 240 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q \
    -p no:cacheprovider tests/ops/test_decode_cuda.py -k gpu
fi
block 400 "$python" -m benchmarks.gpu --quick --json "$OUT/gpu.json"
