"""base_weights: keep: the model is the file's own numbers, whatever their type, and its fingerprint the dense one's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from torch import nn

from deltaw.base.batch import Batch
from deltaw.base.forward import plan_forward
from deltaw.base.frozen import weight_of
from deltaw.base.load import open_base
from deltaw.base.packed import PackedEmbedding, PackedLinear
from deltaw.errors import InputError
from tests.base.gguf_models import KEPT, model_of, write_model

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 32}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped queries whose matrices have every type in turn."""
    return write_model(tmp_path_factory.mktemp("keep") / "mixed.gguf", model_of("llama", **SIZES), types=KEPT)


def packed(model: nn.Module) -> dict[str, PackedLinear | PackedEmbedding]:
    return {path: m for path, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}


def test_every_number_is_the_files(mixed: Path) -> None:
    kept, dense = (open_base(mixed, dtype="float32", weights=weights) for weights in ("keep", "auto"))
    assert kept.fingerprint == dense.fingerprint and kept.kept and not dense.kept
    modules = packed(kept.model)
    assert {module.frozen_weight().form for module in modules.values()} == {*KEPT[:-2], "float16", "bfloat16"}
    assert len(modules) == 2 * 7 + 1 + (not kept.model.config.tie_word_embeddings)
    stored = sorted(
        dequantize(tensor.data, tensor.tensor_type).astype(np.float64).sum() for tensor in GGUFReader(mixed).tensors
    )
    parameters = {path: module.frozen_weight().dense() for path, module in modules.items()}
    parameters |= {name: p for name, p in kept.model.named_parameters() if p.is_floating_point()}
    held = sorted(value.double().sum().item() for value in parameters.values())
    np.testing.assert_allclose(held, stored, rtol=1e-9, atol=1e-9)
    for path, module in modules.items():  # in the model's order of rows, which isn't the file's
        wanted = dense.model.get_submodule(path).weight
        assert torch.equal(module.frozen_weight().dense().bfloat16(), wanted.bfloat16()), path


def test_it_computes_what_the_dense_model_does(mixed: Path) -> None:
    """In bfloat16, to which the converted folder rounds the same numbers."""
    tokens = torch.arange(40) * 7 % 90
    batch = Batch.of(tokens, [0, 9, 40], tokens.roll(-1))
    results = []
    for weights in ("keep", "auto"):
        opened = open_base(mixed, dtype="bfloat16", weights=weights)
        forward = plan_forward(opened.model)
        results.append((forward.describe(), forward.logits(batch), opened.model.training))
    (how, logits, training), (other, wanted, _) = results
    assert how == other and not training
    torch.testing.assert_close(logits, wanted, rtol=0, atol=float(wanted.std()) * 0.02)


def test_shared_tensors_stay_shared(tmp_path: Path) -> None:
    model = model_of("llama", **SIZES, tie_word_embeddings=True)
    opened = open_base(write_model(tmp_path / "tied.gguf", model, types=["Q5_1"]), dtype="float32", weights="keep")
    words, head = opened.model.get_input_embeddings(), opened.model.get_output_embeddings()
    assert words.frozen_weight().parts["low"] is head.frozen_weight().parts["low"]
    assert weight_of(head).rows(torch.tensor([3])).equal(words(torch.tensor([3])))


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen2"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    """Transposed layers, norms that are stored plus one, biases: each is checked by its numbers."""
    sizes = {name: size for name, size in SIZES.items() if name not in ("head_dim", "intermediate_size")}
    sizes |= {"n_inner": 256} if kind == "gpt2" else {"intermediate_size": 256}
    sizes |= {"head_dim": 32} if kind == "gemma2" else {}
    path = write_model(tmp_path / "other.gguf", model_of(kind, **sizes), types=["Q8_0", "Q4_0"])
    kept, dense = (open_base(path, dtype="bfloat16", weights=weights) for weights in ("keep", "auto"))
    assert kept.fingerprint == dense.fingerprint and len(packed(kept.model)) >= 8
    ids = torch.arange(30)[None] * 5 % 90
    with torch.no_grad():
        logits, wanted = (base.model(ids).logits.float() for base in (kept, dense))
    torch.testing.assert_close(logits, wanted, rtol=0, atol=float(wanted.std()) * 0.02)


def test_what_cant_be_kept_is_said_before_weights_are_read(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gguf"):
        open_base(folder, weights="keep")
    strange = write_model(tmp_path / "q2.gguf", model_of("llama", **SIZES), types=["Q4_0", "Q2_K"])
    with pytest.raises(InputError, match="Q2_K"):
        open_base(strange, weights="keep")
