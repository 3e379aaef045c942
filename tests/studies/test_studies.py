"""Every study from its beginning to its page, on trainings that are made up to hold or not; and the loops of those that
train by themselves."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from markupsafe import escape

from deltaw.adapter.file import Adapter
from deltaw.adapter.layer import AdaptedLinear
from deltaw.adapter.targets import linear_paths
from deltaw.data.example import Example
from deltaw.factors import LowRank
from deltaw.show.progress import Display
from deltaw.studies import amp, bf16, compress, forget, fullrank, intruder, lr10, phi, pretrain, rank, where
from deltaw.studies.bench import Arm, weaken
from deltaw.studies.lab import Lab
from deltaw.studies.page import write_outcome
from deltaw.studies.study import NAMES, Outcome, find_study, judge
from deltaw.studies.tiny import PRETRAINING, example, random_weights, tiny_llama
from deltaw.updates import Update
from tests.studies.conftest import BEFORE, ROWS, Loss, Planted, valley

Labs = Callable[[Loss], Lab]
BY_THEMSELVES = ("accum", "rl-rank")  # what they train is not a bench's: test_seven.py


def noise(arm: Arm, seed: int, size: float = 0.005) -> float:
    """A number of its own for each arm and seed, around 1."""
    draw = torch.randn((), generator=torch.Generator().manual_seed(crc32(f"{arm.key()} {seed}".encode())))
    return math.exp(size * float(draw))


def of_rank(least: Mapping[Any, float], at: float = 6e-3) -> Loss:
    """Losses by rank (or "full", whose best rate is a tenth); 1 where none is given."""

    def loss(arm: Arm, seed: int) -> float:
        kind = "full" if arm.spec.full else arm.spec.rank
        return valley(arm, least.get(kind, 1.0), at / 10 * 2.5 if kind == "full" else at) * noise(arm, seed)

    return loss


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies with loops of their own take a few steps."""
    monkeypatch.setattr(bf16, "STEPS", 2)
    monkeypatch.setattr(bf16, "RATES", bf16.RATES[:1])
    monkeypatch.setattr(forget, "STRENGTHS", (0.5, 1.0))
    monkeypatch.setattr(fullrank, "STEPS", (1, 2))
    monkeypatch.setattr(fullrank, "ARM", Arm("full", 1e-3, steps=2, train={"schedule": "constant"}))
    monkeypatch.setattr(forget, "DRAWS", 20)
    monkeypatch.setattr(
        pretrain.Trainings,
        "run",
        lambda self, stage, way, rate, seed: {"before": BEFORE, "loss": 1 + abs(math.log(rate / 3e-3)) + 0.01 * seed},
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_THEMSELVES])
def test_a_study_runs_and_its_page_says_what_it_found(name: str, lab_of: Labs, short: None) -> None:
    study, lab = find_study(name), lab_of(of_rank({}))
    outcome: Outcome = study.run(lab)
    assert study.RULE.name == name and outcome.blocks
    record = write_outcome(study.RULE, outcome, lab, 1.0)
    assert record["verdict"] in ("held", "did not hold", "not settled", "void")
    page = (lab.folder / f"{name}.html").read_text(encoding="utf-8")
    assert escape(study.RULE.title) in page and 'class="verdict' in page and study.RULE.hash in page
    assert "<svg" in page and "<table" in page
    stored = json.loads((lab.folder / f"{name}.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(record))
    assert stored["rule"]["hash"] == study.RULE.hash
    assert {finding["quantity"] for finding in stored["findings"]} == {c.quantity for c in study.RULE.criteria}


@pytest.mark.parametrize(
    ("least", "verdict"),
    [({4: 1.0, 64: 1.0}, "held"), ({4: 1.2, 64: 1.0}, "did not hold"), ({4: 1.048, 64: 1.0}, "not settled"),
     ({4: 3.0, 64: 3.0}, "void")],
)  # fmt: skip
def test_rank_wants_rank_4_within_its_margin(lab_of: Labs, least: Mapping[int, float], verdict: str) -> None:
    assert judge(rank.RULE, rank.run(lab_of(of_rank(least)))).verdict == verdict


@pytest.mark.parametrize(
    ("factor", "verdict"), [(10.0, "held"), (3.0, "did not hold"), (40.0, "did not hold"), (6.7, "not settled")]
)
def test_lr10_measures_the_ratio_of_best_rates(lab_of: Labs, factor: float, verdict: str) -> None:
    def loss(arm: Arm, seed: int) -> float:
        return valley(arm, 1.0, 1.5e-3 if arm.spec.full else 1.5e-3 * factor, curve=0.2) * noise(arm, seed)

    outcome = lr10.run(lab_of(loss))
    assert judge(lr10.RULE, outcome).verdict == verdict
    assert math.exp(outcome.estimates[lr10.ASKED].value) == pytest.approx(factor, rel=0.1)


def test_lr10_isnt_settled_by_a_flat_valley(lab_of: Labs) -> None:
    assert judge(lr10.RULE, lr10.run(lab_of(lambda arm, seed: noise(arm, seed)))).verdict == "not settled"


@pytest.mark.parametrize(
    ("attention", "mlp", "everything", "verdict"),
    [(1.2, 1.0, 1.0, "held"), (1.2, 1.0, 1.02, "held"), (1.2, 1.0, 1.1, "did not hold"),
     (1.0, 1.2, 1.0, "did not hold"), (1.0, 1.0, 1.0, "not settled")],
)  # fmt: skip
def test_where_wants_the_mlp_first_and_all_layers_no_worse(
    lab_of: Labs, attention: float, mlp: float, everything: float, verdict: str
) -> None:
    least = {"attention": attention, "mlp": mlp, "all-linear": everything}

    def loss(arm: Arm, seed: int) -> float:
        return valley(arm, least[str(arm.spec.targets)], 6e-3) * noise(arm, seed)

    lab = lab_of(loss)
    outcome = where.run(lab)
    assert judge(where.RULE, outcome).verdict == verdict
    sizes = {"all-linear": 4 * (64 + 64) + 3 * (64 + 96), "attention": 4 * (64 + 64), "mlp": 3 * (64 + 96)}
    for group, rank_ in outcome.figures["ranks"].items():
        assert abs(rank_ * sizes[group] - 16 * sizes["all-linear"]) <= sizes[group] / 2


class Shared(Planted):
    """Updates whose first `shared` directions are the same in all trainings, the first far stronger than the rest."""

    shared = 1

    def adapter(self, arm: Arm, seed: int) -> Adapter:
        generator, factors = torch.Generator().manual_seed(seed + 1000 * arm.spec.rank), dict[str, Update]()
        for path in self.paths:
            m, n = self.weights[path].dense().shape
            same = torch.randn(n, n, generator=torch.Generator().manual_seed(7))[:, : min(self.shared, arm.spec.rank)]
            own = torch.randn(n, arm.spec.rank - same.shape[1], generator=generator)
            v_NR = torch.linalg.qr(torch.cat([same, own], 1)).Q
            u_MR = torch.linalg.qr(torch.randn(m, arm.spec.rank, generator=generator)).Q
            factors[path] = LowRank(torch.linspace(3, 1, arm.spec.rank)[:, None] * v_NR.T, u_MR)
        return Adapter(arm.spec, factors)


@pytest.mark.parametrize(("shared", "verdict"), [(1, "held"), (16, "did not hold")])
def test_phi_wants_one_direction_shared(base: Path, tmp_path: Path, shared: int, verdict: str) -> None:
    bench = Shared(base, of_rank({}))
    bench.shared = shared
    outcome = phi.run(Lab(tmp_path, Display(quiet=True), bench=bench))
    assert judge(phi.RULE, outcome).verdict == verdict
    assert outcome.estimates[phi.TOP.format(phi.PAIRS[0])].value > 0.99


def test_amp_finds_nothing_in_random_directions(lab_of: Labs) -> None:
    outcome = amp.run(lab_of(of_rank({})))
    assert outcome.estimates[amp.PERCENTILE.format(4)].value == pytest.approx(0.5, abs=0.15)
    assert outcome.estimates[amp.SHARE.format(4)].value == pytest.approx(0.0, abs=0.06)
    assert judge(amp.RULE, outcome).verdict == "did not hold"


def test_an_intruder_is_new_and_a_rotation_is_not() -> None:
    w_MN = torch.diag(torch.linspace(10, 1, 64))
    new_M = torch.ones(64) / 8
    outside_M = torch.cat([torch.zeros(24), torch.ones(40)]) / 40**0.5  # as far from each of W's, outside of the first
    strong = intruder.module_of(w_MN, 50 * outside_M[:, None] @ outside_M[None])
    assert intruder.count({"": strong}, 0.5) == 1 and float(strong.sigma_J[0]) > 40
    rotated = intruder.module_of(w_MN, 2 * new_M[:, None] * torch.cat([torch.ones(20), torch.zeros(44)])[None] * 0.1)
    assert intruder.count({"": rotated}, 0.5) == 0
    assert intruder.count({"": intruder.module_of(w_MN, torch.zeros(64, 64))}, 0.9) == 0


def test_forget_compares_fronts_where_they_first_reach_one_loss() -> None:
    def points(losses: list[float], kls: list[float]) -> list[forget.Point]:
        sums = [torch.tensor([[1.0, 1.0 + kl, kl, 1.0]], dtype=torch.float64) for kl in kls]
        return [forget.Point(n, loss, sum_P4) for n, (loss, sum_P4) in enumerate(zip(losses, sums, strict=True))]

    lora, full = points([4, 2, 1, 3], [0.0, 0.1, 0.4, 9.0]), points([4, 2, 0.5], [0.0, 0.2, 0.8])
    one, other = forget.at_one_loss(lora, full) or (None, None)
    assert one and other and math.exp(one.log_kl) == pytest.approx(0.4) and one.rise == pytest.approx(0.4)
    assert other.rise == pytest.approx(0.2 + 2 / 3 * 0.6)
    assert forget.at_one_loss(lora, points([4, 3], [0.0, 0.1])) is not None
    assert forget.at_loss(points([4, 3], [0.0, 0.1]), 1.0) is None


def test_compress_measures_the_cut_in_the_parents_layers(lab_of: Labs) -> None:
    """A made-up parent is a random update: cutting it changes the loss, cutting nothing off doesn't."""
    lab = lab_of(of_rank({}))
    parent = lab.bench.train(Arm(compress.lora(32)), 0).adapter()
    with lab.bench.wearing(parent) as attached:
        whole = lab.bench.loss()
        compress.wear(attached, compress.resize(parent, rank=32)[0])
        assert lab.bench.loss() == pytest.approx(whole, rel=1e-5)
        compress.wear(attached, compress.resize(parent, rank=1)[0])
        assert abs(lab.bench.loss() - whole) > 1e-5
    assert not any(isinstance(module, AdaptedLinear) for module in lab.bench.forward.model.modules())


def test_a_weakened_update_is_that_much_of_it(lab_of: Labs) -> None:
    bench = lab_of(of_rank({})).bench
    for arm in (Arm(compress.lora(4)), Arm("full")):
        adapter = bench.train(arm, 0).adapter()
        with bench.wearing(adapter) as attached:
            weaken(attached, adapter, 0.25)
            path = bench.paths[0]  # type: ignore[attr-defined]
            half = attached.layers[path].factors().plain().dense()
            assert torch.allclose(half, 0.25 * adapter.factors[path].plain().dense(), atol=1e-6)


def test_bf16_moves_only_what_is_near_zero(lab_of: Labs) -> None:
    """At the rate η an entry can move if it is below 512 η; A is uniform in ±1/√64. B begins at zero."""
    bench = lab_of(of_rank({})).bench
    rows = bench.rows("a new task")
    narrow, wide = (bf16.train(bench.forward, rows, rows, dtype, 1e-5, 0) for dtype in bf16.DTYPES.values())
    assert 0 < narrow.a_changed < 512e-5 * 64**0.5 < 0.1 < 0.9 < wide.a_changed
    assert narrow.b_changed > 0.9 and wide.b_changed > 0.9 and 0 < narrow.a_relative < wide.a_relative


@pytest.mark.parametrize("way", ["full", "LoRA", "low rank"])
def test_pretrain_trains_everything_but_w_in_every_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "STEPS", 3)
    forward = tiny_llama()
    start = random_weights(forward.model, 3)
    outcome = pretrain.learn(forward, start, way, 1e-3, FewRows(), PRETRAINING, 0)
    assert outcome["loss"] < outcome["before"]
    linear = {f"{path}.weight" for path in linear_paths(forward.model)}
    state = forward.model.state_dict()
    moved = {name for name, weight in state.items() if not torch.equal(weight, start[name])}
    assert moved == (start.keys() - linear if way == "LoRA" else start.keys())
    assert way != "low rank" or not any(state[name].any() for name in linear)


class FewRows:
    """A bench's rows, of which there are three."""

    def rows(self, stage: str) -> list[Example]:
        return [example(row, stage) for row in ROWS]

    held_out = rows


def test_pretrain_low_rank_begins_with_the_size_of_random_weights() -> None:
    attached = pretrain._attach(tiny_llama().model, "low rank", torch.Generator().manual_seed(0))
    for layer in attached.layers.values():
        update = layer.factors().plain()
        assert update.rank == pretrain.RANK
        assert float(update.dense().std()) == pytest.approx(update.shape[1] ** -0.5, rel=0.1)


def test_fullrank_takes_means_by_part() -> None:
    shares = {"model.layers.0.self_attn.q_proj": 0.1, "model.layers.0.mlp.up_proj": 0.3}
    assert fullrank.means(shares) == {"all": 0.2, "attention": 0.1, "MLP": 0.3}
