"""Several sources, their weights, patterns, shares held out, and what a hub that can't be reached answers."""

import json
import sys
import time
import types
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy

from deltaw.config import DataConfig, parse_config
from deltaw.config.own_rows import at_home, rows_to_keep, with_names
from deltaw.data.prepare import prepare, prepare_held_out
from deltaw.data.preview import first, summary
from deltaw.data.read import read_rows
from deltaw.data.render import Renderer
from deltaw.data.sources import visits
from deltaw.errors import InputError

RENDERER = Renderer(toy("chatml"))


def pairs(count: int, word: str = "a") -> list[dict]:
    return [{"prompt": f"{word} {n} ->", "completion": f" {n * 7}"} for n in range(count)]


def write(folder, rows, name: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


WEIGHTS = st.sampled_from([0.01, 0.1, 0.5, 0.7, 1.0, 1.1, 2.0, 2.5, 3.0])


@given(st.integers(1, 400), WEIGHTS)
def test_a_weight_is_how_often_rows_are_seen(count, weight):
    seen = visits(count, weight)
    assert len(seen) == count and max(seen) - min(seen) <= 1
    assert sum(seen) == max(1, int(Fraction(repr(weight)) * count))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), WEIGHTS, WEIGHTS, st.integers(0, 2), st.sampled_from([None, 1, 2, 0.2]))
def test_weights_repeat_rows_and_lose_none_that_is_held_out(tmp_path_factory, m, n, one, other, seed, held_out):
    folder = tmp_path_factory.mktemp("weights")
    sources = [
        {"path": write(folder, pairs(m), "a/t.jsonl"), "weight": one},
        {"path": write(folder, pairs(n, "b"), "b/t.jsonl"), "weight": other},
    ]
    config = DataConfig(train=sources, eval=held_out, seed=seed)
    plain = config.model_copy(update={"train": tuple(source["path"] for source in sources)})
    try:
        dataset, unweighted = prepare(config, RENDERER), prepare(plain, RENDERER)
    except InputError:
        assert isinstance(held_out, int) and held_out >= m + n
        return
    assert prepare(config, RENDERER).fingerprint == dataset.fingerprint
    held = [row.origin for row in dataset.eval]
    assert held == [row.origin for row in unweighted.eval] == [row.origin for row in prepare_held_out(config, RENDERER)]
    assert len(held) == (held_out if isinstance(held_out, int) else config.held_out_of(m + n))
    for source, weight in zip(dataset.report.sources, (one, other), strict=True):
        rows = [row.origin for row in unweighted.train if row.origin.startswith(source.name)]
        seen = [row.origin for row in dataset.train if row.origin.startswith(source.name)]
        assert set(seen) <= set(rows) and not set(seen) & set(held)
        assert len(seen) == source.visits == (max(1, int(Fraction(repr(weight)) * len(rows))) if rows else 0)
    assert sum(source.share for source in dataset.report.sources) == pytest.approx(1)
    assert dataset.report.duplicates == 0


def test_one_source_in_a_list_is_that_source(tmp_path):
    path = write(tmp_path, pairs(30), "t.jsonl")
    prints = {
        prepare(DataConfig(train=train, eval=5, limit=20), RENDERER).fingerprint
        for train in (path, [path], [{"path": path}], [{"path": path, "weight": 1.0}], f"{tmp_path}/*.jsonl")
    }
    assert len(prints) == 1


def test_sources_of_other_forms_stand_beside_each_other(tmp_path):
    chats = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    sources = [write(tmp_path, pairs(3), "p.jsonl"), write(tmp_path, chats * 2, "c.jsonl")]
    dataset = prepare(DataConfig(train=sources), RENDERER)
    assert dataset.asking.chat
    assert [source.train_rows for source in dataset.report.sources] == [3, 2]
    assert [row.origin for row in first(dataset, 3)] == ["p.jsonl:1", "c.jsonl:1", "p.jsonl:2"]
    assert len(summary(dataset.report)) > len(summary(prepare(DataConfig(train=sources[0]), RENDERER).report))


def test_a_share_of_the_rows_is_held_out(tmp_path):
    path = write(tmp_path, pairs(25), "t.jsonl")
    counts = {share: len(prepare(DataConfig(train=path, eval=share), RENDERER).eval) for share in (0.01, 0.1, 0.2, 0.9)}
    assert counts == {0.01: 1, 0.1: 2, 0.2: 5, 0.9: 22}
    assert len(prepare(DataConfig(train=path, eval=0.2, limit=10), RENDERER).eval) == 2
    separate = DataConfig(train=path, eval=[write(tmp_path, pairs(3, "e"), "e.jsonl")])
    assert len(prepare(separate, RENDERER).eval) == len(prepare_held_out(separate, RENDERER)) == 3
    with pytest.raises(InputError, match=r"data\.eval"):
        prepare(DataConfig(train=write(tmp_path, pairs(1), "one.jsonl"), eval=0.5), RENDERER)


