"""A sweep trains each run as it would be trained alone, ends each by itself, and resumes."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deltaw.adapter.file import Adapter
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward
from deltaw.commands.sweep import sweep_named
from deltaw.config import parse_config
from deltaw.errors import InputError
from deltaw.files.safetensors import load_safetensors
from deltaw.run import Run
from deltaw.show.progress import QUIET
from deltaw.sweep import joint
from deltaw.sweep.folder import HALVED, Ended, Rung, SweepFolder
from deltaw.sweep.grid import Grid, Variant, of_grid
from deltaw.sweep.standing import ranked
from deltaw.sweep.sweep import run_sweep
from deltaw.training import frozen_layers
from deltaw.training.captured import Captured
from deltaw.training.learner import Learner
from deltaw.training.run import resume, train
from deltaw.training.stop import Stopped
from tests.tiny import Said, run_file, tiny_base, words

NO_ANSWERS = {"samples": 0, "general": None, "report": False}
LORA = {"rank": 4, "alpha": 8}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": LORA},
    "dora": {"adapter": {**LORA, "magnitude": True}},
    "full": {"adapter": "full"},
    "lora+": {"adapter": LORA, "lr_ratio_b": 4.0},
    "pissa": {"adapter": {**LORA, "init": "pissa"}},
    "eva": {"adapter": {**LORA, "init": "eva"}},
    "lora-ga": {"adapter": {**LORA, "init": "lora-ga"}},
    "dropout": {"adapter": {**LORA, "dropout": 0.3}},
    "dora with dropout": {"adapter": {**LORA, "magnitude": True, "dropout": 0.3}, "seed": 5},
    "retain": {"adapter": LORA, "retain": {"data": "builtin:general-train", "share": 0.3}},
    "retain more": {"adapter": LORA, "retain": {"data": "builtin:general-train", "share": 0.3, "weight": 3.0}},
    "others": {"adapter": {"rank": 7, "targets": "attention", "scaling": "rslora"}, "seed": 3, "tokens_per_step": 70},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    return folder


def config(place: Path, output: Path | str, *, adapter: Any = LORA, eval_every: int | None = 3, **options: Any) -> Any:
    fields = run_file(place, adapter=adapter, evaluate=NO_ANSWERS, output=str(output))
    return parse_config({**fields, "train": {**fields["train"], "eval_every": eval_every, **options}})


def grid(folder: Path, configs: dict[str, Any], **settings: Any) -> Grid:
    made = [
        Variant(name, one.model_copy(update={"output": str(folder / name)}), {"run": name})
        for name, one in configs.items()
    ]
    return Grid(folder, tuple(made), **settings).checked()


def begun(made: Grid) -> Any:
    return run_sweep(SweepFolder(made), new=True, display=QUIET)


def losses(run: Path) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in Run(run).read_metrics()]


@pytest.fixture(scope="module")
def together(place: Path) -> Path:
    """A run of each kind, in one sweep."""
    folder = place / "together"
    begun(grid(folder, {kind: config(place, ".", **options) for kind, options in KINDS.items()}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_adapter_is_what_its_own_run_makes(place: Path, together: Path, kind: str) -> None:
    alone, beside = place / "alone" / kind, together / kind
    train(config(place, alone, **KINDS[kind]), display=QUIET)
    assert losses(beside) == pytest.approx(losses(alone), rel=2e-5)
    one, other = Adapter.load(alone), Adapter.load(beside)
    assert one.spec == other.spec
    for path, update in one.factors.items():
        tensors = other.factors[path].tensors()
        for name, wanted in update.tensors().items():
            apart = float((tensors[name] - wanted).norm() / wanted.norm())
            assert apart < 2e-3, (path, name)
    counts = ("steps", "tokens", "supervised_tokens", "best_step", "eval", "fingerprints", "trained_parameters")
    results = [json.loads((folder / "result.json").read_text()) for folder in (alone, beside)]
    for name in counts:
        if name != "eval":
            assert results[0][name] == results[1][name]
    assert results[1]["eval"]["after"]["loss"] == pytest.approx(results[0]["eval"]["after"]["loss"], rel=2e-5)


def test_frozen_layers_are_computed_once_for_all(place: Path) -> None:
    """Those below the lowest adapter of any; what each comes to is its own run's."""

    def upper(output: Path | str, lr: float) -> Any:
        adapter = {**LORA, "targets": ["layers.1.mlp.up_proj", "layers.1.mlp.down_proj"]}
        made = config(place, output, adapter=adapter, lr=lr)
        return made.model_copy(update={"data": made.data.model_copy(update={"limit": 20, "eval": None})})

    rates, said = (1e-2, 3e-2), Said()
    made = grid(place / "upper", {f"lr-{lr}": upper(".", lr) for lr in rates})
    run_sweep(SweepFolder(made), new=True, display=said)
    assert any("computed once" in line for line in said.lines)
    for lr in rates:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(frozen_layers, "FROZEN_SHARE", 0.0)
            train(upper(place / f"alone/upper-{lr}", lr), display=QUIET)
        assert losses(place / f"upper/lr-{lr}") == pytest.approx(losses(place / f"alone/upper-{lr}"), rel=2e-5)


