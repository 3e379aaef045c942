"""From a run file's data section to examples: splits, counts, and errors instead of empty or wasted runs."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy

from deltaw.config import DataConfig
from deltaw.data import prepare as preparing
from deltaw.data.prepare import prepare, prepare_held_out
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from tests.tiny import Said

RENDERER = Renderer(toy("chatml"))


def write(tmp_path, values, name="train.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return str(path)


def pairs(count, start=0) -> list[dict]:
    return [{"prompt": f"{number} ->", "completion": f" {number * 7}"} for number in range(start, start + count)]


def texts(examples) -> list[str]:
    return [RENDERER.decode(example.tokens) for example in examples]


def test_everything_is_used_in_file_order(tmp_path):
    prepared = prepare(DataConfig(train=write(tmp_path, pairs(1100))), RENDERER)
    assert texts(prepared.train) == [pair["prompt"] + pair["completion"] for pair in pairs(1100)]
    assert len(prepared.eval) == 0
    report = prepared.report
    assert (report.rows_read, report.train_rows, report.eval_rows, report.unusable) == (1100, 1100, 0, 0)
    assert report.tokens == sum(len(example.tokens) for example in prepared.train)
    assert report.supervised_tokens == sum(example.loss_mask.sum() for example in prepared.train)
    assert report.share == report.supervised_tokens / report.tokens
    assert report.warnings == []
    json.dumps(dataclasses.asdict(report))


def test_one_row_is_enough(tmp_path):
    assert len(prepare(DataConfig(train=write(tmp_path, pairs(1))), RENDERER).train) == 1


@pytest.mark.parametrize("content", [[], ["", "  "]])
def test_an_empty_set_is_an_error(tmp_path, content):
    with pytest.raises(InputError, match="no rows"):
        prepare(DataConfig(train=write(tmp_path, content)), RENDERER)


def test_held_out_rows_are_random_and_independent_of_the_order(tmp_path):
    config = DataConfig(train=write(tmp_path, pairs(100)), eval=20)
    prepared = prepare(config, RENDERER)
    assert (len(prepared.train), len(prepared.eval)) == (80, 20)
    assert sorted(texts(prepared.train) + texts(prepared.eval)) == sorted(
        texts(prepare(DataConfig(train=config.train), RENDERER).train)
    )
    turned = DataConfig(train=write(tmp_path, pairs(100)[::-1], "turned.jsonl"), eval=20)
    assert texts(prepare(turned, RENDERER).eval) == texts(prepared.eval)[::-1]
    swapped = [dict(reversed(pair.items())) for pair in pairs(100)]
    keys = DataConfig(train=write(tmp_path, swapped, "swapped.jsonl"), eval=20)
    assert texts(prepare(keys, RENDERER).eval) == texts(prepared.eval)
    other = prepare(config.model_copy(update={"seed": 1}), RENDERER)
    assert texts(other.eval) != texts(prepared.eval)
    assert prepare(config, RENDERER).fingerprint == prepared.fingerprint != other.fingerprint


def test_limit_takes_rows_at_random_and_renders_no_others(tmp_path):
    rendered = []

    class Counting(Renderer):
        def render_all(self, documents, origins):
            rendered.extend(origins)
            return super().render_all(documents, origins)

    config = DataConfig(train=write(tmp_path, pairs(3000)), eval=10, limit=50)
    prepared = prepare(config, Counting(toy("chatml")))
    assert (len(prepared.train), len(prepared.eval)) == (50, 10)
    numbers = [int(example.origin.split(":")[1]) for example in prepared.train]
    assert numbers == sorted(numbers)
    assert numbers[-1] - numbers[0] > 1500
    assert len(rendered) <= preparing.CHUNK
    smaller = prepare(config.model_copy(update={"limit": 20}), RENDERER)
    assert texts(smaller.eval) == texts(prepared.eval)
    assert set(texts(smaller.train)) < set(texts(prepared.train))


def rows_that_are_used_or_not(draw) -> list:
    """Good rows, copies of them, rows without an answer, rows that are too long, lines that are no JSON."""
    good = st.integers(0, 30).map(lambda n: {"prompt": f"{n} ->", "completion": f" {n * 7}"})
    bad = st.sampled_from([{"prompt": "1 ->"}, {"prompt": "x" * 300, "completion": " y"}, "{"])
    return draw(st.lists(good, min_size=1, max_size=30)) + draw(st.lists(bad, max_size=4))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 3), st.integers(1, 12) | st.none(), st.sampled_from(["drop", "truncate"]))
def test_held_out_rows_alone_are_the_ones_that_a_whole_preparation_holds_out(
    tmp_path_factory, data, seed, count, too_long
):
    folder = tmp_path_factory.mktemp("alone")
    train = write(folder, rows_that_are_used_or_not(data.draw))
    held_out = count or write(folder, rows_that_are_used_or_not(data.draw), "eval.jsonl")
    options = {"max_length": 64, "too_long": too_long, "bad_rows": data.draw(st.sampled_from([0.0, 0.1, 1.0]))}
    config = DataConfig(train=train, eval=held_out, seed=seed, **options)
    try:
        whole = prepare(config, RENDERER).eval
    except InputError:
        return  # a run that never began
    alone = prepare_held_out(config, RENDERER)
    assert [(row.origin, *row.tokens, *row.loss_mask) for row in alone] == [
        (row.origin, *row.tokens, *row.loss_mask) for row in whole
    ]


def test_held_out_rows_alone_cost_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "CHUNK", 10)
    rendered = []

    class Counting(Renderer):
        def render_all(self, documents, origins):
            rendered.extend(origins)
            return super().render_all(documents, origins)

    rows = prepare_held_out(DataConfig(train=write(tmp_path, pairs(100)), eval=20), Counting(toy("chatml")))
    assert len(rows) == len(rendered) == 20
    own = DataConfig(train="none.jsonl", eval=write(tmp_path, pairs(9), "own.jsonl"))
    assert len(prepare_held_out(own, RENDERER)) == 9  # what it was trained on needn't be there any more


def test_held_out_rows_alone_are_refused_where_they_would_be(tmp_path):
    few = DataConfig(train=write(tmp_path, pairs(5)), eval=9)
    bad = DataConfig(
        train=write(tmp_path, [*pairs(50), *[{"prompt": f"{number} ->"} for number in range(40)]], "bad.jsonl"), eval=20
    )
    for config in (few, bad):
        with pytest.raises(InputError) as whole:
            prepare(config, RENDERER)
        with pytest.raises(InputError) as alone:
            prepare_held_out(config, RENDERER)
        assert alone.value.what == whole.value.what


def test_an_eval_file_of_its_own_and_the_overlap(tmp_path):
    other = write(tmp_path, pairs(10, start=5), "eval.jsonl")
    config = DataConfig(train=write(tmp_path, [*pairs(10), *pairs(3)]), eval=other)
    prepared = prepare(config, RENDERER)
    assert (len(prepared.train), len(prepared.eval)) == (13, 10)
    assert (prepared.report.duplicates, prepared.report.overlap) == (3, 5)
    assert prepared.report.warnings == [
        "3 training rows are copies of another",
        "5 held-out rows are also trained on",
    ]


@pytest.mark.parametrize("eval_rows", [5, 6, 500])
def test_too_few_rows_to_hold_out_so_many(tmp_path, eval_rows):
    with pytest.raises(InputError, match=r"5 usable rows, and data\.eval takes"):
        prepare(DataConfig(train=write(tmp_path, pairs(5)), eval=eval_rows), RENDERER)


def test_unusable_rows_are_counted_and_tolerated_up_to_a_share(tmp_path):
    bad = ["{", {"prompt": "p", "completion": ""}, {"text": "t"}, {"prompt": "\ud800", "completion": "c"}]
    config = DataConfig(train=write(tmp_path, [*pairs(96), *bad]), bad_rows=0.05)
    prepared = prepare(config, RENDERER)
    assert prepared.report.unusable == 4
    lines = [problem.split(": ")[0] for problem in prepared.report.problems]
    assert lines == [f"train.jsonl:{number}" for number in (97, 98, 99, 100)]
    assert len(prepared.train) == 96
    assert prepared.report.warnings[0].startswith("4 rows can't be used; the first: train.jsonl:97: not JSON")
    with pytest.raises(InputError) as raised:
        prepare(config.model_copy(update={"bad_rows": 0.03}), RENDERER)
    assert "4 of 100 rows can't be used" in str(raised.value)
    assert "data.bad_rows" in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 5


@pytest.mark.parametrize("values", [["{", "{"], [{"text": ""}], [{"messages": [{"role": "user", "content": "q"}]}]])
def test_no_usable_row_is_an_error_whatever_is_tolerated(tmp_path, values):
    with pytest.raises(InputError, match=r"train.jsonl:1"):
        prepare(DataConfig(train=write(tmp_path, values), bad_rows=1.0), RENDERER)


def test_what_the_rows_hold_cannot_break_the_message(tmp_path):
    evil = {"messages": [{"role": "\x1b[2J" + "a\n" * 500 + "\ud800", "content": "q"}]}
    with pytest.raises(InputError) as raised:
        prepare(DataConfig(train=write(tmp_path, [evil] * 9)), RENDERER)
    message = str(raised.value)
    message.encode()
    assert "\x1b" not in message
    assert len(message.splitlines()) <= 5
    assert max(map(len, message.splitlines())) < 300


@pytest.mark.parametrize("place", ["x", "tool_calls", "tools"])
@pytest.mark.parametrize("depth", [100, 200, 240, 280, 320, 400, 480, 900])
def test_rows_nested_ever_deeper_are_used_or_refused(tmp_path, place, depth):
    deep = '{"a": ' * depth + "1" + "}" * depth
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    row = json.dumps(good | {"tools": ["deep"]} if place == "tools" else good).replace('"deep"', deep)
    row = row.replace('"q"', f'"q", "x": {deep}' if place == "x" else '"q"')
    row = row.replace('"a"}]', f'"a", "tool_calls": [{{"arguments": {deep}}}]}}]' if place == "tool_calls" else '"a"}]')
    report = prepare(DataConfig(train=write(tmp_path, [good, row]), bad_rows=0.5), RENDERER).report
    assert report.train_rows + report.unusable == 2


def test_rows_nested_deeper_than_python_can_follow(tmp_path):
    deep = '{"messages": [{"role": "user", "content": "q", "x": ' + "[" * 600 + "]" * 600 + "},"
    deep += '{"role": "assistant", "content": "a"}]}'
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    prepared = prepare(DataConfig(train=write(tmp_path, [good, deep]), bad_rows=0.5), RENDERER)
    assert len(prepared.train) == 1
    assert "nested too deeply" in prepared.report.problems[0]


def test_too_long_rows_are_dropped_or_truncated_and_counted(tmp_path):
    long_answer = {"prompt": "p", "completion": "x y " * 50}
    long_prompt = {"prompt": "x y " * 50, "completion": "c"}
    config = DataConfig(train=write(tmp_path, [*pairs(3), long_answer, long_prompt]), max_length=20)
    dropped = prepare(config, RENDERER)
    assert len(dropped.train) == 3
    assert (dropped.report.too_long_dropped, dropped.report.truncated, dropped.report.untrained) == (2, 0, 0)
    assert dropped.report.too_long == ["train.jsonl:4", "train.jsonl:5"]
    cut = prepare(config.model_copy(update={"too_long": "truncate"}), RENDERER)
    assert (cut.report.too_long_dropped, cut.report.truncated, cut.report.untrained) == (0, 1, 1)
    assert len(cut.train) == 4
    assert len(cut.train[-1].tokens) == 20
    assert all(example.loss_mask.any() for example in cut.train)
    assert "1 of 4 rows train no end-of-turn token" in cut.report.warnings[0]


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_only_rows_that_are_too_long_is_an_error(tmp_path, too_long):
    config = DataConfig(
        train=write(tmp_path, [{"prompt": "x y " * 50, "completion": "c"}]), max_length=5, too_long=too_long
    )
    with pytest.raises(InputError, match=r"longer than data\.max_length 5"):
        prepare(config, RENDERER)


@given(length=st.integers(2, 60), on=st.sampled_from(["auto", "all"]))
@settings(max_examples=30, deadline=None)
def test_no_example_trains_nothing_or_its_first_token(tmp_path_factory, length, on):
    path = write(tmp_path_factory.mktemp("rows"), [*pairs(5), {"prompt": "a b " * 9, "completion": " c d" * 9}])
    config = DataConfig(train=path, max_length=length, too_long="truncate", train_on=on)
    try:
        prepared = prepare(config, Renderer(toy("bos"), train_on=on))
    except InputError:
        assert length < 8
        return
    for example in prepared.train:
        assert len(example.tokens) <= length
        assert example.loss_mask.any()
        assert not example.loss_mask[0]


def test_untrained_turns_are_reported(tmp_path):
    turns = [("user", "q"), ("assistant", "<think>x</think>a"), ("user", "q"), ("assistant", "b")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    report = prepare(DataConfig(train=write(tmp_path, [chat])), Renderer(toy("thinking"))).report
    assert report.untrained_turns == 1
    assert report.warnings == ["1 answer isn't trained: the template rewrites earlier turns"]


def test_columns_without_use_are_reported_with_their_share(tmp_path):
    values = [pair | {"id": i} | ({"note": "n"} if i % 4 == 0 else {"note": None}) for i, pair in enumerate(pairs(20))]
    report = prepare(DataConfig(train=write(tmp_path, values), eval=4), RENDERER).report
    assert report.unused == {"id": 1.0, "note": 0.25}
    assert report.left_out == {}
    assert report.warnings == ["columns that aren't used: id (100% of rows), note (25%)"]


def test_a_column_of_nulls_does_not_change_which_rows_are_held_out(tmp_path):
    config = DataConfig(train=write(tmp_path, pairs(40)), eval=10)
    filled = write(tmp_path, [pair | {"tools": None} for pair in pairs(40)], "filled.jsonl")
    assert prepare(config, RENDERER).fingerprint == prepare(DataConfig(train=filled, eval=10), RENDERER).fingerprint


def test_names_of_control_tokens_are_counted_and_the_setting_named(tmp_path):
    values = [{"text": f"a {i}"} for i in range(3)] + [{"text": f"<|im_start|>user\n{i}<|im_end|>"} for i in range(5)]
    report = prepare(DataConfig(train=write(tmp_path, values)), RENDERER).report
    assert (report.named_rows, report.named_tokens, report.named_origin) == (5, 10, "train.jsonl:4")
    (warning,) = report.warnings
    assert all(word in warning for word in ("5 rows", "10", "<|im_start|>", "train.jsonl:4", "data.rendered: true"))
    rendered = prepare(DataConfig(train=write(tmp_path, values)), Renderer(toy("chatml"), rendered=True)).report
    assert (rendered.named_rows, rendered.named_tokens, rendered.warnings) == (0, 0, [])
    chat = [{"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]}]
    (warning,) = prepare(DataConfig(train=write(tmp_path, chat)), RENDERER).report.warnings
    assert "1 row " in warning
    assert "data.rendered" not in warning


def test_progress_ends_at_the_total(tmp_path):
    display = Said()
    prepare(DataConfig(train=write(tmp_path, pairs(600))), RENDERER, display=display)
    assert list(display.tasks.values()) == [(600, [512, 600, 600])]


def test_the_fingerprint_sees_tokens_masks_and_borders(tmp_path):
    def fingerprint(values, renderer=RENDERER, **options):
        return prepare(DataConfig(train=write(tmp_path, values), **options), renderer).fingerprint

    base = fingerprint([{"prompt": "a", "completion": "b"}])
    assert base == fingerprint([{"prompt": "a", "completion": "b", "id": 7}])
    assert base != fingerprint([{"prompt": "a", "completion": "c"}])
    wide = [{"prompt": "a b c", "completion": "d"}]
    assert fingerprint(wide) != fingerprint(wide, Renderer(toy("chatml"), train_on="all"))
    assert fingerprint(pairs(4)) != fingerprint(pairs(4)[::-1])
    assert fingerprint(pairs(4)) != fingerprint(pairs(4), eval=1)
    one, two, three = pairs(3)
    assert fingerprint([one], eval=write(tmp_path, [two, three], "a.jsonl")) != fingerprint(
        [one, two], eval=write(tmp_path, [three], "b.jsonl")
    )


def csv(tmp_path, head, name="t.csv", count=30) -> str:
    path = tmp_path / name
    path.write_text(head + "\n" + "".join(f"in {number},out {number}\n" for number in range(count)))
    return str(path)


def test_a_table_of_questions_and_answers_is_a_chat_on_a_base_with_a_template(tmp_path):
    prepared = prepare(DataConfig(train=csv(tmp_path, "Question, ANSWER "), eval=5), RENDERER)
    assert prepared.asking.chat and len(prepared.eval) == 5 and prepared.report.glued_rows == 0
    first = prepared.train[0]
    number = int(first.origin.split(":")[1]) - 1
    assert RENDERER.decode(first.tokens[first.loss_mask], skip_special=False) == f"out {number}<|im_end|>"
    (note,) = prepared.report.notes
    assert "data.form: completion" in note
    plain = prepare(DataConfig(train=csv(tmp_path, "Question, ANSWER ")), Renderer(toy("plain")))
    assert not plain.asking.chat and plain.report.notes == [] and plain.report.glued_rows == 0
    asked = Renderer(toy("plain")).prompt_ids("in 0")
    assert plain.train[0].tokens[: len(asked)].tolist() == asked and plain.train[0].loss_mask.sum() > 1


def test_prompt_and_completion_that_meet_without_a_blank_are_told_of(tmp_path):
    glued = csv(tmp_path, "prompt,completion")
    prepared = prepare(DataConfig(train=glued), RENDERER)
    assert texts(prepared.train)[0] == "in 0out 0" and not prepared.asking.chat
    assert prepared.report.glued_rows == 30
    (warning,) = [warning for warning in prepared.report.warnings if "blank" in warning]
    assert "data.join" in warning and "data.form: chat" in warning
    for join in (" ", "\n", " -> "):
        apart = prepare(DataConfig(train=glued, join=join), RENDERER)
        assert texts(apart.train)[0] == f"in 0{join}out 0" and apart.report.warnings == []
    for value in ({"prompt": "你好吗？", "completion": "我很好"}, {"prompt": "", "completion": "a"}):
        assert prepare(DataConfig(train=write(tmp_path, [value])), RENDERER).report.glued_rows == 0
    ready = {"prompt": "<|im_start|>user<|im_end|>", "completion": "a"}
    config = DataConfig(train=write(tmp_path, [ready]), rendered=True)
    assert prepare(config, Renderer(toy("chatml"), rendered=True)).report.glued_rows == 0


def test_named_columns_hold_for_a_file_of_held_out_rows_too(tmp_path):
    names = {"prompt": "frage", "completion": "antwort"}
    train = csv(tmp_path, "frage,antwort")
    for head in ("frage,antwort", "prompt,completion"):
        config = DataConfig(train=train, eval=csv(tmp_path, head, "e.csv", 4), columns=names)
        assert prepare(config, RENDERER).report.overlap == 4
        assert len(prepare_held_out(config, RENDERER)) == 4
    with pytest.raises(InputError, match=r"data\.columns\.prompt: e\.csv"):
        prepare(DataConfig(train=train, eval=csv(tmp_path, "x,antwort", "e.csv"), columns=names), RENDERER)


def test_what_is_too_long_is_answered_with_what_would_help(tmp_path):
    long_prompt = {"prompt": "x y " * 50, "completion": "c"}
    config = DataConfig(train=write(tmp_path, [long_prompt, *pairs(3)]), max_length=20)
    (warning,) = prepare(config, RENDERER).report.warnings
    enough = int(warning.split("data.max_length: ")[1].split()[0])
    assert prepare(config.model_copy(update={"max_length": enough}), RENDERER).report.warnings == []
    only = DataConfig(train=write(tmp_path, [long_prompt]), max_length=20)
    with pytest.raises(InputError) as dropped:
        prepare(only, RENDERER)
    with pytest.raises(InputError) as cut:
        prepare(only.model_copy(update={"too_long": "truncate"}), RENDERER)
    assert "truncate" in dropped.value.fix and "truncate" not in cut.value.fix
