"""A GGUF: an adapter as llama.cpp and Ollama load it, or a whole model. Only its header is read.

    <tensor of the base>.lora_a [R, N], .lora_b [M, R]; GGUF says the sides the other way round, the fastest first
    scale of each = adapter.lora.alpha / its own R, or 1 where alpha is 0

Held to the base's own GGUF if that is named with --base, or to the base's architecture. What llama.cpp does was
tried in llama.cpp (tests/shipping/test_lint_gguf.py). Whether the rows of q and k are in llama.cpp's order can't be
told from a file: `deltaw verify` asks for answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.adapter.file import BaseId
from deltaw.base.gguf import llama_cpp_name
from deltaw.base.source import Source, find_base
from deltaw.errors import InputError
from deltaw.files.gguf_header import Header, read_part
from deltaw.files.gguf_parts import parts_of, read_model
from deltaw.files.strict_json import read_json
from deltaw.shipping.lint.base import base_of
from deltaw.shipping.lint.chat import NO_TEMPLATE, Chat, fingerprint
from deltaw.shipping.lint.finding import LLAMA_CPP, OLLAMA, REFUSED, UNSURE, WRONG, Finding, code, some
from deltaw.shipping.lint.forms import other_form
from deltaw.show.progress import Display
from deltaw.show.text import counted

BOTH = (LLAMA_CPP, OLLAMA)
REFUSE, CHANGE, DOUBT = dict.fromkeys(BOTH, REFUSED), dict.fromkeys(BOTH, WRONG), dict.fromkeys(BOTH, UNSURE)
A, B = ".lora_a", ".lora_b"
EXPORT = "let deltaw write it: deltaw export --to gguf"
UNREADABLE = code("DW701", "not a usable GGUF file", REFUSE, "get the file again")
KIND = code("DW702", "a GGUF that is neither a model nor an adapter of type lora", REFUSE, EXPORT)
OTHER_ARCHITECTURE = code("DW703", "an adapter for another architecture than the base's", REFUSE, "name its own base")
STRANGE = code("DW704", "tensors that are neither lora_a nor lora_b", REFUSE, EXPORT)
HALF = code("DW705", "a lora_a without its lora_b, or the other way round", REFUSE, EXPORT)
UNFIT = code("DW706", "tensors that the base lacks, or has in other sizes", REFUSE, "name its own base")
NORMS = code("DW707", "norms, which llama.cpp silently ignores", CHANGE, "export the whole model: --merged")
ALPHA = code(
    "DW708", "adapter.lora.alpha is missing, NaN, or 0 (which llama.cpp takes to mean scale 1)", CHANGE, EXPORT
)
ALPHA_TYPE = code("DW709", "adapter.lora.alpha isn't a float32", REFUSE, EXPORT)
RANKS = code(
    "DW710",
    "several ranks under one alpha: llama.cpp divides it by each tensor's own rank",
    DOUBT,
    "nothing, if that was meant; deltaw's exports pad to one rank",
)
NO_TEMPLATE_KEY = code(
    "DW721", "a model without a chat template: chats are written in ChatML", DOUBT, "write tokenizer.chat_template"
)
OTHER_TEMPLATE = code(
    "DW722",
    "another chat template than the base's",
    DOUBT,
    "nothing, if it was trained under that one; otherwise export again",
)
NO_SPLITTING = code(
    "DW723",
    "a byte-level tokenizer without tokenizer.ggml.pre: text is split by a default rule that fits no particular model",
    CHANGE,
    "write tokenizer.ggml.pre, as llama.cpp's converter does",
)
NO_END = code("DW724", "no end-of-sequence token", CHANGE, "write tokenizer.ggml.eos_token_id")
MAY_BEGIN = code(
    "DW725",
    "a beginning-of-sequence token, without saying whether texts begin with it (add_bos_token)",
    DOUBT,
    "write tokenizer.ggml.add_bos_token",
)


@dataclass(frozen=True)
class GgufFile:
    """`base`: the header of the base's GGUF; `architecture`: llama.cpp's name for the base's, "" if unknown."""

    path: Path
    header: Header
    base: Header | None = None
    architecture: str = ""
    source: Source | None = None

    def __getitem__(self, key: str) -> Any:
        return self.header.metadata.get(key)


def look(path: Path, base: str | None, display: Display) -> Iterator[Finding]:
    """All findings about a file. Raises InputError for a --base that isn't one."""
    source = find_base(base, display=display) if base else None
    yield other_form("gguf", "give them the folder in PEFT's layout that it was made from")
    try:
        header = read_part(path)
        bare = any(name.endswith((A, B)) for name in header.shapes)
        kind_of_file = str(header.metadata.get("general.type", "none" if bare else "model"))
        if kind_of_file == "model":
            header = read_model(parts_of(path))
    except InputError as error:
        yield UNREADABLE.finding(error.what.partition(": ")[2] or error.what)
        return
    file = GgufFile(path, header, *_base(source), source)
    if kind_of_file not in RULES:
        yield KIND.finding(f"general.type is {kind_of_file[:40]!r}")
    for rule in RULES.get(kind_of_file, ()):
        yield from rule(file)


