#!/usr/bin/env bash
# What only a Hopper GPU can show, in ten minutes: results of the kernels, their speed beside peers, the host tier,
# an 8B-shaped model beside transformers, and attention on the host's CPU beside it all on the GPU.
#
#     pip install -e '.[cuda,dev,parity]' && experiments/h200.sh [folder for results]
#     experiments/h200.sh --dry-run       # on any machine: checks every command and says what would be left out
#
# A step that fails or takes too long is named, and the others still run. Peers that are not installed are left out
# and named (`pip install flashinfer-python` brings one more). The limits below add up to ten minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
dry=
[ "${1:-}" = --dry-run ] && dry=--only_check_args && shift
out=${1:-out/h200}
python=${PYTHON:-python}

if [ -z "$dry" ]; then
  export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false
  if ! "$python" -c 'import jax; assert jax.devices()[0].compute_capability.startswith("9.")'; then
    echo "This needs a Hopper GPU (compute capability 9.x) and 'pip install -e .[cuda,dev]'." >&2
    exit 1
  fi
  mkdir -p "$out"
fi

failed=()
has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
step() { # name, seconds, command
  local name=$1 limit=$2
  shift 2
  echo "== $name, at most $limit s"
  if [ -n "$dry" ]; then
    echo "   $*"
    [ "$2" = -m ] && [ "$3" = pytest ] && set -- "$@" --collect-only || set -- "$@" "$dry"
    "$@" >/dev/null || failed+=("$name")
    return
  fi
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
}
run() { # name, seconds, script, flags
  local name=$1 limit=$2 script=$3
  shift 3
  step "$name" "$limit" "$python" -m "experiments.$script" --out="$out/$name" "$@"
}
bench() { # name, seconds, flags
  local name=$1 limit=$2
  shift 2
  run "$name" "$limit" bench_paged_attention --dtype=bfloat16 --q_heads=64 --kv_heads=8 "$@"
}

peers=jax_triton torch_peers= engine_peer=()
if has torch; then torch_peers=,torch_sdpa; else echo "-- torch_sdpa is left out: torch is not installed"; fi
if has flashinfer; then torch_peers+=,flashinfer; else echo "-- flashinfer is left out: it is not installed"; fi
if has torch && has transformers; then
  engine_peer=(--peer=transformers)
else
  echo "-- transformers is left out: 'pip install -e .[parity]' brings it"
fi

step results 110 "$python" -m pytest tests/model/kernels/paged_attention/test_backends.py -n 0 -k mosaic_gpu -m "slow or not slow" -q
bench decode 100 --backend="mosaic_gpu,xla,$peers$torch_peers" --batch=32,128 --context=4096
bench decode_long 50 --backend="mosaic_gpu,xla,$peers$torch_peers" --batch=1 --context=32768
bench decode_pages 40 --backend=mosaic_gpu --batch=32 --context=4096 --page_size=16,32,64,128 --repeats=5
bench prefill 60 --backend="mosaic_gpu,xla$torch_peers" --batch=1,4 --context=4096 --query_len=4096 --repeats=3
run host_memory 20 bench_host_memory
run pair 60 bench_pair --shape=llama3-8b --layers=8 --batches=1,8 --contexts=4096
run engine 160 bench_engine --shape=llama3-8b --dtype=bfloat16 --batches=1,32 --contexts=2048 --prefill=2048 \
  --cores="$(nproc)" "${engine_peer[@]}"

[ ${#failed[@]} -eq 0 ] || { echo "failed or out of time: ${failed[*]}" >&2; exit 1; }
