"""A sample of every fault's tries; `make torture` makes them all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.fault import FAULTS, Fault, load_faults, run_tries
from tests.faults.shim import COMPILER, environment

ROOT = Path(__file__).parents[2]
MEMORY = 30
WANTED = set(range(1, 52)) | {53, 54}  # the list's, the server's aside


def named(known: Fault) -> str:
    return f"{known.number:02}-{known.name}"


@pytest.mark.parametrize(
    "known", [known for known in load_faults() if not known.preload and known.number != MEMORY], ids=named
)
def test_a_sample(known: Fault) -> None:
    outcome = run_tries(known, range(known.sample))
    assert not outcome.failures


def test_a_sample_of_those_that_run_out_of_memory() -> None:
    """In a process of its own: what other tests have left free in this one's heap is room that no limit counts."""
    command = [sys.executable, "-m", "tests.faults", "--sample", "--jobs", "1", "--only", str(MEMORY)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(COMPILER is None, reason="no C compiler: system calls can't be made to fail")
def test_a_sample_of_those_whose_system_calls_fail() -> None:
    numbers = ",".join(sorted({str(known.number) for known in load_faults() if known.preload}))
    command = [sys.executable, "-m", "tests.faults", "--sample", "--jobs", "1", "--only", numbers]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment()})
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_fault_of_the_list_is_tried() -> None:
    load_faults()
    assert {known.number for known in FAULTS} >= WANTED
    names = [known.name for known in FAULTS]
    assert len(names) == len(set(names)), "a worker finds a fault by its function's name"
