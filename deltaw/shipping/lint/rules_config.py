"""What the config says about a LoRA's scale and rank, and how each destination reads it.

scale of module i      alpha_i / r_i, or alpha_i / sqrt(r_i) (rsLoRA)
PEFT, vLLM             r_i and alpha_i by rank_pattern and alpha_pattern
llama.cpp, Ollama      their converters copy lora_alpha, one number; the runtime divides it by each tensor's own rank,
                       and takes an alpha of 0 to mean scale 1. So rank_pattern alone comes out right, but rsLoRA and
                       alpha_pattern don't.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from deltaw.adapter.file import CONFIG
from deltaw.adapter.peft_config import IGNORED, READ, UNSUPPORTED
from deltaw.shipping.lint.finding import (
    LLAMA_CPP,
    LOADS,
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
from deltaw.shipping.lint.keys import A, B
from deltaw.shipping.lint.subject import Subject, Undecided, number

KINDS = {  # peft_type of PEFT 0.21
    "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA", "FOURIERFT",
    "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS",
    "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA",
    "P_TUNING", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA",
    "VBLORA", "VERA", "WAVEFT", "XLORA",
}  # fmt: skip
PROMPTS = {
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
}  # transformers reads none of them
SHARED = {"FROD", "PVERA", "TINYLORA", "UNILORA", "VBLORA", "VERA"}  # nor these, whose layers share state
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes
NEEDED = ("r", "lora_alpha", "target_modules")  # by vLLM
CONVERTERS = (LLAMA_CPP, OLLAMA)
LOADERS = (PEFT, TRANSFORMERS)

KIND = code(
    "DW301",
    "peft_type isn't LORA",
    {PEFT: UNSURE, TRANSFORMERS: UNSURE, VLLM: REFUSED, LLAMA_CPP: REFUSED, OLLAMA: REFUSED},
    "merge it with PEFT (merge_and_unload), if that kind of adapter can be merged",
)
RANK = code(
    "DW302",
    "a rank that is 0, negative or not a whole number",
    dict.fromkeys((PEFT, TRANSFORMERS, VLLM), REFUSED),
    "write the tensors' own rank into r",
)
ALPHA = code(
    "DW303",
    "an alpha that is 0, NaN, infinite or not a number",
    {PEFT: WRONG, TRANSFORMERS: WRONG, VLLM: WRONG, LLAMA_CPP: WRONG, OLLAMA: WRONG},
    "write the alpha that it was trained with",
)
ALPHA_INTEGER = code(
    "DW304",
    "lora_alpha isn't written as a whole number, which Ollama's own reader requires",
    {OLLAMA: REFUSED},
    "give Ollama a GGUF",
)
MISSING = code(
    "DW305",
    "r, lora_alpha or target_modules is missing: PEFT has defaults, vLLM and the converters don't",
    {VLLM: REFUSED},
    "write the values that it was trained with",
)
RSLORA = code(
    "DW306",
    "rsLoRA: converters that copy lora_alpha turn alpha / sqrt(r) into alpha / r",
    {LLAMA_CPP: WRONG, OLLAMA: WRONG},
    "let deltaw write the GGUF, with the scale in B",
)
ALPHA_PATTERN = code(
    "DW307",
    "alpha_pattern: converters that copy lora_alpha give all modules the same alpha, and so does older vLLM",
    {VLLM: LOADS, LLAMA_CPP: WRONG, OLLAMA: WRONG},
    "let deltaw write the GGUF; for older vLLM, export with --plain",
)
RANK_PATTERN = code(
    "DW308",
    "rank_pattern: older vLLM computes every module's scale from r",
    {VLLM: LOADS},
    "for older vLLM, export with --plain",
)
MAX_RANK = code(
    "DW309",
    "a rank above vLLM's --max-lora-rank (16 by default; 512 at most)",
    {VLLM: REFUSED},
    "start vLLM with a higher --max-lora-rank",
)
FAN = code(
    "DW310",
    "fan_in_fan_out doesn't match the base (GPT-2 needs true, others false): PEFT corrects it with a warning",
    dict.fromkeys(LOADERS, LOADS),
    "set it to match the base, for tools that don't correct it",
)
UNKNOWN = code(
    "DW311",
    "config fields that deltaw doesn't know: what they do and who reads them can't be told",
    everywhere(UNSURE),
    "look them up in the tool that wrote them",
)
TASK = code(
    "DW312", "a task_type that PEFT doesn't know", dict.fromkeys(LOADERS, REFUSED), "write CAUSAL_LM, or leave it out"
)

SCALE = code(
    "DW313",
    "the config's scale isn't the one that deltaw recorded when it saved the adapter (deltaw.json)",
    {PEFT: WRONG, TRANSFORMERS: WRONG, VLLM: WRONG, LLAMA_CPP: WRONG, OLLAMA: WRONG},
    "copy rank, alpha and use_rslora from deltaw.json into adapter_config.json",
)


def other_kind(config: Mapping[str, Any]) -> bool:
    """Whether it is one of PEFT's adapters that aren't LoRA, whose config and tensors have other names."""
    given = config.get("peft_type")
    return isinstance(given, str) and given in KINDS - {"LORA"}


def kind(s: Subject) -> Iterator[Finding]:
    given = s.config.get("peft_type")
    if given == "LORA" or not s.config:
        return
    known = other_kind(s.config)
    effects = dict(KIND.effects)
    if not known:
        effects |= dict.fromkeys(LOADERS, REFUSED)
    elif given in PROMPTS | SHARED | {"ADAPTION_PROMPT", "SHADOW"}:
        effects[TRANSFORMERS] = REFUSED
    if s.layers and all(key.part in (A, B) for key in s.keys):  # the others go by the tensors' names
        effects |= dict.fromkeys((VLLM, *CONVERTERS), WRONG if known else LOADS)
    words = f"peft_type is {given!r:.60}" + ("; lint checks only LORA" if known else ", which PEFT doesn't know")
    yield KIND.finding(words, effects=effects)


def rank(s: Subject) -> Iterator[Finding]:
    wrong = [f"r = {s.config['r']!r:.40}"] if "r" in s.config and s.default_rank is None else []
    pattern = s.get("rank_pattern", {})
    values = pattern.items() if isinstance(pattern, dict) else ()
    wrong += [f"rank_pattern {key!r:.60}: {value!r:.40}" for key, value in values if not _natural(value)]
    if wrong:
        yield RANK.finding(f"{CONFIG}: {some(wrong)}")


def alpha(s: Subject) -> Iterator[Finding]:
    given = {"lora_alpha": s.config["lora_alpha"]} if "lora_alpha" in s.config else {}
    pattern = s.get("alpha_pattern", {})
    given |= {f"alpha_pattern {key!r:.60}": v for key, v in pattern.items()} if isinstance(pattern, dict) else {}
    numbers = {name: number(value) for name, value in given.items()}
    if refused := [f"{name} = {given[name]!r:.40}" for name, value in numbers.items() if value is None]:
        effects = dict.fromkeys((PEFT, TRANSFORMERS, VLLM, *CONVERTERS), REFUSED)
        yield ALPHA.finding(f"{CONFIG}: not a number: {some(refused)}", effects=effects)
    zero = [name for name, value in numbers.items() if value == 0]
    if zero:
        yield ALPHA.finding(f"{some(zero)} is 0, so the adapter changes nothing; llama.cpp takes 0 to mean scale 1")
    wild = [f"{name} is {value}" for name, value in numbers.items() if value is not None and not math.isfinite(value)]
    if wild:
        yield ALPHA.finding(f"{some(wild)}, and so is every answer")


def alpha_integer(s: Subject) -> Iterator[Finding]:
    given = s.config.get("lora_alpha")
    if isinstance(given, float) or (type(given) is int and not 0 <= given < 2**32):
        yield ALPHA_INTEGER.finding(
            f"lora_alpha is written as {json.dumps(given)}, but Ollama's reader needs a whole number such as 16",
            s.export("gguf"),
        )


def missing(s: Subject) -> Iterator[Finding]:
    gone = [field for field in NEEDED if field not in s.config]
    if not gone or not s.config:
        return
    effects = dict(MISSING.effects)
    if "lora_alpha" in gone:
        effects |= {LLAMA_CPP: REFUSED, OLLAMA: WRONG}
    if "target_modules" in gone and not s.get("target_parameters"):
        effects |= dict.fromkeys(LOADERS, UNSURE)
    yield MISSING.finding(f"{CONFIG} lacks {' and '.join(gone)}", effects=effects)


def rslora(s: Subject) -> Iterator[Finding]:
    if s.get("use_rslora") and any((s.rank(path) or 2) > 1 for path in s.layers):
        yield RSLORA.finding("use_rslora is on, but converters copy lora_alpha as it is", s.export("gguf"))


def patterns(s: Subject) -> Iterator[Finding]:
    for field, which, default in (
        ("rank_pattern", RANK_PATTERN, s.default_rank),
        ("alpha_pattern", ALPHA_PATTERN, s.default_alpha),
    ):
        try:
            own = {path: value for path, value in s.pattern(field).items() if value != default}
        except Undecided:
            continue
        if own:
            fix = s.export("gguf") if which is ALPHA_PATTERN else s.export("vllm", "--plain")
            yield which.finding(f"{field} gives {len(own)} modules values of their own: {some(list(own))}", fix)


def max_rank(s: Subject) -> Iterator[Finding]:
    """The config's largest rank, which is what vLLM goes by."""
    pattern = s.get("rank_pattern", {})
    values = [s.default_rank or 0, *(pattern.values() if isinstance(pattern, dict) else ())]
    most = max((value for value in values if _natural(value)), default=0)
    if most <= s.max_rank:
        return
    enough = next((allowed for allowed in MAX_RANKS if allowed >= most), None)
    fix = f"start vLLM with --max-lora-rank {enough}" if enough else s.merge()
    yield MAX_RANK.finding(f"rank {most} is above --max-lora-rank {s.max_rank}", fix)


