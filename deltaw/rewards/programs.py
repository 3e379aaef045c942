"""Whether the program in an answer passes its row's tests: pass@1 of `deltaw eval` (evaluation/programs.py), as a
reward.

Each program runs in a process of its own that can only compute (files/program.py), so no consent is asked here: the
tests are the run's own data, and what they could do is less than a template may. As many run at once as there are
cores. One that is late, too large or wrong is worth 0; that is what the row asks.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from deltaw.config.reward import TestsReward
from deltaw.data.row import Row
from deltaw.evaluation.programs import Checks, checks_of, program_of
from deltaw.files.forked import usable_cores
from deltaw.files.program import run_program
from deltaw.rewards.scored import Asked, Value
from deltaw.rewards.truth import Truths


class Programs:
    def __init__(self, config: TestsReward, truths: Truths) -> None:
        self._seconds, self._truths = config.seconds, truths

    def check(self, row: Row) -> None:
        self._checks(row)

    def score(self, asked: Sequence[Asked]) -> list[Value]:
        programs = [program_of(one.completion, self._checks(Row(one.row, one.origin))) for one in asked]
        with ThreadPoolExecutor(max(1, min(len(programs), usable_cores()))) as pool:
            outcomes = pool.map(lambda program: run_program(program, self._seconds), programs)
            return [Value(float(outcome.passed)) for outcome in outcomes]

    def close(self) -> None:
        """Its processes end with their programs."""

    def _checks(self, row: Row) -> Checks:
        names = self._truths.columns.of(row.value)
        prompt = self._truths.prompt(row)
        known = {name: row.value[column] for name, column in names.items()}
        return checks_of(known, prompt if isinstance(prompt, str) else "")
