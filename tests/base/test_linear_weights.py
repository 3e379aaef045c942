"""Weights by module path: what the model has under that path, each read alone; what isn't there is an InputError."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import deltaw.base.linear_weights as module
from deltaw.adapter.targets import linear_paths
from deltaw.base.frozen import FrozenLinear
from deltaw.base.linear_weights import LinearWeights
from deltaw.errors import InputError
from tests.bases import tiny_gpt2

Q = "model.layers.0.self_attn.q_proj"


def stored(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_equals_the_models_own_weights(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    weights = LinearWeights(tmp_path, transposed=model.config.model_type == "gpt2")
    for path in linear_paths(model):
        layer = FrozenLinear(model.get_submodule(path))
        assert weights.shape(path) == (layer.out_features, layer.in_features)
        assert path in weights
        assert (
            torch.equal(weights[path].dense(), layer.weight.dense().detach()) and weights[path].dense().is_contiguous()
        )


def test_a_bare_base_models_file_has_the_whole_models_paths_and_the_other_way_round(tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.base_model.save_pretrained(tmp_path)
    weights = LinearWeights(tmp_path, transposed=True)
    assert "h.0.attn.c_attn" in list(weights)
    truth = model.transformer.h[1].mlp.c_fc.weight.detach().T
    assert torch.equal(weights["transformer.h.1.mlp.c_fc"].dense(), truth)
    assert torch.equal(weights["h.1.mlp.c_fc"].dense(), truth)


def test_the_first_part_may_be_left_out(folder: Path) -> None:
    weights = LinearWeights(folder)
    assert torch.equal(weights[Q.removeprefix("model.")].dense(), weights[Q].dense())
    with pytest.raises(InputError, match=r"no weight of a module 'self_attn.q_proj'"):
        weights["self_attn.q_proj"]


def test_a_path_that_stands_for_two_weights_is_refused(tmp_path: Path) -> None:
    x = torch.ones(2, 3)
    weights = LinearWeights(stored(tmp_path, {"text.up.weight": x, "vision.up.weight": x.clone()}))
    assert "up" not in weights
    with pytest.raises(InputError, match=r"several weights:\n  text.up\n  vision.up"):
        weights["up"]


def test_iteration_gives_matrices_alone(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.ones(2, 3),
        "a.bias": torch.ones(2),
        "norm.weight": torch.ones(3),
        "b": torch.ones(2, 2),
    }
    weights = LinearWeights(stored(tmp_path, tensors))
    assert list(weights) == ["a"] and len(weights) == 1
    assert "norm" not in weights and 7 not in weights
    with pytest.raises(InputError, match=r"norm has shape \(3,\), which isn't a matrix"):
        weights["norm"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_every_floating_type_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 0.5, -2.0]]).to(dtype)
    got = LinearWeights(stored(tmp_path, {"a.weight": x}))["a"].dense()
    assert got.dtype == torch.float32 and got.tolist() == [[1.0, 0.5, -2.0]]


def test_one_tensor_is_read_at_a_time_and_none_to_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(path: Path, name: str) -> Tensor:
        read.append(name)
        return torch.ones(1, 1)

    monkeypatch.setattr(module, "read_tensor", reading)
    weights = LinearWeights(folder)
    assert Q in weights and weights.shape(Q) == (16, 16) and len(list(weights)) == len(weights) == 16 and not read
    weights[Q]
    assert read == [Q + ".weight"]


def test_what_is_read_outlives_its_file(folder: Path) -> None:
    weights = LinearWeights(folder)
    q = weights[Q].dense()
    before = q.clone()
    q.zero_()  # not the file's
    assert torch.equal(weights[Q].dense(), before)
    file = folder / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert not q.any()


def test_a_misspelt_path_names_its_neighbours(folder: Path) -> None:
    weights = LinearWeights(folder)
    for ask in (weights.__getitem__, weights.get, weights.shape):
        with pytest.raises(InputError, match=r"did you mean model.layers.0.self_attn.q_proj or ") as caught:
            ask("model.layers.0.attn.q_proj")
        assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) <= 5
    with pytest.raises(InputError, match="for example:\n  "):
        weights["zzz"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    weights = LinearWeights(stored(tmp_path, {"a.weight": torch.ones(2, 2), "b.weight": torch.tensor([[1.0, bad]])}))
    assert weights["a"].dense().any()
    with pytest.raises(InputError, match=r"b, shape \(1, 2\), holds NaN or infinity"):
        weights["b"]


def test_integers_are_no_weights(tmp_path: Path) -> None:
    weights = LinearWeights(stored(tmp_path, {"a.weight": torch.ones(2, 2, dtype=torch.int8)}))
    with pytest.raises(InputError, match=r"a holds torch.int8"):
        weights["a"]


def test_a_folder_without_weights_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither"):
        LinearWeights(tmp_path)
