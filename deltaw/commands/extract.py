"""`deltaw extract`: a LoRA out of full fine-tuning (adapter/extract.py), and what it can't hold."""

from dataclasses import asdict
from pathlib import Path

from deltaw.adapter.extract import extract_adapter, extract_folders
from deltaw.adapter.file import Adapter, is_run
from deltaw.commands.made import Made, saved
from deltaw.errors import InputError
from deltaw.files.lock import new_folder
from deltaw.show.progress import Display
from deltaw.show.result import Result


def extract_named(
    tuned: str, base: str | None, output: str, *, rank: int | None, energy: float | None, display: Display
) -> Result:
    """Out of a run with `adapter: full`, or out of a fine-tuned model's folder and its base."""
    with new_folder(output) as folder:
        if base is None:
            if not is_run(Path(tuned)) and (Path(tuned) / "config.json").is_file():
                raise InputError(f"{tuned} is a model: what changed can't be told without its base", "add --base BASE")
            full = Adapter.load(tuned)
            made = Made(*extract_adapter(full, rank=rank, energy=energy, display=display))
            return saved(made, folder, full, tuned)
        if not Path(tuned).is_dir():
            raise InputError(f"{tuned}: no such folder", fix="name the fine-tuned model's folder")
        adapter, report = extract_folders(Path(tuned), base, rank=rank, energy=energy, display=display)
        missing = report.warning()
        more = {"not_in_adapter": [asdict(change) for change in report.unadapted], "settings": report.config}
        more["rounding"] = report.rounding
        return saved(Made(adapter, report.losses, [missing] if missing else [], more), folder, None)
