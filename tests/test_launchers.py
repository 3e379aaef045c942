"""Recipes that start torchrun elsewhere: what each would start, at the first start, after an interruption and when
it is done, with stand-ins for the service; and their fields, held to a list of names that was looked up, in part, and
isn't the services' own schema."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

RECIPES = Path(__file__).parents[1] / "recipes"
STATES = {"first": "run.yaml", "interrupted": "FOLDER", "finished": None}  # what is trained
ARGUMENTS = ["-m", "deltaw", "train"]


@pytest.fixture(params=STATES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str | None]:
    """A run's folder and what the recipe must train."""
    run = tmp_path / "runs first"
    if request.param != "first":
        run.mkdir()
        (run / "config.yaml").touch()
    if request.param == "finished":
        (run / "result.json").touch()
    wanted = STATES[request.param]
    return run, str(run) if wanted == "FOLDER" else wanted


def shell(script: list[str], tmp_path: Path, torchrun: str = "", **environment: str) -> tuple[int, list[str]]:
    """Run it with stand-ins on the PATH: (exit code, the commands that were started)."""
    bin_, log = tmp_path / "bin", tmp_path / "log"
    bin_.mkdir()
    stubs = {
        "srun": 'shift; exec "$@"',
        "torchrun": torchrun,
        "scontrol": 'case "$1" in show) echo host-a; echo host-b;; *) echo "scontrol $*" >>"$LOG";; esac',
        "scancel": 'echo "scancel $*" >>"$LOG"; kill -TERM "$(cat "$LOG.pid")"',
    }
    for name, body in stubs.items():
        first = 'printf "%s|" torchrun "$@" >>"$LOG"; echo >>"$LOG"\n' if name == "torchrun" else ""
        (bin_ / name).write_text(f"#!/bin/bash\n{first}{body}\n")
        (bin_ / name).chmod(0o755)
    path = f"{bin_}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        script, env={**os.environ, "PATH": path, "LOG": str(log), **environment}, cwd=tmp_path, timeout=20
    )
    return done.returncode, log.read_text().splitlines() if log.exists() else []


SLURM = {"SLURM_JOB_NODELIST": "host-[a-b]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}


def test_slurm_starts_or_resumes(folder: tuple[Path, str | None], tmp_path: Path) -> None:
    run, wanted = folder
    code, lines = shell(["bash", str(RECIPES / "slurm.sh"), "run.yaml", str(run)], tmp_path, **SLURM)
    assert code == 0
    if wanted is None:
        assert not lines
        return
    words = lines[0].split("|")[:-1]
    assert words[-4:] == [*ARGUMENTS, wanted] and "--rdzv-endpoint=host-a:29500" in words and "--nnodes=2" in words
    assert len(lines) == 1  # nothing was asked, so nothing is queued


def test_slurm_saves_before_the_limit_and_queues_itself_again(tmp_path: Path) -> None:
    body = 'echo $$ >"$LOG.pid"; trap "echo saved >>\\"$LOG\\"; exit 143" TERM\n'
    body += "kill -USR1 $BATCH\nwhile :; do sleep 0.05; done"
    script = f'export BATCH=$$; exec bash "{RECIPES}/slurm.sh" run.yaml runs/first'
    code, lines = shell(["bash", "-c", script], tmp_path, body, **SLURM)
    assert code == 0 and lines[1:] == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]


def test_slurm_fails_as_the_run_does(tmp_path: Path) -> None:
    code, lines = shell(["bash", str(RECIPES / "slurm.sh"), "run.yaml", "runs/first"], tmp_path, "exit 2", **SLURM)
    assert code == 2 and len(lines) == 1
    text = (RECIPES / "slurm.sh").read_text()
    assert "#SBATCH --signal=B:USR1@" in text and "#SBATCH --requeue" in text


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RECIPES / name).read_text()))


def test_kubernetes(folder: tuple[Path, str | None], tmp_path: Path) -> None:
    run, wanted = folder
    runtime, job = documents("kubernetes.yaml")
    assert {runtime["apiVersion"], job["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert set(runtime["spec"]) == {"mlPolicy", "template"} and set(runtime["spec"]["mlPolicy"]) == {
        "numNodes",
        "torch",
    }
    trainer = job["spec"]["trainer"]
    assert set(trainer) <= {"image", "command", "args", "env", "numNodes", "resourcesPerNode"}
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert replicated["name"] == pod["containers"][0]["name"] == "node"  # the container that the operator fills in
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    given = {one["name"]: one["value"] for one in trainer["env"]} | {"RUN_FOLDER": str(run)}
    code, lines = shell(["bash", *trainer["command"][1:], *trainer["args"]], tmp_path, **given)
    assert code == 0 and lines == ([f"torchrun|{'|'.join(ARGUMENTS)}|{wanted}|"] if wanted else [])


def test_skypilot(folder: tuple[Path, str | None], tmp_path: Path) -> None:
    run, wanted = folder
    (task,) = documents("skypilot.yaml")
    assert set(task) <= {"name", "num_nodes", "resources", "workdir", "file_mounts", "envs", "setup", "run"}
    assert set(task["resources"]) <= {"accelerators", "use_spot", "job_recovery"}
    given = {**task["envs"], "RUN_FOLDER": str(run), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    given |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    code, lines = shell(["bash", "-c", task["run"]], tmp_path, **given)
    assert code == 0 and bool(lines) == bool(wanted)
    if wanted:
        words = lines[0].split("|")[:-1]
        assert words[-4:] == [*ARGUMENTS, wanted] and {"--node-rank=1", "--master-addr=10.0.0.1"} <= set(words)


def test_ray(folder: tuple[Path, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    run, wanted = folder
    made: list[Any] = []

    class TorchTrainer:
        def __init__(self, loop: Any, *, train_loop_config: Any, scaling_config: Any, run_config: Any) -> None:
            self.loop, self.given, self.scaling = loop, train_loop_config, scaling_config
            made.append(self)

        def fit(self) -> None:
            self.loop(self.given)

    package, train, torch_ = (ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch"))
    context = SimpleNamespace(get_world_size=lambda: 2, get_world_rank=lambda: 1)
    vars(train).update(dict.fromkeys(("ScalingConfig", "RunConfig", "FailureConfig"), SimpleNamespace))
    vars(train)["get_context"] = lambda: context
    vars(torch_)["TorchTrainer"], vars(package)["train"] = TorchTrainer, train
    for module in (package, train, torch_):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, check, env, cwd: started.append(words))
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setattr(sys, "argv", ["ray_train.py", "run.yaml", str(run), "2", "4"])
    runpy.run_path(str(RECIPES / "ray_train.py"), run_name="__main__")
    assert made[0].scaling.num_workers == 2 and made[0].scaling.resources_per_worker == {"GPU": 4}
    assert [Path(words[-1]) for words in started] == ([Path(wanted).absolute()] if wanted else [])
    assert all({"--nnodes=2", "--node-rank=1", "--nproc-per-node=4"} <= set(words) for words in started)