def fan(s: Subject) -> Iterator[Finding]:
    given = bool(s.get("fan_in_fan_out", False))
    if s.base and s.layers and given != s.base.transposed:
        yield FAN.finding(f"fan_in_fan_out is {str(given).lower()}, but {s.base.source.name} needs the opposite")


def unknown(s: Subject) -> Iterator[Finding]:
    if s.config.get("peft_type", "LORA") != "LORA":
        return
    names = sorted(name for name in s.config.keys() - UNSUPPORTED.keys() - IGNORED - READ if s.config[name])
    if names:
        yield UNKNOWN.finding(f"{CONFIG} has {some(names, 4)}")


def task(s: Subject) -> Iterator[Finding]:
    given = s.config.get("task_type")
    if given is not None and given not in TASKS:
        yield TASK.finding(f"task_type is {given!r:.60}")


def recorded_scale(s: Subject) -> Iterator[Finding]:
    if s.spec is None or s.spec.full:
        return
    try:
        scales = s.scales()
    except Undecided:
        return
    wrong = [
        f"{path}: {scale:g} instead of {s.spec.scale(path):g}"
        for path, scale in scales.items()
        if not math.isclose(scale, s.spec.scale(path), rel_tol=1e-6)
    ]
    if wrong:
        yield SCALE.finding(f"{len(wrong)} of {len(scales)} modules: {some(wrong)}")


def _natural(value: Any) -> bool:
    return type(value) is int and value > 0


RULES = (kind, rank, alpha, alpha_integer, missing, rslora, patterns, max_rank, fan, unknown, task, recorded_scale)
