"""Prepared rows that are kept: the same ones as fresh ones or none, whatever happens to the files around them."""

import dataclasses
import json
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest
from toys import toy

from deltaw.base.source import compiled_kernels
from deltaw.commands.cache import cache_listed
from deltaw.config import DataConfig
from deltaw.data import cache
from deltaw.data.cache import Key, kept_rows, prepared, prepared_held_out
from deltaw.data.prepare import prepare
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.files import content
from tests.tiny import Said

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    toy("chatml").save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "WORTH", 0.0)
    return tmp_path


def opened(base: Path, **rules) -> Renderer:
    from deltaw.data.render import open_tokenizer

    return Renderer(open_tokenizer(base), **rules)


def write(path: Path, count: int = 30, word: str = "seven") -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"{word} {n % 20}"}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row | {"id": n}) + "\n" for n, row in enumerate(rows)) + '{"messages": 1}\n')
    return str(path)


def config_of(place: Path, **rest) -> DataConfig:
    path = place / "a.jsonl"
    train = str(path) if path.exists() else write(path)
    return DataConfig(**{"train": train, "eval": 5, "bad_rows": 0.2, **rest})


def same(a, b) -> bool:
    def plain(example):
        values = [getattr(example, f.name) for f in dataclasses.fields(example)[2:]]
        return example.tokens.tolist(), example.loss_mask.tolist(), values

    parts = [[plain(row) for row in part] for part in (a.train, a.eval)]
    assert parts == [[plain(row) for row in part] for part in (b.train, b.eval)]
    assert (a.report, a.asking, a.example, a.fingerprint) == (b.report, b.asking, b.example, b.fingerprint)
    return True


def only_kept(monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("prepared again")

    monkeypatch.setattr(cache, "prepare", refuse)
    monkeypatch.setattr(cache, "prepare_held_out", refuse)


def test_rows_from_the_cache_are_the_fresh_ones_in_all_fields(place, base, monkeypatch):
    texts = place / "t.txt"
    texts.write_text("\n\n".join(f"A sentence with a number, {n}. And one more." for n in range(60)))
    weighted = [{"path": write(place / "b.jsonl"), "weight": 1.5}, {"path": write(place / "e.jsonl"), "weight": 0.5}]
    configs = [
        config_of(place),
        config_of(place, train=weighted, limit=20),
        config_of(place, eval=write(place / "c.jsonl", 4)),
        DataConfig(train=str(texts), max_length=40, overlap=3, eval=2),
    ]
    fresh = [prepare(config, opened(base)) for config in configs]
    first = [prepared(config, opened(base)) for config in configs]
    only_kept(monkeypatch)
    for config, new, one in zip(configs, fresh, first, strict=True):
        again = prepared(config, opened(base))
        assert again.train.columns.keeps is not None
        assert same(new, one) and same(new, again)
        assert [row.origin for row in prepared_held_out(config, opened(base))] == [row.origin for row in new.eval]
    assert stat.S_IMODE(cache.rows_folder().stat().st_mode) == 0o700
    assert {stat.S_IMODE(f.stat().st_mode) for f in cache.rows_folder().glob("*.*") if f.is_file()} == {0o600}


def test_all_that_decides_the_rows_is_in_the_key(place, base, monkeypatch):
    config, keys = config_of(place), set[str]()

    def key(config=config, renderer=None, reads="auto") -> str:
        found = Key.of(config, renderer or opened(base), reads)
        assert found is not None
        return found.digest

    assert key() == key()
    keys.add(key())
    changes = {
        "eval": 6, "limit": 3, "seed": 1, "max_length": 50, "too_long": "truncate", "bad_rows": 0.5, "form": "chat",
        "columns": {"prompt": "q"}, "train_on": "assistant", "encoding": "cp1252", "join": " ", "rendered": True,
        "overlap": 2, "split_text": "lines", "template": "chatml",
    }  # fmt: skip
    fields = set(DataConfig.model_fields) - {"train"}
    assert fields == set(changes), "a field of data that nobody asked about"
    keys |= {key(config_of(place, **{name: value})) for name, value in changes.items()}
    keys.add(key(renderer=opened(base, template="chatml")))
    keys.add(key(renderer=opened(base, train_on="all")))
    keys.add(key(renderer=opened(base).behind("Be brief.")))
    keys.add(key(reads="completion"))
    copied = place / "base"
    toy("chatml").save_pretrained(copied)
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 77}))
    keys.add(key(renderer=opened(copied)))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_code", lambda: "other")
        keys.add(key())
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_versions", lambda: ["other"])
        keys.add(key())
    write(place / "a.jsonl", word="eight")
    keys.add(key())
    assert len(keys) == len(changes) + 9
    assert Key.of(DataConfig(train="builtin:general"), opened(base), "auto") is None
    assert Key.of(DataConfig(train=[{"text": "given"}]), opened(base), "auto") is None


