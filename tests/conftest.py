"""For all tests: no network, one thread each."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
# Before anything imports triton: kernels run in its interpreter, on a CPU. 0 to run them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A rank that is gone is no news of torch's own: several tests kill one.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import hypothesis
import pytest
import torch

from tests.bases import builtin, folder, model, sharded  # noqa: F401

# A shared machine's clock is no property of the code; speed is measured in benchmarks.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# A shell that starts the tests in the background has them ignore Ctrl-C, and they test it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Threads of two tests side by side wait for each other longer than tiny products take.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
