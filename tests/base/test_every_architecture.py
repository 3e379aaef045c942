"""Every type of causal language model: packed, padded or apart, what is trained is what PEFT would train, and the table
in docs/models.md says what is so."""

from pathlib import Path

import pytest

from tests.every_causal_type import TYPES, examine

TABLE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
# A type of each kind, all of them fast to build; the others are slow in sum.
SAMPLE = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "gpt_neo", "cohere2",
    "granite", "ministral3", "qwen3_moe", "qwen2_moe", "gpt_oss", "bloom", "mamba", "bart", "cpmant", "gemma3",
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(t, marks=() if t in SAMPLE else pytest.mark.slow) for t in TYPES])
def test_one_loss_and_gradient_with_peft_and_as_the_table_says(name: str) -> None:
    row = examine(name)
    assert row.equal, f"loss off by {row.loss:.1e}, gradient by {row.gradient:.1e}"
    assert row.line() in TABLE, "python -m tests.every_causal_type > docs/models.md"


def test_the_table_has_every_type() -> None:
    rows = [line.split("|")[1].strip() for line in TABLE if line.startswith("| ")]
    assert rows == ["type", *TYPES]
