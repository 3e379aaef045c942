"""A packed base: the dense one's numbers where nothing is rounded, its fingerprint always, read tensor by tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.base.load import open_base, open_skeleton
from deltaw.base.packed import PackedLinear
from deltaw.base.packing import check_packing
from deltaw.base.source import Source
from deltaw.base.streamed import open_plan
from deltaw.config import parse_config
from deltaw.errors import InputError
from deltaw.training.changes import check_changes
from tests.architectures import PACKED, PADDED, tiny
from tests.tiny import Said, tiny_base

IDS = torch.arange(3, 23)[None]
REARRANGED = {"gpt_neox", "qwen3_moe", "gpt_oss"}  # transformers renames or fuses what their files hold


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose rows nf4 takes."""
    return tiny_base(tmp_path_factory.mktemp("wide") / "base", hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_in_16_bits_it_is_the_dense_base(name: str, tmp_path: Path) -> None:
    tiny(name, torch.bfloat16).save_pretrained(tmp_path / "m")
    dense = open_base(tmp_path / "m", dtype="float32", device="cpu")
    said = Said()
    base = open_base(tmp_path / "m", dtype="float32", device="cpu", weights="bfloat16", display=said)
    assert base.fingerprint == dense.fingerprint
    assert not any(tensor.is_meta for tensor in [*base.model.parameters(), *base.model.buffers()])
    for one, other in zip(base.model.buffers(), dense.model.buffers(), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        wanted, logits = (one.model(input_ids=IDS, use_cache=False).logits for one in (dense, base))
    assert torch.equal(logits, wanted)
    assert any("reading" in task for task in said.tasks) == (name not in REARRANGED)
    assert bool(said.lines) == (name in REARRANGED)


@pytest.mark.parametrize("weights", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_it_is_near(wide: Path, weights: Any, dtype: Any) -> None:
    dense = open_base(wide, dtype=dtype, device="cpu")
    base = open_base(wide, dtype=dtype, device="cpu", weights=weights)
    assert (base.fingerprint, base.dtype, base.rounded) == (dense.fingerprint, dense.dtype, weights)
    packed = [path for path, module in base.model.named_modules() if isinstance(module, PackedLinear)]
    assert len(packed) >= 14 and not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    wanted, logits = (one.model(input_ids=IDS, use_cache=False).logits for one in (dense, base))
    assert 0 < (logits - wanted).norm() / wanted.norm() < (0.2 if weights == "nf4" else 0.02)
    assert torch.equal(*(one.model.get_input_embeddings()(IDS).to(torch.bfloat16) for one in (dense, base)))


@pytest.mark.parametrize("sharing", [True, False])
def test_a_tied_head_is_the_embedding(tmp_path: Path, sharing: bool) -> None:
    folder = tiny_base(tmp_path / "b", tie_word_embeddings=sharing)
    model = open_base(folder, dtype="float32", device="cpu", weights="int8").model
    words, head = (end.frozen_weight().parts["numbers"] for end in (model.get_input_embeddings(), model.lm_head))
    assert (words is head) == sharing


def test_faults_of_the_files_are_named_as_of_a_dense_base(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "b")
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    whole = load_file(path)
    nan = whole[name].clone()
    nan[1, 2] = torch.nan
    broken = {
        "NaN": whole | {name: nan},
        "not in the files": {key: value for key, value in whole.items() if key != name},
        "no place for it": whole | {"extra.weight": torch.zeros(3)},
        "can't load it|wrong shape": whole | {name: torch.zeros(3, 3)},
    }
    for message, weights in broken.items():
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(InputError, match=message):
            open_base(folder, device="cpu", weights="int8")
    save_file(whole | {name: whole[name].float() * 1e9}, path, {"format": "pt"})
    with pytest.raises(InputError, match="float16"):
        open_base(folder, dtype="float16", device="cpu", weights="int8")


def test_what_a_shape_cannot_have_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "b")
    (folder / "model.safetensors").unlink()
    skeleton = open_skeleton(Source("b", folder))
    with pytest.raises(InputError, match="64") as caught:
        check_packing("nf4", skeleton)
    assert len(str(caught.value).splitlines()) <= 5
    for weights in ("int8", "bfloat16", "auto"):
        check_packing(weights, skeleton)


def test_what_stays_in_16_bits_is_said(tmp_path: Path) -> None:
    said = Said()
    folder = tiny_base(tmp_path / "b", hidden_size=64, intermediate_size=96)
    model = open_base(folder, dtype="float32", device="cpu", weights="nf4", display=said).model
    assert len(said.lines) == 1 and "down_proj" in said.lines[0]
    kinds = {type(one.frozen_weight()).__name__ for one in model.modules() if isinstance(one, PackedLinear)}
    assert kinds == {"Nf4Weight", "CastWeight"}


def test_a_run_keeps_its_form() -> None:
    nf4, int8 = (
        parse_config({"base": "b", "base_weights": form, "data": {"train": "t"}, "output": "o"})
        for form in ("nf4", "int8")
    )
    with pytest.raises(InputError, match="base_weights: nf4 -> int8"):
        check_changes(nf4, int8, allow=True, run="r")


def test_a_model_that_makes_no_buffers_is_not_streamed(wide: Path) -> None:
    skeleton = open_skeleton(Source("wide", wide))
    skeleton.model.register_buffer("own", torch.ones(2, device="meta"), persistent=False)
    assert open_plan(skeleton, wide) is None
    assert open_plan(open_skeleton(Source("wide", wide)), wide) is not None
