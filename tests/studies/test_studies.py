"""Every study from its beginning to its page, on a tiny base; and the verdicts' rules on planted numbers."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from markupsafe import escape

from deltaw.adapter.layer import AdaptedLinear
from deltaw.adapter.targets import linear_paths
from deltaw.base.forward import plan_forward
from deltaw.base.load import open_base, open_skeleton
from deltaw.base.source import find_base
from deltaw.config import parse_config
from deltaw.data.builtin import pronunciation
from deltaw.data.opening import open_dataset
from deltaw.data.row import Row
from deltaw.studies import bf16, compress, lr10, pretrain, rank, where
from deltaw.studies.lab import RATES, Lab
from deltaw.studies.page import write_outcome
from deltaw.studies.study import NAMES, Outcome, find_study

VERDICTS = ("held", "did not hold", "too noisy")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies with loops of their own take a few steps, too."""
    monkeypatch.setattr(bf16, "STEPS", 3)
    monkeypatch.setattr(pretrain, "STEPS", dict.fromkeys(pretrain.STEPS, 2))
    monkeypatch.setattr(pretrain, "TOKENS", 256)
    monkeypatch.setattr(pretrain, "HELD_OUT", 20)
    monkeypatch.setattr(pretrain, "ROWS", dict.fromkeys(pretrain.ROWS, 60))


@pytest.mark.parametrize("name", NAMES)
def test_a_study_runs_and_its_page_says_what_it_found(name: str, lab: Lab, short: None) -> None:
    study = find_study(name)
    outcome = study.run(lab)
    assert isinstance(outcome, Outcome) and outcome.verdict in VERDICTS and outcome.because
    assert study.CLAIM.name == name and outcome.blocks and outcome.figures
    record = write_outcome(study.CLAIM, outcome, lab, 1.0)
    page = (lab.folder / f"{name}.html").read_text(encoding="utf-8")
    assert escape(study.CLAIM.title) in page and 'class="verdict' in page
    assert escape(outcome.because)[:40] in page
    assert "<svg" in page and "<table" in page
    assert json.loads((lab.folder / f"{name}.json").read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    json.dumps(outcome.figures, allow_nan=False)


# rank and lr10


class Planted:
    """A lab whose trainings end with given losses."""

    noise = 0.01

    def __init__(self, loss: Callable[[Any, float], float]) -> None:
        self.loss = loss

    def sweep(self, adapter: Any) -> dict[float, Any]:
        rates = [rate / 10 if adapter == "full" else rate for rate in RATES]
        return {rate: SimpleNamespace(loss=self.loss(adapter, rate)) for rate in rates}

    sweeps, tie, margin = Lab.sweeps, Lab.tie, Lab.margin


def valley(least: float, at: float) -> Callable[[float], float]:
    """Losses by rate: a parabola over logarithms with this least point."""
    return lambda rate: least * math.exp(0.1 * math.log(rate / at) ** 2)


@pytest.mark.parametrize(("four", "expected"), [(1.05, "held"), (1.15, "did not hold"), (1.0, "held")])
def test_rank_holds_if_rank_4_does_nearly_as_well_as_the_best(four: float, expected: str) -> None:
    lab = Planted(lambda adapter, rate: valley(four if adapter != "full" and adapter["rank"] == 4 else 1.0, 2e-3)(rate))
    assert rank.run(cast(Lab, lab)).verdict == expected


@pytest.mark.parametrize(
    ("lora", "shift", "expected"),
    [
        (2e-3, 1.0, "held"),
        (2e-3, 2.0, "held"),
        (3e-4, 1.0, "too noisy"),  # the grid's end
        (2e-3, 0.8, "held"),
    ],
)
def test_lr10_looks_at_the_ratio_and_at_the_shift_over_ranks(lora: float, shift: float, expected: str) -> None:
    def loss(adapter: Any, rate: float) -> float:
        return valley(1.0, 2e-4 if adapter == "full" else lora * (shift if adapter["rank"] == 64 else 1))(rate)

    outcome = lr10.run(cast(Lab, Planted(loss)))
    assert outcome.verdict == expected
    if expected == "held":
        assert outcome.figures["best_rates"]["full"] == pytest.approx(2e-4, rel=1e-2)
        assert outcome.figures["ratio"] == pytest.approx(10, rel=0.02)
        assert outcome.figures["over_ranks"] == pytest.approx(max(shift, 1 / shift), rel=0.02)


# where


@pytest.mark.parametrize(
    ("attention", "mlp", "everything", "expected"),
    [
        (1.2, 1.0, 1.0, "held"),
        (1.2, 1.0, 1.04, "held"),  # no worse than what seeds do
        (1.2, 1.0, 1.1, "did not hold"),
        (1.0, 1.2, 0.9, "did not hold"),
        (1.02, 1.0, 0.9, "too noisy"),
        (1.0, 1.02, 1.0, "too noisy"),
        (1.02, 1.0, 1.2, "did not hold"),
    ],
)
def test_where_holds_if_the_mlp_beats_attention_and_all_layers_are_no_worse(
    attention: float, mlp: float, everything: float, expected: str
) -> None:
    assert where.verdict({"attention": attention, "mlp": mlp, "all-linear": everything}, 0.05) == expected


def test_where_gives_each_place_as_many_parameters(lab: Lab) -> None:
    ranks = where.equal_ranks(open_skeleton(find_base(lab.task["base"])))
    sizes = {"all-linear": 4 * (64 + 64) + 3 * (64 + 96), "attention": 4 * (64 + 64), "mlp": 3 * (64 + 96)}
    budget = 16 * sizes["all-linear"]
    assert ranks["all-linear"] == 16
    for group, wanted in ranks.items():
        assert abs(wanted * sizes[group] - budget) <= sizes[group] / 2
    shared = where._train(lab, "all-linear", 16, 1e-3)
    assert shared.run.folder == lab.sweep({"rank": 16, "alpha": 32})[1e-3].run.folder


# compress


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ((0.9, 0.9, 0.9), "held"),
        ((0.9, 0.9, 1.5), "held"),
        ((1.0, 0.9, 1.0), "held"),
        ((1.01, 0.99, 1.0), "too noisy"),
        ((0.9, 1.1, 1.0), "did not hold"),  # one each
        ((1.1, 0.9, 0.9), "did not hold"),  # loses at 16
        ((1.0, 1.0, 1.5), "did not hold"),
    ],
)
def test_compress_counts_ranks_won_and_lost(cut: tuple[float, ...], expected: str) -> None:
    assert compress.LOW == (16, 4, 1)
    losses = dict(zip(compress.LOW, cut, strict=True))
    assert compress.verdict(losses, dict.fromkeys(compress.LOW, 1.0), 0.05) == expected


