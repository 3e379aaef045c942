"""The run file: every mistake is one InputError that names file, line and field; what is accepted comes back."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from deltaw.config import METRICS, AdapterSpec, RunConfig, load_config, parse_config
from deltaw.config.retain import RetainConfig
from deltaw.errors import InputError
from deltaw.files.paths import written

MINIMAL = "base: b\noutput: o\ndata:\n  train: t.jsonl\n"  # what is appended to it begins on line 5


def load(folder: Path, text: str | bytes, *overrides: str) -> RunConfig:
    (folder / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(folder / "run.yaml", overrides)


def refusal(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The message, with the file's path shortened to its name. Always short, always naming the file."""
    with pytest.raises(InputError) as caught:
        load(folder, text, *overrides)
    message = str(caught.value)
    assert len(message.splitlines()) <= 5
    return message.replace(f"{folder}/", "")


KNOWN = ", ".join(METRICS)
WRONG_VALUES = {
    "train: {steps: '4'}": 'train.steps: must be a valid integer (got "4")',
    "train: {steps: true}": "train.steps: must be a valid integer (got true)",
    "train: {steps: 1.0}": "train.steps: must be a valid integer (got 1.0)",
    "train: {steps: [4]}": "train.steps: must be a valid integer",
    "train: {epochs: null}": "train.epochs: must be a valid number (got null)",
    "train: {lr: '1e-3'}": 'train.lr: must be a valid number (got "1e-3")',
    "train: {lr: 0}": "train.lr: must be greater than 0 (got 0)",
    "train: {lr: -1}": "train.lr: must be greater than 0 (got -1)",
    "train: {lr: .inf}": "train.lr: must be a finite number (got Infinity)",
    "train: {lr: .nan}": "train.lr: must be a finite number (got NaN)",
    "train: {lr: 2}": "train.lr: must be less than or equal to 1 (got 2)",
    "train: {seed: -1}": "train.seed: must be greater than or equal to 0 (got -1)",
    "train: {schedule: cosin}": "train.schedule: must be 'constant', 'linear' or 'cosine' (got \"cosin\")",
    "train: 3": "train: must be a mapping (got 3)",
    "train:": "train: must be a mapping (got null)",
    "adapter: {alpha: 0}": "adapter.alpha: must be greater than 0 (got 0)",
    "adapter: {alpha: .nan}": "adapter.alpha: must be a finite number (got NaN)",
    "adapter: {dropout: 1}": "adapter.dropout: must be less than 1 (got 1)",
    "adapter: {init: svd}": "adapter.init: must be 'lora', 'pissa', 'olora', 'eva' or 'lora-ga' (got \"svd\")",
    "adapter: {magnitude: 1}": "adapter.magnitude: must be a valid boolean (got 1)",
    "adapter: {rank: 0}": "adapter.rank: must be greater than or equal to 1 (got 0)",
    "adapter: {rank: 2024-01-01}": 'adapter.rank: must be a valid integer (got "2024-01-01")',
    "adapter: {targets: 3}": "adapter.targets: must be a name or a list of names (got 3)",
    "adapter: {targets: [q_proj, 3]}": "adapter.targets: must be a name or a list of names",
    "adapter: {targets: []}": "adapter.targets: is empty: name at least one module, or all-linear, attention, mlp, "
    "experts",
    "adapter: {rank_overrides: {v: 0}}": "adapter.rank_overrides.v: must be greater than or equal to 1 (got 0)",
    "evaluate: {metrics: [bleu]}": f'evaluate.metrics.0: must be {KNOWN}, or file.py:function (got "bleu")',
}


@pytest.mark.parametrize("line", WRONG_VALUES)
def test_a_wrong_value_names_file_line_and_field(tmp_path: Path, line: str) -> None:
    message = f"run.yaml has 1 problem:\n  run.yaml:5: {WRONG_VALUES[line]}"
    assert refusal(tmp_path, MINIMAL + line) == message


