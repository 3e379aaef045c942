"""The checks of a finished run: each on figures that are right, and on figures that it must object to."""

from typing import Any

import pytest
import torch

from deltaw.analysis.checks import check_adapter, check_run
from deltaw.analysis.measure import Measures, measure
from deltaw.analysis.page import Finding
from deltaw.analysis.training import Training
from deltaw.config import RunConfig, parse_config
from deltaw.factors import LowRank

RESULT: dict[str, Any] = {
    "eval": {"before": {"loss": 3.0}, "after": {"loss": 1.0}},
    "steps": 10,
    "best_step": 10,
    "trained_parameters": 1000,
    "train_rows": 100,
    "form": "completion",
    "forgetting": {"loss_before": 2.0, "loss_after": 2.1, "kl": 0.1, "source": "s", "tokens": 9},
}


def config(**train: Any) -> RunConfig:
    return parse_config({"base": "b", "data": {"train": "t"}, "train": {"lr": 1e-3, **train}, "output": "o"})


def metrics(loss: float = 0.1, tokens: int = 100) -> list[dict[str, Any]]:
    return [{"step": i + 1, "loss": loss, "supervised_tokens": tokens * (i + 1)} for i in range(10)]


def found(result: dict[str, Any] | None = None, lines: Any = None, **train: Any) -> list[Finding]:
    return check_run(Training(config(**train), {**RESULT, **(result or {})}, metrics() if lines is None else lines))


def said(findings: list[Finding], *levels: str) -> str:
    return "\n".join(words for level, words in findings if level in levels)


def update(rank: int, used: int, size: float = 1.0) -> Measures:
    """Equal singular values in `used` of `rank` directions."""
    s_R = torch.tensor([1.0] * used + [1e-4] * (rank - used))
    b_MR, a_RN = torch.linalg.qr(torch.randn(40, rank)).Q * s_R, torch.linalg.qr(torch.randn(50, rank)).Q.T
    return measure(LowRank(a_RN, b_MR, size), torch.randn(40, 50))


def test_a_good_run_has_nothing_to_object_to() -> None:
    assert {level for level, _ in found()} == {"ok"}


@pytest.mark.parametrize(
    ("result", "level", "words"),
    [
        ({"eval": {"before": {"loss": 1.0}, "after": {"loss": 1.5}}}, "problem", "held-out loss rose"),
        ({"eval": {"before": {}, "after": {}}}, "note", "data.eval"),
        ({"best_step": 4}, "note", "best at step 4 of 10"),
        ({"trained_parameters": 10}, "warning", "raise adapter.rank"),
        ({"trained_parameters": 10, "form": "text"}, "warning", "continued pretraining"),
        ({"train_rows": 900}, "note", "90 documents per step"),
        ({"train_rows": 9000}, "warning", "900 documents per step"),
        ({"forgetting": {**RESULT["forgetting"], "loss_after": 2.5}}, "warning", "forgot a lot"),
        ({"forgetting": {**RESULT["forgetting"], "kl": 0.9}}, "warning", "forgot a lot"),
    ],
)
def test_what_a_run_shows(result: dict[str, Any], level: str, words: str) -> None:
    assert words in said(found(result), level)
    assert " :" not in said(found(result), level)
    assert words not in said(found(), level)


def test_capacity_counts_the_first_epochs_nats_in_bits() -> None:
    # 10 steps of 100 tokens at 0.1 nats are 100 nats, 144 bits: 72 parameters hold them, 71 do not
    assert "warning" not in {level for level, _ in found({"trained_parameters": 73})}
    assert "144 bits" in said(found({"trained_parameters": 71}), "warning")
    # two epochs: only the first five steps count
    assert "72 bits" in said(found({"trained_parameters": 10}, epochs=2.0), "warning")


@pytest.mark.parametrize("told", [{"steps": 10}, {"epochs": 5.0}])
def test_an_epoch_is_counted_in_tokens_however_the_length_was_set(told: dict[str, Any]) -> None:
    """Five epochs of two steps: the first two are the data, 29 bits, and a step sees 50 documents of its 100."""
    seen = {"tokens": 5000, "epoch_tokens": 1000}
    assert "29 bits" in said(found({**seen, "trained_parameters": 10}, **told), "warning")
    assert "documents" not in said(found(seen, **told), "note", "warning")
    assert "500 documents per step" in said(found({**seen, "train_rows": 1000}, **told), "warning")
    assert "documents per step" in said(
        found({"tokens": 500, "epoch_tokens": 1000, "train_rows": 2000}, **told), "note"
    )


def test_steps_without_a_count_of_tokens_tell_no_epoch() -> None:
    """An older run's result: nothing is said of capacity or batches rather than something wrong."""
    assert not [words for _, words in found({"trained_parameters": 10}, steps=10) if "bits" in words]


def test_a_low_rate_is_noted_and_full_fine_tunings_is_a_tenth() -> None:
    assert "below the usual range" in said(found(lr=5e-5), "note")
    # Adam moves ΔW by lr s r: what counts is that at the default's s r = 32
    for adapter, low in (({"rank": 64, "alpha": 128.0}, 2e-5), ({"rank": 4, "alpha": 4.0}, 7e-4)):
        adapter = {"adapter": adapter, "base": "b", "data": {"train": "t"}, "output": "o"}
        for lr, words in ((low, True), (1.3 * low, False)):
            noted = check_run(Training(parse_config({**adapter, "train": {"lr": lr}}), RESULT, metrics()))
            assert ("below the usual range" in said(noted, "note")) == words
    assert "below" not in said(found(lr=5e-5, lr_ratio_b=16.0), "note")
    full = parse_config({"base": "b", "adapter": "full", "data": {"train": "t"}, "train": {"lr": 5e-5}, "output": "o"})
    assert "below" not in said(check_run(Training(full, RESULT, metrics())), "note")


def test_modules_that_learnt_nothing_are_a_problem() -> None:
    zero = measure(LowRank(torch.randn(4, 50), torch.zeros(40, 4)))
    assert "learnt nothing" in said(check_adapter({"a": update(4, 4), "layer.1.q": zero}), "problem")
    assert "layer.1.q" in said(check_adapter({"a": update(4, 4), "layer.1.q": zero}), "problem")
    assert "the base answers" in said(check_adapter({"a": zero}), "problem")
    assert "all 1 modules learnt" in said(check_adapter({"a": update(4, 4)}), "ok")


def test_idle_ranks_are_noted() -> None:
    assert "2 of 16 directions" in said(check_adapter({"a": update(16, 2)}), "note")
    assert "directions" not in said(check_adapter({"a": update(16, 16)}), "note")


def test_a_merge_is_judged_by_what_it_keeps_along_the_update() -> None:
    assert "0 % of the update is kept" in said(check_adapter({"a": update(4, 4, size=1e-7)}), "warning")
    light = update(4, 4, size=0.05)  # 1 % of W: noisy, and whole
    assert light.base is not None and light.base.merge_error > 0.1
    assert "noise" in said(check_adapter({"a": light}), "ok")


@pytest.mark.parametrize(("ends", "level"), [((0.26, 0.5), "warning"), ((0.1, 0.5), "note"), (None, "warning")])
def test_forgetting_is_judged_by_its_interval(ends: tuple[float, float] | None, level: str) -> None:
    lost = {**RESULT["forgetting"], "loss_after": 2.3, "rise_interval": ends}
    assert "general text" in said(found({"forgetting": lost}), level)
    assert ends is None or f"{ends[0]:.3f} to {ends[1]:.3f}" in said(found({"forgetting": lost}), level)
