"""Every common shape of preference data gives the same answers, and a pair is never torn apart."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.base.parts import CHOSEN, DESIRABLE, PLAIN, REJECTED, UNDESIRABLE
from deltaw.config import DataConfig
from deltaw.data.dataset import Dataset
from deltaw.data.example import Example
from deltaw.data.loader import Loader, LoaderState
from deltaw.data.prepare import prepare, prepare_held_out
from deltaw.data.render import Renderer
from deltaw.data.weighed import mismatched
from deltaw.errors import InputError
from tests.data.toys import toy

Q, A, B = "Is it?", "Yes.", "No, never."
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", Q), ("assistant", A), ("assistant", B)))
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS: list[dict[str, Any]] = [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": A, "rejected": B},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": Q, "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # as in ultrafeedback_binarized
    {"prompt": Q, "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    {"question": Q, "chosen": A, "rejected": B},
    {"instruction": Q, "chosen": A, "rejected": B},
    {"messages": [USER], "chosen": A, "rejected": B},
    {"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": A},
     "rejected": {"from": "gpt", "value": B}},
]  # fmt: skip


def dataset(rows: list[dict[str, Any]], shape: Any = "pairs", kind: str = "chatml", **config: Any) -> Dataset:
    return prepare(DataConfig(train=rows, **config), Renderer(toy(kind), shape=shape))  # type: ignore[arg-type]


def texts(rows: Any, kind: str = "chatml") -> list[tuple[str, str, int]]:
    """(what is given, what is trained, which part) of each example."""
    decode = Renderer(toy(kind)).decode
    cut = [int(np.argmax(row.loss_mask)) for row in rows]
    return [
        (decode(row.tokens[:n], False), decode(row.tokens[n:][row.loss_mask[n:]], False), row.part)
        for row, n in zip(rows, cut, strict=True)
    ]


@pytest.mark.parametrize("row", CHATS, ids=lambda row: "+".join(row))
def test_every_shape_of_chat_gives_the_same_pair(row: dict[str, Any]) -> None:
    plain = dataset([{"messages": [USER, GOOD]}, {"messages": [USER, BAD]}], "one")
    chosen, rejected = texts(dataset([row]).train)
    assert [chosen[:2], rejected[:2]] == [one[:2] for one in texts(plain.train)]
    assert (chosen[2], rejected[2]) == (CHOSEN, REJECTED)
    assert chosen[0] == rejected[0]


def test_turns_before_the_answer_and_a_system_prompt_are_given() -> None:
    before = [SYSTEM, USER, BAD, {"role": "user", "content": "Sure?"}]
    row = {"chosen": [*before, GOOD], "rejected": [*before, BAD]}
    (given, wanted, _), (other, _, _) = texts(dataset([row]).train)
    assert given == other and B in given and "Be brief." in given and wanted.startswith(A)
    column = {"system": "Be brief.", "question": Q, "chosen": A, "rejected": B}
    assert "Be brief." in texts(dataset([column]).train)[0][0]


def test_texts_are_taken_as_they_stand_and_cut_where_they_part() -> None:
    laid_out = {"prompt": "Q: Is it?\nA:", "chosen": " Yes.", "rejected": " No."}
    whole = {"chosen": "Q: Is it?\nA: Yes.", "rejected": "Q: Is it?\nA: No."}
    some, others = (texts(dataset([row]).train) for row in (laid_out, whole))
    assert some == others and some[0][0].endswith("A:") and some[0][1].startswith(" Yes.")
    as_chat = texts(dataset([{"prompt": Q, "chosen": A, "rejected": B}], form="chat").train)
    assert as_chat == texts(dataset([CHATS[0]]).train)
    renamed = {"frage": Q, "gut": A, "schlecht": B}
    columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    assert texts(dataset([renamed], columns=columns).train) == as_chat


@pytest.mark.parametrize("label", [True, 1, "true", "True", "1"])
def test_judged_answers(label: Any) -> None:
    rows = [{"prompt": "p", "completion": A, "label": label}, {"messages": [USER, BAD, USER, GOOD], "label": 0}]
    (one,) = texts(dataset(rows[:1], "judged").train)
    assert one[1].startswith(A) and one[2] == DESIRABLE
    ((given, wanted, part),) = texts(dataset(rows[1:], "judged").train)
    assert part == UNDESIRABLE and B in given and wanted.startswith(A)  # the last answer is what was judged
    pairs = texts(dataset([CHATS[0]], "judged").train)
    assert [part for _, _, part in pairs] == [CHOSEN, REJECTED]


def test_a_label_is_nobodys_where_answers_are_not_judged() -> None:
    data = dataset([{"prompt": "p", "completion": A, "label": True}], "one")
    assert data.report.unused == {"label": 1.0} and data.train[0].part == PLAIN


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "p", "chosen": A, "rejected": A}, "same"),
        ({"prompt": "p", "chosen": A, "rejected": 3}, "rejected"),
        ({"prompt": "p", "chosen": A, "rejected": [BAD]}, "messages"),
        ({"prompt": "p", "chosen": "", "rejected": B}, "chosen"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "?"}, BAD]}, "prompt"),
        ({"chosen": "abc", "rejected": "xyz"}, "prompt"),
        ({"prompt": "p", "chosen": A, "rejected": None}, "rejected"),
        ({"prompt": "p", "chosen": A}, "rejected"),
    ],
)
def test_a_row_that_prefers_nothing_is_a_problem_of_its_own(row: dict[str, Any], why: str) -> None:
    good = [{"prompt": f"p{n}", "chosen": A, "rejected": B} for n in range(20)]
    data = dataset([*good, row], bad_rows=0.1)
    assert data.report.unusable == 1 and why in data.report.problems[0]
    assert len(data.train.units) == data.report.train_rows == 20


@pytest.mark.parametrize("shape", ["pairs", "judged"])
def test_rows_of_another_form_are_refused(shape: str) -> None:
    with pytest.raises(InputError) as error:
        dataset([{"question": Q, "answer": A}], shape)
    assert "chosen" in str(error.value) and "question" in str(error.value)


def test_files_of_every_kind_give_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n} ", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    nested = [{"chosen": [USER, {**GOOD, "content": f"y{n}"}], "rejected": [USER, BAD]} for n in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), tmp_path / "b.parquet")
    prints = set()
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        config = DataConfig(train=str(tmp_path / name), eval=7)
        data = prepare(config, Renderer(toy("chatml"), shape="pairs"))
        prints.add(data.fingerprint)
        assert (data.report.train_rows, data.report.eval_rows, len(data.eval)) == (33, 7, 14)
        alone = prepare_held_out(config, Renderer(toy("chatml"), shape="pairs"))
        assert [row.origin for row in alone] == [row.origin for row in data.eval]
    assert len(prints) == 1
    assert (
        len(prepare(DataConfig(train=str(tmp_path / "b.parquet")), Renderer(toy("chatml"), shape="pairs")).train) == 10
    )


def test_one_answer_that_is_too_long_takes_its_pair_along() -> None:
    rows = [{"prompt": "p", "chosen": A * n, "rejected": B} for n in (1, 2, 60)]
    data = dataset(rows, max_length=64)
    assert data.report.too_long_dropped == 1 and data.report.train_rows == 2
    cut = dataset(rows, max_length=64, too_long="truncate")
    assert cut.report.truncated == 1 and len(cut.train) == 6 and cut.train.lengths.max() == 64


def test_weights_copies_and_overlap_go_by_pair() -> None:
    rows = [{"prompt": f"p{n}", "chosen": A, "rejected": B} for n in range(6)]
    data = dataset([*rows, rows[0], {**rows[1], "rejected": "Well."}])
    assert data.report.duplicates == 1  # one chosen answer beside two rejected ones is no copy
    assert [row.part for row in data.train] == [CHOSEN, REJECTED] * 8


def test_a_weight_repeats_whole_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": A, "rejected": B} for n in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "a.jsonl"), "weight": 2.5}
    data = prepare(DataConfig(train=[source]), Renderer(toy("chatml"), shape="pairs"))  # type: ignore[list-item]
    assert [row.part for row in data.train] == [CHOSEN, REJECTED] * 15
    origins = [row.origin for row in data.train]
    assert origins[0::2] == origins[1::2] and data.report.train_rows == 6


@given(
    st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=30),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 3),
)
def test_a_pair_is_never_torn_apart(lengths: list[tuple[int, int]], step: int, size: int, ranks: int) -> None:
    examples = [
        Example(np.full(n, 5, np.int32), np.arange(n) > 0, f"a:{row}", part=part)
        for row, pair in enumerate(lengths, 1)
        for n, part in zip(pair, (CHOSEN, REJECTED), strict=True)
    ]
    loader = Loader(examples, step, size, 0, LoaderState(), ranks)
    seen = []
    for _, (batches, _) in zip(range(loader.steps_in_epoch(0)), loader, strict=False):
        for batch in batches:
            assert batch.parts == (CHOSEN, REJECTED) * (len(batch.parts) // 2)
            assert batch.origins[0::2] == batch.origins[1::2]
            assert len(batch.parts) == 2 or len(batch.tokens_T) <= size
            seen += batch.origins[0::2]
    assert sorted(seen) == sorted(f"a:{row}" for row in range(1, len(lengths) + 1))


def test_a_mismatched_answer_is_anothers() -> None:
    rows = [{"prompt": f"p{n // 2}", "completion": f" answer {n}", "label": n % 2} for n in range(8)]
    examples = dataset(rows, "judged").train
    own = texts(examples)
    for number, (prompt, answer, _) in enumerate(texts([mismatched(examples, n) for n in range(8)])):
        assert prompt == own[number][0]
        assert answer in [other for given, other, _ in own if given != prompt]


ANSWERS = st.sampled_from(["ab", "ab ", " ab", "abc", "abcd", "ab" * 9 + "c", "ab" * 9 + "d"])


@given(chosen=ANSWERS, rejected=ANSWERS, messages=st.booleans(), length=st.sampled_from([20, 2048]))
def test_no_pair_of_equal_answers_is_weighed_however_they_came_to_be_equal(
    chosen: str, rejected: str, messages: bool, length: int
) -> None:
    """Equal as they stand, where they were cut, or once a template that drops a field has written them."""
    answers: dict[str, Any] = {"chosen": chosen, "rejected": rejected}
    if messages:
        answers = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
        answers["rejected"][0]["name"] = "bob"
    other = {"prompt": Q, "chosen": "x", "rejected": "y"}
    made = dataset([{"prompt": Q, **answers}, other], max_length=length, too_long="truncate", bad_rows=1.0)
    pairs = list(zip(made.train[::2], made.train[1::2], strict=True))
    assert pairs and all(not one.equals(two) for one, two in pairs)
    assert made.report.unusable + made.report.untrained == 2 - len(pairs)


@pytest.mark.parametrize("label", [True, False])
def test_answers_that_are_all_judged_alike_are_warned_of(label: bool) -> None:
    rows = [{"prompt": f"{n} ", "completion": "a", "label": label} for n in range(3)]
    word = "desirable" if label else "undesirable"
    assert any(f"every answer is {word}," in warning for warning in dataset(rows, "judged").report.warnings)
    both = [*rows, {"prompt": "b ", "completion": "c", "label": not label}]
    assert not any("every answer" in warning for warning in dataset(both, "judged").report.warnings)


def test_what_is_wrong_with_an_answer_is_said_of_that_answer() -> None:
    judged = [{"prompt": "a ", "completion": text, "label": True} for text in ("b", "")]
    assert dataset(judged, "judged", bad_rows=1.0).report.problems == ["the rows given:2: completion is empty"]
    with pytest.raises(InputError, match="chosen: a message has no role"):
        dataset([{"prompt": "a", "chosen": {"text": "b"}, "rejected": {"text": "c"}}])


def test_a_column_is_one_thing() -> None:
    for columns in ({"chosen": "best", "rejected": "best"}, {"prompt": "Best ", "chosen": "best"}):
        with pytest.raises(InputError, match="a column is one thing"):
            DataConfig(train="x.jsonl", columns=columns)
    DataConfig(train="x.jsonl", columns={"chosen": "rejected", "rejected": "chosen"})
