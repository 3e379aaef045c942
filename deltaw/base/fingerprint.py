"""The fingerprint of a base: of its weights, and of what its config does with them.

    sha256:<64 hex digits>                    of the weights alone: the mark of adapters and runs until decision 10
    sha256:<64 hex digits>+<16 hex digits>    the same, and the mathematics

The first part must not depend on how weights were stored or loaded, so it hashes bfloat16 samples of every parameter
and no names (transformers renames modules between versions). Rejected: the hash of the files (a GGUF, shards and a
single file would differ), and of all the weights (14 GB to read).

The second covers every field that the text config's class declares, except those known to carry no mathematics: a
field that is invented tomorrow counts; a note that some tool left in config.json doesn't. So the same weights with
another rope scaling, window, cap or epsilon are another base. It must not depend either on who wrote the config: a
field that is off (None, false, 0, empty) is as good as absent, numbers are compared as float32 (a GGUF holds 1e-6 as
9.99999997e-07), and a window that no layer has doesn't count. A mark of the old kind and one of the new are compared by
what both have.

This module imports no transformers: a config is handed in as it is.
"""

import hashlib
import inspect
import json
import struct
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

SAMPLES = 1024  # elements of each parameter in the fingerprint
# Fields that change no output in eval mode, or that show in the weights: names, versions, training, generation.
NOTHING = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "intermediate_size",  # this and the next three show in the weights
    "n_ctx",
    "n_inner",
    "n_positions",
    "is_encoder_decoder",
    "label2id",
    "max_length",
    "model_type",  # below
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "quantization_config",
    "reorder_and_upcast_attn",
    "residual_in_fp32",
    "return_dict",
    "router_aux_loss_coef",
    "task_specific_params",
    "tie_word_embeddings",  # shows in the weights
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
    "use_associative_scan",
    "use_cache",
    "use_mambapy",
    "vocab_size",  # shows in the weights
}
NOTHING_PARTS = ("_token_id", "_token_index", "dropout", "_pdrop", "initializer", "summary_")
LAYERS = ("max_window_layers", "use_sliding_window", "sliding_window_pattern", "full_attn_idxs")
UNDECLARED = ("head_dim", "layer_types", "rope_parameters", "sliding_window")  # that models read, declared or not
SAME_MODEL = {"mistral": "llama"}  # without a window


def fingerprint_of(weights: Iterable[Tensor], config: Any = None) -> str:
    """The fingerprint of a set of parameters and the config they stand in, or of the parameters alone."""
    digests = []
    for weight in weights:
        count = weight.numel()
        stride = max(1, -(-count // SAMPLES))
        sample = weight.detach().reshape(-1)[::stride].to("cpu", torch.bfloat16).contiguous()
        digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
        digest.update(sample.view(torch.int16).numpy().astype("<i2").tobytes())
        digests.append(digest.digest())
    print_ = "sha256:" + hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    return print_ if config is None else f"{print_}+{mathematics(config)}"


def same_base(a: str, b: str) -> bool:
    """Whether two fingerprints may be of one base: the weights are equal, and so is the mathematics where both tell."""
    (weights_a, _, rest_a), (weights_b, _, rest_b) = a.partition("+"), b.partition("+")
    return weights_a == weights_b and (not rest_a or not rest_b or rest_a == rest_b)


def describe(fingerprint: str) -> str:
    """Short, for a message: the beginnings of both parts."""
    weights, _, rest = fingerprint.partition("+")
    return f"{weights[:19]}+{rest[:6]}" if rest else weights[:19]


def mathematics(config: Any) -> str:
    """16 hex digits of what a transformers config says about the mathematics."""
    return hashlib.sha256(json.dumps(settings(config), sort_keys=True).encode()).hexdigest()[:16]


def settings(config: Any) -> dict[str, Any]:
    """The fields that count, in the form in which they are compared."""
    text = config.get_text_config(decoder=True)
    known = {*inspect.signature(type(text).__init__).parameters, *UNDECLARED}
    fields = {name: value for name, value in text.to_dict().items() if name in known and not _nothing(name)}
    layers = fields.pop("layer_types", None) or []
    if layers:  # they say what the fields say that they were made of
        for name in LAYERS:
            fields.pop(name, None)
        if not any("sliding" in kind for kind in layers):
            fields.pop("sliding_window", None)
        if set(layers) != {"full_attention"}:
            fields["layer_types"] = layers
    if (heads := getattr(text, "num_attention_heads", 0)) and fields.get("head_dim") == text.hidden_size // heads:
        fields.pop("head_dim")  # what it would be anyway
    window = fields.get("sliding_window")
    fields["model"] = text.model_type if window else SAME_MODEL.get(text.model_type, text.model_type)
    if not _by_length(fields.get("rope_parameters")):
        fields.pop("max_position_embeddings", None)
    return {name: plain for name, value in fields.items() if (plain := _plain(value)) is not None}


def _nothing(name: str) -> bool:
    return name in NOTHING or any(part in name for part in NOTHING_PARTS)


def _by_length(rope: Any) -> bool:
    """Whether rotary positions depend on the length that the model is made for."""
    if not isinstance(rope, dict):
        return False
    parts = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return any(
        part.get("rope_type") in ("dynamic", "longrope") or (part.get("rope_type") == "yarn" and not part.get("factor"))
        for part in parts
    )


def _plain(value: Any) -> Any:
    """As JSON, with numbers as those of float32; None for whatever is off."""
    if isinstance(value, dict):
        return {str(name): plain for name, item in value.items() if (plain := _plain(item)) is not None} or None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value] or None
    if isinstance(value, bool) or value is None:
        return value or None
    if isinstance(value, (int, float)):
        try:
            return repr(struct.unpack("<f", struct.pack("<f", value))[0]) if value else None
        except OverflowError:
            return repr(float(value))
    return str(value) or None
