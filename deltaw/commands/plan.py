"""`deltaw plan`: a run rehearsed (training/plan.py)."""

from collections.abc import Sequence
from pathlib import Path

from deltaw.config import load_config
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.training.world import World


def plan_named(run: Path, overrides: Sequence[str], *, display: Display) -> Result:
    """What the run will take. Nothing stays of the rehearsal."""
    config = load_config(run, overrides)
    Run(Path(config.output)).check_place()
    if not (world := World.of_environment()).is_alone:
        display.say(
            f"planned as one process, by rank 0: {world.size} share the batches of each step, so that a step takes "
            "less time; each needs as much memory, but for a base that is spread over them (train.shard)"
        )
    from deltaw.training.plan import plan  # torch takes seconds, a wrong run file none

    planned = plan(config, display)
    return Result(planned.to_json(), planned.text())
