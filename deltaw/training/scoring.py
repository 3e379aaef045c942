"""The rewards of a run, opened on its rows (deltaw/rewards/).

They are opened twice: before the weights are read, so that a reward that doesn't load, or a row that lacks what its
answers are held against, costs nothing; and for as long as the run takes its steps and is measured. Where several
processes train together, the first one alone asks them.
"""

from collections.abc import Sequence

import numpy as np

from deltaw.base.limits import Limits
from deltaw.base.parts import ASKED
from deltaw.config import RunConfig
from deltaw.data.dataset import Dataset
from deltaw.data.examples import parts_of
from deltaw.data.row import Row
from deltaw.errors import InputError
from deltaw.evaluation.own_metric import ASKED_FOR, Consent
from deltaw.rewards.opening import Rewards, rewards_of


def open_rewards(config: RunConfig, dataset: Dataset, consent: Consent = ASKED_FOR) -> Rewards:
    """Raises InputError where one can't be opened, or rows lack what it needs."""
    assert config.objective.reward is not None, "only rewards have some"
    columns = {str(name): column for name, column in config.data.columns.items()}
    return rewards_of(config.objective.reward, rows_of(dataset), columns=columns, consent=consent)


def check_prompts(config: RunConfig, dataset: Dataset, limits: Limits) -> None:
    """Raise InputError where a prompt leaves no room for an answer, or a metric has nothing to compare one with."""
    longest, rows = config.objective.group[2], dataset.rows
    prompts = rows.lengths - rows.supervised
    room = (limits.context or 0) - longest
    if limits.context is not None and (over := np.flatnonzero(prompts + longest > limits.context)).size:
        at = int(over[prompts[over].argmax()])
        raise InputError(
            f"{len(over):,} of {len(rows):,} prompts leave no room for an answer of {longest:,} tokens in the "
            f"{limits.context:,} of this base; the longest has {int(prompts[at]):,}: {rows.origin(at)}",
            fix="set objective.max_new_tokens lower"
            + (f", or data.max_length to {room}, which leaves those out" if room > 16 else ""),
        )
    if config.evaluate.metrics and (parts_of(dataset.eval) == ASKED).any():
        raise InputError(
            "evaluate.metrics compares answers with those of the held-out rows, and there are rows without one",
            fix="leave it out: the reward is measured in any case",
        )


def rows_of(dataset: Dataset) -> Sequence[Row]:
    """All rows that are asked, to train on and held out, as they stood in the data; each once."""
    parts = zip(dataset.questions, (dataset.train.distinct, dataset.eval), strict=True)
    return [questions.row(part.origin(number)) for questions, part in parts for number in range(len(part))]
