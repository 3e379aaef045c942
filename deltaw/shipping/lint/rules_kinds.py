"""What goes beyond a plain LoRA on linear layers, or starts from a moved base, and what destinations make of it.

PEFT reads all of it. vLLM refuses most of it by the config, and any tensor whose name isn't lora_A or lora_B;
llama.cpp's converter stops at such a tensor, but accepts norms, which are then ignored when the model runs.
"""

from collections.abc import Iterator

from deltaw.adapter.peft_config import MOVES_BASE, UNSUPPORTED
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
    Effect,
    Finding,
    code,
    some,
)
from deltaw.shipping.lint.keys import (
    BIAS,
    COPY,
    EMBEDDING_A,
    FULL,
    MAGNITUDE,
    NORM,
    TOKENS,
    A,
    Names,
    named,
)
from deltaw.shipping.lint.subject import Subject
from deltaw.show.text import counted

PLAIN_ONLY = {VLLM: REFUSED, LLAMA_CPP: REFUSED, OLLAMA: REFUSED}  # refuse tensors that they don't know by name
LOADERS = (PEFT, TRANSFORMERS)
MERGE_THERE = "merge it with PEFT (merge_and_unload), which can read it"
MERGE = "merge it into its base: deltaw merge"
DORA = code(
    "DW321",
    "DoRA: servers refuse it, and transformers' load_adapter drops its magnitudes with only a line in the log",
    {TRANSFORMERS: WRONG, **PLAIN_ONLY},
    "load it with PEFT's PeftModel, or merge it into a model folder",
)
DORA_TORN = code(
    "DW322",
    "use_dora without magnitudes in the file, or magnitudes without use_dora",
    {PEFT: WRONG, TRANSFORMERS: WRONG, **PLAIN_ONLY},
    "set use_dora as it was trained, or get the complete file",
)
LORA_BIAS = code("DW323", "a bias on B (lora_bias)", PLAIN_ONLY, MERGE_THERE)
BIAS_TORN = code(
    "DW324",
    "biases of B in the file without lora_bias in the config: PEFT ignores them",
    {PEFT: WRONG, TRANSFORMERS: WRONG, **PLAIN_ONLY},
    "write lora_bias: true",
)
TRAINED_BIAS = code("DW325", "trained biases of the base (bias)", {VLLM: REFUSED}, MERGE_THERE)
SAVED = code("DW326", "whole trained tensors (modules_to_save: a head, an embedding)", PLAIN_ONLY, MERGE)
SAVED_MISSING = code(
    "DW327",
    "modules_to_save names modules that the file doesn't hold",
    {PEFT: REFUSED, TRANSFORMERS: WRONG, VLLM: REFUSED},
    "get the complete file",
)
UNLISTED = code(
    "DW328",
    "whole tensors that modules_to_save doesn't name: PEFT overwrites the base's own with them",
    PLAIN_ONLY,
    "name them in modules_to_save",
)
EMBEDDING = code(
    "DW329",
    "LoRA on an embedding",
    {VLLM: LOADS, LLAMA_CPP: LOADS, OLLAMA: REFUSED},
    "merge it into its base for Ollama: deltaw merge",
)
COPIED = code(
    "DW330",
    "a copy of a base layer's weight beside its LoRA, which servers ignore",
    {VLLM: UNSURE, LLAMA_CPP: UNSURE, OLLAMA: REFUSED},
    "if the embedding was resized or trained, merge it with PEFT; otherwise remove the copy",
)
TRAINED_TOKENS = code("DW331", "trained token embeddings (trainable_token_indices)", PLAIN_ONLY, MERGE)
NORMS = code(
    "DW332",
    "trained norms, which llama.cpp silently ignores",
    {VLLM: REFUSED, LLAMA_CPP: WRONG, OLLAMA: REFUSED},
    MERGE_THERE,
)
EXPERTS = code(
    "DW333",
    "LoRA on experts that are stored as one parameter (target_parameters): PEFT reads it from 0.17 on",
    {VLLM: UNSURE, LLAMA_CPP: UNSURE, OLLAMA: REFUSED},
    MERGE_THERE,
)
BY_WEIGHT = code(
    "DW334",
    "layers that are named by their weights (target_parameters): PEFT before 0.17 ignores them",
    {PEFT: LOADS, TRANSFORMERS: LOADS},
    "use PEFT 0.17 or newer",
)
START = code(
    "DW335",
    "an initialisation that moves the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), saved unconverted: the factors "
    "belong to a base that nobody else has; PEFT recomputes it, correctly for PiSSA and OLoRA on the same weights",
    {PEFT: WRONG, TRANSFORMERS: WRONG, VLLM: REFUSED, LLAMA_CPP: WRONG, OLLAMA: WRONG},
    "save it with PEFT's path_initial_model_for_weight_conversion; if it was, write init_lora_weights: true",
)
START_UNKNOWN = code(
    "DW336",
    "an init_lora_weights that PEFT or vLLM doesn't know",
    {PEFT: REFUSED, TRANSFORMERS: REFUSED, VLLM: REFUSED},
    "write init_lora_weights: true",
)
ACTIVATED = code("DW337", "activated LoRA (aLoRA)", {VLLM: REFUSED, OLLAMA: WRONG}, "serve it with PEFT or llama.cpp")
VARIANT = code(
    "DW338",
    "a variant of LoRA that servers refuse, or that only its own trainer reads (QALoRA, BD-LoRA, replicated layers …)",
    {PEFT: UNSURE, TRANSFORMERS: UNSURE, VLLM: REFUSED, LLAMA_CPP: UNSURE, OLLAMA: UNSURE},
    MERGE_THERE,
)
TIED = code(
    "DW339",
    "an update of only the embedding or only the head, on a base where the two share one matrix",
    {PEFT: LOADS, TRANSFORMERS: LOADS, VLLM: UNSURE, LLAMA_CPP: REFUSED, OLLAMA: REFUSED},
    "merge it into its base, which unties them: deltaw merge",
)
ADDED = code(
    "DW340",
    "trained tokens that the base doesn't have: PEFT loads them once the base has as many rows",
    {PEFT: REFUSED, TRANSFORMERS: REFUSED, **PLAIN_ONLY},
    "first model.resize_token_embeddings(len(tokenizer)), with the tokenizer beside the adapter; or merge it",
)
# init_lora_weights that only choose the factors' first values
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
REMADE = ("pissa", "olora")  # that PEFT recomputes from the base's weights alone
READ_BY_VLLM = ("arrow_config", "kasa_config", "monteclora_config", "velora_config", "megatron_config")  # not refused
VARIANTS = {name: UNSUPPORTED[name] for name in ("layer_replication", "use_qalora", "use_bdlora", *READ_BY_VLLM)}


