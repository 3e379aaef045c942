"""A run's figures for TensorBoard: event files in the run's folder, `tensorboard --logdir RUN`.

TensorBoard is told after which step a resumed run goes on (`purge_step`) and forgets what it had of later ones.
"""

from collections.abc import Mapping

from deltaw.config import RunConfig
from deltaw.run import Run


class TensorBoard:
    def __init__(self, run: Run, config: RunConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        self._writer.close()
