"""Patterns: what they mean, what is refused, and that what is saved names exactly the same layers to PEFT."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.patterns import fits, is_literal, problem
from deltaw.adapter.targets import find_targets, in_words, linear_paths
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from tests.architectures import tiny

model = functools.cache(tiny)
PARTS = st.from_regex(r"[a-z]{1,3}(_[a-z]{1,3})?|\d{1,2}", fullmatch=True)


def paths(targets: Any, name: str = "llama", **fields: Any) -> set[str]:
    return set(find_targets(model(name), AdapterSpec(rank=2, targets=targets, **fields)).paths)


def refusal(targets: Any, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        paths(targets, **fields)
    assert len(str(caught.value).splitlines()) <= 5
    return str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "path", "means"),
    [
        ("layers.16-31", "model.layers.16.self_attn.q_proj", True),
        ("layers.16-31", "model.layers.31.mlp.up_proj", True),
        ("layers.16-31", "model.layers.32.mlp.up_proj", False),
        ("layers.16-31", "model.layers.160.mlp.up_proj", False),
        ("layers.16-", "model.layers.160.mlp.up_proj", True),
        ("layers.1", "model.layers.11.mlp.up_proj", False),
        ("layers.0-3.mlp", "model.layers.3.mlp.up_proj", True),
        ("layers.0-3.mlp", "model.layers.3.self_attn.q_proj", False),
        ("layers.0-3.q_proj", "model.layers.3.self_attn.q_proj", True),
        ("layers.0-3", "model.layers.9.mlp.experts.2.w1", False),  # an expert's number isn't a layer's
        ("experts.0-3", "model.layers.9.mlp.experts.2.w1", True),
        ("layers.9.experts.2", "model.layers.9.mlp.experts.2.w1", True),
        ("0-3", "model.layers.2.mlp", False),
        ("0-3", "2.mlp", True),
        ("*_proj", "a.q_proj", True),
        ("*.q_proj", "a.q_proj", True),
        ("*.q_proj", "q_proj", False),
        ("q_*", "a.q_proj", True),
        ("q*o*", "a.q_proj", True),
        ("q*z*", "a.q_proj", False),
        ("*a*a", "a", False),
        ("proj", "a.q_proj", False),
        ("self_attn", "layers.0.self_attn.q_proj", True),
    ],
)
def test_what_a_pattern_means(pattern: str, path: str, means: bool) -> None:
    assert fits(pattern, path) == means


@given(st.lists(PARTS, min_size=1, max_size=7), st.data())
def test_a_path_with_something_left_open_fits_itself(path: list[str], data: st.DataObject) -> None:
    kept: list[int] = []
    for at in range(len(path)):  # a number stays behind the part before it
        if data.draw(st.booleans()) and (not path[at].isdecimal() or at == 0 or at - 1 in kept):
            kept.append(at)
    pattern = []
    for at in kept:
        part = path[at]
        if part.isdecimal():
            low, high = data.draw(st.integers(0, int(part))), data.draw(st.integers(int(part), 200))
            pattern.append(data.draw(st.sampled_from([part, f"{low}-", f"{low}-{high}"])))
        else:
            cut = sorted(data.draw(st.tuples(st.integers(0, len(part)), st.integers(0, len(part)))))
            pattern.append(data.draw(st.sampled_from([part, f"{part[: cut[0]]}*{part[cut[1] :]}"])))
    if pattern and not (pattern[0][0].isdecimal() and kept[0]):
        assert fits(".".join(pattern), ".".join(path)) and problem(".".join(pattern)) is None


@given(st.text(alphabet="ab.*-019", max_size=40), st.lists(PARTS, min_size=1, max_size=8))
def test_any_text_is_decided(pattern: str, path: list[str]) -> None:
    fits(pattern, ".".join(path)), problem(pattern), is_literal(pattern)


def test_groups_names_and_patterns_add_up_and_not_takes_away() -> None:
    everything = paths("all-linear")
    assert paths("layers.0-") == paths("layers.0-1") == paths("*") == everything
    first, second = paths("layers.0"), paths("layers.1-")
    assert first | second == everything and not first & second
    assert paths(("all-linear", "not layers.0")) == second == paths(("not layers.0", "all-linear"))
    assert paths(("layers.1.mlp", "q_proj")) == {p for p in everything if p.endswith("q_proj") or "layers.1.mlp" in p}
    assert paths("self_attn") == paths("attention") == paths(("all-linear", "not mlp"))
    assert paths(("all-linear", "not lm_head")) == everything
    assert paths("h.0-0.mlp", "gpt2") == {path for path in paths("mlp", "gpt2") if ".h.0." in path}


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("layers.7-", "layers.0-1"),  # what there is
        ("layer.0-1", "'layers'"),
        ("blocks.0-1", "could match"),
        ("layers.1-0", "0-1"),
        ("q_proj,v_proj", "[q_proj, v_proj]"),
        (r"model\.layers\..*", "regular expression"),
        ("not q_proj", "all-linear"),
        (("q_proj", "not *"), "nothing is left"),
        (("all-linear", "not q_prj"), "q_proj"),
        ("lm_head", "output head"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(targets: Any, said: str) -> None:
    assert said in refusal(targets)


def test_an_override_of_nothing_is_refused() -> None:
    assert "layers.5-" in refusal("all-linear", rank_overrides={"layers.5-": 3})
    assert "layers.0" in refusal("layers.1-", alpha_overrides={"layers.0": 3})


def test_overrides_by_group_and_pattern_are_each_layers_own_and_the_first_counts() -> None:
    spec = AdapterSpec(rank=2, rank_overrides={"layers.0.mlp": 5, "attention": 4, "*_proj": 3})
    found = find_targets(model("llama"), spec)
    ranks = {path: 5 if ".0.mlp" in path else 4 if "self_attn" in path else 3 for path in found.paths}
    assert {path: found.spec.rank_of(path) for path in found.paths} == ranks
    plain = AdapterSpec(rank=2, rank_overrides={"q_proj": 3})
    assert find_targets(model("llama"), plain).spec == plain


def test_a_pattern_asks_for_what_can_be_done_and_a_name_insists() -> None:
    assert not {path for path in paths("layers.*", rank_overrides={"layers.*.k_proj": 17}) if "k_proj" in path}
    assert "k_proj" in refusal("all-linear", rank_overrides={"k_proj": 17})


def test_what_is_chosen_is_said() -> None:
    every = linear_paths(model("llama"))
    said = find_targets(model("llama"), AdapterSpec(rank=2, targets=("layers.1.mlp",))).words
    assert said == in_words(sorted(paths("layers.1.mlp"), key=every.index), len(every))
    assert "3 of 14" in said and "layers.1" in said
    assert not find_targets(model("llama"), AdapterSpec(rank=2, targets="mlp")).words


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_adapts_exactly_the_same_layers(tmp_path: Path, name: str) -> None:
    blocks = "h" if name == "gpt2" else "layers"
    spec = AdapterSpec(
        rank=2,
        targets=(f"{blocks}.1-", "*.0.mlp", "not down_proj" if name == "llama" else "not c_proj"),
        rank_overrides={f"{blocks}.1-.mlp": 3},
        alpha_overrides={f"{blocks}.0": 5, "mlp": 7},
    )
    attached = attach(tiny(name), spec, fuse=())
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_(std=0.3)
    adapter = attached.adapter(BaseId("tiny"))
    tokens = torch.arange(3, 15)[None]
    peft = PeftModel.from_pretrained(tiny(name), adapter.save(tmp_path)).eval()
    theirs = {key.removeprefix("base_model.model.").split(".lora_A")[0] for key in peft.state_dict() if "lora_A" in key}
    assert theirs == set(attached.paths) == set(find_targets(model(name), spec).paths)
    with torch.no_grad():
        wanted = attached.model(input_ids=tokens, use_cache=False).logits
        got = peft(input_ids=tokens, use_cache=False).logits
    assert float((got - wanted).abs().max()) <= 3e-4 * float(wanted.abs().max())
    read = Adapter.load(tmp_path)
    for path in theirs:
        layer, block, mlp = attached.layers[path].factors(), path.split(".")[2], "mlp" in path
        assert layer.rank == read.factors[path].rank == (3 if block == "1" and mlp else 2)
        alpha = 5 if block == "0" else 7 if mlp else 32
        assert layer.scale == read.factors[path].scale == alpha / layer.rank
