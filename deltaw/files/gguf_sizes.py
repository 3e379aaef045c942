"""The sizes that a GGUF's metadata names, held against its tensors: a model is never built larger than its file."""

import math
from pathlib import Path

from deltaw.errors import InputError
from deltaw.files.gguf_header import Header, unusable

# Sizes in the metadata that would become allocations; none can be larger than the largest tensor's side.
SIZES = (
    "embedding_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_count",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.relative_buckets_count",
    "rope.dimension_count",
    "shortconv.l_cache",
    "ssm.conv_kernel",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.time_step_rank",
)
# Sizes whose product is that of weights in the file (or less), so that many large ones can't stand together.
PRODUCTS = (
    ("embedding_length", "vocab_size"),
    ("block_count", "embedding_length", "feed_forward_length"),
    ("block_count", "embedding_length", "attention.head_count", "attention.key_length"),
    ("block_count", "embedding_length", "attention.head_count", "rope.dimension_count"),
    ("block_count", "embedding_length", "ssm.inner_size"),
)


def check_sizes(path: Path, header: Header) -> None:
    """Raise InputError unless a model built after the metadata is no larger than the tensors."""
    metadata, shapes = header.metadata, header.shapes
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not shapes:
        raise unusable(path, "it holds no model (no architecture or no tensors)")
    if metadata.get("general.type", "model") != "model":
        what = f"{path}: it doesn't hold a model but {str(metadata['general.type'])[:40]!r}"
        raise InputError(what, fix="name the model's own GGUF; an adapter is named by its run or its folder here")
    limits = dict.fromkeys(SIZES, max(max(shape) for shape in shapes.values()))
    limits["block_count"] = len(shapes)
    routers = [shape for name, shape in shapes.items() if name.endswith("ffn_gate_inp.weight")]
    limits["expert_count"] = max((shape[-1] for shape in routers), default=0)
    for key, limit in limits.items():
        value = metadata.get(f"{architecture}.{key}", 0)
        for size in value if isinstance(value, tuple) else (value,):
            if not isinstance(size, int) or not 0 <= size <= limit:
                raise unusable(path, f"{architecture}.{key} = {size!r}, but its tensors are smaller")
    total = sum(map(math.prod, shapes.values()))
    for keys in PRODUCTS:
        sizes = [metadata.get(f"{architecture}.{key}", 0) for key in keys]
        if all(isinstance(size, int) for size in sizes) and math.prod(sizes) > total:
            raise unusable(path, f"{' x '.join(keys)} = {math.prod(sizes):,}, but it holds {total:,} numbers")
