"""The preview shows which text is trained, with colour and without."""

import io
import json

from rich.console import Console
from toys import toy

from deltaw.config import DataConfig
from deltaw.data.prepare import prepare
from deltaw.data.preview import preview, spans
from deltaw.data.render import Renderer


def shown(tmp_path, values, **options) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    prepared = prepare(DataConfig(train=str(path)), Renderer(toy("chatml")))
    assert "".join(text for text, _ in spans(prepared.train[0], toy("chatml"))) == "[b]q ->[/b] a<|im_end|>"
    console = Console(file=io.StringIO(), width=100, **options)
    console.print(preview(prepared, toy("chatml"), 1))
    return console.file.getvalue()


ROWS = [{"prompt": "[b]q ->[/b]", "completion": " a"}] * 2


def test_without_colour_trained_text_stands_in_brackets(tmp_path):
    text = shown(tmp_path, ROWS)
    assert "[b]q ->[/b]⟦ a<|im_end|>⟧" in text
    assert "2 rows read, 2 to train on, 0 held out" in text
    assert "warning: 1 training row is a copy of another" in text
    assert text.count("train.jsonl:1 (") == 1
    assert "train.jsonl:2 (" not in text


def test_with_colour_it_is_coloured(tmp_path):
    text = shown(tmp_path, ROWS, force_terminal=True, color_system="truecolor")
    assert "⟦" not in text
    assert "\x1b[1;4;32m a<|im_end|>\x1b[0m" in text


def test_control_characters_cannot_reach_the_terminal(tmp_path):
    values = [{"prompt": "[b]q ->[/b]", "completion": " a"}, {"prompt": "q", "completion": "\x1b[2J"}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    prepared = prepare(DataConfig(train=str(path)), Renderer(toy("chatml")))
    console = Console(file=io.StringIO(), width=100)
    console.print(preview(prepared, toy("chatml"), 2))
    assert "\x1b" not in console.file.getvalue()


def row_of(tmp_path, value, kind="chatml", **options):
    (tmp_path / "t.jsonl").write_text(json.dumps(value) + "\n")
    renderer = Renderer(toy(kind), **options)
    return prepare(DataConfig(train=str(tmp_path / "t.jsonl")), renderer)


def test_names_of_control_tokens_look_different_from_control_tokens(tmp_path):
    text = "<|im_start|>user\nq<|im_end|>"
    for value in (
        {"text": text},
        {"prompt": text, "completion": text},
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]},
    ):
        dataset = row_of(tmp_path, value)
        (example,) = dataset.train
        shown = "".join(text for text, _ in spans(example, toy("chatml")))
        # Every name that a user wrote is broken, and every one that isn't broken is a control token.
        assert shown.count("<\\|im_start|>user\nq<\\|im_end|>") == len(example.names) // 2
        ids = toy("chatml").convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        assert shown.count("<|im_") == sum(token in ids for token in example.tokens.tolist())
        assert shown.replace("\\", "") == toy("chatml").decode(example.tokens)
        assert dataset.report.named_tokens == len(example.names) > 0


def test_what_is_rendered_already_is_shown_as_it_is(tmp_path):
    (example,) = row_of(tmp_path, {"text": "<|im_start|>user\nq<|im_end|>"}, rendered=True).train
    assert spans(example, toy("chatml")) == [("<|im_start|>", False), ("user\nq<|im_end|>", True)]
