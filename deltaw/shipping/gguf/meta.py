"""From a transformers config to the GGUF metadata that means the same: base/gguf_meaning.py in reverse.

The rule is the reader's in reverse: there every key must find a field, here every field that counts must find a key.
The fingerprint decides what counts (base/fingerprint.py), each field is handed out once (`Fields`), and any left over
is refused by name, before anything is written. So a setting that is invented tomorrow is refused tomorrow.

    key          the field's number, under the architecture's name
    by tensors   biases of a llama: the file says them by having them
    implied      what llama.cpp does for this architecture whatever the file says: the activation, Gemma's scale of
                 queries, its caps. The config must say the same, or it is refused

If llama.cpp ignores what the file says (a window in a llama or in Phi-3), the key is written all the same, since others
read it, and the user is told.

One property guards it all: what is written, then read by base/gguf_meaning.py and written again, is the same
(`check_read_back`, on every file, before it gets its name).
"""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

from deltaw.base.gguf_meaning import GEMMA, PARTIAL, read_meaning
from deltaw.errors import InputError, RunError, listed
from deltaw.files.gguf_parts import read_model
from deltaw.shipping.gguf.fields import Fields
from deltaw.shipping.gguf.names import TYPES
from deltaw.shipping.gguf.rotary import rotary

MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # one function, by three names
BIASED = {"llama": ("attention_bias", "mlp_bias")}  # llama.cpp looks for these tensors
SQUARE = ("qwen2", "phi3")  # llama.cpp takes their heads together to be as wide as the model


class Meta(NamedTuple):
    """`keys` without the architecture's prefix: numbers, texts and flags (an int is an unsigned one); `tensors`: those
    that are settings, not weights; `notes`: where llama.cpp does something other than the file says."""

    keys: dict[str, Any]
    tensors: dict[str, list[float]]
    notes: list[str]


