"""Other tools' words: every hint names a setting that exists, and leads from the wrong place to the right one."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deltaw.config import AdapterSpec, DataConfig, RunConfig, TrainConfig, fields_at, load_config, parse_config
from deltaw.config.hints import EXPLAINED, MEANT, VALUES, WITHOUT, named_here, of_word
from deltaw.config.load import setting_meant
from deltaw.errors import MAX_LISTED, InputError

SECTIONS = {name: fields_at(RunConfig, [name]) for name in fields_at(RunConfig, ())}
SETTINGS = {*SECTIONS, *(f"{name}.{field}" for name, fields in SECTIONS.items() for field in fields)}
WORDS = [
    word
    for words in (*MEANT.values(), *(e[-1] for e in EXPLAINED), *(w[-1] for w in WITHOUT))
    for word in words.split()
]
MINIMAL = {"base": "b", "output": "o", "data": {"train": "t.jsonl"}}


def refusal(raw: object) -> str:
    with pytest.raises(InputError) as caught:
        parse_config(raw)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) <= 5
    return str(caught.value)


def test_each_word_is_explained_once() -> None:
    assert len(WORDS) == len(set(WORDS)) > 250


def test_whatever_the_hints_name_exists() -> None:
    assert set(MEANT) | {field for field, *_ in EXPLAINED} | set(VALUES) <= SETTINGS
    sentences = [note for _, note, _ in EXPLAINED] + [note for note, _ in WITHOUT]
    sentences += [str(said) for values in VALUES.values() for said in values.values()]
    named = {name for text in sentences for name in re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.\w+", text)}
    assert named and named <= SETTINGS


@pytest.mark.parametrize("word", WORDS)
def test_a_word_at_the_top_is_led_to_its_section(word: str) -> None:
    if word in SECTIONS:
        return
    message = refusal({**MINIMAL, word: 1})
    field = named_here(word)
    assert message.count("\n") == 1 and "known:" not in message
    assert field is None or f"did you mean {field!r}?" in message


def test_a_setting_in_the_wrong_section_is_led_to_its_own() -> None:
    for section, fields in SECTIONS.items():
        for field in fields:
            homes = [name for name, known in SECTIONS.items() if field in known]
            if len(homes) == 1 and field not in SECTIONS:
                assert f"did you mean '{section}.{field}'?" in refusal({**MINIMAL, field: 1}), field


@pytest.mark.parametrize(
    ("section", "word", "said"),
    [
        ("train", "learning_rate", "'lr'"),
        ("train", "learnig_rate", "'lr'"),
        ("train", "Learning-Rate", "'lr'"),
        ("adapter", "learning_rate", "'train.lr'"),
        ("adapter", "r", "'rank'"),
        ("adapter", "lora_r", "'rank'"),
        ("adapter", "target_modules", "'targets'"),
        ("data", "cutoff_len", "'max_length'"),
        ("train", "batch_size", "'tokens_per_batch'"),
        ("train", "rank", "'adapter.rank'"),
        ("evaluate", "val_set_size", "'data.eval'"),
    ],
)
def test_a_word_in_a_section(section: str, word: str, said: str) -> None:
    assert f"did you mean {said}?" in refusal({**MINIMAL, section: {**MINIMAL.get(section, {}), word: 1}})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in VALUES.items() for value in values if type(value) is not type],
)
def test_another_tools_value_is_refused_with_what_to_write(field: str, value: object) -> None:
    section, _, name = field.partition(".")
    raw = {**MINIMAL, section: {**MINIMAL.get(section, {}), name: value} if name else value}  # type: ignore[dict-item]
    assert f"; {VALUES[field][value]}" in refusal(raw)


def test_a_section_that_is_a_single_value_is_shown_as_a_mapping() -> None:
    assert "{train: FILE}" in refusal({**MINIMAL, "data": "rows.jsonl"})
    assert "{epochs: 1}" in refusal({**MINIMAL, "train": True})


def test_another_tools_whole_file_is_answered_at_once(tmp_path: Path) -> None:
    theirs = {
        "base_model": "org/name", "load_in_4bit": True, "datasets": [{"path": "a.jsonl"}], "val_set_size": 0.05,
        "output_dir": "out", "sequence_len": 4096, "adapter": "lora", "lora_r": 8, "learning_rate": 2e-4,
    }  # fmt: skip
    file = tmp_path / "axolotl.yml"
    file.write_text(yaml.safe_dump(theirs))
    with pytest.raises(InputError) as caught:
        load_config(file)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 1 + MAX_LISTED
    for word in ("base_model", "datasets", "val_set_size", "output_dir", "sequence_len", "lora_r", "learning_rate"):
        assert f"{word} → {named_here(word)}" in lines[1]


@pytest.mark.parametrize("make", [AdapterSpec, TrainConfig, DataConfig, RunConfig])
def test_a_value_made_in_python_raises_our_own_error(make: type) -> None:
    with pytest.raises(InputError) as caught:
        make(learning_rate=3, surely_nothing=4)
    assert str(caught.value).splitlines()[0].startswith(f"{make.__name__} has ")
    assert "'learning_rate'" in str(caught.value) and "'surely_nothing'" in str(caught.value)


def test_sections_may_be_mappings_in_python_too() -> None:
    made = RunConfig(**{**MINIMAL, "adapter": {"rank": 4, "targets": ["q_proj"]}, "train": {"lr": 1e-3}})
    assert made == parse_config({**MINIMAL, "adapter": {"rank": 4, "targets": ["q_proj"]}, "train": {"lr": 1e-3}})
    with pytest.raises(InputError, match=r"adapter\.rank"):
        RunConfig(**{**MINIMAL, "adapter": {"rank": "4"}})


def test_a_value_shows_what_differs_from_the_defaults() -> None:
    assert repr(AdapterSpec(rank=8)) == "AdapterSpec(rank=8)" and repr(TrainConfig()) == "TrainConfig()"
    config = RunConfig(**{**MINIMAL, "adapter": {"rank": 4}})
    assert eval(repr(config)) == config


@pytest.mark.parametrize(
    ("option", "said"),
    [("--lr", "train.lr"), ("--learning-rate", "train.lr"), ("--lora_r=8", "adapter.rank"), ("--output", "output="),
     ("--num-train-epochs", "train.epochs"), ("--load-in-4bit", "quantised")],
)  # fmt: skip
def test_an_option_of_other_tools_is_led_to_the_setting(option: str, said: str) -> None:
    assert said in (setting_meant(option) or "")


@given(st.text(max_size=30))
def test_any_key_is_refused_in_a_few_lines(key: str) -> None:
    if key not in SECTIONS:
        refusal({**MINIMAL, key: 1})
    of_word(key)
