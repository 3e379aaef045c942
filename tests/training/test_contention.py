"""Other programs on the cores: seen by counters that are given here, so that no test depends on the machine's load."""

import pytest

from deltaw.machine.waiting import SECONDS, Ticks, choose_waiting, core_ticks, taken
from deltaw.training.contention import CONTESTED, Contention, seconds_without_core


class Machine:
    """Two threads that have no core for `share` of the time; a step takes 2 seconds."""

    def __init__(self, share: float) -> None:
        self.share, self.now, self.waited = share, 100.0, 7.0
        self.lines: list[str] = []

    def run(self, steps: int, passive: bool = False, threads: int = 2, counted: bool = True) -> Contention:
        seen = Contention(
            "runs/x",
            threads,
            self.lines.append,
            clock=lambda: self.now,
            without_core=lambda: self.waited if counted else None,
            passive=passive,
        )
        for _ in range(steps):
            self.now += 2
            self.waited += 2 * threads * self.share
            seen.stepped()
        return seen


def test_an_idle_machine_is_not_a_matter() -> None:
    machine = Machine(0.005)
    assert machine.run(20).waited == pytest.approx(0.005) and not machine.lines


def test_it_is_told_once_and_in_the_first_steps() -> None:
    machine = Machine(0.4)
    assert machine.run(4).waited == pytest.approx(0.4)
    assert len(machine.lines) == 1 and "OMP_WAIT_POLICY=passive deltaw train runs/x" in machine.lines[0]
    machine = Machine(0.4)
    machine.run(100)
    assert len(machine.lines) == 1


def test_what_is_done_already_is_not_advised() -> None:
    for passive, threads in ((True, 2), (False, 1)):
        machine = Machine(0.4)
        machine.run(6, passive=passive, threads=threads)
        assert len(machine.lines) == 1 and "OMP_WAIT_POLICY" not in machine.lines[0]


def test_company_that_comes_later_is_noticed() -> None:
    machine = Machine(0.0)
    seen = machine.run(0)
    for number in range(40):
        machine.share = 0.5 if number > 20 else 0.0
        machine.now, machine.waited = machine.now + 2, machine.waited + 4 * machine.share
        seen.stepped()
        assert bool(machine.lines) <= (number > 20)
    assert len(machine.lines) == 1 and seen.waited is not None and seen.waited > CONTESTED


def test_a_system_that_does_not_count_says_nothing() -> None:
    machine = Machine(0.9)
    assert machine.run(10, counted=False).waited is None and not machine.lines
    counted = seconds_without_core()
    assert counted is None or counted >= 0


def chosen(busy: list[float], **environment: str) -> tuple[dict[str, str], list[str]]:
    """What is set on a machine whose cores are busy for these shares."""
    looks: list[Ticks] = [
        dict.fromkeys(range(len(busy)), (1000, 9000)),
        {core: (1000 + round(40 * share), 9040) for core, share in enumerate(busy)},
    ]
    given, lines, slept = dict(environment), list[str](), list[float]()
    choose_waiting(lines.append, given, lambda: looks.pop(0), slept.append)
    assert sum(slept) in (0, SECONDS)
    return {name: value for name, value in given.items() if name not in environment}, lines


PASSIVE = {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize(
    ("busy", "environment", "wanted"),
    [
        ([0.0, 0.05], {}, {}),
        ([1.0, 0.0], {}, PASSIVE),
        ([0.5, 0.5], {}, PASSIVE),
        ([1.0, 1.0], {"OMP_NUM_THREADS": "1"}, {}),  # one thread waits for nobody
        ([1.0], {}, {}),
        ([1.0, 0.0, 0.0, 0.0], {"OMP_NUM_THREADS": "2,1"}, {}),  # there is room for two elsewhere
        ([1.0, 1.0, 1.0, 0.0], {"OMP_NUM_THREADS": "2"}, PASSIVE),
        ([1.0, 1.0], {"OMP_WAIT_POLICY": "active"}, {}),  # the user's own
        ([1.0, 1.0], {"GOMP_SPINCOUNT": "100"}, {}),
        ([], {}, {}),  # no /proc
    ],
)
def test_waiting_is_passive_where_cores_are_taken(
    busy: list[float], environment: dict[str, str], wanted: dict[str, str]
) -> None:
    got, lines = chosen(busy, **environment)
    assert got == wanted and len(lines) == len(wanted)


def test_cores_are_read_as_linux_writes_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "stat").write_text("cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 10 0 5 80 5 0 0 0 0 0\nintr 7\n")
    ticks = core_ticks(tmp_path / "stat")
    assert ticks in ({0: (15, 100)}, {})  # it may not be ours to run on
    assert taken({0: (15, 100)}, {0: (35, 140)}) == pytest.approx(0.5)
    for broken in ("", "cpu0 a b\n", "cpu0 1\n"):
        (tmp_path / "stat").write_text(broken)
        assert core_ticks(tmp_path / "stat") == {}
    assert core_ticks(tmp_path / "nothing") == {}
