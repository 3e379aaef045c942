"""A run on a Ray cluster: python recipes/ray_train.py RUN.yaml RUNFOLDER [NODES [GPUS]]

One Ray worker per node starts torchrun there, in the folder that this is called in, which all nodes share. RUNFOLDER is
the run file's output. A worker that fails makes Ray start all of them again, and the run resumes.
"""

import os
import subprocess
import sys

import ray.train  # type: ignore[import-not-found]
from ray.train.torch import TorchTrainer  # type: ignore[import-not-found]


def node(given: dict) -> None:
    """On each node, as Ray's worker."""
    folder, context = given["folder"], ray.train.get_context()
    if os.path.exists(f"{folder}/result.json"):
        return
    what = folder if os.path.exists(f"{folder}/config.yaml") else given["run_file"]
    subprocess.run(
        [
            "torchrun",
            f"--nnodes={context.get_world_size()}",
            f"--node-rank={context.get_world_rank()}",
            f"--nproc-per-node={given['gpus']}",
            f"--master-addr={os.environ['MASTER_ADDR']}",  # of Ray's first worker; its own group has another port
            "--master-port=29500",
            *("-m", "deltaw", "train", what),
        ],
        check=True,
        env={**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"},  # seconds to save a step in; 30 by itself
        cwd=given["home"],  # Ray's workers begin in a folder of their own; what the run file names lies here
    )


def main(run_file: str, folder: str, nodes: str = "2", gpus: str = "8") -> None:
    trainer = TorchTrainer(
        node,
        train_loop_config={
            "run_file": os.path.abspath(run_file),
            "folder": os.path.abspath(folder),
            "home": os.getcwd(),
            "gpus": int(gpus),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=int(nodes),
            use_gpu=True,
            resources_per_worker={"GPU": int(gpus)},
            placement_strategy="STRICT_SPREAD",
        ),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
