"""A GGUF in llama.cpp itself: the real thing, through the optional package xllamacpp.

It runs as a server in a child process (llama_server.py), on a port of its own and behind a key of its own, so that this
side is `Server` (server.py) asked about a machine of ours. Nothing of it outlives `close`, nor this process.

    weights        the type that most of the file's numbers have; where the other side's base is this very GGUF,
                   compare.py says that they are the same numbers
    activations    what llama.cpp's CPU kernels turn a layer's input into: 8-bit blocks for quantised weights, the
                   weight's own type for F16 and BF16. Keys and values, F16 in other servers, stay as they are
"""

import contextlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaw.errors import InputError, listed
from deltaw.files.client import Client
from deltaw.files.forked import usable_cores
from deltaw.files.gguf_header import Header, read_part
from deltaw.shipping.verify.sides.side import Numbers

INSTALL = "pip install xllamacpp"
SCRIPT = Path(__file__).with_name("llama_server.py")
CONTEXT = 4096  # at most: its cache is allocated at once
START = 600.0  # seconds to load a model


class LlamaCpp:
    """A running llama.cpp on a GGUF and its adapters. Raises InputError: no xllamacpp, a file that it refuses."""

    def __init__(self, model: Path, adapters: Sequence[Path] = (), *, threads: int | None = None) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise InputError(f"{model}: asking llama.cpp needs a package that isn't installed", fix=INSTALL)
        header = read_part(model)
        for adapter in adapters:
            read_part(adapter)
        self.model, self.numbers = model, numbers_of(header)
        self.context = min(_context(header), CONTEXT)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process is)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for us
        )
        key = secrets.token_hex(16)
        asked = {
            "model": str(model.resolve()),
            "adapters": [str(adapter.resolve()) for adapter in adapters],
            "context": self.context,
            "threads": threads or free_cores(),
            "key": key,
        }
        try:
            self.client = Client(self._address(asked, [model, *adapters]), key=key)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def why(self) -> str:
        """What llama.cpp wrote to its log, the last errors of it."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        told = [line.split(" E ", 1)[1].strip() for line in lines if " E " in line]
        told = told or [line for line in lines if "GGML_ASSERT" in line or "Error" in line] or lines[-2:]
        return listed([line[:200] for line in dict.fromkeys(told)][:2]) or "  (it says nothing)"

    def _address(self, asked: dict[str, Any], files: Sequence[Path]) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        os.set_blocking(self._process.stdout.fileno(), False)
        until, line = time.monotonic() + START, b""
        while not line.endswith(b"\n") and time.monotonic() < until:
            line += self._process.stdout.read() or b""
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        if not line.endswith(b"\n"):
            which = " + ".join(file.name for file in files)
            raise InputError(f"{which}: llama.cpp doesn't take it:\n{self.why()}", fix="write it again, or fix it")
        return line.decode().strip()


def numbers_of(header: Header) -> Numbers:
    """What a GGUF's numbers are, and what llama.cpp makes of a layer's input for them."""
    from gguf.constants import GGMLQuantizationType

    counts: Counter[str] = Counter()
    for name, place in header.places.items():
        if len(header.shapes[name]) > 1:
            counts[GGMLQuantizationType(place.kind).name] += place.size
    weights = counts.most_common(1)[0][0] if counts else "F32"
    return numbers_of_type(weights, f"most of the GGUF is {weights}")


def numbers_of_type(weights: str, why: str, *, cache: str = "float32") -> Numbers:
    """The same from the type's name ("Q8_0", "Q4_K - Medium"). `cache`: what keys and values are kept as."""
    weights = weights.split(" ")[0].upper()
    stored = () if cache == "float32" else (cache,)
    if weights in ("F32", "F16", "BF16"):
        name = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[weights]
        return Numbers(name, (name, *stored), why)
    return Numbers(weights, ("Q8_0", *stored), f"{why}; llama.cpp rounds what meets such weights to 8 bits")


def free_cores() -> int:
    """How many cores nobody is busy on, one at least: threads beyond that make llama.cpp ten times slower."""
    cores = usable_cores()
    with contextlib.suppress(OSError):
        cores -= round(os.getloadavg()[0])
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(limit)) if limit.isdigit() else cores)


def _context(header: Header) -> int:
    architecture = header.metadata.get("general.architecture")
    trained = header.metadata.get(f"{architecture}.context_length")
    return trained if isinstance(trained, int) and trained > 0 else CONTEXT
