"""K types, by llama.cpp's own quantiser: `llama-quantize`, if there is one on the PATH.

A K type is a mixture: which tensor gets how many bits depends on its place in the model, and the search for the scales
of a block of 256 is llama.cpp's art. So a float32 GGUF is written beside (one rounding, not two), given to the
quantiser, and its result is accepted only if it is the same model: every tensor with its shape, every key but
those of the types. It is run without a shell, and its numbers of the finished tensors are the progress.

Rejected: gguf-py (it reads K types, and can't write them), and bindings of llama.cpp as a library: the struct that they
pass changes between versions, and the wrong one crashes or quantises otherwise.
"""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import torch

from deltaw.errors import InputError, RunError, listed
from deltaw.files.gguf_header import Header
from deltaw.files.gguf_parts import read_model
from deltaw.shipping.gguf.types import name_of
from deltaw.show.progress import Display

PROGRAM = "llama-quantize"
DONE = re.compile(rb"\[\s*(\d+)/\s*(\d+)\]")
SUPER = 256  # numbers in a block of the K types
OWN = ("general.file_type", "general.quantization_version")


def find_quantizer(asked: str) -> str:
    """Where llama.cpp's quantiser is. Raises InputError that says how to get it."""
    path = shutil.which(PROGRAM)
    if path is None:
        raise InputError(
            f"--type {asked} is made by llama.cpp's {PROGRAM}, which isn't on the PATH",
            fix="install llama.cpp (brew install llama.cpp, or a release from its page), or take --type Q8_0 or Q5_1",
        )
    return path


def quantize_file(program: str, source: Path, path: Path, asked: str, display: Display) -> Counter[str]:
    """Write `path` from the float file `source`; how many tensors have which type. Raises RunError if it fails."""
    before = read_model([source])
    command = [program, str(source), str(path), asked, str(torch.get_num_threads())]
    tail = b""
    with display.task(f"{PROGRAM} {asked}", len(before.shapes)) as progress:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            for line in process.stdout:
                tail = line.strip() or tail
                if done := DONE.match(line.strip()):
                    progress(int(done[1]))
        progress(len(before.shapes))
    if process.returncode != 0 or not path.is_file():
        reason = tail.decode(errors="replace")[:200]
        raise RunError(f"{program} failed with {process.returncode}: {reason}", fix="take another --type")
    try:
        after = read_model([path])
    except InputError as error:
        raise RunError(f"{program} wrote no usable file: {error.what}", fix="take another --type") from None
    _check_same(program, before, after)
    return _types(after)


def _check_same(program: str, before: Header, after: Header) -> None:
    """Raise RunError unless only the types differ."""
    keys = {**before.metadata, **after.metadata}
    odd = [key for key in keys if key not in OWN and before.metadata.get(key) != after.metadata.get(key)]
    odd = [key for key in odd if not key.startswith("quantize.")]
    names = {**before.shapes, **after.shapes}
    odd += [name for name in names if before.shapes.get(name) != after.shapes.get(name)]
    if odd:
        raise RunError(f"{program} changed more than the types:\n{listed(odd, 2)}", fix="take another --type")


def _types(header: Header) -> Counter[str]:
    return Counter(name_of(place.kind) for place in header.places.values())


def fallbacks(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """What is to be said of tensors whose rows no K type takes."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    odd = [shape for shape in matrices.values() if shape[-1] % SUPER]
    if not odd:
        return None
    rows = ", ".join(str(row) for row in sorted({shape[-1] for shape in odd}))
    return (
        f"{len(odd)} of {len(matrices)} matrices have rows of {rows} numbers, not a multiple of {SUPER}: "
        "llama.cpp gives them Q5_0, Q5_1 or Q8_0 instead, and the file is larger than its type says"
    )
