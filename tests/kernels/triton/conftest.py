"""The GPU kernels need triton, which is not everywhere."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
