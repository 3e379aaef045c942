#!/bin/sh
# One GPU: the kernels' tests on the chip (two minutes); deltaw against its peers (gpu.py, at most nine); `deltaw train`
# itself, timed, profiled, killed and resumed (gpu_train.py, at most four). PARTS="tests train" takes under eight.
#
#   benchmarks/gpu.sh [arguments of gpu.py]
#
#   PARTS    which of tests, peers and train                                     tests peers train
#   OUT      where gpu.csv goes                                                  benchmarks
#   PYTHON   a Python with torch, transformers, peft and deltaw's dependencies   python3
#   WHEELS   a folder of wheels for what that Python lacks; nothing is fetched, and nothing is installed into it
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
PARTS="${PARTS:-tests peers train}"
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
  echo "no torch in $PYTHON: nothing was measured (PYTHON=... names another)" >&2
  exit 2
fi
if [ -n "${WHEELS:-}" ]; then
  extra="$(mktemp -d)"
  trap 'rm -rf "$extra"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$extra" "$WHEELS"/*.whl
  PYTHONPATH="$PYTHONPATH:$extra"
fi
export PYTHONPATH
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU here: nothing was measured (gpu.py and gpu_train.py with --device cpu --toy test themselves)" >&2
  exit 2
fi
failed=0
for part in $PARTS; do
  case "$part" in
    tests) TRITON_INTERPRET=0 "$PYTHON" -m pytest tests/kernels -q -n 8 -p no:cacheprovider || failed=1 ;;
    peers) "$PYTHON" benchmarks/gpu.py "$@" || failed=$? ;;
    train) "$PYTHON" benchmarks/gpu_train.py || failed=$? ;;
    decode) "$PYTHON" benchmarks/gpu_decode.py || failed=$? ;;
    *) echo "PARTS: $part is none of tests, peers, train" >&2; exit 2 ;;
  esac
done
exit "$failed"