def test_patterns(tmp_path):
    for name in ("d/a.jsonl", "d/b.jsonl", "d/deep/c.jsonl", "d/.hidden.jsonl", "d/[x].jsonl"):
        write(tmp_path, pairs(1, name), name)
    (tmp_path / "d/notes.pdf").write_text("x")

    def origins(pattern: str) -> list[str]:
        return [row.origin for row in read_rows(f"{tmp_path}/{pattern}")[0]]

    assert origins("d/?.jsonl") == ["a.jsonl:1", "b.jsonl:1"]
    assert origins("d/**") == origins("d") == ["[x].jsonl:1", "a.jsonl:1", "b.jsonl:1", "deep/c.jsonl:1"]
    assert origins("d/**/c.jsonl") == ["deep/c.jsonl:1"]
    assert origins("*/deep") == ["d/deep/c.jsonl:1"]
    assert origins("d/[x].jsonl") == ["[x].jsonl:1"]  # what exists under the very name is meant
    with pytest.raises(InputError, match=r"a\.jsonl"):
        origins("d/*.csv")
    with pytest.raises(InputError, match="no folder"):
        origins("e/*.csv")
    with pytest.raises(InputError, match="data file"):
        origins("d/*.pdf")


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ([], "empty"),
        (["a", "a"], "twice"),
        (["a", {"x": 1}], "item 2"),
        ([{"path": "a", "weight": 0}], "weight"),
        ([{"path": "a", "weight": True}], "weight"),
        ([{"path": ""}], "path"),
        ([3], "item 1"),
        (3, "source"),
        ("", "source"),
        ("$NOT_SET_AT_ALL/x", "NOT_SET_AT_ALL"),
        ([{"text": float("nan")}], "row 1"),
        ([{"text": object()}], "row 1"),
    ],
)
def test_what_is_no_source_is_refused_with_its_place(value, wrong):
    with pytest.raises(InputError, match=wrong):
        DataConfig(train=value)


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.0, 1.5, True, []])
def test_what_is_no_number_of_held_out_rows_is_refused(value):
    with pytest.raises(InputError, match="eval"):
        DataConfig(train="t.jsonl", eval=value)


def test_settings_survive_being_written(tmp_path, monkeypatch):
    monkeypatch.setenv("ROWS", "/rows")
    for train in ("$ROWS/a$$b", ["~/a", {"path": "$ROWS/*.csv", "weight": 0.5}], [{"text": "$ROWS"}]):
        config = parse_config({"base": "b", "output": "o", "data": {"train": train, "eval": 0.25}})
        assert parse_config(config.model_dump(mode="json")) == config
    assert config.data.train == ({"text": "$ROWS"},)


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "utf-16"])
def test_rows_that_were_given_are_kept_with_the_run(tmp_path, encoding):
    rows = [{"prompt": f"é {n} ->", "completion": f" {n}"} for n in range(9)]
    given = {"base": "b", "output": str(tmp_path / "r"), "data": {"train": rows, "eval": 2, "encoding": encoding}}
    config = parse_config(given)
    rows[0]["prompt"] = "changed afterwards"
    before = prepare(config.data, RENDERER)
    (tmp_path / "r/data").mkdir(parents=True)
    for name, text in rows_to_keep(config.data).items():
        (tmp_path / "r" / name).write_bytes(text.encode())
    named = with_names(config)
    assert prepare(named.data, RENDERER).fingerprint == before.fingerprint
    (tmp_path / "r").rename(tmp_path / "moved")
    moved = at_home(named, tmp_path / "moved")
    assert prepare(moved.data, RENDERER).fingerprint == before.fingerprint
    assert at_home(moved, tmp_path) == moved


def test_a_content_in_text_parts_is_their_text(tmp_path):
    def chat(content):
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": content}]}

    parts = [{"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": "b"}]
    one, other = (prepare(DataConfig(train=[chat(content)]), RENDERER) for content in ("a\nb", parts))
    assert one.fingerprint == other.fingerprint


def test_a_hub_that_cannot_be_reached_answers_at_once(monkeypatch, tmp_path):
    def never(*_, **__):
        raise AssertionError("asked the library")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=never))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(InputError, match="can't be reached"):
        read_rows("org/name")
    assert time.monotonic() - began < 5
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda name, split: 1 / 0)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        read_rows("org/name")


def test_a_name_that_could_be_both_says_which(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, pairs(1), "org/name/t.jsonl")
    notes: list[str] = []
    rows, _ = read_rows("org/name", note=notes.append)
    assert len(rows) == len(notes) == 1
