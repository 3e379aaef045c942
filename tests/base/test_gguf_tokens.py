"""The tokenizer of a GGUF gives llama.cpp's ids, whatever rule it splits by; a rule that isn't known is refused."""

import json
from pathlib import Path

import pytest

from deltaw.base.gguf import to_folder
from deltaw.base.gguf_tokens import SPLITTINGS
from deltaw.data.render import open_tokenizer
from deltaw.errors import InputError
from tests.tiny import Said

from .gguf_ids import FIXTURE, NAMES, texts, write_sentences, write_vocabulary


def ids(path: Path, cache: Path) -> list[list[int]]:
    tokenizer = open_tokenizer(to_folder(path, cache))
    return [tokenizer(text)["input_ids"] for text in texts()]


@pytest.mark.parametrize("name", NAMES)
def test_the_ids_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    path = write_vocabulary(tmp_path / "x.gguf", name)
    assert ids(path, tmp_path / "cache") == json.loads(FIXTURE.read_text())[name]


@pytest.mark.parametrize("prefix", [None, True, False])
def test_the_ids_of_sentences_are_those_of_llama_cpp(tmp_path: Path, prefix: bool | None) -> None:
    path = write_sentences(tmp_path / "x.gguf", prefix)
    assert ids(path, tmp_path / "cache") == json.loads(FIXTURE.read_text())[f"sentences, {prefix is not False}"]
    tokenizer = open_tokenizer(to_folder(path, tmp_path / "cache"))
    for text in texts():
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_every_rule_is_held_to_llama_cpp() -> None:
    assert {SPLITTINGS[name] for name in NAMES} == set(SPLITTINGS.values())
    assert len({json.dumps(found) for found in json.loads(FIXTURE.read_text()).values()}) >= len(NAMES) - 3


def test_without_a_name_it_is_the_default_and_said(tmp_path: Path) -> None:
    display = Said()
    path = write_vocabulary(tmp_path / "x.gguf", None)
    to_folder(path, tmp_path / "cache", display=display)
    assert len(display.lines) == 2 and "splits" in display.lines[1]
    assert ids(path, tmp_path / "cache") == json.loads(FIXTURE.read_text())["default"]


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wordpiece-9") as caught:
        to_folder(write_vocabulary(tmp_path / "x.gguf", "wordpiece-9"), tmp_path / "cache")
    assert len(str(caught.value).splitlines()) <= 5
