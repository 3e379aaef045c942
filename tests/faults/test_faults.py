"""A sample of every fault's tries; `make torture` makes them all."""

import pytest

from tests.faults.__main__ import run_in_workers
from tests.faults.fault import FAULTS, Fault, load_faults, run_tries
from tests.faults.shim import COMPILER

MEMORY = 30
WANTED = set(range(1, 65))  # the whole list


def named(known: Fault) -> str:
    return f"{known.number:02}-{known.name}"


@pytest.mark.parametrize(
    "known", [known for known in load_faults() if not known.preload and known.number != MEMORY], ids=named
)
def test_a_sample(known: Fault) -> None:
    outcome = run_tries(known, range(known.sample))
    assert not outcome.failures


def test_a_sample_of_those_that_need_a_process_of_their_own() -> None:
    """Memory runs out first: what others have left free in a process's heap is room that no limit counts. Then system
    calls fail, which takes a library that is preloaded: without a C compiler they can't be made to."""
    known = load_faults()
    in_worker = [one for one in known if one.number == MEMORY]
    in_worker += [one for one in known if one.preload and COMPILER is not None]
    outcomes, _ = run_in_workers(in_worker, [], sample=True, jobs=1)
    assert not [(name, failure) for name, outcome in outcomes.items() for failure in outcome.failures]
    assert {one.name: outcomes[one.name].passed for one in in_worker} == {one.name: one.sample for one in in_worker}


def test_every_fault_of_the_list_is_tried() -> None:
    load_faults()
    assert {known.number for known in FAULTS} >= WANTED
    names = [known.name for known in FAULTS]
    assert len(names) == len(set(names)), "a worker finds a fault by its function's name"
