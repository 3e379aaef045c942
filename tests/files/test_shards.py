"""The weights of a model folder: every reader takes the same tensors, and a broken folder is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltaw.base.linear_weights import LinearWeights
from deltaw.errors import InputError
from deltaw.files.safetensors import save_safetensors
from deltaw.files.shards import INDEX, read_tensors, shards


def test_shards_and_single_file_hold_the_same(folder: Path, sharded: Path) -> None:
    one, many = dict(read_tensors(folder)), dict(read_tensors(sharded))
    assert len(shards(sharded)) > 1
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_broken_shards_are_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    kept = (sharded / first).read_bytes()
    (sharded / first).unlink()
    with pytest.raises(InputError, match=first):
        shards(sharded)
    (sharded / first).write_bytes(kept[:-1])
    with pytest.raises(InputError, match=first):
        shards(sharded)
    (sharded / first).write_bytes(kept)
    for weight_map in (
        index["weight_map"] | {"more": first},
        index["weight_map"] | {"more": "../x.safetensors"},
        {"more": 3},
        {},
        None,
    ):
        (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=r"more|weight_map"):
            shards(sharded)


def loaded_by_transformers(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).state_dict())


def test_every_reader_takes_the_file_that_transformers_takes(folder: Path, sharded: Path) -> None:
    """A new single file beside old shards, a shard with more than its index names, a file that config.json names."""
    old = dict(read_tensors(sharded))
    new = {name: weight + 1 for name, weight in old.items()}

    def agree(where: Path, expected: dict[str, torch.Tensor]) -> None:
        ours, theirs = dict(read_tensors(where)), loaded_by_transformers(where)
        weights = LinearWeights(where)
        for name, weight in expected.items():
            assert torch.equal(ours[name], weight) and torch.equal(theirs[name], weight), name
        path = "model.layers.0.self_attn.q_proj"
        assert torch.equal(weights[path].dense(), expected[f"{path}.weight"])

    file, twice = sorted(shards(sharded))[-1], "model.layers.0.self_attn.q_proj.weight"
    save_safetensors(load_file(file) | {twice: new[twice]}, file)  # beside the one in an earlier shard
    agree(sharded, old | {twice: new[twice]})
    save_safetensors(new, sharded / "model.safetensors")
    agree(sharded, new)
    save_safetensors(old, sharded / "other.safetensors")
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    agree(sharded, old)
    for odd in ("../other.safetensors", "other.bin", 3):
        (sharded / "config.json").write_text(json.dumps(config | {"transformers_weights": odd}))
        with pytest.raises(InputError, match="transformers_weights"):
            shards(sharded)
