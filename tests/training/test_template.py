"""What was trained under a template that isn't the tokenizer's own has it beside its weights."""

import json
from pathlib import Path

from deltaw.commands.scale import scale_named
from deltaw.config import parse_config
from deltaw.data.render import TEMPLATE
from deltaw.model import open_model
from deltaw.shipping.trained import open_trained
from deltaw.training.run import train
from tests.tiny import Said, run_file

OWN = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"""


def chats(path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "ab" * (1 + i % 5)}]}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def finished(folder: Path, **data: str) -> Path:
    raw = run_file(folder, data={"train": str(chats(folder / "chats.jsonl")), "eval": 4, **data})
    raw["train"]["steps"] = 2
    train(parse_config(raw))
    return folder / "run"


def test_a_runs_own_template_lies_beside_its_weights(folder: Path) -> None:
    (folder / "own.jinja").write_text(OWN)
    run = finished(folder, template=str(folder / "own.jinja"))
    assert (run / "adapter" / TEMPLATE).read_text() == OWN
    (folder / "own.jinja").unlink()
    scale_named(str(run), to=0.5, output=str(folder / "half"), factors=None, data=None, base=None, display=Said())
    for name in (run, run / "adapter", folder / "half"):
        trained = open_trained(name, base=str(folder / "base"))
        assert trained.renderer.template == OWN and not trained.renderer.own_template
        assert open_model(name, base=str(folder / "base"), device="cpu").renderer.template == OWN


def test_the_tokenizers_own_need_not_go_along(folder: Path) -> None:
    assert not (finished(folder) / "adapter" / TEMPLATE).exists()
