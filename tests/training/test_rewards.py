"""Runs on rewards: the reward rises, they resume to the bit, sampling and training agree, every record says what the
answers were like, and what can't be trained so is refused before the base is read."""

import json
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw.commands.eval import eval_named
from deltaw.config import config_of
from deltaw.data.loader import LoaderState
from deltaw.errors import InputError, RunError
from deltaw.run import Run
from deltaw.show.progress import QUIET
from deltaw.training.plan import plan
from deltaw.training.rollouts import Prompts
from deltaw.training.verify import verify_resume
from tests.faults.common import command
from tests.tiny import Said, run_file, tiny_base
from tests.training.processes import together

REWARDS = """
def vowels(prompt, completion, row):
    return completion.count("e") / (1 + len(completion))

def two(prompt, completion, row):
    return {"short": 0.5 / (1 + len(completion)), "gold": row["gold"] * 1e-3}

def flat(prompt, completion, row):
    return 0.25

def below_k(prompt, completion, row):
    return sum(c < "k" for c in completion) / max(1, len(completion))

def broken(prompt, completion, row):
    if prompt.startswith("say 7"):
        raise ValueError("no seven")
    return 0.5
"""
OBJECTIVE = {"kind": "grpo", "samples": 4, "prompts": 4, "max_new_tokens": 8, "mask_truncated": False}
TRAIN = {
    "steps": 4,
    "lr": 2e-2,
    "dtype": "float32",
    "device": "cpu",
    "save_every": 1,
    "tokens_per_batch": 160,
    "eval_every": 2,
}
EVALUATE = {"general": None, "report": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, prompts without answers, rewards, and a finished run."""
    place = tmp_path_factory.mktemp("rewards")
    tiny_base(place / "base", initializer_range=0.3)  # type: ignore[arg-type]  # else no token is ever likely
    prompts = [{"prompt": f"say {i} and then something else, please: ", "gold": i} for i in range(30)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (place / "judge.py").write_text(REWARDS)
    deltaw.train(fields(place, "run"), display=QUIET)
    return place


def rows(place: Path) -> dict[str, Any]:
    """All of them to train on."""
    return {"train": str(place / "train.jsonl")}


def fields(place: Path, output: str, reward: str = "vowels", **changes: Any) -> dict[str, Any]:
    objective = {**OBJECTIVE, "reward": f"{place / 'judge.py'}:{reward}", **changes.pop("objective", {})}
    train = {**TRAIN, **changes.pop("train", {})}
    if "data" in changes:
        del train["eval_every"]
    evaluate = {**EVALUATE, **changes.pop("evaluate", {})}
    sections = {"objective": objective, "train": train, "evaluate": evaluate, **changes}
    return run_file(place, **sections, output=str(place / output))


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in Run(folder).read_metrics()]


def bits(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_each_record_says_what_the_answers_were_like(place: Path) -> None:
    steps = [line for line in Run(place / "run").read_metrics() if "reward" in line]
    held_out = [line for line in Run(place / "run").read_metrics() if "eval_reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and [line["step"] for line in held_out] == [2, 4]
    for line in steps:
        assert 0 <= line["reward"] <= 1 and line["reward_spread"] >= 0 and line["entropy"] > 0
        assert 0 <= line["flat_groups"] <= 1 and 0 <= line["truncated"] <= 1 and 1 <= line["answer_tokens"] <= 8
        assert line["clipped"] == 0 and line["logp_difference"] <= 1e-4  # one engine: sampling and training agree
        parts = sum(line[f"{name}_seconds"] for name in ("sampling", "reward", "update"))
        assert parts > 0 and "loss" not in line
    result = Run(place / "run").read_json(Run(place / "run").result)
    best = max(held_out, key=lambda line: line["eval_reward"])
    assert result["best_step"] == best["step"] and result["eval"]["after"]["reward"] == pytest.approx(
        best["eval_reward"]
    )
    assert result["eval"]["higher_is_better"]["reward"] and "loss" not in result["eval"]["after"]
    assert all(answer["truth"] == "" for answer in result["answers"])


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "beta": 0.1}], ids=["plain", "tempered and tethered"])
def test_resuming_gives_the_same_bits(place: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = config_of(fields(place, "verified", objective=changes, data=rows(place)))
    verified = verify_resume(config, 3, QUIET)
    assert verified.exact and len(verified.resumed) == 2


def test_a_run_that_was_killed_while_it_sampled_ends_as_one_that_was_not(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaw.training import rollouts

    calls, real = [0], rollouts.sampled

    def dying(*args: Any, **how: Any) -> Any:
        calls[0] += 1
        answers = real(*args, **how)
        if calls[0] == 3:
            raise KeyboardInterrupt  # in step 3, whose answers are lost
        return answers

    monkeypatch.setattr(rollouts, "sampled", dying)
    with pytest.raises(KeyboardInterrupt):
        deltaw.train(fields(place, "killed"), display=QUIET)
    monkeypatch.undo()
    deltaw.resume(place / "killed", display=QUIET)
    assert bits(place / "killed") == bits(place / "run") and untimed(place / "killed") == untimed(place / "run")


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_log_probabilities_are_of_the_distribution_that_is_sampled(place: Path, temperature: float) -> None:
    changes = {"temperature": temperature, "max_new_tokens": 12}
    deltaw.train(fields(place, f"t{temperature}", objective=changes, train={"steps": 2}), display=QUIET, replace=True)
    steps = [line for line in Run(place / f"t{temperature}").read_metrics() if "reward" in line]
    assert all(line["logp_difference"] <= 1e-4 for line in steps)


def test_an_easy_reward_rises(place: Path) -> None:
    objective = {"samples": 8, "max_new_tokens": 4}
    train = {"steps": 20, "lr": 3e-2, "schedule": "constant", "save_every": 100, "tokens_per_batch": 2048}
    config = fields(place, "easy", "below_k", data=rows(place), objective=objective, train=train)
    deltaw.train(config, display=QUIET)
    rewards = [line["reward"] for line in Run(place / "easy").read_metrics() if "reward" in line]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3, rewards


def test_parts_of_a_reward_are_told_apart(place: Path) -> None:
    deltaw.train(fields(place, "parts", "two", train={"steps": 2}), display=QUIET)
    (first, *_) = [line for line in Run(place / "parts").read_metrics() if "reward" in line]
    assert {name for name in first if name.startswith("reward_") and "gold" in name}


def test_a_run_from_which_nothing_can_be_learnt_stops_and_says_why(place: Path) -> None:
    said = Said()
    with pytest.raises(RunError) as stopped:
        deltaw.train(
            fields(
                place,
                "flat",
                "flat",
                train={"steps": 30},
                data=rows(place),
            ),
            display=said,
        )
    assert "0.25" in stopped.value.what and stopped.value.fix
    assert sum(line.startswith("warning: step") and "same reward" in line for line in said.lines) == 1  # long before
    assert Run(place / "flat").read_metrics()[-1]["step"] == 10


def test_a_reward_that_fails_stops_the_run_saved_and_names_the_row(place: Path) -> None:
    with pytest.raises((RunError, InputError), match=r"train\.jsonl:8"):
        deltaw.train(fields(place, "broken", "broken", data=rows(place), train={"steps": 20}), display=QUIET)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("train", {"tokens_per_step": 64}),
        ("train", {"retain": {"weight": 0.1}}),
        ("train", {"skip_spikes": 3.0}),
        ("adapter", {"rank": 4, "dropout": 0.1}),
        ("adapter", {"rank": 4, "init": "eva"}),
        ("evaluate", {"max_new_tokens": 9}),
        ("evaluate", {"metrics": ["exact_match"]}),  # the rows have no answers
        ("objective", {"max_new_tokens": 10_000}),  # the base can't hold them
        ("objective", {"reward": "judgement"}),
        ("objective", {"sft_weight": 0.1}),
    ],
)
def test_what_cant_be_trained_so_is_refused(place: Path, section: str, value: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        deltaw.train(fields(place, "refused", **{section: value}), display=QUIET)
    assert not (place / "refused" / "checkpoints").exists()


def test_a_plan_is_the_most_that_can_come(place: Path) -> None:
    planned = plan(config_of(fields(place, "planned")), QUIET)
    names = [phase.name for phase in planned.phases]
    assert "sampling" in names and "answers" in names and "held-out loss" not in names
    run = Run(place / "run").read_json(Run(place / "run").result)
    assert planned.steps == 4 and planned.tokens >= run["tokens"] and "sampled" in planned.text()
    assert not (place / "planned").exists()


def test_prompts_are_all_asked_once_per_epoch() -> None:
    prompts, at = Prompts(10, 4, seed=3), LoaderState()
    asked: list[int] = []
    for _ in range(2 * prompts.steps):
        asked += prompts.of(at)
        at = prompts.after(at)
    assert (
        prompts.steps == 3 and sorted(asked[:10]) == sorted(asked[10:]) == list(range(10)) and asked[:10] != asked[10:]
    )
    assert (at.epoch, at.step) == (2, 0)


def test_drawing_depends_on_seed_step_prompt_and_sample_alone(place: Path) -> None:
    from deltaw.generate.rollout import sampled
    from deltaw.generate.sampling import Sampling
    from deltaw.model import open_model

    model = open_model(place / "base", dtype="float32").base.model
    prompts = [[5 + n, 9, 11 + n] for n in range(3)]
    sampling = Sampling(max_new_tokens=6, temperature=1.0, seed=11)
    every = sampled(model, prompts, 4, sampling, {0})
    alone = sampled(model, prompts[2:], 4, sampling, {0}, first=[8])
    assert [one.tokens for one in every[2]] == [one.tokens for one in alone[0]]
    assert len({tuple(one.tokens) for group in every for one in group}) > 6
    other = sampled(model, prompts, 4, sampling.model_copy(update={"seed": 12}), {0})
    assert [one.tokens for one in other[0]] != [one.tokens for one in every[0]]
    for group in every:
        for one in group:
            assert len(one.tokens) == len(one.logprobs) and one.truncated == (one.tokens[-1] != 0)
            assert one.text_tokens == (one.tokens if one.truncated else one.tokens[:-1])


def test_two_processes_take_the_steps_of_one(place: Path) -> None:
    config = fields(place, "two", train={"steps": 2})
    (place / "two.yaml").write_text(json.dumps(config))
    deltaw.train(fields(place, "one", train={"steps": 2}), display=QUIET)
    work = command("train", place / "two.yaml", "--quiet")
    ranks = together(2, lambda rank: work())
    assert [rank.code for rank in ranks] == [0, 0], ranks
    one, two = untimed(place / "one"), untimed(place / "two")
    told = [[line.get("reward", line.get("eval_reward")) for line in lines] for lines in (one, two)]
    assert len(told[0]) == 3 and told[1] == pytest.approx(told[0])
    norms = [[line["grad_norm"] for line in lines if "grad_norm" in line] for lines in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_eval_asks_the_reward_again(place: Path) -> None:
    command_line = {"base": None, "use_adapter": True, "use_base": True, "metrics": None, "rows": None}
    command_line |= {"max_tokens": None, "output": None, "allow_code": False, "display": QUIET}
    told = eval_named(str(place / "run"), None, **command_line).data  # type: ignore[arg-type]
    result = Run(place / "run").read_json(Run(place / "run").result)["eval"]
    assert told["reward"] == pytest.approx(result["after"]["reward"])
    assert told["base"]["reward"] == pytest.approx(result["before"]["reward"])


@pytest.mark.parametrize("blank", ["", "  \n"])
def test_a_row_that_asks_nothing_is_said_to_lack_its_prompt(place: Path, tmp_path: Path, blank: str) -> None:
    rows = [{"prompt": "say 1 ", "gold": 1}, {"prompt": blank, "gold": 2}, {"prompt": "say 3 "}]
    (tmp_path / "blank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"blank\.jsonl:2: its prompt is empty"):
        deltaw.train(fields(place, "blank", data={"train": str(tmp_path / "blank.jsonl")}), display=QUIET)