@pytest.mark.parametrize(
    ("value", "said"),
    [("true", "true"), ("1.5", "1.5"), ("0", "0")],
)
def test_a_value_of_several_types_is_one_problem(tmp_path: Path, value: str, said: str) -> None:
    message = refusal(tmp_path, MINIMAL + f"  eval: {value}")
    assert (
        message.startswith("run.yaml has 1 problem:\n  run.yaml:5: data.eval: must be") and f"(got {said})" in message
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("traim: {}", "'traim'; did you mean 'train'?"),
        ("  evl: 3", "'data.evl'; did you mean 'eval'?"),
        ("train: {warmup: 3}", "'train.warmup'; did you mean 'warmup_steps'?"),
        ("adapter: {rnak: 3}", "'adapter.rnak'; did you mean 'rank'?"),
        ("evaluate: {metric: []}", "'evaluate.metric'; did you mean 'metrics'?"),
        ("xyz: 1", "'xyz'; known: base, base_weights, adapter, data, objective, train, evaluate, output"),
        ("1: 2", "'1'; known: base, base_weights, adapter, data, objective, train, evaluate, output"),
    ],
)
def test_an_unknown_key_names_the_nearest_that_exists(tmp_path: Path, line: str, said: str) -> None:
    assert refusal(tmp_path, MINIMAL + line) == f"run.yaml has 1 problem:\n  run.yaml:5: unknown key {said}"


def test_all_problems_at_once_names_before_values(tmp_path: Path) -> None:
    text = "base: b\ndata:\n  train: t\ntrain:\n  lr: 0\n  seed: -1\n  step: 4\n"
    assert refusal(tmp_path, text).splitlines() == [
        "run.yaml has 4 problems:",
        "  run.yaml:7: unknown key 'train.step'; did you mean 'steps'?",
        "  run.yaml: 'output' is missing",
        "  run.yaml:5: train.lr: must be greater than 0 (got 0)  (and 1 more)",
    ]


NOT_YAML = {
    "duplicate key": (MINIMAL + "train:\n  lr: 1e-3\n  lr: 1e-4", "run.yaml:7: not valid YAML: 'lr' is set twice"),
    "duplicate section": (MINIMAL + "base: c", "run.yaml:5: not valid YAML: 'base' is set twice"),
    "half a list": ("a: [", "run.yaml:1: not valid YAML:"),
    "tab": (MINIMAL + "train:\n\tlr: 1", "run.yaml:6: not valid YAML:"),
    "tag that names code": ("a: !!python/object:os.system x", "run.yaml:1: not valid YAML:"),
    "list as a key": (MINIMAL + "? [a]\n: 3", "run.yaml:5: not valid YAML: a key must be a single value"),
    "alias": ("a: &a [1]\nb: *a", "run.yaml:2: not valid YAML: aliases (*name) aren't supported"),
    "control character": ("a: b\nc: \x00", "run.yaml:2: not valid YAML: the character '\\x00' is not allowed"),
    "deep list": ("[" * 100_000, "run.yaml: not valid YAML: nested too deeply"),
    "deep mapping": ("{a: " * 10_000, "run.yaml: not valid YAML: nested too deeply"),
    "list": ("- a", "run.yaml: a run file is a mapping with base, data and output; this is a list"),
    "text": ("hello", "run.yaml: a run file is a mapping with base, data and output; this is a text"),
    "nothing": ("", "run.yaml: a run file is a mapping with base, data and output; this is empty"),
    "latin-1": ("base: caf\xe9".encode("latin-1"), "run.yaml: not UTF-8 text"),
    "utf-16": (MINIMAL.encode("utf-16"), "run.yaml: not UTF-8 text"),
    "huge": (b"#" * 10_000_001, "run.yaml: 10,000,001 bytes is too large for a run file"),
}


@pytest.mark.parametrize("fault", NOT_YAML)
def test_a_file_that_is_no_mapping_in_yaml_is_named(tmp_path: Path, fault: str) -> None:
    text, said = NOT_YAML[fault]
    assert refusal(tmp_path, text).startswith(said)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf" + MINIMAL.encode()) == load(tmp_path, MINIMAL)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", ".1e-2", "+1e-3", "0.001"])
def test_a_number_in_scientific_notation_is_a_number(tmp_path: Path, number: str) -> None:
    assert load(tmp_path, MINIMAL + f"train: {{lr: {number}}}").train.lr == 0.001
    assert load(tmp_path, MINIMAL, f"train.lr={number}").train.lr == 0.001


