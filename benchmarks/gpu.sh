#!/bin/sh
# deltaw against its peers on one GPU, in at most nine minutes; see gpu.py.
#
#   benchmarks/gpu.sh [arguments of gpu.py]
#
#   OUT      where gpu.csv goes                                                  benchmarks
#   PYTHON   a Python with torch, transformers, peft and deltaw's dependencies   python3
#   WHEELS   a folder of wheels for what that Python lacks; nothing is fetched, and nothing is installed into it
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
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
"$PYTHON" benchmarks/gpu.py "$@"
