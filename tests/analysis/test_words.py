"""Plain words: the place a path names, and what is said of an update."""

import pytest
import torch

from deltaw.analysis.measure import measure
from deltaw.analysis.summary import summarise
from deltaw.analysis.words import gist, kinds_of, place, sentence, title
from deltaw.factors import LowRank


@pytest.mark.parametrize(
    ("path", "where", "words"),
    [
        ("model.layers.12.mlp.down_proj", (12, "down_proj"), "layer 12 down_proj"),
        ("transformer.h.0.attn.c_attn", (0, "c_attn"), "layer 0 c_attn"),
        ("head", (None, "head"), "head"),
    ],
)
def test_a_path_names_a_place(path: str, where: tuple[int | None, str], words: str) -> None:
    assert place(path) == where and title(path) == words


def test_kinds_stand_in_the_order_of_the_computation() -> None:
    paths = [f"layers.{i}.{kind}" for i in (0, 1) for kind in ("down_proj", "zeta", "up_proj", "k_proj", "q_proj")]
    assert kinds_of(paths) == ["q_proj", "k_proj", "up_proj", "down_proj", "zeta"]


def test_a_sentence_says_what_was_measured() -> None:
    u, v = torch.eye(20)[:, :4], torch.eye(30)[:, :4]
    update = LowRank(v.T, u @ torch.diag(torch.tensor([3.0, 3.0, 3.0, 0.01])))
    said = sentence("layers.2.up_proj", measure(update))
    assert said == "layer 2 up_proj uses 3 of 4 directions"
    w_MN = torch.randn(20, 30)
    relative = float(update.dense().norm() / w_MN.norm())
    assert f"changes the weight by {100 * relative:.1f} %" in sentence("layers.2.up_proj", measure(update, w_MN))
    assert "learnt nothing" in sentence("x.1.q", measure(LowRank(v.T, torch.zeros(20, 4))))


def test_the_gist_is_of_all_modules() -> None:
    measures = {f"layers.{i}.q_proj": measure(LowRank(torch.randn(2, 30), torch.randn(20, 2))) for i in range(3)}
    (said,) = gist(measures, summarise(measures))
    assert said.startswith("3 modules, 300 parameters") and "of 2 directions" in said
    zero = {"layers.0.q_proj": measure(LowRank(torch.randn(2, 30), torch.zeros(20, 2)))}
    assert gist(zero, summarise(zero)) == ["The update is zero in every module: this is the base."]
