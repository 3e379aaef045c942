"""`deltaw inspect` tries the update: what it does, held against other ways to the same numbers."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltaw.adapter.attach import attach, discard
from deltaw.analysis.effect import effect as effects
from deltaw.analysis.effect.effect import OTHER, TASK, Effect, effect_of, try_update
from deltaw.analysis.effect.passes import Budget, pass_over
from deltaw.analysis.effect.sections import of_effect
from deltaw.analysis.effect.states import states_of
from deltaw.analysis.effect.words import in_words
from deltaw.analysis.page import Page, render
from deltaw.config import AdapterSpec
from deltaw.data.example import Example
from deltaw.data.pack import pack
from deltaw.evaluation.forgetting import forgetting, general_text
from deltaw.evaluation.held_out import held_out_loss
from deltaw.evaluation.rows import rows_of
from deltaw.evaluation.slider import slide
from deltaw.model import Model, open_model
from deltaw.show.progress import QUIET
from tests.test_cli import call
from tests.tiny import Said

Opened = tuple[Model, list[Example], list[Example]]
SOURCES = {TASK: "rows", OTHER: "text"}


@pytest.fixture(scope="module")
def opened(folder: Path) -> Opened:
    """A trained run, its rows, and general text."""
    model, rows = rows_of(str(folder / "one"), None, base=None, display=QUIET)
    return model, list(rows), general_text("builtin:general", model.renderer)[:4]


@pytest.fixture(scope="module")
def deep(opened: Opened) -> Effect:
    """Of all rows, in every state."""
    return try_update(*opened, sources=SOURCES, deep=True, display=QUIET)


def test_the_figures_are_those_of_eval_scale_and_forgetting(opened: Opened, deep: Effect) -> None:
    model, rows, general = opened
    base, tuned = deep.of(None)
    lost = forgetting(model, "text", general, QUIET)
    assert tuned.kl.value == pytest.approx(lost.kl, rel=1e-4)
    change = deep.tokens[OTHER].change
    assert change.value == pytest.approx(lost.loss_after - lost.loss_before, rel=1e-3, abs=1e-6)
    assert (change.low, change.high) == pytest.approx(lost.rise_interval, abs=0.3 * abs(change.high - change.low))  # type: ignore[operator]
    factors = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    slid = [point.task_loss for point in slide(model, factors, rows, general, display=QUIET)]
    assert [point.task_loss.value for point in deep.curves["scale"]] == pytest.approx(slid, rel=1e-5)
    assert base.kl.value == pytest.approx(0, abs=1e-6)
    assert tuned.task_change.value == tuned.kl_change.value == 0


def test_an_update_cut_to_its_rank_or_off_everywhere_is_itself_or_nothing(opened: Opened, deep: Effect) -> None:
    model, rows, _ = opened
    assert [point.name for point in deep.of("rank")] == ["1", "2"]  # of rank 4
    assert [point.name for point in deep.of("layer")] == ["0", "1"] and len(deep.of("kind")) == 7
    attached = model.attached
    assert attached is not None
    trained = {path: layer.factors() for path, layer in attached.layers.items()}
    for point in deep.of("layer"):
        for path in attached.paths:
            if f".layers.{point.name}." in path:
                attached.layers[path].set_factors(trained[path].times(0.0))
        loss = held_out_loss(model.forward, rows)[0]
        for path in attached.paths:
            attached.layers[path].set_factors(trained[path])
        assert point.task_loss.value == pytest.approx(loss, rel=1e-5)
    tuned = deep.of(None)[1]
    for point in deep.points[2:]:
        assert point.task_change.value == pytest.approx(point.task_loss.value - tuned.task_loss.value, abs=1e-9)


def test_the_model_is_left_as_it_was(opened: Opened) -> None:
    model, rows, general = opened
    attached = model.attached
    assert attached is not None
    before = {name: value.clone() for name, value in model.base.model.state_dict().items()}
    try_update(model, rows, general, sources=SOURCES, deep=False, display=QUIET)
    after = model.base.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(layer.enabled and not layer._forward_hooks for layer in attached.layers.values())
    assert all(stand_in.enabled for stand_in in attached.stand_ins.values())


def test_a_modules_effect_is_what_its_matrices_make_of_what_reaches_it(opened: Opened, deep: Effect) -> None:
    model, rows, _ = opened
    path = "model.layers.1.mlp.down_proj"
    inputs: list[torch.Tensor] = []
    layer = model.base.model.get_submodule(path)
    attached = model.attached
    assert attached is not None
    hook = attached.layers[path].register_forward_hook(lambda module, args, y: inputs.append(args[0]))
    for stand_in in attached.stand_ins.values():
        stand_in.enabled = False
    try:
        with torch.no_grad():
            model.forward.rows(pack(rows))
    finally:
        hook.remove()
        for stand_in in attached.stand_ins.values():
            stand_in.enabled = True
    x_TN, weight = inputs[0].squeeze(0).double(), layer.base.weight.dense().double()  # type: ignore[union-attr, operator]
    delta = attached.layers[path].factors().dense().double()
    ratio_T = (x_TN @ delta.T).norm(dim=1) / (x_TN @ weight.T).norm(dim=1)
    assert deep.modules[path].value(TASK) == pytest.approx(float(ratio_T.mean()), rel=1e-3)
    size = float(delta.norm() / weight.norm())
    assert 0.6 * size < deep.modules[path].random < 1.1 * size


def test_tokens_are_the_labels_and_sorted_by_what_became_of_them(opened: Opened, deep: Effect) -> None:
    _, rows, _ = opened
    tokens = deep.tokens[TASK]
    assert tokens.labels == sum(int(row.loss_mask.sum()) for row in rows) and tokens.rows == len(rows)
    assert tokens.curve == sorted(tokens.curve)
    changes = [token.tuned_loss - token.base_loss for token in tokens.most_helped]
    assert changes == sorted(changes) and changes[0] == pytest.approx(tokens.curve[0], rel=1e-5)
    for token in tokens.most_helped:
        assert token.token in "ab<|im_end|>" and token.before.startswith("say ")
    kls = [token.kl for token in deep.tokens[OTHER].most_moved]
    assert kls == sorted(kls, reverse=True) and 0 < (deep.tokens[OTHER].half_of_kl or 0) <= 0.5


def test_time_that_does_not_suffice_leaves_out_whole_groups_and_says_so(opened: Opened) -> None:
    model, rows, general = opened
    attached = model.attached
    assert attached is not None
    trained = {path: layer.factors() for path, layer in attached.layers.items()}
    states, said = states_of(attached, trained, deep=True), Said()
    passes = pass_over(model, {TASK: rows, OTHER: general}, states, trained, Budget(10_000, 1e-6), said)
    assert not passes.states and len(passes.left_out) == 5  # four groups, and the rows of later rounds
    assert passes.rows[TASK].tokens > 0 < passes.rows[OTHER].tokens
    total, told = said.tasks["trying the update"]
    assert told[-1] == total


def test_a_page_without_states_can_be_drawn(deep: Effect) -> None:
    bare = replace(deep, points=deep.of(None), left_out=("lower ranks",))
    html = render(Page("run", "", of_effect(bare)))
    assert "lower ranks" in html and in_words(bare)


@pytest.fixture
def fresh(folder: Path) -> Iterator[Model]:
    model = open_model(folder / "base", dtype="float32", device="cpu")
    attached = attach(model.base.model, AdapterSpec(rank=2, magnitude=True))
    yield replace(model, attached=attached)
    discard(attached)


def test_dora_and_an_update_of_nothing(fresh: Model, opened: Opened) -> None:
    effect = try_update(fresh, *opened[1:], sources=SOURCES, deep=True, display=QUIET)
    assert not effect.of("scale", "rank") and effect.of("kind", "layer")
    assert all(point.kl.value == pytest.approx(0, abs=1e-6) for point in effect.points)
    json.dumps(effect.to_json(), allow_nan=False)
    assert "What it does" in render(Page("run", "", of_effect(effect)))


def test_full_fine_tuning_has_no_lower_rank(folder: Path) -> None:
    effect = effect_of(str(folder / "full"), deep=False, display=QUIET)
    assert effect.of("scale") and not effect.of("rank", "kind", "layer")


def test_a_run_is_tried_and_an_adapter_alone_says_why_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "QUICK", Budget(100, 60.0))
    adapter = shutil.copytree(folder / "one/adapter", tmp_path / "adapter")
    page = tmp_path / "page.html"
    code, out, _ = call("inspect", adapter, "--base", folder / "base", "--json", "-o", page)
    assert code == 0 and json.loads(out)["effect"] is None
    assert any("wasn't tried" in one["text"] for one in json.loads(out)["findings"])
    code, out, _ = call("inspect", adapter, folder / "train.jsonl", "--base", folder / "base", "--json", "-o", page)
    effect = json.loads(out)["effect"]
    assert code == 0 and effect["rows"]["task"]["source"].endswith("train.jsonl")
    assert {point["group"] for point in effect["points"]} == {None, "scale", "rank"}
    assert len(effect["modules"]) == 14 and ">Token by token</h2>" in page.read_text()


def test_what_was_asked_for_in_words_is_an_error_where_it_cannot_be(folder: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(folder / "one/adapter", tmp_path / "adapter")
    for more in ([tmp_path / "none.jsonl"], ["--deep"]):
        code, _, err = call("inspect", adapter, *more, "--base", folder / "base")
        assert code == 2 and len(err.strip().splitlines()) <= 5
    assert not (adapter / "report.html").exists()


def test_a_page_that_shows_more_is_not_replaced_by_one_that_shows_less(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "QUICK", Budget(100, 60.0))
    monkeypatch.setattr(effects, "DEEP", Budget(100, 60.0))
    page, rows = tmp_path / "page.html", folder / "train.jsonl"
    adapter, on_base = folder / "one/adapter", ["--base", folder / "base", "-o", page]
    assert call("inspect", adapter, rows, *on_base, "--deep")[0] == 0
    deep = page.read_bytes()
    for less in ([rows], []):
        code, _, err = call("inspect", adapter, *less, *on_base)
        assert code == 2 and "--deep" in err and page.read_bytes() == deep
    assert call("inspect", adapter, rows, *on_base, "--deep")[0] == 0
    page.unlink()
    assert call("inspect", adapter, rows, *on_base)[0] == 0
    tried = page.read_bytes()
    code, _, err = call("inspect", adapter, *on_base)  # without rows there is nothing to try it on
    assert code == 2 and "-o page.html" in err and page.read_bytes() == tried
    assert call("inspect", adapter, rows, *on_base)[0] == 0