def test_a_date_is_a_name_like_any_other(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "output=2024-01-01").output == "2024-01-01"


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    load(tmp_path, MINIMAL)
    with pytest.raises(InputError, match=r"run\.yml: no such file\ndid you mean .*run\.yaml\?"):
        load_config(tmp_path / "run.yml")
    with pytest.raises(InputError, match="is a folder, not a file"):
        load_config(tmp_path)


def test_overrides_are_values_of_the_file(tmp_path: Path) -> None:
    changed = load(tmp_path, MINIMAL + "train:\n", "train.steps=4", "adapter.targets=[q_proj, v_proj]", "data.eval=5")
    written = load(tmp_path, MINIMAL + "  eval: 5\ntrain: {steps: 4}\nadapter: {targets: [q_proj, v_proj]}")
    assert changed == written


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr", "'train.lr' is not an override\nwrite key=value"),
        ("=3", "'=3' is not an override"),
        ("base.name=3", "'base.name=3': base is a single value, it has no fields"),
        ("train.lr=[", "the value is not valid YAML"),
        ("train.lr=" + "[" * 9999, "the value is not valid YAML"),
        ("train.seed=" + "9" * 9999, "the value is not valid YAML"),
        ("train.lrr=3", "unknown key 'train.lrr'; did you mean 'lr'?"),
        ("train..lr=3", "unknown key 'train.'"),
        ("train.lr=", "train.lr: must be a valid number (got null)"),
        ("train.lr=0", "train.lr: must be greater than 0 (got 0)"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    assert said in refusal(tmp_path, MINIMAL, override)


def test_metrics_need_held_out_rows(tmp_path: Path) -> None:
    assert "set data.eval" in refusal(tmp_path, MINIMAL + "evaluate: {metrics: [exact_match]}")
    assert load(tmp_path, MINIMAL + "  eval: 3\nevaluate: {metrics: [exact_match]}").evaluate.metrics == (
        "exact_match",
    )


def test_a_config_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    for section, field in ((config, "base"), (config.train, "lr"), (config.adapter, "rank")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, getattr(section, field))


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)
PATHS = NAMES.filter(lambda text: not text.startswith("~")).map(written)  # tests/files/test_paths.py has the others
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@example(names=("1e3", "0E0", "2024-01-01"), targets="0E0", ranks={}, alphas={"1.e-3": 1.0}, lr=1.0, held_out=None)
@given(
    names=st.tuples(PATHS, PATHS, PATHS),
    targets=NAMES | st.lists(NAMES, min_size=1),
    ranks=st.dictionaries(NAMES, st.integers(1, 65536)),
    alphas=st.dictionaries(NAMES, POSITIVE),
    lr=st.floats(min_value=0, max_value=1, exclude_min=True),
    held_out=st.none() | st.integers(1, 9) | PATHS,
)
def test_to_yaml_round_trips(tmp_path_factory, names, targets, ranks, alphas, lr, held_out) -> None:
    base, train, output = names
    adapter = {"targets": targets, "rank_overrides": ranks, "alpha_overrides": alphas}
    raw = {"base": base, "output": output, "data": {"train": train, "eval": held_out}, "adapter": adapter}
    config = parse_config({**raw, "train": {"lr": lr}})
    again = load(tmp_path_factory.getbasetemp(), config.to_yaml())
    assert again == config
    assert list(again.adapter.rank_overrides) == list(ranks)  # the first that matches counts


@pytest.mark.parametrize("init", ["pissa", "olora", "lora-ga"])
def test_dora_starts_at_the_base(init: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, MINIMAL + f"adapter: {{init: {init}, magnitude: true}}")
    assert (
        f"run.yaml:5: adapter: magnitude (DoRA) starts at B = 0, but init {init} doesn't: use init lora or eva" in said
    )
    assert load(tmp_path, MINIMAL + f"adapter: {{init: {init}}}").adapter.moves_base
    assert not load(tmp_path, MINIMAL + "adapter: {init: eva, magnitude: true}").adapter.moves_base


@pytest.mark.parametrize("field", ["init: pissa", "magnitude: true"])
def test_full_fine_tuning_has_no_start_and_no_magnitude(field: str, tmp_path: Path) -> None:
    name = field.partition(":")[0]
    assert f"full fine-tuning has no {name}" in refusal(tmp_path, MINIMAL + f"adapter: {{full: true, {field}}}")