def test_compress_measures_what_cutting_loses(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = lab.train("", adapter={"rank": 64, "alpha": 32}, lr=1e-2)
    monkeypatch.setattr(compress, "LOW", (64, 1))
    whole, least = compress.cut_losses(trial, lab).values()
    assert whole == pytest.approx(trial.loss, rel=1e-5)
    assert abs(least - trial.loss) > 1e-5


# bf16


@pytest.mark.parametrize(
    ("narrow", "wide", "expected"),
    [(0.1, 1.0, "held"), (0.2, 1.0, "did not hold"), (0.1, 0.9, "did not hold"), (1.0, 1.0, "did not hold")],
)
def test_bf16_holds_if_a_stands_still_in_bfloat16_alone(narrow: float, wide: float, expected: str) -> None:
    assert bf16.verdict({"bfloat16": narrow, "float32": wide}) == expected


def test_bf16_moves_only_what_is_near_zero(lab: Lab) -> None:
    """At the rate η an entry can move if it is below 512 η; A is uniform in ±1/√64. B begins at zero."""
    config = parse_config({**lab.task, "output": "-"})
    source, _, dataset = open_dataset(config, lab.display)
    forward = plan_forward(open_base(source, dtype="float32", device="cpu").model)
    narrow, wide = (bf16.train(forward, config, dataset, 1e-5, dtype, 5) for dtype in (torch.bfloat16, torch.float32))
    assert 0 < narrow.a_changed < 512e-5 * 64**0.5 < 0.1 < 0.9 < wide.a_changed
    assert narrow.b_changed > 0.9 and wide.b_changed > 0.9
    assert 0 < narrow.a_relative < wide.a_relative
    assert not any(isinstance(module, AdaptedLinear) for module in forward.model.modules())


# pretrain


@pytest.mark.parametrize(
    ("lora", "low_rank", "fine", "expected"),
    [
        (1.2, 1.3, 1.02, "held"),
        (1.2, 1.3, 0.9, "held"),  # better than full is no gap
        (1.2, 1.3, 1.15, "did not hold"),
        (1.2, 0.8, 1.02, "did not hold"),
        (1.02, 1.3, 1.0, "too noisy"),
        (1.2, 1.3, 1.1, "too noisy"),
    ],
)
def test_pretrain_holds_if_both_ways_lag_more_than_in_fine_tuning(
    lora: float, low_rank: float, fine: float, expected: str
) -> None:
    pretraining = {"full": 1.0, "LoRA": lora, "low rank": low_rank}
    assert pretrain.verdict(pretraining, {"full": 2.0, "LoRA": 2 * fine}, 0.01) == expected


@pytest.mark.parametrize("way", ["full", "LoRA", "low rank"])
def test_pretrain_trains_everything_but_w_in_every_way(way: str) -> None:
    forward = pretrain.tiny_llama()
    row = Row(pronunciation("cat", "K AE1 T"), "here")
    rows = [pretrain._example(row, "pretraining")]
    start = pretrain.random_weights(forward.model, 3)
    learnt = pretrain.learn(forward, start, way, 1e-3, pretrain.Stage(rows, rows, 2), 0)
    linear = {f"{path}.weight" for path in linear_paths(forward.model)}
    moved = {name for name, weight in learnt.weights.items() if not torch.equal(weight, start[name])}
    assert moved == (start.keys() - linear if way == "LoRA" else start.keys())
    assert way != "low rank" or not any(learnt.weights[name].any() for name in linear)
    longer = pretrain.learn(forward, start, way, 1e-3, pretrain.Stage(rows, rows, 20), 0)
    assert longer.loss < learnt.loss < 10


def test_pretrain_low_rank_begins_with_the_size_of_random_weights() -> None:
    model = pretrain.tiny_llama().model
    attached = pretrain._attach(model, "low rank", torch.Generator().manual_seed(0))
    for layer in attached.layers.values():
        update = layer.factors()
        assert update.rank == pretrain.RANK
        assert float(update.dense().std()) == pytest.approx(update.shape[1] ** -0.5, rel=0.1)


@pytest.mark.parametrize(
    ("stage", "line", "learnt"),
    [
        ("pretraining", b"cats>KAETS\n", b"ats>KAETS\n"),
        ("fine-tuning", b"cats>KAADS\n", b"KAADS\n"),
        ("a new task", b"KAETS<cats\n", b"cats\n"),
    ],
)
def test_pretrain_rows_are_words_and_sounds(stage: str, line: bytes, learnt: bytes) -> None:
    example = pretrain._example(Row(pronunciation("cats", "K AE1 T S"), "here"), stage)
    assert bytes(example.tokens.tolist()) == line
    assert bytes(example.tokens[example.loss_mask].tolist()) == learnt
