"""A run's figures for Weights & Biases, with the run file as its config.

Project, entity, offline mode and the rest are set as wandb's users set them (`WANDB_PROJECT`, `WANDB_MODE=offline`,
`wandb login`); without a project it is `deltaw`. The id lies in the run's folder beside wandb's own files, so a resumed
run goes on in the same curve. wandb ignores a step that it has had: those that a resumed run takes again are equal.
The screen stays deltaw's (`console`): wandb isn't handed what is printed.
"""

import os
import uuid
from collections.abc import Mapping

from deltaw.config import RunConfig
from deltaw.files.atomic import write_text_atomic
from deltaw.run import Run

PROJECT = "deltaw"


class WeightsAndBiases:
    def __init__(self, run: Run, config: RunConfig, step: int) -> None:
        import wandb

        file = run.folder / "wandb" / "run-id"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            write_text_atomic(file, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or run.folder.absolute().name,
            dir=str(run.folder.absolute()),
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=config.model_dump(mode="json"),
            settings={"console": "off"},
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