RANKS = st.integers(1, 64)
ALPHAS = st.floats(0.1, 100)


@given(rank=RANKS, alpha=ALPHAS, other_rank=RANKS, other_alpha=ALPHAS)
def test_scale_is_alpha_over_rank_or_its_root(rank: int, alpha: float, other_rank: int, other_alpha: float) -> None:
    overrides = {"rank_overrides": {"q_proj": other_rank}, "alpha_overrides": {"q_proj": other_alpha}}
    for scaling, root in (("lora", float), ("rslora", math.sqrt)):
        spec = AdapterSpec(rank=rank, alpha=alpha, scaling=scaling, **overrides)
        assert spec.scale("layers.0.k_proj") == alpha / root(rank)
        assert spec.scale("layers.0.q_proj") == other_alpha / root(other_rank)


def test_the_first_override_that_names_the_module_counts() -> None:
    first, second = {"layers.1.q_proj": 2}, {"q_proj": 4}
    specific = AdapterSpec(rank=8, rank_overrides={**first, **second}, alpha_overrides={**first, **second})
    general = AdapterSpec(rank=8, rank_overrides={**second, **first}, alpha_overrides={**second, **first})
    path = "model.layers.1.q_proj"
    assert (specific.rank_of(path), specific.alpha_of(path)) == (2, 2)
    assert (general.rank_of(path), general.alpha_of(path)) == (4, 4)


@pytest.mark.parametrize("path", ["model.layers.11.q_proj", "q_proj_2", "my_q_proj", "q_proj.base"])
def test_an_override_names_whole_parts_of_a_path(path: str) -> None:
    assert AdapterSpec(rank=8, rank_overrides={"layers.1.q_proj": 2, "1.q_proj": 2, "_proj": 3}).rank_of(path) == 8


def test_a_run_of_before_a_setting_means_what_it_did(tmp_path: Path) -> None:
    written = load(tmp_path, MINIMAL).to_yaml()
    older = "".join(
        line + "\n" for line in written.splitlines() if line.split(":")[0].strip() not in ("join", "split_text")
    )
    assert load(tmp_path, older).data == load(tmp_path, written).data
    (tmp_path / "config.yaml").write_text(older)
    (tmp_path / "metrics.jsonl").write_text("")
    before = load_config(tmp_path / "config.yaml").data
    assert (before.join, before.split_text) == ("", "blank_lines")
    (tmp_path / "config.yaml").write_text(written)
    assert load_config(tmp_path / "config.yaml").data.join is None


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("  overlap: 2000", "overlap"),
        ("  overlap: 9\n  too_long: drop", "data.overlap"),
        ("  split_text: lines\n", "data.split_text"),
        ("  columns: {promt: a}", "data.columns.promt"),
        ("  columns: {prompt: 3}", "data.columns.prompt"),
    ],
)
def test_settings_of_long_texts_and_columns(tmp_path: Path, line: str, name: str) -> None:
    text = MINIMAL.replace("t.jsonl", "t.jsonl" if "split_text" in line else "t.txt")
    assert name in refusal(tmp_path, text + line)


def test_what_is_wrong_with_an_override_isnt_said_of_a_line_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: b\ndata: {train: x.jsonl}\noutput: o\ntrain:\n  lr: -1\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_config(file, ["train.checkpointing=sometimes", "adapter=5"])
    lines = str(error.value).splitlines()
    assert any(f"{file}:5: train.lr" in line for line in lines)
    assert sum("override: " in line for line in lines) == 2


def test_an_override_reaches_into_a_section_that_a_word_is_short_for(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    short = {"objective": "dpo", "train": {"retain": "builtin:general-train"}, "adapter": "full"}
    file.write_text(json.dumps({"base": "b", "data": {"train": "t"}, "output": "o", **short}))  # which is YAML
    config = load_config(file, ["objective.beta=0.3", "train.retain.weight=2", "adapter.targets=mlp"])
    assert config.objective.kind == "dpo" and config.objective.beta == 0.3
    assert config.train.retain == RetainConfig(weight=2.0)
    assert config.adapter.full and config.adapter.targets == "mlp"
