"""A run on a GGUF's own blocks: its adapter goes on the dense base, and llama.cpp answers as it does."""

import json
from pathlib import Path

import pytest

import deltaw
from deltaw.model import open_model
from deltaw.shipping.destination import Options
from deltaw.shipping.gguf.adapter import ADAPTER, GgufAdapter
from deltaw.shipping.trained import open_trained
from deltaw.shipping.verify.compare import verify
from deltaw.show.progress import Display
from tests.base.gguf_models import model_of, write_model

QUIET = Display(quiet=True)
WORDS = ("hello", "world", "it's", "12,345", "CamelCase", "x = 1", "ok!?")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("keep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(folder / "cache"))
        sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 32}
        model = model_of("llama", **sizes, num_hidden_layers=1)
        base = write_model(folder / "base.gguf", model, types=("Q8_0", "Q4_1", "Q5_0", "Q6_K"))
        rows = [{"prompt": f"{word} {n}", "completion": f" {word[::-1]} {n * n}"} for n in range(4) for word in WORDS]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        config = deltaw.parse_config(
            {
                "base": str(base),
                "base_weights": "keep",
                "adapter": {"rank": 4, "alpha": 8},
                "data": {"train": str(folder / "rows.jsonl"), "eval": 6},
                "train": {"lr": 2e-2, "epochs": 2, "tokens_per_step": 256, "warmup_steps": 0, "dtype": "float32"},
                "evaluate": {"report": False, "general": None, "samples": 0},
                "output": str(folder / "run"),
            }
        )
        deltaw.train(config, display=QUIET)
        yield folder


def test_llama_cpp_answers_as_it_does_on_the_very_file(run: Path) -> None:
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp, a build of llama.cpp")
    (run / "out").mkdir()
    GgufAdapter(open_trained(run / "run"), Options()).write(run / "out", QUIET)
    result = verify(run / "run", f"{run / 'base.gguf'}+{run / 'out' / ADAPTER}", prompts=4, tokens=8)
    assert result.agree, result.text()
    assert result.numbers[1].weights == "float32"  # the same numbers to the bit
    assert result.tolerance.measured and result.effect.kl > 10 * result.kl  # x is rounded to 8 bits there


def test_it_opens_as_it_was_trained_and_its_adapter_goes_on_the_dense_base(run: Path) -> None:
    kept, dense = open_model(run / "run"), open_model(run / "run" / "adapter", base=run / "base.gguf")
    assert kept.base.weights == "keep" and dense.base.weights == "auto"
    assert kept.base.fingerprint == dense.base.fingerprint
    assert len(kept.attached.paths) == len(dense.attached.paths) == 7