def dora(s: Subject) -> Iterator[Finding]:
    on = bool(s.get("use_dora"))
    magnitudes = named(s.keys, MAGNITUDE)
    if on and magnitudes:
        yield DORA.finding(f"it is DoRA, with {len(magnitudes)} magnitudes", s.merge())
    elif on and s.layers:
        yield DORA_TORN.finding("use_dora is on, but the file holds no magnitudes")
    elif magnitudes:
        yield DORA_TORN.finding(f"the file holds {len(magnitudes)} magnitudes, but use_dora is off: {some(magnitudes)}")


def biases(s: Subject) -> Iterator[Finding]:
    names = named(s.keys, BIAS)
    if names and s.get("lora_bias"):
        yield LORA_BIAS.finding(f"{counted(len(names), 'bias', 'biases')}: {some(names)}")
    elif names:
        yield BIAS_TORN.finding(f"{counted(len(names), 'bias', 'biases')}: {some(names)}")
    if s.get("bias", "none") != "none":
        yield TRAINED_BIAS.finding(f"bias is {s.get('bias')!r:.40}")


def whole_tensors(s: Subject) -> Iterator[Finding]:
    listed = Names(s.texts("modules_to_save"))
    tensors = [key for key in s.keys if key.part == FULL]
    saved = [key for key in tensors if listed.of(key.path) is not None]
    present = {listed.of(key.path) for key in s.keys}
    if saved:
        last = {key.path.rpartition(".")[2] for key in saved}
        effects = {**PLAIN_ONLY, VLLM: LOADS if last <= {"classifier", "score"} else REFUSED}
        yield SAVED.finding(
            f"{counted(len(saved), 'whole tensor')}: {some([key.name for key in saved])}", s.merge(), effects
        )
    if (gone := sorted(listed.all.difference(present))) and s.shapes:
        yield SAVED_MISSING.finding(f"modules_to_save names {some(gone)}, missing from the file")
    if unlisted := [key for key in tensors if listed.of(key.path) is None]:
        yield from _unlisted(s, [key.path for key in unlisted], [key.name for key in unlisted])


