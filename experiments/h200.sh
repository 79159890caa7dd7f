#!/usr/bin/env bash
# Everything about paged attention that only a Hopper GPU can show: results, decode bandwidth, prefill FLOP/s.
#
#     pip install -e '.[cuda,dev]' && experiments/h200.sh [folder for results]
#
# Stops within ten minutes; a step that fails or takes too long is named, and the others still run.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/h200}
python=${PYTHON:-python}
export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false

if ! "$python" -c 'import jax; assert jax.devices()[0].compute_capability.startswith("9.")'; then
  echo "This needs a Hopper GPU (compute capability 9.x) and 'pip install -e .[cuda,dev]'." >&2
  exit 1
fi
mkdir -p "$out"

failed=()
step() { # name, seconds, command
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
}
bench() { # name, seconds, flags
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m experiments.bench_paged_attention --out="$out/$name" --dtype=bfloat16 "$@"
}

step results 150 "$python" -m pytest tests/model/kernels/paged_attention/test_backends.py -n 0 -k mosaic_gpu -m "slow or not slow" -q
bench decode 150 --backend=mosaic_gpu,xla,jax_triton --batch=32,128 --context=4096,8192 --q_heads=64 --kv_heads=8
bench decode_long 90 --backend=mosaic_gpu,xla,jax_triton --batch=1 --context=32768 --q_heads=64 --kv_heads=8
bench decode_pages 90 --backend=mosaic_gpu --batch=32 --context=4096 --q_heads=64 --kv_heads=8 --page_size=16,32,64,128
bench prefill 110 --backend=mosaic_gpu,xla --batch=1,4 --context=4096 --query_len=4096 --repeats=3

[ ${#failed[@]} -eq 0 ] || { echo "failed or out of time: ${failed[*]}" >&2; exit 1; }
