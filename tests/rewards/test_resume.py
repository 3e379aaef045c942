"""A run whose reward fails can go on with a mended one, and is told that it is another."""

from pathlib import Path

import pytest

import deltaw
from deltaw.errors import RunError
from deltaw.run import Run
from tests.tiny import Said, run_file, tiny_base, words

JUDGE = """calls = 0
def judge(prompt, completion, row):
    global calls
    calls += 1
    return len(completion) if calls <= 6 else None
"""  # two calls before work, four in the first step


def test_it_stops_saved_and_resumes_with_other_code(tmp_path: Path) -> None:
    tiny_base(tmp_path / "base")
    words(tmp_path / "train.jsonl", 12)
    judge = tmp_path / "judge.py"
    judge.write_text(JUDGE)
    reward = {"kind": "grpo", "samples": 2, "prompts": 2, "max_new_tokens": 4, "reward": f"{judge}:judge"}
    train = {"steps": 2, "lr": 1e-3, "dtype": "float32", "device": "cpu", "save_every": 1}
    evaluate = {"general": None, "report": False}
    data = {"train": str(tmp_path / "train.jsonl")}
    fields = run_file(tmp_path, data=data, objective=reward, train=train, evaluate=evaluate)
    with pytest.raises(RunError, match=r"None.*on row train\.jsonl"):
        deltaw.train(fields, display=Said())
    judge.write_text(JUDGE.replace("None", "0"))
    said = Said()
    deltaw.resume(tmp_path / "run", display=said, allow_code=True)
    assert any(line.startswith("warning:") and "judge" in line for line in said.lines)
    assert Run(tmp_path / "run").read_metrics()[-1]["step"] == 2
