"""`deltaw export`: a run or an adapter -> a folder for the place where it will run, with its card, and to the hub.

    refused       options that make no sense together, a hub that wouldn't take it, all that the destination can't hold
    written       into a folder that is whole under its name or not there (target.py)
    pushed        when the folder is whole

The destinations are named here and imported when they are asked for.
"""

import importlib
from os import fspath
from pathlib import Path
from typing import Any

from deltaw.errors import InputError, listed
from deltaw.shipping.card import REPORT, Form, Relation, write_card
from deltaw.shipping.destination import Destination, Options, Written
from deltaw.shipping.push import Push
from deltaw.shipping.target import check_output, target
from deltaw.shipping.trained import open_trained
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.text import counted

MERGED = "merged"  # after the name of a destination that has a form for the whole model
DESTINATIONS = {
    "peft": "deltaw.shipping.peft:PeftAdapter",
    "vllm": "deltaw.shipping.vllm:VllmAdapter",
    "mlx": "deltaw.shipping.mlx:MlxAdapter",
    "gguf": "deltaw.shipping.gguf.adapter:GgufAdapter",
    f"gguf {MERGED}": "deltaw.shipping.gguf.model:GgufModel",
}
NAMES = tuple(dict.fromkeys(name.partition(" ")[0] for name in DESTINATIONS))
LIBRARIES = {"peft": "peft", "vllm": "peft", "mlx": "mlx", "gguf": "gguf"}
AS_IT_IS = Options()
UNROUNDED = ("F32", "F16", "BF16")


def export_named(
    name: str,
    to: str,
    output: str,
    *,
    options: Options = AS_IT_IS,
    base: str | None = None,
    replace: bool = False,
    push: str | None = None,
    public: bool = False,
    display: Display | None = None,
) -> Result:
    """Write it, and push it if that is asked for. Raises InputError before anything is written."""
    display, to = display or Display(quiet=True), to.lower()
    _check_options(to, options, push, public)
    check_output(output, replace)
    hub = Push(push, public=public, replace=replace) if push else None
    if hub:
        hub.check()
    trained = open_trained(name, base=base, display=display)
    destination = _destination(f"{to} {MERGED}" if options.merged else to)(trained, options)
    what = {"kind": "export", "to": to, "merged": options.merged, "base": trained.adapter.base.fingerprint}
    with target(output, what=what, needed=destination.size(), replace=replace, sources=trained.sources) as folder:
        written = destination.write(folder, display)
        write_card(folder, trained, form_of(to, options, written), written.usage)
        files = {
            str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()
        }
    data: dict[str, Any] = {**written.more, "output": output, "to": to, "files": files, "pushed": None}
    lines = [f"{output}: {sum(files.values()):,} bytes, {counted(len(files), 'file')}", *written.lines]
    if hub:
        if REPORT in files:
            display.say(f"{REPORT} goes along, which shows rows of the data")
        data["pushed"] = hub.run(Path(output), display)
        lines.append(f"pushed: {data['pushed']} ({'public' if public else 'private'})")
    return Result(data, "\n".join(lines))


def export(
    name: str | Path,
    *,
    to: str,
    output: str | Path,
    plain: bool = False,
    merged: bool = False,
    type: str | None = None,
    force: bool = False,
    base: str | Path | None = None,
    replace: bool = False,
    push: str | None = None,
    public: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """Write a run or an adapter for another program: `to` is peft, vllm, mlx or gguf. What was written.

    The arguments are those of `deltaw export`. Raises InputError before anything is written where it can't be had.
    """
    options = Options(plain=plain, merged=merged, type=type, force=force)
    result = export_named(
        fspath(name),
        to,
        fspath(output),
        options=options,
        base=fspath(base) if base else None,
        replace=replace,
        push=push,
        public=public,
        display=Display(quiet=quiet),
    )
    return dict(result.data)


def form_of(to: str, options: Options, written: Written) -> Form:
    """What the card says it is."""
    relation: Relation = "adapter"
    if options.merged:
        relation = "finetune" if written.more.get("type") in UNROUNDED else "quantized"
    return Form(relation, LIBRARIES[to], (to,) if to != LIBRARIES[to] else ())


def _check_options(to: str, options: Options, push: str | None, public: bool) -> None:
    if to not in NAMES:
        raise InputError(f"--to {to}: no such destination", fix=f"one of {', '.join(NAMES)}")
    problems = []
    if options.merged and f"{to} {MERGED}" not in DESTINATIONS:
        problems.append(f"--merged: {to} takes adapters; a merged model for transformers is what deltaw merge makes")
    if options.plain and to != "vllm":
        problems.append(f"--plain is for vllm; {to} has one form")
    if not options.merged:
        problems += [f"--{word} goes with --merged" for word in ("type", "force") if getattr(options, word)]
    if public and not push:
        problems.append("--public goes with --push")
    if problems:
        raise InputError(f"these options don't go together:\n{listed(problems)}")


def _destination(name: str) -> type[Destination]:
    module, _, cls = DESTINATIONS[name].partition(":")
    destination: type[Destination] = getattr(importlib.import_module(module), cls)
    return destination
