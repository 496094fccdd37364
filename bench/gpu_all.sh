#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under eight minutes: tests, kernels against float64 and against torch,
# whole jobs. Every step has its own time limit and none stops the next; the exit status is 1 if one failed.
# PYTHON names the interpreter that holds torch, Triton and the package's dependencies. Results go to $OUT, if set, and
# there each step's output too, of which only the end is printed; else results go to bench/results.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/src:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
python=${PYTHON:-python3}
failed=()
[ -z "${OUT:-}" ] || mkdir -p "$OUT"

step() { # name, seconds, command
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  echo "== $name: at most $limit s"
  if [ -n "${OUT:-}" ]; then
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    tail -c 2000 "$OUT/$name.log"
  else
    timeout --kill-after=5 "$limit" "$@"
    status=$?
  fi
  echo "== $name: status $status after $((SECONDS - start)) s"
  [ $status -eq 0 ] || failed+=("$name")
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 2
parallel=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 6")
# Warnings of other versions of the dependencies are no failures here.
# shellcheck disable=SC2086
step tests 100 "$python" -m pytest -q -m gpu -W default -p no:cacheprovider $parallel tests/test_gpu.py tests/kernels \
  tests/test_backend.py
step kernels 110 "$python" -m bench run kernels
step roberta-base 90 "$python" -m bench run gpu-jobs -- roberta
step llama-7b 65 "$python" -m bench run gpu-jobs -- llama-7b
step llama-45b 100 "$python" -m bench run gpu-jobs -- llama-45b
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