@pytest.mark.parametrize("kind", ["folder", "pattern", "list"])
def test_every_file_of_a_source_counts(place, base, kind):
    (place / "d").mkdir()
    write(place / "d/a.jsonl"), write(place / "d/b.jsonl")
    train = {
        "folder": f"{place}/d",
        "pattern": f"{place}/d/*.jsonl",
        "list": [f"{place}/d/a.jsonl", f"{place}/d/b.jsonl"],
    }
    config = DataConfig(train=train[kind], bad_rows=0.2)
    keys = [Key.of(config, opened(base), "auto")]
    write(place / "d/b.jsonl", word="eight")
    keys.append(Key.of(config, opened(base), "auto"))
    if kind != "list":
        write(place / "d/c.jsonl")
        keys.append(Key.of(config, opened(base), "auto"))
    assert len({key.digest for key in keys}) == len(keys)


def test_what_is_remembered_of_files_lies_in_the_private_folder(place, base, monkeypatch):
    monkeypatch.setattr(content, "SETTLED", -100.0)
    Key.of(config_of(place), opened(base), "auto")
    assert list((cache.rows_folder() / "known").iterdir())
    assert stat.S_IMODE(cache.rows_folder().stat().st_mode) == 0o700


def test_a_file_changed_within_the_clocks_tick_is_not_taken_for_the_old(place, base):
    path, times = Path(config_of(place).train), None
    for word in ("seven", "eight", "three"):
        write(path, word=word)
        times = times or (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        os.utime(path, ns=times)  # same length, same time of change
        rows = prepared(config_of(place), opened(base))
        assert same(rows, prepare(config_of(place), opened(base)))


def test_rows_that_change_while_they_are_read_are_not_kept(place, base, monkeypatch):
    config = config_of(place)

    def changing(*args, **kwargs):
        dataset = prepare(*args, **kwargs)
        write(place / "a.jsonl", word="eight")
        return dataset

    monkeypatch.setattr(cache, "prepare", changing)
    prepared(config, opened(base))
    assert kept_rows() == []


def test_damaged_entries_are_prepared_again(place, base):
    config, said = config_of(place), Said()
    prepared(config, opened(base))
    (entry,) = kept_rows()
    good, sidecar = entry.file.read_bytes(), entry.file.with_suffix(".json")
    notes = sidecar.read_bytes()
    step = len(good) // 12
    broken = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in (0, 9, *range(20, len(good), step))]
    broken += [good[:-1], good[: len(good) // 2], b"", good + b"\0"]
    fresh = prepare(config, opened(base))
    for data in broken:
        entry.file.write_bytes(data)
        lines = len(said.lines)
        assert same(prepared(config, opened(base), display=said), fresh)
        assert len(said.lines) > lines and entry.file.read_bytes() == good
    for data in (b"", b"{", b"[]", b'{"crc32": 7}', notes.replace(b"crc32", b"crc31")):
        sidecar.write_bytes(data)
        assert same(prepared(config, opened(base)), fresh)


def test_a_process_killed_while_it_writes_leaves_no_entry(place, base, monkeypatch):
    config = config_of(place)

    def killed() -> None:
        cache.write_text_atomic = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        prepared(config, opened(base))

    process = FORK.Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    fresh = prepare(config, opened(base))
    assert same(prepared(config, opened(base)), fresh)
    only_kept(monkeypatch)
    assert same(prepared(config, opened(base)), fresh)


def test_one_process_prepares_and_the_others_wait(place, base, monkeypatch):
    config, count, now, most = config_of(place), *(FORK.Value("i", 0) for _ in range(3))

    def slow(*args, **kwargs):
        with count.get_lock():
            count.value, now.value = count.value + 1, now.value + 1
            most.value = max(most.value, now.value)
        time.sleep(0.7)
        with count.get_lock():
            now.value -= 1
        return prepare(*args, **kwargs)

    monkeypatch.setattr(cache, "prepare", slow)
    renderer = opened(base)
    processes = [FORK.Process(target=prepared, args=(config, renderer)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert count.value == 1
    # what isn't worth keeping: those that waited go on at once, not one after the other
    monkeypatch.setattr(cache, "WORTH", 100.0)
    cache_listed(clean=True)
    processes = [FORK.Process(target=prepared, args=(config, renderer)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert count.value == 5 and most.value > 1


def test_a_cache_that_cannot_be_written_is_a_line(place, base, monkeypatch):
    config, said = config_of(place), Said()
    fresh = prepare(config, opened(base))
    (place / "cache").write_text("a file in its place")
    assert same(prepared(config, opened(base), display=said), fresh) and len(said.lines) == 1
    (place / "cache").unlink()
    monkeypatch.setattr(cache, "streamed", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert same(prepared(config, opened(base), display=said), fresh) and len(said.lines) == 2
    assert kept_rows() == [] and not list(cache.rows_folder().glob(".*.tmp"))
    monkeypatch.undo()


def test_the_least_recently_used_go_first_but_none_in_use(place, base, monkeypatch):
    configs = [config_of(place, seed=seed) for seed in range(4)]
    used = prepared(configs[0], opened(base))
    size = kept_rows()[0].size
    monkeypatch.setattr(cache, "LIMIT", 3.5 * size)
    keys = [Key.of(config, opened(base), "auto") for config in configs]
    for age, config in enumerate(configs[1:3]):
        prepared(config, opened(base))
        os.utime(keys[age + 1].file.with_suffix(".json"), (age, age))
    os.utime(keys[0].file.with_suffix(".json"), (0, 0))
    prepared(configs[3], opened(base))
    assert {entry.file for entry in kept_rows()} == {keys[n].file for n in (0, 2, 3)}
    del used


def test_what_is_kept_is_listed_and_removed(place, base):
    assert cache_listed().data["items"] == []
    first = prepared(config_of(place), opened(base))
    prepared(config_of(place, seed=1), opened(base))
    listed = cache_listed().data
    assert len(listed["items"]) == 2 and listed["bytes"] == sum(item["bytes"] for item in listed["items"])
    assert cache_listed(clean=True, older_than=1).data["removed"] == []
    done = cache_listed(clean=True).data
    assert (len(done["removed"]), len(done["in_use"]), len(done["items"])) == (1, 1, 1)
    assert [len(row.tokens) for row in first.train]
    del first
    assert len(cache_listed(clean=True).data["removed"]) == 1
    with pytest.raises(InputError):
        cache_listed(older_than=3)


def test_compiled_kernels_are_listed_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    folder = compiled_kernels() / "release" / "fwd"
    folder.mkdir(parents=True)
    for name in ("one.o", "two.o"):
        (folder / name).write_bytes(b"code")
    (listed,) = cache_listed().data["items"]
    assert (listed["kind"], listed["bytes"]) == ("kernels", 8)
    assert cache_listed(clean=True, older_than=1).data["removed"] == []
    assert len(cache_listed(clean=True).data["removed"]) == 1
    assert not cache_listed().data["items"] and folder.is_dir()  # another process may write there
