"""llama.cpp's own ids of many texts under every splitting rule: `python tests/base/gguf_ids.py` writes gguf_ids.json.

Needs the packages xllamacpp (a build of llama.cpp) and gguf, which the tests don't. The vocabulary merges every pair
of the signs in ALPHABET, so that wherever a rule cuts between two of them a merge is missing and the ids tell.
"""

import itertools
import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

FIXTURE = Path(__file__).with_name("gguf_ids.json")
NAMES = [  # one of each rule
    *(
        "gpt-2",
        "smollm",
        "llama-bpe",
        "dbrx",
        "glm4",
        "qwen2",
        "qwen35",
        "tekken",
        "gpt-4o",
        "seed-coder",
        "bailingmoe",
    ),
    *("deepseek-v3", "deepseek-llm", "deepseek-coder", "falcon", "bloom", "viking", "default"),
]
ALPHABET = " \n\t\r12ab A.'s,-/é漢"  # byte-level: é is two signs, 漢 three
REAL = (
    "hello  world",
    "x =\n    1",
    "| 1 |  2 |\n| 3 |  4 |",
    "it's 12,345.67 and WE'LL don't\r\n\r\n  CamelCase iOS",
    "a\u0301 na\u00efve \u4e2d\u6587123\u65e5\u672c\u8a9e",
    "\U0001f600\U0001f600 ok!?...",
    "  tail  \n\n\n ",
    "\u0663\u0664 \u00bd x\u00b2 \u2167",
    "`code`<|x|>~$5+3=8^2",
)


def texts() -> list[str]:
    draw = random.Random(0)
    return [*REAL, *("".join(draw.choices(ALPHABET, k=draw.randint(2, 14))) for _ in range(30))]


def byte_signs() -> list[str]:
    """The sign of each byte in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = (chr(256 + n) for n in itertools.count())
    return [chr(byte) if byte in plain else next(other) for byte in range(256)]


def vocabulary() -> tuple[list[str], list[str]]:
    """(tokens, merges)."""
    signs = byte_signs()
    letters = sorted({signs[byte] for byte in ALPHABET.encode()})
    pairs = [(a, b) for a in letters for b in letters]
    whole = [
        "".join(signs[byte] for byte in word.encode()) for word in ("hello", "Case", "abab")
    ]  # reached by no merge
    return [*signs, *(a + b for a, b in pairs), *whole, "<s>", "</s>"], [f"{a} {b}" for a, b in pairs]


def write_vocabulary(path: Path, pre: str | None) -> Path:
    """A tiny Llama of zeros with this vocabulary."""
    tokens, merges = vocabulary()
    size = len(tokens)
    types = [1] * (size - 2) + [3, 3]
    return _write(path, tokens, model="gpt2", pre=pre, token_types=types, token_merges=merges, ids=(size - 2, size - 1))


def _write(
    path: Path,
    tokens: list[str],
    *,
    model: str,
    pre: str | None,
    ids: tuple[int, int],
    prefix: bool | None = None,
    **lists: Any,
) -> Path:
    writer = GGUFWriter(path, "llama")
    for add, value in (("block_count", 1), ("embedding_length", 32), ("feed_forward_length", 32), ("head_count", 2)):
        getattr(writer, f"add_{add}")(value)
    writer.add_head_count_kv(2)
    writer.add_context_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    writer.add_token_list(tokens)
    for name, values in lists.items():
        getattr(writer, f"add_{name}")(values)
    writer.add_bos_token_id(ids[0])
    writer.add_eos_token_id(ids[1])
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in (shapes | {f"blk.0.{matrix}": (32, 32) for matrix in matrices}).items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sentences(path: Path, prefix: bool | None) -> Path:
    """The same with a SentencePiece vocabulary: bytes, and pairs of signs scored in no particular order."""
    letters = ["▁", *(sign for sign in ALPHABET if sign not in " \n\t\r"), "h", "e", "l", "o"]
    words = [*letters, *(a + b for a in letters for b in letters), "▁▁▁", "hell", "▁hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(words)]
    draw = random.Random(1)
    return _write(
        path,
        tokens,
        model="llama",
        pre="default",
        token_types=[2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        token_scores=[0.0] * 259 + draw.sample([-float(n) for n in range(1, 1 + len(tokens) - 259)], len(tokens) - 259),
        ids=(1, 2),
        prefix=prefix,
    )


def ids_of_llama_cpp(path: Path) -> list[list[int]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.n_parallel, params.n_ctx, params.cpuparams.n_threads = str(path), 0, 1, 64, 1
    server = xllamacpp.Server(params)
    found = []
    for text in texts():
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        found.append(json.load(urllib.request.urlopen(request))["tokens"])
    return found


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = {name: ids_of_llama_cpp(write_vocabulary(Path(folder) / f"{name}.gguf", name)) for name in NAMES}
        for prefix in (True, False):
            path = write_sentences(Path(folder) / f"{prefix}.gguf", prefix)
            found[f"sentences, {prefix}"] = ids_of_llama_cpp(path)
    FIXTURE.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
