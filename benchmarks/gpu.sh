#!/bin/sh
# One GPU, under eight minutes: deltaw's steps, then those of its peers as far as time goes (gpu.py); `deltaw train`
# itself, timed, profiled, killed and resumed (gpu_train.py); the kernels' tests on the chip. What matters most comes
# first, and each part has seconds of its own. Beside them: decoding, recorded and not (gpu_decode.py, another minute).
#
#   benchmarks/gpu.sh [arguments of gpu.py]
#
#   PARTS    which of peers, train, tests and decode, in this order or another   peers train tests
#   OUT      where gpu.csv goes                                                  benchmarks
#   PYTHON   a Python with torch, transformers, peft and deltaw's dependencies   python3
#   WHEELS   folders of wheels for what that Python lacks; nothing is fetched, and nothing is installed into it
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
PARTS="${PARTS:-peers train tests}"
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
  echo "no torch in $PYTHON: nothing was measured (PYTHON=... names another)" >&2
  exit 2
fi
if [ -n "${WHEELS:-}" ]; then
  extra="$(mktemp -d)"
  trap 'rm -rf "$extra"' EXIT
  wheels=""
  for folder in $WHEELS; do wheels="$wheels $folder/*.whl"; done
  # shellcheck disable=SC2086  # names of files, to be expanded
  "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$extra" $wheels
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
    peers) "$PYTHON" benchmarks/gpu.py --budget 220 "$@" || failed=$? ;;
    train) timeout 130 "$PYTHON" benchmarks/gpu_train.py --budget 110 || failed=$? ;;
    decode) timeout 80 "$PYTHON" benchmarks/gpu_decode.py --budget 55 || failed=$? ;;
    tests)
      TRITON_INTERPRET=0 timeout 120 "$PYTHON" -m pytest tests/kernels -q -n 8 -p no:cacheprovider || failed=$?
      ;;
    *) echo "PARTS: $part is none of peers, train, tests, decode" >&2; exit 2 ;;
  esac
done
exit "$failed"
