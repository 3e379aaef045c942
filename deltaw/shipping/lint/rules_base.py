"""Which base it goes with, whether it was trained on that one, and who knows the base's architecture."""

from collections.abc import Iterator

from deltaw.base.fingerprint import describe, same_base
from deltaw.base.gguf import llama_cpp_name
from deltaw.base.source import BUILTINS, HUB_ID
from deltaw.shipping.lint.finding import (
    LLAMA_CPP,
    LOADS,
    MLX,
    OLLAMA,
    PEFT,
    REFUSED,
    TRANSFORMERS,
    UNSURE,
    VLLM,
    WRONG,
    Finding,
    code,
    everywhere,
    some,
)
from deltaw.shipping.lint.keys import A
from deltaw.shipping.lint.subject import Subject
from deltaw.show.text import counted

OLLAMAS = {"llama", "mistral", "mixtral", "gemma2"}  # whose adapters its own reader takes: llama.cpp's llama and gemma2
PERMUTED = {"llama", "mistral", "mixtral"}
UNNAMED = code(
    "DW501",
    "it doesn't say which base it belongs to",
    {PEFT: UNSURE, TRANSFORMERS: UNSURE, VLLM: UNSURE, LLAMA_CPP: UNSURE, OLLAMA: UNSURE},
    "write base_model_name_or_path; name the base with --base",
)
NOT_PUBLIC = code(
    "DW502",
    "the base is named by a path or a bare name, which means nothing on another machine",
    dict.fromkeys((PEFT, TRANSFORMERS, VLLM, LLAMA_CPP), LOADS),
    "write the base's hub id into base_model_name_or_path, or ship the base with it",
)
NOT_HERE = code(
    "DW503",
    "the base isn't on this machine: names, sizes, template and stop tokens weren't checked against it",
    dict.fromkeys((PEFT, TRANSFORMERS, VLLM, LLAMA_CPP, OLLAMA), UNSURE),
    "name it with --base",
)
OTHER_BASE = code(
    "DW504",
    "it was trained on weights other than this base's (by fingerprint)",
    everywhere(WRONG),
    "name its own base with --base",
)
REVISION = code(
    "DW505",
    "it was trained on a revision of the base other than the one available here",
    everywhere(UNSURE),
    "load the base at the recorded revision",
)
ARCHITECTURE = code(
    "DW506",
    "llama.cpp isn't known to support the base's architecture",
    dict.fromkeys((LLAMA_CPP, OLLAMA), UNSURE),
    "check whether llama.cpp's convert_hf_to_gguf.py accepts the base",
)
OLLAMA_KIND = code(
    "DW507",
    "Ollama's own reader of adapter folders knows only llama and gemma2",
    {OLLAMA: REFUSED},
    "give Ollama a GGUF",
)
OLLAMA_ROTARY = code(
    "DW508",
    "q_proj and k_proj of the llama family: Ollama's own reader permutes their A, but B is what must be permuted",
    {OLLAMA: WRONG},
    "give Ollama a GGUF",
)
NOT_CAUSAL = code(
    "DW509",
    "the base isn't a causal language model",
    {VLLM: REFUSED, LLAMA_CPP: UNSURE, OLLAMA: REFUSED, MLX: REFUSED},
    "serve it with transformers",
)


def named(s: Subject) -> Iterator[Finding]:
    if not s.config and not s.recorded.name:
        return
    if not s.recorded.name:
        effects = dict(UNNAMED.effects)
        if s.base:
            effects = {TRANSFORMERS: LOADS, LLAMA_CPP: LOADS}
        yield UNNAMED.finding("base_model_name_or_path is missing or empty", effects=effects)
    elif s.recorded.name not in BUILTINS and (not HUB_ID.fullmatch(s.recorded.name) or s.recorded.name[0] in "./~"):
        yield NOT_PUBLIC.finding(f"base_model_name_or_path is {s.recorded.name!r:.100}, not of the form org/name")
    if s.base is None and s.recorded.name:
        yield NOT_HERE.finding(f"{s.no_base}, so nothing was checked against it")


def own(s: Subject) -> Iterator[Finding]:
    if s.base is None:
        return
    trained, present = s.recorded.fingerprint, ""
    if trained:
        s.display.say(f"comparing {s.base.source.name} with the base that it was trained on")
        present = s.base.files.fingerprint
    if trained and present and not same_base(trained, present):
        yield OTHER_BASE.finding(
            f"trained on {s.recorded.name or 'another base'} ({describe(trained)}), but this is {s.base.source.name} "
            f"({describe(present)})"
        )
    revisions = s.recorded.revision, s.base.source.revision
    if not trained and all(revisions) and not str(revisions[1]).startswith(str(revisions[0])):
        yield REVISION.finding(f"trained on revision {revisions[0]:.40}, but this is revision {revisions[1]:.40}")


def architecture(s: Subject) -> Iterator[Finding]:
    if not s.kind or not s.shapes:
        return
    yield from unknown_to_llama_cpp(s.kind)
    gguf = s.export("gguf")
    if s.kind not in OLLAMAS:
        yield OLLAMA_KIND.finding(f"the base is a {s.kind:.40}: `ADAPTER <this folder>` is refused", gguf)
    elif s.kind in PERMUTED:
        last = ("q_proj", "k_proj")
        paths = [path for path in s.layers if path.rpartition(".")[2] in last and A in s.factors[path]]
        if paths:
            words = f"{counted(len(paths), 'module')} ({some(paths)}): `ADAPTER <this folder>` answers wrongly"
            yield OLLAMA_ROTARY.finding(words, gguf)


def unknown_to_llama_cpp(kind: str) -> Iterator[Finding]:
    if llama_cpp_name(kind) is None:
        yield ARCHITECTURE.finding(f"the base is a {kind:.40}, and llama.cpp has no architecture by that name")


def causal(s: Subject) -> Iterator[Finding]:
    if s.base is None and s.config.get("task_type") == "SEQ_2_SEQ_LM":
        yield NOT_CAUSAL.finding("task_type is SEQ_2_SEQ_LM")


RULES = (named, own, architecture, causal)