def _unlisted(s: Subject, paths: list[str], names: list[str]) -> Iterator[Finding]:
    effects: dict[str, Effect] = dict(PLAIN_ONLY)
    words = f"{counted(len(names), 'whole tensor')} that modules_to_save doesn't name: {some(names)}"
    if s.base and (strays := [path for path in paths if f"{path}.weight" not in s.base.parameters]):
        effects |= dict.fromkeys(LOADERS, WRONG)
        words += f"; the base has no {some(strays)}"
    elif s.base and s.base.tied and len({s.base.head, s.base.embedding} & set(paths)) == 1:
        effects |= dict.fromkeys(LOADERS, WRONG)
        words += "; in this base the embedding and the head share one matrix, so both are overwritten"
    yield UNLISTED.finding(words, effects=effects)


def embeddings(s: Subject) -> Iterator[Finding]:
    if names := named(s.keys, EMBEDDING_A):
        yield EMBEDDING.finding(f"LoRA on {some(names)}", s.merge())
    if names := named(s.keys, COPY):
        yield COPIED.finding(f"{some(names)}: vLLM and llama.cpp silently ignore it")
    if names := named(s.keys, TOKENS):
        yield TRAINED_TOKENS.finding(f"{some(names)}", s.merge())
        yield from _added(s)


def _added(s: Subject) -> Iterator[Finding]:
    """Trained tokens beyond the base's last row."""
    given = s.get("trainable_token_indices", [])
    lists = given.values() if isinstance(given, dict) else [given]
    rows = [row for some_rows in lists if isinstance(some_rows, list) for row in some_rows if type(row) is int]
    own = s.base.embeddings.get(s.base.embedding) if s.base else None
    if own and rows and max(rows) >= own[0]:
        words = f"row {max(rows)} of {own[0]} in {s.base.source.name}" if s.base else ""
        yield ADDED.finding(f"trained tokens that the base doesn't have: {words}")


def norms(s: Subject) -> Iterator[Finding]:
    if names := named(s.keys, NORM):
        yield NORMS.finding(f"{counted(len(names), 'norm')}: {some(names)}")


def parameters(s: Subject) -> Iterator[Finding]:
    if names := [key.name for key in s.keys if key.expert and key.part == A]:
        yield EXPERTS.finding(f"{len(names)} expert parameters: {some(names)}", s.merge())
    elif entries := s.texts("target_parameters"):
        yield BY_WEIGHT.finding(f"target_parameters names {some(entries)}")


def start(s: Subject) -> Iterator[Finding]:
    given = s.config.get("init_lora_weights", True)
    if not isinstance(given, str):
        return
    name = given.lower()
    if name.startswith(MOVES_BASE):
        effects = dict(START.effects)
        if name == "lora_ga":  # vLLM doesn't look at it
            effects[VLLM] = WRONG
        elif name.startswith("corda"):  # PEFT needs what it was computed from
            effects |= dict.fromkeys(LOADERS, REFUSED)
        words = f"init_lora_weights is {given!r:.40}"
        if name.startswith(REMADE):
            effects |= dict.fromkeys(LOADERS, UNSURE)
            words += ": PEFT moves the base again on loading, which is right unless it was converted when it was saved"
        yield START.finding(words, effects=effects)
    elif name not in STARTS:
        yield START_UNKNOWN.finding(f"init_lora_weights is {given!r:.40}")


def variants(s: Subject) -> Iterator[Finding]:
    if s.get("alora_invocation_tokens"):
        yield ACTIVATED.finding("it is meant to act only from its invocation tokens on")
    for field, words in VARIANTS.items():
        if s.get(field):
            effects = {**VARIANT.effects, **({VLLM: UNSURE} if field in READ_BY_VLLM else {})}
            yield VARIANT.finding(f"{field}: {words}", effects=effects)


def tied(s: Subject) -> Iterator[Finding]:
    if s.base is None or not s.base.tied:
        return
    ends = {s.base.head: "head", s.base.embedding: "embedding"}
    updated = {key.path for key in s.keys if key.path in ends and key.part != TOKENS}  # their rows stay tied
    if len(updated) == 1:
        (path,) = updated
        head = path == s.base.head
        effects = {**TIED.effects, LLAMA_CPP: REFUSED if head else UNSURE}
        yield TIED.finding(
            f"{path} is updated, but in {s.base.source.name} the head and the embedding share one matrix",
            s.merge(),
            effects,
        )


RULES = (dora, biases, whole_tensors, embeddings, norms, parameters, start, variants, tied)
