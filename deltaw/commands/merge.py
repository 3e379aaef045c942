"""`deltaw merge`: base and adapter -> one model folder that transformers loads.

planned      which tensor changes, is copied, is written on its own (plan.py); said before anything is written
written      piece by piece, the base's files under their own names, into a hidden folder (rewrite.py, target.py)
surveyed     what survives the rounding, from the same pass; said, and refused, before the folder has its name
beside       config, tokenizer, the template and the stop tokens that were trained, the card (folder.py)
read         the folder's headers are held to the model that its config describes: every parameter is there
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deltaw.errors import InputError
from deltaw.linalg.rounding import Survival
from deltaw.shipping.merge import survey
from deltaw.shipping.merge.folder import check_whole, header, needed_bytes, type_name, write_around_weights
from deltaw.shipping.merge.plan import MergePlan, counts, plan_merge
from deltaw.shipping.merge.rewrite import entries, rewrite
from deltaw.shipping.target import check_output, target
from deltaw.shipping.trained import open_trained
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.text import counted

DTYPES = ("bfloat16", "float16", "float32")
MILLION = 1_000_000


def merge_named(
    name: str,
    output: str,
    *,
    dtype: str | None = None,
    base: str | None = None,
    replace: bool = False,
    force: bool = False,
    display: Display | None = None,
) -> Result:
    """Merge a run or an adapter into its base. Raises InputError and RunError; there is then no folder `output`."""
    display = display or Display(quiet=True)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: not a type that a merged model can have", fix=f"one of {', '.join(DTYPES)}")
    number = None if dtype is None else getattr(torch, dtype)
    check_output(output, replace)
    trained = open_trained(name, base=base, display=display)
    plan = plan_merge(trained)
    word = type_name(plan, number)
    for line in [*_planned(plan, word), *([f"warning: {trained.form_note}"] if trained.form_note else [])]:
        display.say(line)
    what = {"kind": "merge", "base": trained.adapter.base.fingerprint, "dtype": word}
    needed = needed_bytes(trained, plan, number)
    with target(output, what=what, needed=needed, replace=replace, sources=trained.sources) as folder:
        began = time.perf_counter()
        survivals = _write_weights(plan, folder, number, display)
        seconds = time.perf_counter() - began
        warning = survey.warning(survivals, word)
        for line in [*survey.said(survivals, word), *([warning] if warning else [])]:
            display.say(line)
        survey.check_floating(survivals, word, force=force)
        write_around_weights(trained, plan, folder, number)
        check_whole(folder, plan)
        files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    data = {
        "output": output,
        "base": trained.base.public_name,
        "dtype": word,
        "seconds": seconds,
        "fates": dict(counts(plan)),
        "tensors": [row for file in plan.by_file for row in _shown(plan, file, number)],
        "trained_on": trained.adapter.base.weights or None,
        "survival": survey.to_json(survivals),
        "warning": warning,
        "files": files,
    }
    return Result(data, f"{output}: a model in {word}, {sum(files.values()):,} bytes, {counted(len(files), 'file')}")


def _write_weights(
    plan: MergePlan, folder: Path, dtype: torch.dtype | None, display: Display
) -> Mapping[str, Survival]:
    total = max(1, sum(file.stat().st_size for file in plan.by_file) // MILLION)
    with display.task("merging, MB", total) as update:
        survivals = rewrite(plan, folder, dtype, progress=lambda done: update(min(done // MILLION, total - 1)))
        update(total)
    return survivals


def _planned(plan: MergePlan, word: str) -> list[str]:
    fates = dict(counts(plan))
    lines = [
        f"plan: {counted(len(plan.tensors), 'tensor')} in {counted(len(plan.by_file), 'file')}, in {word}: "
        f"{fates['changed']} changed, {fates['copied']} copied, {fates['untied']} untied"
    ]
    if plan.unties:
        names = [planned.name for planned in plan.tensors if planned.fate == "untied"]
        lines.append(
            f"the update goes to one of two tied weights, so they are no longer tied: {', '.join(names)} is written"
        )
    return lines


def _shown(plan: MergePlan, file: Path, dtype: torch.dtype | None) -> list[dict[str, Any]]:
    """The plan of a file, one entry per tensor."""
    new = entries(plan, file, header(file), dtype)
    return [
        {
            "name": planned.name,
            "file": file.name,
            "fate": planned.fate,
            "dtype": new[planned.name].dtype,
            "shape": list(planned.shape),
            "module": planned.module,
        }
        for planned in plan.by_file[file]
    ]
