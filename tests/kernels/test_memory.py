"""keep_freed_memory: blocks that were freed are there again without the system's help."""

import subprocess
import sys

import pytest

from deltaw.kernels.memory import keep_freed_memory

FAULTS = """
import resource, torch
from deltaw.kernels.memory import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    held = [torch.empty(n * 1_000_000).fill_(1) for n in (3, 9, 5, 12, 7)]
for _ in range(10):
    step()
before = faults()
for _ in range(3):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc")
def test_freed_blocks_cost_no_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # 36 million floats a step are 35,000 pages. Without the call they may fault at every step, or never: it depends on
    # what happens to lie above them in the heap.
    assert int(done.stdout) < 3 * 35_000 / 10


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
