"""GGUF: the header walk refuses every lie fast; a good file becomes the same model, once."""

import multiprocessing
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from transformers import AutoTokenizer

from deltaw.base.gguf import to_folder
from deltaw.base.load import Base, fingerprint, open_base
from deltaw.base.source import BUILTINS, builtin_file
from deltaw.errors import InputError, RunError
from deltaw.files.gguf_parts import read_model
from tests.bases import BUILTIN, tiny_llama
from tests.tiny import Said

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_gguf(path: Path) -> Path:
    """The tiny Llama as llama.cpp would write it: rows of q and k permuted, a byte-level vocabulary."""
    model = tiny_llama()
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(48)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(97)
    tokens = [chr(33 + i) for i in range(94)] + ["<s>", "</s>", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 94 + [3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(94)
    writer.add_eos_token_id(95)
    writer.add_chat_template(TEMPLATE)
    names = {"self_attn.": "attn_", "attn_o_proj": "attn_output", "_proj": "", "mlp.": "ffn_"}
    names |= {"model.layers": "blk", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
        if heads:
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(name, weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def build(
    *, magic: bytes = b"GGUF", version: int = 3, keys: Any = (), tensors: Any = (), counts: Any = None, data: int = 64
) -> bytes:
    """A GGUF of raw entries: keys are (name, type, bytes), tensors (name, shape, type, offset)."""
    n_tensors, n_keys = counts or (len(tensors), len(keys) + 1)
    raw = magic + struct.pack("<IQQ", version, n_tensors, n_keys)
    raw += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    for name, kind, value in keys:
        raw += text(name) + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        raw += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        raw += struct.pack("<IQ", kind, offset)
    return raw + bytes(-len(raw) % 32 + data)


GOOD = ("a", (4, 2), 0, 0)
HUGE = 2**63


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + raw


HOSTILE = {
    "empty": b"",
    "short": b"GGUF",
    "magic": build(magic=b"GGML", tensors=[GOOD]),
    "version 1": build(version=1, tensors=[GOOD]),
    "big-endian": build(version=3 << 24, tensors=[GOOD]),
    "huge number of tensors": build(counts=(HUGE, 1)),
    "many tensors": build(counts=(60_000, 1)),
    "huge number of keys": build(counts=(0, HUGE)),
    "many keys": build(counts=(0, 60_000)),
    "text of 2^63": build(keys=[("k", 8, struct.pack("<Q", HUGE))], tensors=[GOOD]),
    "text of 2^64-1": build(keys=[("k", 8, struct.pack("<Q", 2**64 - 1))], tensors=[GOOD]),
    "array of 2^63 texts": build(keys=[("k", 9, array(8, HUGE))], tensors=[GOOD]),
    "array of 2^61 doubles": build(keys=[("k", 9, array(12, 2**61))], tensors=[GOOD]),
    "array of arrays": build(keys=[("k", 9, array(9, 1, array(9, 1)))], tensors=[GOOD]),
    "array of unknown": build(keys=[("k", 9, array(77, 1))], tensors=[GOOD]),
    "key of unknown type": build(keys=[("k", 77, b"")], tensors=[GOOD]),
    "key twice": build(keys=[("k", 4, u32(1)), ("k", 4, u32(1))], tensors=[GOOD]),
    "key without a name": build(keys=[("", 4, u32(1))], tensors=[GOOD]),
    "key no text": build(keys=[(b"\xff\xfe", 4, u32(1))], tensors=[GOOD]),
    "alignment 0": build(keys=[("general.alignment", 4, u32(0))], tensors=[GOOD]),
    "alignment 33": build(keys=[("general.alignment", 4, u32(33))], tensors=[GOOD]),
    "alignment 2^31": build(keys=[("general.alignment", 4, u32(2**31))], tensors=[GOOD]),
    "alignment a text": build(keys=[("general.alignment", 8, text("32"))], tensors=[GOOD]),
    "tensor twice": build(tensors=[GOOD, GOOD]),
    "tensor of 5 sides": build(tensors=[("a", (1,) * 5, 0, 0)]),
    "tensor of no side": build(tensors=[("a", (), 0, 0)]),
    "tensor of size 0": build(tensors=[("a", (0, 4), 0, 0)]),
    "tensor overflows": build(tensors=[("a", (2**32, 2**32), 0, 0)]),
    "tensor of unknown type": build(tensors=[("a", (4,), 999, 0)]),
    "removed type": build(tensors=[("a", (32,), 4, 0)]),
    "no whole blocks": build(tensors=[("a", (31,), 3, 0)]),
    "offset past the end": build(tensors=[("a", (4,), 0, HUGE)]),
    "one element past the end": build(tensors=[("a", (17,), 0, 0)]),
    "misaligned": build(tensors=[("a", (4,), 0, 4)]),
    "overlap": build(tensors=[("a", (4, 3), 0, 0), ("b", (4,), 0, 32)]),
    "no tensors": build(),
    "an adapter": build(keys=[("general.type", 8, text("adapter"))], tensors=[GOOD]),
    "more layers than tensors": build(keys=[("llama.block_count", 4, u32(2**31))], tensors=[GOOD]),
    "wider than its tensors": build(keys=[("llama.embedding_length", 4, u32(2**31))], tensors=[GOOD]),
    "negative width": build(keys=[("llama.embedding_length", 5, struct.pack("<i", -1))], tensors=[GOOD]),
    "width a text": build(keys=[("llama.embedding_length", 8, text("4"))], tensors=[GOOD]),
    "turns more than its tensors": build(keys=[("llama.rope.dimension_count", 4, u32(2**31))], tensors=[GOOD]),
    "experts without a router": build(keys=[("llama.expert_count", 4, u32(2))], tensors=[GOOD]),
    "more words than its numbers": build(
        keys=[("llama.embedding_length", 4, u32(4)), ("llama.vocab_size", 4, u32(4))], tensors=[GOOD]
    ),
    "widths by layer": build(keys=[("llama.feed_forward_length", 9, array(4, 2, u32(4) + u32(9)))], tensors=[GOOD]),
}


def test_the_builder_builds_a_good_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(build(keys=[("k", 7, b"\x01"), ("l", 9, array(4, 1, u32(5)))], tensors=[GOOD]))
    header = read_model([tmp_path / "x.gguf"])
    assert header.metadata == {"general.architecture": "llama", "k": True, "l": (5,)}
    assert header.shapes == {"a": (4, 2)}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_header_is_refused_fast_and_small(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"hostile\.gguf") as caught:
        read_model([path])
    assert time.perf_counter() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert len(str(caught.value).splitlines()) <= 5


def test_mutated_headers_are_read_or_refused(tiny: Path, tmp_path: Path) -> None:
    data, path = tiny.read_bytes(), tmp_path / "mutated.gguf"
    length = len(data) - 4 * sum(weight.numel() for weight in tiny_llama().parameters())
    rng = random.Random(0)
    refused = 0
    start = time.perf_counter()
    for number in range(3_000):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(length)
            changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        if number % 3 == 0:
            del changed[rng.randrange(length) :]
        path.write_bytes(changed)
        try:
            read_model([path])
        except InputError as error:
            refused += 1
            assert "mutated.gguf" in str(error) and len(str(error).splitlines()) <= 5
    assert 1_000 < refused < 3_000
    assert time.perf_counter() - start < 30


def test_conversion_gives_the_same_model(tiny: Path, tmp_path: Path) -> None:
    display = Said()
    folder = to_folder(tiny, tmp_path / "cache", display=display)
    assert len(display.lines) == 1 and "tiny.gguf" in display.lines[0]
    base = open_base(str(folder), dtype="float32")
    assert base.fingerprint == fingerprint(tiny_llama())
    ids = torch.arange(20)[None]
    rounded = tiny_llama()
    rounded.load_state_dict({name: weight.bfloat16().float() for name, weight in rounded.state_dict().items()})
    torch.testing.assert_close(base.model.cpu()(input_ids=ids).logits, rounded(input_ids=ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "</s>"
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {folder.stat().st_mode & 0o666}
    assert not [file for file in (tmp_path / "cache").iterdir() if file.name.endswith(".tmp")]
    # A copy under another name is the same content, so it is the same folder, at once.
    (tmp_path / "copy.gguf").write_bytes(tiny.read_bytes())
    assert to_folder(tmp_path / "copy.gguf", tmp_path / "cache", display=display) == folder
    assert len(display.lines) == 1


def convert(path: Path, cache: Path) -> Path:
    return to_folder(path, cache)


def test_concurrent_conversions_agree(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / ".stale-v1.tmp").mkdir(parents=True)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        folders = pool.starmap(convert, [(tiny, cache)] * 2)
    assert folders[0] == folders[1]
    assert open_base(str(folders[0])).fingerprint == fingerprint(tiny_llama())


def test_what_transformers_cannot_read_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "unknown.gguf"
    path.write_bytes(tiny.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lamma", 1))
    with pytest.raises(InputError, match=r"unknown\.gguf") as caught:
        to_folder(path, tmp_path / "cache")
    assert len(str(caught.value).splitlines()) <= 5
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir() and entry.name != "known"]


def test_an_unusable_cache_is_named(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="DELTAW_CACHE"):
        to_folder(tiny, tmp_path / "file")


@pytest.mark.slow
def test_bfloat16_loses_little_of_the_real_model(builtin: Base) -> None:
    """The number in the module's docstring."""
    worst = 0.0
    reader = GGUFReader(builtin_file(BUILTIN))
    kinds = {tensor.tensor_type for tensor in reader.tensors}
    for tensor in reader.tensors[:60]:
        if tensor.tensor_type == GGMLQuantizationType.Q4_1:
            exact = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
            error = (exact.bfloat16().float() - exact).abs() / exact.abs().clamp_min(1e-30)
            worst = max(worst, error.max().item())
    assert GGMLQuantizationType.Q4_1 in kinds and BUILTINS[BUILTIN].version == "0.1.2"
    assert 0.0015 < worst <= 2**-8
    print(f"worst relative error {worst:.6f}")
