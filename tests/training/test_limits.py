"""Rows that the base can't be given are seen before the first step, those it wasn't made for are said."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as T

from deltaw.config import RunConfig, parse_config
from deltaw.data.opening import limits_of, open_dataset
from deltaw.errors import InputError
from deltaw.evaluation.side_by_side import evaluate
from deltaw.show.progress import Display
from deltaw.training import opening
from deltaw.training.plan import plan
from deltaw.training.run import train
from tests.data.toys import toy
from tests.tiny import Said, run_file, tiny_base

QUIET = Display(quiet=True)


def texts(path: Path, lengths: list[int]) -> Path:
    rows = [{"text": "ab" * (length // 2) + str(n)} for n, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder: Path, data: dict[str, Any], **evaluate: Any) -> RunConfig:
    fields = run_file(folder, data=data, evaluate={"general": None, "report": False, "samples": 0, **evaluate})
    options = {**fields["train"]}
    if "eval" not in data:
        options.pop("eval_every", None)
    return parse_config({**fields, "train": options})


def other_base(folder: Path, model: Any) -> None:
    model.save_pretrained(folder / "base")
    toy("chatml").save_pretrained(folder / "base")


@pytest.mark.parametrize("where", ["train", "eval"])
def test_a_token_without_an_embedding_is_refused_before_the_weights_are_read(
    folder: Path, monkeypatch, where: str
) -> None:
    tokenizer = T.AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens(["<step>"])
    tokenizer.save_pretrained(folder / "base")
    files = {name: texts(folder / f"{name}.jsonl", [8] * 30) for name in ("train", "eval")}
    lines = files[where].read_text().splitlines()
    files[where].write_text("\n".join([*lines[:16], '{"text": "ab <step> ab"}', *lines[16:]]))
    settings = config(folder, {name: str(path) for name, path in files.items()})
    monkeypatch.setattr(opening, "open_base", lambda *args, **options: pytest.fail("the weights were read"))
    for work in (train, plan):
        with pytest.raises(InputError) as refused:
            work(settings, display=QUIET)
        assert f"{where}.jsonl:17: token id {len(tokenizer) - 1}" in refused.value.what
    assert not (folder / "run").exists()
    source, _, dataset = open_dataset(settings, QUIET)
    assert f"{where}.jsonl:17" in limits_of(source, dataset)[0]


def test_a_row_beyond_a_learned_table_is_refused_and_what_is_advised_works(folder: Path) -> None:
    sizes = {"vocab_size": len(toy("chatml")), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    other_base(folder, T.GPT2LMHeadModel(T.GPT2Config(**sizes)))
    data = {"train": str(texts(folder / "t.jsonl", [10] * 20 + [200] + [10] * 20))}
    with pytest.raises(InputError) as refused:
        train(config(folder, data), display=QUIET)
    assert "t.jsonl:21" in refused.value.what and "data.max_length to 64" in str(refused.value.fix)
    assert not (folder / "run").exists()
    # The general text has passages of 256 tokens: it is cut.
    train(config(folder, {**data, "max_length": 64}, general="builtin:general"), display=QUIET)
    result = json.loads((folder / "run/result.json").read_text())
    assert result["forgetting"]["tokens"] > 0 and result["failed"] == {}
    with pytest.raises(InputError, match=r"t\.jsonl:21"):
        evaluate(folder / "base", str(folder / "t.jsonl"))


def test_a_row_beyond_a_rotary_context_is_said_once_and_trained(folder: Path) -> None:
    tiny_base(folder / "base", max_position_embeddings=64)
    data = {
        "train": str(texts(folder / "t.jsonl", [10] * 19 + [200])),
        "eval": str(texts(folder / "e.jsonl", [200, 9])),
    }
    display = Said()
    train(config(folder, data, samples=2), display=display)
    said = [line for line in display.lines if "made for" in line]
    assert len(said) == 1 and "2 rows (9.1 %)" in said[0] and "64 tokens" in said[0]
    answers = json.loads((folder / "run/result.json").read_text())["answers"]
    assert len(answers) == 1, "the row that leaves no room for an answer isn't asked"
    with pytest.raises(InputError, match=r"e\.jsonl:1"):
        train(
            parse_config(
                {**config(folder, data, metrics=["exact_match"]).model_dump(mode="json"), "output": str(folder / "m")}
            ),
            display=QUIET,
        )


def test_a_border_that_only_the_model_knows_is_found_before_the_first_step(folder: Path) -> None:
    sizes = {"vocab_size": len(toy("chatml")), "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 64}
    other_base(folder, T.MptForCausalLM(T.MptConfig(**sizes)))
    data = {"train": str(texts(folder / "t.jsonl", [10] * 30 + [100]))}
    for work in (train, plan):
        with pytest.raises(InputError) as refused:
            work(config(folder, data), display=QUIET)
        assert "t.jsonl:31" in refused.value.what and "64" in str(refused.value.fix)
    assert not (folder / "run/checkpoints").exists()
