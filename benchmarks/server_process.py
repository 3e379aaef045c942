"""`deltaw serve` in a process of its own, on the builtin, for whoever measures it from outside."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BASE = "builtin:smollm2-135m"


class Server:
    """Until the block ends. `place`: where it listens; `base`: its name; `seconds`: from its start to its first answer.
    `folder`: of adapters; `threads`: how many it computes with, all where None."""

    def __init__(self, folder: Path | None = None, threads: int | None = None) -> None:
        command = [sys.executable, "-m", "deltaw", "serve", BASE, "--port", "0", "--json"]
        bound = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, *(["--adapters", str(folder)] if folder else [])],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **bound, "HF_HUB_OFFLINE": "1"},
        )
        assert self.process.stdout is not None
        told = self.process.stdout.readline()
        if not told:
            sys.exit("the server didn't start")
        data = json.loads(told)
        self.base: str = data["base"]
        host, _, port = data["address"].removeprefix("http://").rpartition(":")
        self.place = host, int(port)
        list(self.ask(self.base, [1, 2, 3], 1))
        self.seconds = time.perf_counter() - began

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        """Answers that are being made aren't waited for: there is nothing to lose."""
        self.process.kill()
        self.process.wait()

    def ask(self, model: str, prompt: list[int], new: int) -> Iterator[float]:
        """When each piece of a stream of `new` tokens came; tokens that would end it sooner are made impossible."""
        connection = http.client.HTTPConnection(*self.place, timeout=600)
        try:
            body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
            body["logit_bias"] = {"2": -100, "0": -100}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                sys.exit(answer.read().decode())
            for line in answer:
                if line.startswith(b"data: {"):
                    yield time.perf_counter()
        finally:
            connection.close()

    @property
    def memory(self) -> float:
        """GB that it holds, without pages that files could give back."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e9
