"""Where a run's figures go besides the screen: metrics.jsonl, and TensorBoard when it is installed."""

from typing import Any

from deltaw.run import Run


class EventLog:
    """`write` appends one record to metrics.jsonl and its numbers to TensorBoard, where those after `step` go first."""

    def __init__(self, run: Run, step: int = 0) -> None:
        self.run = run
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """`record` has `step` and numbers by name."""
        self.run.append_metrics(record)
        if self._board is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
