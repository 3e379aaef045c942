"""The same rows as JSON lines, as Parquet and as a hub set are the same examples: Arrow's fillings aren't trained."""

import json
import sys
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import CHATML, toy

from deltaw.config import DataConfig
from deltaw.data.prepare import prepare
from deltaw.data.read import read_rows
from deltaw.data.render import Renderer

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML.replace(
    "message.content +", "message.content + (message.tool_calls | tojson if message.tool_calls else '') +"
)
ARGUMENTS = {"port": st.sampled_from(["Port A", ""]), "dock": st.integers(0, 9), "wet": st.booleans()}
SCHEMAS = {"port": {"type": "string"}, "dock": {"type": "integer", "minimum": 0}, "wet": {"enum": ["yes", "no"]}}


@st.composite
def chats(draw):
    """A chat with tools; keys stand in one order, since a column of Arrow has one for all rows."""
    names = sorted(draw(st.sets(st.sampled_from(sorted(ARGUMENTS)))))
    properties = {name: SCHEMAS[name] for name in names}
    tool = {"name": "f", "parameters": {"type": "object", **({"properties": properties} if names else {})}}
    messages = [{"role": "user", "content": draw(st.sampled_from(["How deep?", "<|im_end|>"]))}]
    if draw(st.booleans()):
        arguments = {name: draw(ARGUMENTS[name]) for name in names}
        call = {"type": "function", "function": {"name": "f", **({"arguments": arguments} if names else {})}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "content": "7", **draw(st.sampled_from([{}, {"name": "f"}]))})
    messages.append({"role": "assistant", "content": draw(st.sampled_from(["It is 7.", "Deep."]))})
    return {"messages": messages, **({"tools": [tool]} if draw(st.booleans()) else {})}


def renderer(tmp_path):
    (tmp_path / "t.jinja").write_text(TOOLS)
    return Renderer(toy("chatml"), template=str(tmp_path / "t.jinja"))


def first():
    """A row that has every field, in order."""
    call = {"name": "f", "arguments": {"dock": 1, "port": "p", "wet": True}}
    turn = {"role": "assistant", "content": "a", "tool_calls": [{"type": "function", "function": call}], "name": "n"}
    parameters = {"type": "object", "properties": {name: SCHEMAS[name] for name in sorted(SCHEMAS)}}
    return {"messages": [{"role": "user", "content": "q"}, turn], "tools": [{"name": "f", "parameters": parameters}]}


@given(rows=st.lists(chats(), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_parquet_gives_the_examples_of_json_lines(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    rows = [first(), *rows]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "t.parquet")
    by = renderer(folder)
    one, other = (prepare(DataConfig(train=str(folder / f"t.{kind}")), by) for kind in ("jsonl", "parquet"))
    assert one.fingerprint == other.fingerprint
    assert (one.report.unused, one.report.left_out) == (other.report.unused, other.report.left_out)


def filled(value):
    """What Arrow makes of two rows of which only one has `dock`."""
    return arrow.Table.from_pylist([value, {"m": [{"a": {"dock": 1, "also": [1]}, "b": "x"}]}]).to_pylist()[0]


def test_nulls_inside_objects_are_taken_as_lacking(monkeypatch, tmp_path):
    value = {"m": [{"a": {"port": "p"}}], "n": None}
    assert filled(value)["m"] == [{"a": {"port": "p", "dock": None, "also": None}, "b": None}]
    hub = types.SimpleNamespace(load_dataset=lambda name, split: [filled(value)])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    (row,), _ = read_rows("org/name")
    assert row.value == value
    (tmp_path / "t.jsonl").write_text(json.dumps({"m": [{"a": None, "b": [None]}]}))
    (row,), _ = read_rows(str(tmp_path / "t.jsonl"))
    assert row.value == {"m": [{"a": None, "b": [None]}]}


def test_a_map_is_an_object_and_keeps_its_nulls(tmp_path):
    kind = arrow.list_(
        arrow.struct({"arguments": arrow.map_(arrow.string(), arrow.int64()), "x": arrow.list_(arrow.int64())})
    )
    column = arrow.array(
        [[{"arguments": [("dock", 3), ("port", None)], "x": [1, None]}, {"arguments": [], "x": None}]], kind
    )
    parquet.write_table(arrow.table({"calls": column}), tmp_path / "t.parquet")
    (row,), _ = read_rows(str(tmp_path / "t.parquet"))
    assert row.value == {"calls": [{"arguments": {"dock": 3, "port": None}, "x": [1, None]}, {"arguments": {}}]}


def test_arguments_as_text_give_the_same_tokens(tmp_path):
    by, examples = renderer(tmp_path), []
    for arguments in ({"dock": 3}, '{"dock": 3}', '{"dock":3}'):
        call = {"function": {"name": "f", "arguments": arguments}}
        row = {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [call]}]
        }
        (tmp_path / "t.jsonl").write_text(json.dumps(row))
        examples += prepare(DataConfig(train=str(tmp_path / "t.jsonl")), by).train
    assert len({example.tokens.tobytes() for example in examples}) == 1
    assert '{"dock": 3}' in by.decode(examples[0].tokens)


def test_rows_that_went_through_a_hub_set_are_those_of_json_lines(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    values = [first(), {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    values[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["also"] = None
    values[1]["tools"] = [{"name": "g", "parameters": {"type": "object", "required": ["x"]}}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.load_dataset(
        "json", data_files=str(tmp_path / "t.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    table.to_parquet(str(tmp_path / "t.parquet"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    for source in ("t.parquet", "t.jsonl"):
        rows, problems = read_rows(str(tmp_path / source))
        assert not problems
        assert [row.value for row in rows] == [row.value for row in read_rows("org/name")[0]]