def metadata(config: Any, rows: int) -> Meta:
    """The keys and tensors for a model with this config whose embedding has `rows` rows. Raises InputError for what
    can't be said."""
    if config.model_type not in MODELS:
        raise InputError(
            f"a whole model of the type {config.model_type!r} can't be written as GGUF yet",
            fix=f"known: {', '.join(MODELS)}; for others use deltaw merge and llama.cpp's own converter",
        )
    fields, architecture = Fields(config), TYPES[config.model_type]
    if architecture == "gpt2":
        return _gpt2(fields, rows)
    width, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    head_dim = fields.take("head_dim", width // heads)
    keys = {
        "context_length": fields.take("max_position_embeddings"),
        "block_count": fields.take("num_hidden_layers"),
        "embedding_length": width,
        "feed_forward_length": fields.take("intermediate_size"),
        "vocab_size": rows,
        "attention.head_count": heads,
        "attention.head_count_kv": fields.take("num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(fields.take("rms_norm_eps")),
    }
    if architecture in SQUARE and head_dim * heads != width:
        fields.refuse(f"head_dim = {head_dim} ({heads} heads of it aren't {width} wide)")
    for name in BIASED.get(architecture, ()):
        fields.take(name)
    fields.expect("hidden_act", "silu")
    fields.expect("hidden_activation", *GELU_TANH)
    notes = list[str]()
    if architecture in GEMMA:
        keys |= _gemma(fields, architecture, head_dim)
    else:
        keys |= _window(fields, architecture, keys["context_length"])
    turn, tensors = rotary(fields, architecture, head_dim, keys["context_length"], notes)
    if architecture in PARTIAL and turn["rope.dimension_count"] % 2:
        fields.refuse(f"partial_rotary_factor: it rotates {turn['rope.dimension_count']} numbers, an odd count")
    fields.finish()
    return Meta(keys | turn, tensors, notes)


def _gpt2(fields: Fields, rows: int) -> Meta:
    width = fields.take("n_embd")
    keys = {
        "context_length": fields.take("n_positions"),
        "block_count": fields.take("n_layer"),
        "embedding_length": width,
        "feed_forward_length": fields.take("n_inner", 4 * width),
        "vocab_size": rows,
        "attention.head_count": fields.take("n_head"),
        "attention.layer_norm_epsilon": float(fields.take("layer_norm_epsilon")),
    }
    fields.expect("activation_function", *GELU_TANH)
    fields.expect("scale_attn_weights", True)
    fields.finish()
    if not fields.config.scale_attn_weights:
        raise InputError("a gpt2 GGUF can't express scale_attn_weights = False", fix="use another destination")
    return Meta(keys, {}, [])


def _gemma(fields: Fields, architecture: str, head_dim: int) -> dict[str, Any]:
    """Windows, caps and the scale of queries, which llama.cpp knows by the number of layers."""
    layers, heads = fields.take("num_hidden_layers"), fields.take("num_attention_heads")
    implied = fields.take("hidden_size") // heads if layers == GEMMA[architecture] else head_dim
    scalar = fields.take("query_pre_attn_scalar", 0)
    if scalar != implied:
        fields.refuse(f"query_pre_attn_scalar = {scalar} (llama.cpp takes {implied})")
    keys: dict[str, Any] = {}
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = float(fields.take(cap, 0.0))
        if architecture == "gemma2" and not value:
            fields.refuse(f"{cap} = None (llama.cpp's gemma2 always caps)")
        if value:
            keys[cap] = value
    if architecture == "gemma3" and "attn_logit_softcapping" in keys:
        fields.refuse(f"attn_logit_softcapping = {keys['attn_logit_softcapping']} (llama.cpp's gemma3 never does)")
    return keys | _layers(fields, architecture, layers)


def _layers(fields: Fields, architecture: str, layers: int) -> dict[str, Any]:
    """Which layers have a window: one in every so many has none."""
    kinds = fields.take("layer_types") or ["full_attention"] * layers
    window = fields.take("sliding_window", 0)
    usual = 2 if architecture == "gemma2" else 6
    near = [kind == "sliding_attention" for kind in kinds]
    period = next(
        (n for n in (usual, *range(1, max(layers, 6) + 1)) if near == [(at + 1) % n != 0 for at in range(layers)]), 0
    )
    if not period:
        fields.refuse("layer_types: full attention at irregular distances")
    elif not any(near):
        fields.refuse("layer_types: no layer has a window (llama.cpp's Gemma fails without)")
    keys = {"attention.sliding_window": window}
    return keys if period == usual else keys | {"attention.sliding_window_pattern": period}


def _window(fields: Fields, architecture: str, context: int) -> dict[str, Any]:
    """A window over all layers. llama.cpp reads it for Phi-3 and a llama, and attends to everything all the same, which
    `Family.differs` says."""
    window = fields.take("sliding_window", 0)
    kinds = set(fields.take("layer_types") or ())
    if architecture not in ("llama", "phi3"):
        if "sliding_attention" in kinds and window < context:
            fields.refuse(f"sliding_window = {window}")
        return {}
    return {"attention.sliding_window": window} if window else {}


def check_read_back(path: Path, config: Any, written: Meta) -> None:
    """Raise RunError unless deltaw's reader understands the file as what was meant."""
    try:
        meaning = read_meaning(path, read_model([path]))
    except InputError as error:
        raise RunError(f"{path.name} doesn't read back: {error.what}", fix="please report it") from None
    names = type(config).attribute_map
    read = copy.deepcopy(config)
    for name, value in meaning.config.items():
        setattr(read, names.get(name, name), value)
    again = metadata(read, meaning.config["vocab_size"])
    odd = [name for name in {**written.keys, **again.keys} if not _same(written.keys.get(name), again.keys.get(name))]
    odd += [name for name in {**written.tensors, **again.tensors} if not _same_floats(written, again, name)]
    if odd:
        raise RunError(
            f"{path.name}: reads back as another model: {listed(sorted(odd), 1).strip()}", fix="please report it"
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _same_floats(a: Meta, b: Meta, name: str) -> bool:
    pair = a.tensors.get(name, []), b.tensors.get(name, [])
    return len(pair[0]) == len(pair[1]) and all(math.isclose(x, y, rel_tol=1e-4) for x, y in zip(*pair, strict=True))