def _base(source: Source | None) -> tuple[Header | None, str]:
    if source is None:
        return None, ""
    if source.gguf is not None:
        header = read_model(parts_of(source.gguf))
        return header, str(header.metadata.get("general.architecture", ""))
    return None, llama_cpp_name(str(read_json(source.directory / "config.json", allow_nan=True)["model_type"])) or ""


def kind(f: GgufFile) -> Iterator[Finding]:
    if f["adapter.type"] != "lora":
        yield KIND.finding(f"adapter.type is {str(f['adapter.type'])[:40]!r}, but llama.cpp needs 'lora'")


def architecture(f: GgufFile) -> Iterator[Finding]:
    own = str(f["general.architecture"] or "")
    if f.architecture and own != f.architecture:
        yield OTHER_ARCHITECTURE.finding(f"it is for {own[:40] or 'none'}, but the base is {f.architecture}")


def tensors(f: GgufFile) -> Iterator[Finding]:
    names = list(f.header.shapes)
    if norms := [name for name in names if name.endswith("_norm.weight")]:
        yield NORMS.finding(f"{counted(len(norms), 'norm')}: {some(norms)}")
    if odd := [name for name in names if not name.endswith((A, B, "_norm.weight"))]:
        yield STRANGE.finding(f"{counted(len(odd), 'tensor')}: {some(odd)}")
    stems = {name.removesuffix(A).removesuffix(B) for name in names if name.endswith((A, B))}
    if single := sorted(stem for stem in stems if (stem + A in f.header.shapes) != (stem + B in f.header.shapes)):
        yield HALF.finding(f"{counted(len(single), 'tensor')}: {some(single)}")
    yield from _sizes(f, sorted(stems.difference(single)))


def _sizes(f: GgufFile, stems: list[str]) -> Iterator[Finding]:
    """Checks sizes by llama.cpp's rule; an embedding's A is the other way round."""
    wrong = []
    for stem in stems:
        a, b = ([*f.header.shapes[stem + part], 1][:2] for part in (A, B))
        own = f.base.shapes.get(stem) if f.base else None
        embedding = stem == "token_embd.weight"
        if not embedding and a[1] != b[0]:
            wrong.append(f"{stem}: lora_a {a} and lora_b {b} have no rank in common")
        elif f.base and own is None:
            wrong.append(f"{stem}: the base lacks it")
        elif own and (own[0], own[1]) != ((b[1], a[1]) if embedding else (a[0], b[1])):
            wrong.append(f"{stem}: lora_a {a} and lora_b {b}, but the base's is {list(own)}")
    if wrong:
        yield UNFIT.finding(f"{len(wrong)} of {len(stems)} tensors: {some(wrong)}")
    ranks = sorted({f.header.shapes[stem + B][0] for stem in stems})
    if len(ranks) > 1:
        yield RANKS.finding(f"ranks {', '.join(map(str, ranks[:8]))} under one alpha")


def alpha(f: GgufFile) -> Iterator[Finding]:
    value = f["adapter.lora.alpha"]
    if value is None or value == 0 or value != value:
        yield ALPHA.finding(f"adapter.lora.alpha is {'missing' if value is None else value}")
    elif type(value) is not float:
        yield ALPHA_TYPE.finding(f"adapter.lora.alpha is {str(value)[:40]!r}, a {type(value).__name__}")


def template(f: GgufFile) -> Iterator[Finding]:
    own = f["tokenizer.chat_template"]
    if not isinstance(own, str) or not own:
        yield NO_TEMPLATE_KEY.finding("the file has no tokenizer.chat_template")
    if f.source is not None:
        bases = Chat(f.path.parent, BaseId(), base_of(f.source)).bases
        if bases not in ("", NO_TEMPLATE) and bases != (fingerprint(own) if isinstance(own, str) else ""):
            yield OTHER_TEMPLATE.finding(f"{f.source.name} has another chat template than the file")


def tokenizer(f: GgufFile) -> Iterator[Finding]:
    if f["tokenizer.ggml.model"] == "gpt2" and not f["tokenizer.ggml.pre"]:
        yield NO_SPLITTING.finding("the file has no tokenizer.ggml.pre")
    if f["tokenizer.ggml.eos_token_id"] is None:
        yield NO_END.finding("the file has no tokenizer.ggml.eos_token_id")
    if f["tokenizer.ggml.bos_token_id"] is not None and f["tokenizer.ggml.add_bos_token"] is None:
        yield MAY_BEGIN.finding("the file has a bos_token_id but no add_bos_token: defaults differ")


RULES = {"adapter": (kind, architecture, tensors, alpha), "model": (architecture, template, tokenizer)}
