"""The preview shows which text is trained, with colour and without."""

import io
import json

from rich.console import Console
from toys import toy

from deltaw.config import DataConfig
from deltaw.data.dataset import prepare
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
    assert "warning: 1 training rows are copies of another" in text
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
