"""From a name on the command line to a side.

    runs/demo, adapter/               base + adapter, as deltaw answers
    merged/, builtin:…, org/name      a model folder, as transformers answers
    peft:adapter/                     base + adapter in PEFT
    mlx:adapter/, mlx:model/          the same in MLX
    model.gguf                        in llama.cpp
    model.gguf+adapter.gguf           with an adapter; builtin:…+adapter.gguf on the builtin's own GGUF
    http://host:port/v1#model         a running server

A name that could be read in several ways means the file or folder, if that exists.
"""

from pathlib import Path

from deltaw.adapter.file import is_adapter, is_run
from deltaw.base.source import BUILTINS, builtin_file
from deltaw.errors import InputError
from deltaw.files.gguf_header import read_part
from deltaw.shipping.verify.sides.adapted import Adapted
from deltaw.shipping.verify.sides.folder import Folder
from deltaw.shipping.verify.sides.llama import LlamaCpp
from deltaw.shipping.verify.sides.mlx import Mlx
from deltaw.shipping.verify.sides.peft import Peft
from deltaw.shipping.verify.sides.server import Server, open_server
from deltaw.shipping.verify.sides.side import Side
from deltaw.show.progress import Display


def open_side(name: str, *, base: str | None = None, display: Display) -> Side:
    """The side that `name` stands for; `base` in place of the one that an adapter names. Raises InputError."""
    path = Path(name).expanduser()
    if name.startswith(("http://", "https://")):
        return open_server(name)
    if name.startswith("peft:"):
        return Peft(name, Path(name.removeprefix("peft:")).expanduser(), base=base, display=display)
    if name.startswith("mlx:"):
        return Mlx(name, Path(name.removeprefix("mlx:")).expanduser(), base=base, display=display)
    if name.endswith(".gguf"):
        return _llama(name, [name] if path.is_file() else name.split("+"), display)
    if is_run(path) or is_adapter(path):
        return Adapted(name, base=base, display=display)
    return Folder(name, display=display)


def goes_on_a_base(name: str) -> bool:
    """Whether it is an adapter, which goes on one base or another."""
    path = Path(name.removeprefix("peft:").removeprefix("mlx:")).expanduser()
    return name.startswith("mlx:") or is_run(path) or is_adapter(path)


def _llama(name: str, parts: list[str], display: Display) -> Server:
    files = [builtin_file(part) if part in BUILTINS else Path(part).expanduser() for part in parts]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file", fix="write model.gguf, or model.gguf+adapter.gguf")
    metadata = [read_part(file).metadata for file in files]
    kinds = [str(one.get("general.type", "model")) for one in metadata]
    if kinds[0] != "model" or "model" in kinds[1:]:
        raise InputError(
            f"{name}: {' + '.join(kinds)}; a model comes first, then its adapters",
            fix="write model.gguf+adapter.gguf",
        )
    display.say(f"starting llama.cpp on {' + '.join(file.name for file in files)}")
    process = LlamaCpp(files[0], files[1:])
    try:
        server = Server(name, process.client, process=process)
        server.chats = bool(metadata[0].get("tokenizer.chat_template"))
        return server
    except BaseException:
        process.close()
        raise