OBJECTIVES = ("long", "kto")  # pairs that share a long beginning, weighed by DPO


@pytest.fixture(scope="module")
def weighed(place: Path) -> Path:
    """A run of each of these, in one sweep."""
    rows = [{"prompt": f"say {i} ", "chosen": "ab" * (1 + i % 5), "rejected": "ba" * (1 + i % 3)} for i in range(40)]
    for name, beginning in (("pairs", ""), ("long", "You are asked what a row says. ")):
        text = "".join(json.dumps({**row, "prompt": beginning + row["prompt"]}) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(text)
    folder = place / "weighed"
    begun(grid(folder, {kind: of_pairs(place, ".", kind) for kind in OBJECTIVES}))
    return folder


def of_pairs(place: Path, output: Path | str, kind: str) -> Any:
    fields = run_file(place, adapter=LORA, evaluate={"general": None, "report": False}, output=str(output))
    data = {"train": str(place / ("long.jsonl" if kind == "long" else "pairs.jsonl")), "eval": 6}
    train = {**fields["train"], "eval_every": 3, "tokens_per_step": 300, "tokens_per_batch": 150}
    objective = {"kind": "dpo" if kind == "long" else kind}
    return parse_config({**fields, "data": data, "objective": objective, "train": train})


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_each_objective_is_what_its_own_run_minimises(place: Path, weighed: Path, kind: str) -> None:
    alone = place / "alone" / kind
    train(of_pairs(place, alone, kind), display=QUIET)
    lines = [Run(folder).read_metrics() for folder in (alone, weighed / kind)]
    assert len(lines[0]) == len(lines[1]) == 8
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds", "tokens_per_second"}:
            assert other[name] == pytest.approx(one[name], rel=2e-4, abs=1e-6), name
    kept = [load_safetensors(Run(folder).references) for folder in (alone, weighed / kind)]
    for name in kept[0]:
        torch.testing.assert_close(kept[1][name], kept[0][name], rtol=1e-5, atol=1e-4)


def test_losses_of_different_objectives_are_not_ranked(place: Path, weighed: Path) -> None:
    ranking = ranked(SweepFolder.read(weighed))
    assert ranking.winner is None and not ranking.settings and all(run.loss is not None for run in ranking.runs)
    variants = [
        Variant(f"beta-{beta}", made, {"objective.beta": beta})
        for beta in (0.1, 0.5)
        for made in [of_pairs(place, place / f"halved/{beta}", "dpo")]
        for made in [made.model_copy(update={"objective": made.objective.model_copy(update={"beta": beta})})]
    ]
    assert not ranked(SweepFolder(Grid(place / "halved", tuple(variants)).checked())).settings
    with pytest.raises(InputError, match="objective"):
        Grid(place / "halved", tuple(variants), halving=True).checked()


# Ending, one by one and all at once


def stopping(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    """The `at`-th common step raises instead."""
    taken, taking = [0], joint.step_together

    def step(*args: Any, **options: Any) -> Any:
        taken[0] += 1
        if taken[0] == at:
            raise error
        return taking(*args, **options)

    monkeypatch.setattr(joint, "step_together", step)


def three(place: Path, folder: Path, **options: Any) -> Grid:
    rates = {f"lr-{rate}": config(place, ".", lr=rate, **options) for rate in (1e-3, 1e-2, 3e-2)}
    return grid(folder, rates)


@pytest.mark.parametrize("error", [Stopped(2, "stopped"), RuntimeError("the machine")])
def test_what_was_stopped_goes_on_and_ends_the_same(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    whole = three(place, tmp_path / "whole")
    begun(whole)
    made = three(place, tmp_path / "part")
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        stopping(patch, 4, error)
        begun(made)
    for variant in made.variants:
        assert (Path(variant.config.output) / "checkpoints/step-000003").is_dir()
    ranking = run_sweep(SweepFolder.read(made.folder), new=False, display=QUIET)
    assert [run.state for run in ranking.runs] == ["finished"] * 3
    for one, other in zip(whole.variants, made.variants, strict=True):
        same, theirs = Adapter.load(one.config.output), Adapter.load(other.config.output)
        assert same.fingerprint == theirs.fingerprint, "to the bit"
        assert losses(Path(one.config.output)) == losses(Path(other.config.output))


def test_a_run_that_cannot_go_on_ends_alone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = grid(tmp_path / "sweep", {"good": config(place, "."), "bad": config(place, ".", seed=1)})
    taking = joint.step_together

    def step(forward: Any, learners: Any, *args: Any, **options: Any) -> Any:
        bad = [one for one in learners if one.config.seed == 1]
        if bad and bad[0].state.step == 3:
            with torch.no_grad():
                bad[0].attached.parameters[0].fill_(float("nan"))
        return taking(forward, learners, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(joint, "step_together", step)
        ranking = begun(made)
    good, bad = ranking.runs
    assert good.state == "finished" and bad.state == "failed" and "NaN" in bad.why and bad.step == 3
    train(config(place, tmp_path / "alone"), display=QUIET)
    assert losses(tmp_path / "sweep/good") == pytest.approx(losses(tmp_path / "alone"), rel=2e-5)
    sweep = SweepFolder.read(tmp_path / "sweep")
    assert sweep.to_train == [] and (tmp_path / "sweep/bad/checkpoints/step-000003").is_dir()
    resume(tmp_path / "sweep/bad", display=QUIET)  # an ordinary run: by itself, from its checkpoint
    assert [run.state for run in ranked(sweep).runs] == ["finished"] * 2


def test_halving_stops_settings_and_not_seeds(place: Path, tmp_path: Path) -> None:
    rates, seeds = (1e-5, 1e-3, 1e-2, 3e-2), (0, 1)
    variants = [
        Variant(
            f"{rate}-{seed}",
            config(place, tmp_path / f"sweep/{rate}-{seed}", lr=rate, seed=seed, steps=40, eval_every=None),
            {"train.lr": rate, "train.seed": seed},
        )
        for rate in rates
        for seed in seeds
    ]
    ranking = begun(Grid(tmp_path / "sweep", tuple(variants), halving=True).checked())
    states = [run.state for run in ranking.runs]
    assert sorted(states) == ["finished"] * 2 + ["halved"] * 6
    done = [run for run in ranking.runs if run.state == "finished"]
    assert len({run.variant.settings["train.lr"] for run in done}) == 1 and {run.step for run in done} == {40}
    rungs = SweepFolder.read(tmp_path / "sweep").rungs
    assert [(rung.share, len(rung.losses)) for rung in rungs] == [(0.25, 8), (0.5, 4)]
    stopped = {run.step for run in ranking.runs if run.state == "halved"}
    assert stopped == {10, 20}
    assert (tmp_path / "sweep/sweep.html").is_file()


def test_runs_of_different_lengths_are_halved(place: Path, tmp_path: Path) -> None:
    """One goes on to its share while the other, whose adapter is the first, is there already."""
    lengths = {f"{steps}": config(place, ".", steps=steps, eval_every=None) for steps in (20, 30)}
    variants = [
        Variant(name, one.model_copy(update={"output": str(tmp_path / "sweep" / name)}), {"train.steps": int(name)})
        for name, one in lengths.items()
    ]
    ranking = begun(Grid(tmp_path / "sweep", tuple(variants), halving=True).checked())
    assert sorted(run.state for run in ranking.runs) == ["finished", "halved"]


def test_where_steps_are_recorded_runs_take_them_one_after_the_other(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; those that can't be recorded take theirs together."""
    kinds = {name: KINDS[name] for name in ("retain", "lora", "dora", "retain more")}
    monkeypatch.setattr(Forward, "shares", property(lambda self: False))
    taking, seen, released = joint.step_together, list[list[int]](), list[int]()

    class Counted(Captured):
        def release(self) -> None:
            released.append(self.learner.attached.number)
            assert not self.why_not
            super().release()

    def captured_on(device: Any, forward: Any, learner: Learner, longest: int, say: Any, following: Any) -> Any:
        recordable = learner.config.retain is None
        return Counted(forward, learner, longest, say, None, following) if recordable else None

    def step(forward: Any, learners: Any, batches: Any, positions: Any, **options: Any) -> Any:
        assert (options["captured"] is None) == any(one.config.retain for one in learners)
        seen.append([learner.attached.number for learner in learners])
        return taking(forward, learners, batches, positions, **options)

    monkeypatch.setattr(joint, "captured_on", captured_on)
    monkeypatch.setattr(joint, "step_together", step)
    said = Said()
    made = grid(tmp_path / "sweep", {kind: config(place, ".", **options) for kind, options in kinds.items()})
    run_sweep(SweepFolder(made), new=True, display=said)
    steps = len(seen) // 3
    assert seen == [[1]] * steps + [[2]] * steps + [[0, 3]] * steps and released == [1, 2]
    assert sum("one after the other" in line for line in said.lines) == 1
    for kind in ("lora", "dora"):
        train(config(place, tmp_path / kind, **kinds[kind]), display=QUIET)
        assert losses(tmp_path / "sweep" / kind) == pytest.approx(losses(tmp_path / kind), rel=2e-5)


# The command line


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    fields = run_file(place, evaluate=NO_ANSWERS, output=str(tmp_path / "sweep"))
    fields["train"]["steps"] = 3
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    return tmp_path


def named(*names: object, **options: Any) -> Any:
    flags = {"runs": False, "output": None, "halving": False, "replace": False, "allow_code": False}
    return sweep_named([str(name) for name in names], **{**flags, **options}, display=QUIET)


def test_the_same_command_finds_what_it_began_and_another_is_refused(folder: Path) -> None:
    first = named(folder / "run.yaml", "train.lr=1e-2,1e-3")
    assert first.exit_code == 0 and Path(first.data["winner"]["folder"], "adapter").is_dir()
    changed = (folder / "sweep/lr-1e-2/result.json").stat().st_mtime_ns
    for again in (named(folder / "run.yaml", "train.lr=1e-2,1e-3"), named(folder / "sweep")):
        assert again.data == first.data
    assert (folder / "sweep/lr-1e-2/result.json").stat().st_mtime_ns == changed
    with pytest.raises(InputError, match="another sweep"):
        named(folder / "run.yaml", "train.lr=1e-2,3e-3")
    assert named(folder / "run.yaml", "train.lr=1e-2,3e-3", replace=True).exit_code == 0
    assert json.loads((folder / "sweep/sweep.json").read_text())["runs"][1]["settings"] == {"train.lr": 3e-3}


def test_runs_of_their_own_data_lie_where_they_say(folder: Path, place: Path) -> None:
    files = []
    for who in ("alice", "bob"):
        rows = words(folder / f"{who}.jsonl", 30 if who == "alice" else 40)
        fields = run_file(
            place, evaluate=NO_ANSWERS, data={"train": str(rows), "eval": 4}, output=str(folder / "out" / who)
        )
        files.append(folder / f"{who}.yaml")
        files[-1].write_text(yaml.safe_dump(fields), encoding="utf-8")
    result = named(*files, runs=True)
    assert result.data["winner"] is None, "losses on other rows"
    assert {run["state"] for run in result.data["runs"]} == {"finished"}
    assert all((folder / "out" / who / "adapter").is_dir() for who in ("alice", "bob"))
    assert (folder / "out/sweep.json").is_file()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (["train.lr=1e-3"], "nothing varies"),
        (["train.lr=1e-3,1e-3"], "twice"),
        (["train.lr=1e-3,0.001"], "same run"),
        (["train.lr=1e-3,,2e-3"], "missing"),
        (["train.lr=1e-3,fast"], "lr"),
        (["train.dtype=float32,bfloat16"], "dtype"),
        (["base_weights=auto,int8"], "base"),
        (["output=a,b"], "output"),
        (["train.seed=" + ",".join(map(str, range(300)))], "256"),
        (["train.nothing=1,2"], "nothing"),
    ],
)
def test_what_cannot_be_swept_is_refused_at_once(folder: Path, settings: Sequence[str], word: str) -> None:
    with pytest.raises(InputError, match=word):
        named(folder / "run.yaml", *settings)
    assert not (folder / "sweep").exists()


def test_values_in_brackets_and_quotes_are_one_value(folder: Path) -> None:
    made = of_grid(folder / "run.yaml", ["adapter.targets=[q_proj,v_proj],all-linear", "train.lr=1e-3"])
    assert [variant.config.adapter.targets for variant in made.variants] == [("q_proj", "v_proj"), "all-linear"]
    assert made.keys == ("adapter.targets",)
    assert all(variant.config.train.lr == 1e-3 for variant in made.variants)


def test_a_section_is_called_what_was_written(folder: Path) -> None:
    """Not all that it has by default, and nothing in Python's words."""
    written = ["adapter={rank: 2},{rank: 4}", "train.retain=builtin:general-train,null", "evaluate.report=true,false"]
    made = of_grid(folder / "run.yaml", written)
    first, last = made.variants[0].setting, made.variants[-1].setting
    assert first == "adapter {rank: 2}, retain builtin:general-train, report true"
    assert last == "adapter {rank: 4}, retain null, report false"


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of all that stands in a JSON value, but for what is in a config."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        if key != "config":
            yield from places(value[key])


def test_a_damaged_record_is_read_or_refused_whatever_stands_in_it(place: Path, tmp_path: Path) -> None:
    made = grid(tmp_path, {name: config(place, tmp_path / name, seed=n) for n, name in enumerate("ab")}, halving=True)
    SweepFolder(made, {"a": Ended(HALVED, "late")}, (Rung(0.5, {"a": 2.0, "b": None}),)).write()
    file = tmp_path / "sweep.json"
    whole, refused = file.read_text(), 0
    assert ranked(SweepFolder.read(tmp_path)).to_json()
    for number in range(sum(1 for _ in places(json.loads(whole)))):
        for junk in (None, 3, -1.5, "x", [], {}, [None], {"x": None}):
            raw = json.loads(whole)
            container, key = list(places(raw))[number]
            container[key] = junk
            file.write_text(json.dumps(raw))
            try:
                ranking = ranked(SweepFolder.read(tmp_path))
                assert ranking.verdict() and json.dumps(ranking.to_json())
            except InputError as error:
                refused += "sweep.json" in error.what
    assert refused > 100


def test_a_record_that_names_a_folder_of_something_else_leaves_it_alone(place: Path, tmp_path: Path) -> None:
    strange = tmp_path / "documents"
    (strange / "adapter").mkdir(parents=True)
    for file in (kept := (strange / "thesis.tex", strange / "adapter/notes.md")):
        file.write_text("mine")
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    SweepFolder(grid(sweep, {"a": config(place, "."), "b": config(place, ".", seed=1)})).write()
    raw = json.loads((sweep / "sweep.json").read_text())
    raw["runs"][0]["folder"] = "../documents"
    (sweep / "sweep.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="documents exists and isn't a run"):
        run_sweep(SweepFolder.read(sweep), new=False, display=QUIET)
    assert [path for path in strange.rglob("*") if path.is_file()] and all(file.read_text() == "mine" for file in kept)


def test_the_batches_of_one_number_are_laid_together_whole() -> None:
    def batch(tokens: int) -> Batch:
        return Batch.of(torch.arange(tokens), [0, 2, tokens], torch.arange(tokens), origins=("a", "b"))

    laid, numbers = joint.lay({0: [batch(10), batch(5)], 3: [batch(10)], 4: [batch(8), batch(9), batch(3)]}, 20)
    assert numbers == [0, 0, 1, 2]
    assert [len(one.tokens_T) for one in laid] == [20, 8, 14, 3]
    assert [one.updates for one in laid] == [(0, 0, 3, 3), (4, 4), (0, 0, 4, 4), (4, 4)]
    assert laid[0].starts == [0, 2, 10, 12, 20] and laid[0].origins == ("a", "b") * 2
    assert laid[0].positions_T.tolist() == [*range(2), *range(8)] * 2
