"""Forgetting: both losses and the divergence, against sums written out document by document."""

from pathlib import Path

import pytest
import torch

from deltaw.adapter.attach import attach
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.evaluation.forgetting import forgetting, general_text
from deltaw.factors import LowRank
from deltaw.model import Model, open_model
from deltaw.show.progress import Display
from tests.tiny import tiny_base

QUIET = Display(quiet=True)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """The tiny base with a fresh adapter, which changes nothing yet."""
    plain = open_model(tiny_base(tmp_path / "base"), dtype="float32", device="cpu")
    attached = attach(plain.base.model, AdapterSpec(rank=2))
    return Model(plain.base, plain.renderer, plain.forward, attached)


def disturb(model: Model) -> None:
    for layer in model.attached.layers.values():
        update = layer.factors()
        layer.set_factors(LowRank(update.a_RN, torch.randn_like(update.b_MR), update.scale))


def test_a_fresh_adapter_has_forgotten_nothing(model: Model) -> None:
    rows = general_text("builtin:general", model.renderer)
    found = forgetting(model, "builtin:general", rows, QUIET)
    assert len(rows) == 18 and found.tokens == sum(len(row.tokens) - 1 for row in rows)
    assert found.loss_before == pytest.approx(found.loss_after, abs=1e-6) and abs(found.kl) < 1e-6


def test_it_is_what_the_definitions_say(model: Model) -> None:
    disturb(model)
    rows = general_text("builtin:general", model.renderer)[:3]
    found = forgetting(model, "general", rows, QUIET)
    logs: dict[str, list[torch.Tensor]] = {"before": [], "after": []}
    for row in rows:
        ids = torch.tensor(row.tokens, dtype=torch.long)
        for name in logs:
            with torch.no_grad():
                if name == "before":
                    with model.attached.disabled():
                        out = model.base.model(ids[None]).logits[0, :-1]
                else:
                    out = model.base.model(ids[None]).logits[0, :-1]
            logs[name].append(out.double().log_softmax(-1))
    labels = torch.cat([torch.tensor(row.tokens[1:], dtype=torch.long) for row in rows])
    before, after = torch.cat(logs["before"]), torch.cat(logs["after"])
    assert found.tokens == len(labels)
    pick = torch.arange(len(labels))
    assert found.loss_before == pytest.approx(-float(before[pick, labels].mean()), rel=1e-4)
    assert found.loss_after == pytest.approx(-float(after[pick, labels].mean()), rel=1e-4)
    assert found.kl == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    assert found.kl > 1e-3


def test_no_row_ends_with_a_stop_token_and_rows_are_cut(model: Model, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("a long line " * 100 + "\n")
    (row,) = general_text(str(text), model.renderer)
    assert int(row.tokens[-1]) not in model.renderer.stop_ids and len(row.tokens) <= 256


def test_a_missing_text_is_an_error(model: Model) -> None:
    with pytest.raises(InputError, match="no such"):
        general_text("nowhere.txt", model.renderer)
