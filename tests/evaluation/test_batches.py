"""What is measured doesn't depend on whether beginnings that rows share are computed once."""

import dataclasses

import numpy as np
import pytest
import torch

from deltaw.adapter.attach import attach
from deltaw.base.parts import CHOSEN, REJECTED
from deltaw.base.preferences import Dpo
from deltaw.config import AdapterSpec
from deltaw.data.example import Example
from deltaw.data.weighed import Weighed
from deltaw.evaluation.batches import batches
from deltaw.evaluation.choices import likelihoods
from deltaw.evaluation.forgetting import forgetting
from deltaw.evaluation.held_out import held_out_loss
from deltaw.evaluation.weighing import summed_logprobs, weighed_sums
from deltaw.model import Model, open_model
from deltaw.show.progress import Display
from tests.tiny import tiny_base

QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """One model, that shares beginnings and that doesn't."""
    opened = open_model(tiny_base(tmp_path_factory.mktemp("batches") / "base"), dtype="float32")
    generator = torch.Generator().manual_seed(0)
    attached = attach(opened.base.model, AdapterSpec(rank=4, alpha=64), generator=generator)
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_(0, 0.2, generator=generator)
    plain = dataclasses.replace(opened.forward, continues=False)
    assert opened.forward.shares and not plain.shares
    return tuple(Model(opened.base, opened.renderer, way, attached) for way in (opened.forward, plain))  # type: ignore[return-value]


def rows(*parts: int) -> list[Example]:
    """Of two beginnings, each with a tail of its own, of which some tokens are trained; and one of another kind."""
    random, made = np.random.default_rng(1), list[Example]()
    heads = [random.integers(5, 60, size).astype(np.int32) for size in (30, 24)]
    for number in range(12):
        for part in parts or (0,):
            tokens = np.concatenate([heads[number % 2], random.integers(5, 60, 3 + number % 5).astype(np.int32)])
            mask = np.arange(len(tokens)) >= (20 if not parts else len(heads[number % 2]))
            made.append(Example(tokens, mask, f"row {number}", part=part))
    return [*made, *([] if parts else [Example(heads[0][:9], np.arange(9) > 3, "short")])]


def test_less_is_computed_for_the_same_figures(models: tuple[Model, Model]) -> None:
    shared, plain = (model.forward for model in models)
    examples = rows()
    computed = [sum(len(batch.tokens_T) for _, batch in batches(way, Weighed(examples))) for way in (shared, plain)]
    assert computed[0] < 0.6 * computed[1]
    for at_once in (4096, 60):
        numbers = [n for own, _ in batches(shared, Weighed(examples), at_once=at_once) for n in own]
        assert sorted(numbers) == list(range(len(examples)))
    assert held_out_loss(shared, examples)[0] == pytest.approx(held_out_loss(plain, examples)[0], rel=1e-5)
    assert held_out_loss(shared, examples)[1] == held_out_loss(plain, examples)[1]
    np.testing.assert_allclose(summed_logprobs(shared, examples), summed_logprobs(plain, examples), rtol=1e-5)


def test_answers_of_pairs_are_weighed_alike(models: tuple[Model, Model]) -> None:
    pairs = rows(CHOSEN, REJECTED)
    weighed = Weighed(pairs, np.linspace(-40, -20, len(pairs)))
    shared, plain = (weighed_sums(model.forward, weighed, Dpo(0.1)) for model in models)
    assert shared.count == plain.count == 12
    np.testing.assert_allclose(shared.values, plain.values, rtol=1e-5)
    some = weighed_sums(models[0].forward, weighed, Dpo(0.1), [1, 5, 6])
    assert some.count == 3
    np.testing.assert_allclose(
        some.values, weighed_sums(models[1].forward, weighed, Dpo(0.1), [1, 5, 6]).values, rtol=1e-5
    )


def test_choices_and_forgetting_are_the_same(models: tuple[Model, Model]) -> None:
    random = np.random.default_rng(0)
    asked = {
        n: (random.integers(5, 60, 25 + n).tolist(), [random.integers(5, 60, k).tolist() for k in (1, 4, 2)])
        for n in range(4)
    }
    shared, plain = (dict(likelihoods(model, asked, adapter=True)) for model in models)
    for n in asked:
        np.testing.assert_allclose(shared[n], plain[n], atol=1e-4)
    texts = [dataclasses.replace(row, loss_mask=np.ones(len(row.tokens), bool)) for row in rows()]
    one, other = (forgetting(model, "rows", texts, QUIET) for model in models)
    for name in ("tokens", "passages", "loss_before", "loss_after", "kl", "rise_interval", "kl_interval"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4), name
