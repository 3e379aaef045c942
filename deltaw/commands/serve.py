"""`deltaw serve`: a base, and the adapters of a folder on it, for whoever speaks OpenAI's API.

What can be wrong is found before the weights are read: the key, the port, the folder. Then the model is opened and
tried, each step is said, and once a request would be answered without a wait, the address is. The server runs until a
signal comes.

A key is needed as soon as other machines can connect (`--host`), unless `--no-key` says that everybody may ask.
"""

import json
import os
import shlex
import socket
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.base.load import as_kept
from deltaw.base.source import find_base
from deltaw.config import BaseWeights
from deltaw.data.opening import open_renderer
from deltaw.errors import InputError, command
from deltaw.linalg.threads import apart
from deltaw.model import Model, open_model
from deltaw.named import Named
from deltaw.serve.adapters import Adapters, check_words
from deltaw.serve.app import build
from deltaw.serve.catalog import Catalog
from deltaw.serve.guard import Access, is_loopback
from deltaw.serve.limits import Limits
from deltaw.serve.listen import Server, address_of, bind, run
from deltaw.serve.worker import Worker
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.text import counted

KEY = "DELTAW_API_KEY"
SHOWN = 12  # names


@dataclass(frozen=True)
class Place:
    """Where it listens and who may ask."""

    host: str
    port: int
    key_file: str | None = None
    no_key: bool = False
    origins: tuple[str, ...] = ()


def serve_named(
    name: str,
    *,
    folder: str | None,
    weights: BaseWeights | None,
    place: Place,
    show: Callable[[Result], None],
    display: Display,
) -> None:
    """Serves until a signal comes. `show` is given what can be asked, and where, once it can be."""
    access = access_of(place, os.environ.get(KEY), display)
    named = Named(name)
    own = _own_adapter(named)
    root = None if folder is None else _folder(folder)
    listening = bind(place.host, place.port)
    try:
        display.say(f"starting: reading {named.base if named.holds_adapter else named.name}")
        model = apart(lambda: _opened(named, weights, display))  # the worker's thread decodes
        served = Adapters(model, root, named=own)
        _check_names(model, served)
        _say_what_is_left_out(served, display)
        worker = Worker(model, served)
        limits = Limits.of(model)
        server = Server(build(worker, access, limits=limits, say=display.say), worker, limits, say=display.say)
        display.say("starting: trying the model, ready in a few seconds")
        worker.start()
        try:
            worker.ready()
            run(server, listening, begun=lambda: show(_result(listening, model, served, access)))
        finally:
            worker.close()
    finally:
        listening.close()


def access_of(place: Place, key: str | None, display: Display) -> Access:
    """Who may ask. Raises InputError for a key that can't be one, or that is missing where other machines can ask."""
    if place.key_file is not None:
        key = _key_in(Path(place.key_file), display)
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise InputError(
            f"the API key must be letters, digits and signs without blanks ({_source(place)})",
            fix="try: openssl rand -hex 24",
        )
    if place.no_key and key is not None:
        raise InputError(f"--no-key, and there is a key ({_source(place)})", fix="leave one of them out")
    local = is_loopback(place.host) or place.host == "localhost"
    if key is None and not local and not place.no_key:
        raise InputError(
            f"other machines can ask at {place.host}, and there is no API key",
            fix=f"set {KEY} or --api-key-file; --no-key lets everybody ask",
        )
    for origin in place.origins:
        if origin != "*" and not origin.startswith(("http://", "https://")):
            raise InputError(f"--allow-origin {origin}: not an origin", fix="write https://example.org, without a path")
    return Access(key, frozenset(origin.rstrip("/") for origin in place.origins), local)


def _source(place: Place) -> str:
    return f"--api-key-file {place.key_file}" if place.key_file else f"in the environment: {KEY}"


def _key_in(file: Path, display: Display) -> str:
    try:
        text = file.read_text(encoding="ascii")
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-key-file {file}: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISREG(mode) and mode & 0o077:
        display.say(f"others on this machine can read {file}: chmod 600 keeps the key to you")
    return text.strip()


def _own_adapter(named: Named) -> dict[str, Path]:
    """The adapter that was named in the base's place, by its name."""
    if not named.holds_adapter:
        return {}
    path = named.path.resolve()
    return {path.parent.name if path.name == "adapter" else path.name: path}


def _opened(named: Named, weights: BaseWeights | None, display: Display) -> Model:
    """The base alone, as its run had it."""
    if not named.holds_adapter:
        return open_model(named, weights=weights, display=display)
    source, config = find_base(named.base, display=display), named.local
    check_words(named.name, named.adapter, open_renderer(source, config, tokens={}))
    weights = weights or (as_kept(source, config.base_weights) if config else None)
    return open_model(named.base, dtype=config.train.dtype if config else None, weights=weights, display=display)


def _folder(folder: str) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"--adapters {folder}: no such folder", fix="name the folder whose subfolders are adapters")
    if Named(folder).holds_adapter:
        raise InputError(
            f"--adapters {folder} is an adapter itself",
            fix=f"name the folder that it lies in, or serve it alone: {command('serve', path)}",
        )
    return path


def _check_names(model: Model, served: Adapters) -> None:
    base = model.base.source.public_name
    if base in served.names():
        raise InputError(f"an adapter is called {base}, and so is the base", fix="rename the adapter's folder")


def _say_what_is_left_out(served: Adapters, display: Display) -> None:
    badly_named, empty = served.left_out()
    if badly_named:
        display.say(f"not served: {_some(map(repr, badly_named))}: a name has only A-Z, a-z, 0-9, '.', '_' and '-'")
    if empty:
        display.say(f"not served: {_some(map(repr, empty))}: no adapter in it")


def _some(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:SHOWN]) + (f", … ({len(first):,} in all)" if first[SHOWN:] else "")


def _result(listening: socket.socket, model: Model, served: Adapters, access: Access) -> Result:
    """What is said once, at the beginning."""
    address, base, names = address_of(listening), model.base.source.public_name, served.names()
    data: dict[str, Any] = {"address": address, "base": base, "adapters": names, "key": access.key is not None}
    lines = [
        f"{base} with {counted(len(names), 'adapter')}{': ' + _some(names) if names else ''}",
        f"address: {address}/v1",
        f"ask:     {_curl(address, Catalog(model, served).entry(names[0] if names else base), access)}",
        f"page:    {address}/" + (" (any name, and the key as the password)" if access.key else ""),
        f"{_who(access)}; Ctrl-C ends it",
    ]
    return Result(data, "\n".join(lines))


def _curl(address: str, entry: Mapping[str, Any], access: Access) -> str:
    """A line that asks a model as it was trained."""
    messages = [{"role": "system", "content": entry["system"]}] if entry["system"] else []
    asked = {"messages": [*messages, {"role": "user", "content": "Hello"}]}
    route, body = ("chat/completions", asked) if entry["asking"] == "chat" else ("completions", {"prompt": "Hello"})
    data = shlex.quote(json.dumps({"model": entry["id"], **body}, ensure_ascii=False))
    key = f' -H "Authorization: Bearer ${KEY}"' if access.key else ""
    return f"curl {address}/v1/{route}{key} -d {data}"


def _who(access: Access) -> str:
    who = "programs on this machine" if access.local else "all machines that reach this one"
    return f"{who} may ask, {'with the key' if access.key else 'without a key'}"
