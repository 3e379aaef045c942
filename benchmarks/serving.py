"""Decoding for many streams, deltaw's engine beside llama.cpp: new tokens per second, and their ratio.

    python -m benchmarks.serving [--weights auto keep] [--rounds 3] [--threads 2] [--record]

The builtin with the base alone, one adapter for all, and another adapter for each stream (rank 16, all linear layers,
random), 1 and 16 streams, prompts of 20 tokens, 48 new ones, greedy, nothing stops early. llama.cpp (xllamacpp) serves
the builtin's own file with as many slots and the same adapters as GGUF, in a process of its own. The two take turns in
every round, prompts included; each figure is the median over rounds. To be run on an idle machine: llama.cpp with more
threads than free cores is ten times slower, which would flatter deltaw. About six minutes on two idle cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

from benchmarks.figures import Measured, note

BASE, STREAMS, PROMPT, NEW = "builtin:smollm2-135m", 16, 20, 48
ARMS = {"base": 0, "one adapter": 1, "16 adapters": STREAMS}  # how many are in use
ASKED = "auto"  # the weights whose figures are noted
WANTED, OF_BASE = {(STREAMS, "base"): 1.8, (STREAMS, "16 adapters"): 3.5}, 0.85


def serve() -> None:
    """llama.cpp: told what to load by a line of JSON, it answers with its address and ends with its standard input."""
    import xllamacpp

    asked = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in asked["adapters"]]
    params.n_parallel, params.n_ctx, params.port = STREAMS, STREAMS * 128, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    params.warmup, params.ui, params.verbosity = False, False, 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


class Llama:
    """Its server."""

    def __init__(self, model: str, adapters: list[str], threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.serving", "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"model": model, "adapters": adapters, "threads": threads}) + "\n")
        self.process.stdin.flush()
        self.address, self.adapters = "", len(adapters)
        while not self.address.startswith("http"):
            self.address = self.process.stdout.readline().strip()
            if self.process.poll() is not None:
                sys.exit("llama.cpp didn't start")

    def run(self, prompts: list[list[int]], used: int) -> float:
        """Tokens per second."""

        def ask(number: int) -> int:
            scales = [float(used > 0 and number % used == at) for at in range(self.adapters)]
            body: dict[str, Any] = {"prompt": prompts[number], "n_predict": NEW, "temperature": 0, "ignore_eos": True}
            body |= {"cache_prompt": False, "lora": [{"id": at, "scale": scale} for at, scale in enumerate(scales)]}
            request = Request(f"{self.address}/completion", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urlopen(request, timeout=600) as answer:
                return int(json.loads(answer.read())["tokens_predicted"])

        began = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            tokens = sum(pool.map(ask, range(len(prompts))))
        assert tokens == NEW * len(prompts)
        return tokens / (time.perf_counter() - began)


class Ours:
    """The engine, on a base kept in one form, which carries the adapters of `folders`."""

    def __init__(self, weights: Any, folders: list[Path]) -> None:
        from deltaw.adapter.attach import attach
        from deltaw.adapter.file import Adapter
        from deltaw.base.forward import plan_forward
        from deltaw.base.load import open_base

        self.model = open_base(BASE, weights=weights).model
        plan_forward(self.model)
        self.numbers = [attach(self.model, Adapter.load(folder)).number for folder in folders]

    def run(self, prompts: list[list[int]], used: int) -> float:
        """Tokens per second."""
        from deltaw.generate.cache import BASE as ALONE
        from deltaw.generate.engine import Engine
        from deltaw.generate.sampling import Sampling

        began = time.perf_counter()
        engine = Engine(self.model, batch_size=len(prompts), copies=True)
        for at, prompt in enumerate(prompts):
            engine.add(prompt, Sampling(max_new_tokens=NEW), update=self.numbers[at % used] if used else ALONE)
        tokens = 0
        while engine.busy:
            tokens += sum(event.token is not None for event in engine.step())
        assert tokens == NEW * len(prompts)
        return tokens / (time.perf_counter() - began)


def make_adapters(folder: Path, count: int) -> list[Path]:
    """Random adapters, PEFT's folders."""
    import torch

    from deltaw.adapter.attach import attach, detach
    from deltaw.config import AdapterSpec
    from deltaw.model import open_model

    opened = open_model(BASE)
    folders = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        attached = attach(opened.base.model, AdapterSpec(rank=16, alpha=32), generator=generator)
        with torch.no_grad():
            for layer in attached.layers.values():
                layer.trained()["b"].normal_(std=0.01, generator=generator)
        folders.append(detach(attached, opened.id).save(folder / f"a{number}"))
    return folders


def as_gguf(folders: list[Path]) -> list[str]:
    """The same as llama.cpp reads them."""
    from deltaw.commands.export import export

    files = list[str]()
    for folder in folders:
        export(folder, to="gguf", output=folder.with_suffix(".gguf"))
        files += map(str, folder.with_suffix(".gguf").glob("*.gguf"))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["auto", "keep"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, STREAMS])
    parser.add_argument("--adapters", type=int, default=STREAMS, help="fewer, for a short look")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="note the figures in benchmarks/figures.csv")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return
    import torch

    from deltaw.base.source import builtin_file

    torch.set_num_threads(asked.threads)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 40_000, (STREAMS, PROMPT), generator=generator).tolist()
    with TemporaryDirectory() as folder:
        folders = make_adapters(Path(folder), asked.adapters)
        llama = Llama(str(builtin_file(BASE)), as_gguf(folders), asked.threads)
        ours = {weights: Ours(weights, folders) for weights in asked.weights}
        speeds: dict[tuple[str, int, str], float] = {}  # medians
        ratios: dict[tuple[str, int, str], float] = {}
        sides: dict[str, Any] = {"llama.cpp": llama, **ours}
        for streams in asked.streams:
            for name, used in ARMS.items():
                if used <= streams:
                    used = min(used, asked.adapters)
                    rounds = [
                        {side: one.run(prompts[:streams], used) for side, one in sides.items()}
                        for _ in range(1 + asked.rounds)  # the first is to warm up
                    ][1:]
                    for side in sides:
                        arm = side, streams, name
                        speed = speeds[arm] = statistics.median(one[side] for one in rounds)
                        ratio = ratios[arm] = statistics.median(one[side] / one["llama.cpp"] for one in rounds)
                        print(f"{streams:2} x {name:11}  {side:9} {speed:6.0f} tokens/s  {ratio:5.2f} x", flush=True)
        assert llama.process.stdin is not None
        llama.process.stdin.close()
        llama.process.wait()
    if asked.record:
        for (side, streams, name), ratio in ratios.items():
            if side == ASKED:
                told = f"{streams} stream{'s' * (streams > 1)}, {name}, of llama.cpp's speed"
                note(Measured("Serving", told, ratio, bound=WANTED.get((streams, name))))
        if (base := speeds.get((ASKED, STREAMS, "base"))) and (each := speeds.get((ASKED, STREAMS, "16 adapters"))):
            note(Measured("Serving", "16 streams, 16 adapters, of the base's speed", each / base, bound=OF_BASE))


if __name__ == "__main__":
    main()
