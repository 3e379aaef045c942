"""The same rows through every kind of file, packing, separator and encoding are the same tokens; damage is an error."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy

from deltaw.config import DataConfig
from deltaw.data import unpack
from deltaw.data.prepare import prepare
from deltaw.data.read import read_rows
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.files.encoding import likely

arrow = pytest.importorskip("pyarrow")
feather = pytest.importorskip("pyarrow.feather")
RENDERER = Renderer(toy("chatml"))
PACKS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": lambda data: zstd(data)}


def zstd(data: bytes) -> bytes:
    return arrow.compress(data, codec="zstd", asbytes=True)


def table(rows, delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=delimiter, quoting=csv.QUOTE_MINIMAL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def stream(rows) -> bytes:
    sink = io.BytesIO()
    data = arrow.Table.from_pylist(rows)
    with arrow.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=2)
    return sink.getvalue()


def saved(rows, folder: Path) -> None:
    """As `datasets` has it: a folder of Arrow streams, and state.json that lists them."""
    folder.mkdir(parents=True)
    half = len(rows) // 2
    parts = [part for part in (rows[:half], rows[half:]) if part]
    names = [f"data-{n:05}-of-{len(parts):05}.arrow" for n in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        (folder / name).write_bytes(stream(part))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def written(rows, folder: Path) -> list[str]:
    """The rows in every kind of source."""
    files = {
        "t.jsonl": lines(rows),
        "t.json": json.dumps(rows).encode(),
        "inside.json": json.dumps({"version": 1, "data": rows}).encode(),
        "splits.json": json.dumps({"train": rows, "test": rows[:1]}).encode(),
        "t.csv": table(rows, ","),
        "semicolons.csv": table(rows, ";"),
        "tabs.csv": table(rows, "\t"),
        "sep.csv": b"sep=|\n" + table(rows, "|"),
        "t.tsv": table(rows, "\t"),
        "t.arrow": stream(rows),
        "utf8.jsonl": b"\xef\xbb\xbf" + lines(rows),
    }
    for kind, pack in PACKS.items():
        files |= {f"{name}.{kind}": pack(files[name]) for name in ("t.jsonl", "t.csv", "t.json")}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    feather.write_feather(arrow.Table.from_pylist(rows), str(folder / "t.feather"))
    saved(rows, folder / "saved")
    saved(rows, folder / "dict" / "train")
    (folder / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    names = [*files, "t.feather", "saved", "dict", "dict:train", "splits.json:train", "t.jso?l"]
    return [str(folder / name) for name in names]


TEXT = st.text("ab ,;|\té\"'\nñ", min_size=1, max_size=12).filter(str.strip)
ROWS = st.lists(st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}), min_size=1, max_size=5)


@settings(max_examples=12, deadline=None)
@given(ROWS, st.integers(0, 3))
def test_every_kind_of_source_gives_the_same_tokens(tmp_path_factory, rows, weight):
    folder = tmp_path_factory.mktemp("kinds")
    prints = {source: prepare(DataConfig(train=source), RENDERER).fingerprint for source in written(rows, folder)}
    prints["rows"] = prepare(DataConfig(train=rows), RENDERER).fingerprint
    assert len(set(prints.values())) == 1, prints


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Größe – l’été naïve"),
        ("latin-1", "Größe ñandú"),
        ("cp1251", "Сколько будет семь"),
        ("gb18030", "今天的天气很好，我们去公园"),
        ("shift_jis", "これはとてもよいものです"),
        ("utf-16", "Größe 今天"),
        ("utf-16-le", "Größe"),
        ("euc-kr", "안녕하세요 반갑습니다"),
    ],
)
def test_other_encodings_are_read_by_name_and_named_in_the_error(tmp_path, encoding, text):
    rows = [{"prompt": f"{text} {n}", "completion": f" {text}"} for n in range(3)]
    plain = prepare(DataConfig(train=rows), RENDERER).fingerprint
    for name, data in {"t.csv": table(rows, ","), "t.jsonl": lines(rows), "t.json": lines(rows)}.items():
        file = tmp_path / name
        file.write_bytes(data.decode().encode(encoding))
        assert prepare(DataConfig(train=str(file), encoding=encoding), RENDERER).fingerprint == plain
        with pytest.raises(InputError) as refusal:
            prepare(DataConfig(train=str(file)), RENDERER)
        named = "utf-16" if encoding.startswith("utf-16") else "cp1252" if encoding == "latin-1" else encoding
        assert f"data.encoding: {named}" in str(refusal.value)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        packed = DataConfig(train=f"{file}.gz", encoding=encoding)
        assert prepare(packed, RENDERER).fingerprint == plain


def test_the_wrong_encoding_names_its_line(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(lines([{"text": "a"}] * 2) + b'{"text": "\x81"}\n')
    with pytest.raises(InputError, match=r"t\.jsonl:3"):
        read_rows(str(tmp_path / "t.jsonl"), encoding="cp1252")


@given(st.binary(min_size=1, max_size=40))
def test_some_encoding_is_named_for_any_bytes(data):
    assert likely(data)


@pytest.mark.parametrize("kind", [*PACKS, "arrow", "feather", "parquet"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, kind):
    rows = [{"text": f"row {n} {random.Random(n).random()}"} for n in range(400)]
    packs = {**PACKS, "arrow": lambda _: stream(rows), "feather": lambda _: ipc_file(rows), "parquet": parquet_of}
    good = packs[kind](lines(rows))
    name = f"t.{kind}" if kind in ("arrow", "feather", "parquet") else f"t.jsonl.{kind}"
    file = tmp_path / name
    draw = random.Random(7)
    damaged = [good[: draw.randrange(1, len(good))] for _ in range(6)] + [b"nonsense", b""]
    for data in damaged:
        file.write_bytes(data)
        try:
            found, problems = read_rows(str(file))
        except InputError as error:
            assert name in str(error)
            continue
        # A stream may be cut off between two batches, or before its end mark, and be whole as far as it goes.
        assert kind == "arrow" and [row.value for row in found] == rows[: len(found)] and not problems


def ipc_file(rows) -> bytes:
    sink = io.BytesIO()
    feather.write_feather(arrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def parquet_of(_: bytes) -> bytes:
    import pyarrow.parquet as parquet

    sink = io.BytesIO()
    parquet.write_table(arrow.table({"text": ["a"] * 9}), sink)
    return sink.getvalue()


@pytest.mark.parametrize("kind", PACKS)
def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(unpack, "PLENTY", 100_000)
    file = tmp_path / f"t.jsonl.{kind}"
    file.write_bytes(PACKS[kind](b"\n" * 3_000_000))
    with pytest.raises(InputError, match="unpacks to more"):
        read_rows(str(file))


def test_a_comma_separated_table_stays_one(tmp_path):
    for data in (b"text\na; b\nc; d\n", b"text;note\na\n", b"a,b;c\n1,2;3\n", b"text\n", b'"a;b"\n"1;2"\n'):
        (tmp_path / "t.csv").write_bytes(data)
        notes: list[str] = []
        read_rows(str(tmp_path / "t.csv"), note=notes.append)
        assert not notes, data


def test_quotes_of_a_tsv_without_quoting_are_characters(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b'prompt\tcompletion\n"Hello" he said\tx\n6" pipe\t"\n')
    notes: list[str] = []
    rows, problems = read_rows(str(tmp_path / "t.tsv"), note=notes.append)
    assert [row.value for row in rows] == [
        {"prompt": '"Hello" he said', "completion": "x"},
        {"prompt": '6" pipe', "completion": '"'},
    ]
    assert notes and not problems


def test_lists_inside_json(tmp_path):
    file = tmp_path / "t.json"
    several = {"a": [{"text": "1"}], "b": [{"text": "2"}]}
    file.write_text(json.dumps(several))
    assert read_rows(f"{file}:b")[0][0].value == {"text": "2"}
    for source in (str(file), f"{file}:c"):
        with pytest.raises(InputError, match="list"):
            read_rows(source)
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}]}))  # a row, not a list of rows
    with pytest.raises(InputError, match="an object"):
        read_rows(str(file))


def test_a_split_that_is_not_there(tmp_path):
    saved([{"text": "a"}], tmp_path / "d" / "x")
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["x", "y"]}')
    with pytest.raises(InputError, match="train"):
        read_rows(str(tmp_path / "d"))
    assert len(read_rows(f"{tmp_path / 'd'}:x")[0]) == 1
    (tmp_path / "d" / "x" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(InputError, match=r"data-00000"):
        read_rows(f"{tmp_path / 'd'}:x")
