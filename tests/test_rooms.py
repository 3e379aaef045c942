"""The house rules of the design, read off the source: who may import whom, where each library lives, what never stands
in it."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "deltaw"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

# Imports go down only, and not between rooms of one level.
LEVELS = [
    {"errors", "version"},
    {"files", "linalg"},
    {"config", "show", "kernels"},
    {"updates"},
    {"factors"},
    {"kinds"},
    {"base", "replaced"},
    {"data"},
    {"adapter"},
    {"generate"},
    {"named"},
    {"model", "run"},
    {"runs"},
    {"training", "rewards", "evaluation", "analysis", "shipping", "serve"},
    {"studies", "machine", "sweep"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
SIDEWAYS = {
    ("training", "evaluation"),
    ("training", "rewards"),
    ("rewards", "evaluation"),
    ("training", "analysis"),
    ("analysis", "evaluation"),
    ("shipping", "evaluation"),
    ("shipping", "analysis"),
}

# Each heavy library has its home.
VERBS = ("__init__", "app", "ask", "machine", "run", "serve", "ship", "update", "verbs", "why")
KERNELS = ("cross_entropy", "factors", "gated", "norm", "rotary", "sums", "thin", "tanh", "views")
HOMES = {
    "jinja2": {"analysis/page.py", "files/bounded_worker.py"},
    "rich": {"show/progress.py", "show/table.py", "data/preview.py"},
    "typer": {f"cli/{name}.py" for name in VERBS},
    "yaml": {"config/load.py", "config/run.py", "files/run_yaml.py"},
    "gguf": {
        "base/gguf.py",
        "files/gguf_header.py",
        "shipping/gguf/adapter.py",
        "shipping/gguf/file.py",
        "shipping/gguf/names.py",
        "shipping/gguf/types.py",
        "shipping/verify/sides/llama.py",
    },
    "huggingface_hub": {"base/source.py", "shipping/push.py"},
    "sacrebleu": {"evaluation/chrf.py"},
    "llguidance": {"generate/grammar.py"},
    "safetensors": {"files/safetensors.py"},
    "starlette": {"serve/app.py", "serve/page/__init__.py"},
    "sympy": {"linalg/exact.py"},
    "reasoning_gym": {"data/gym_worker.py"},
    "bitsandbytes": {"kernels/nf4.py"},
    "datasets": {"data/hub.py"},
    "pyarrow": {"data/arrow.py"},
    "flash_attn": {"kernels/flash.py"},
    "flash_attn_interface": {"kernels/flash.py"},
    "matplotlib": {"analysis/pictures.py", "analysis/svg.py"},
    "triton": {f"kernels/triton/{name}.py" for name in KERNELS},
    "torch.distributed": {"training/distributed.py", "training/sharding.py"},
    "torch.utils.tensorboard": {"training/to_tensorboard.py"},
    "uvicorn": {"serve/listen.py"},
    "wandb": {"training/to_wandb.py"},
    "peft": {"shipping/verify/sides/peft.py"},
    "mlx": {"shipping/verify/sides/mlx.py"},
    "mlx_lm": {"shipping/verify/sides/mlx.py"},
    "xllamacpp": {"shipping/verify/sides/llama_server.py"},
}
NOWHERE = ["trl", "fastapi", "accelerate", "tokenizers"]
MODELS, TOKENIZERS = {"base/load.py", "base/gguf.py"}, {"data/render.py", "base/gguf.py"}
TRANSFORMERS = {
    "AutoModel*": MODELS,
    "AutoConfig": MODELS,
    "*ForCausalLM*": MODELS,
    "PreTrainedModel": MODELS,
    "AutoTokenizer": TOKENIZERS,
    "PreTrainedTokenizer*": TOKENIZERS,
}


def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@cache
def imports(file: str) -> list[tuple[str, str]]:
    """(module, imported name or "") of every import, also those inside functions."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def level(name: str) -> int:
    found = [number for number, names in enumerate(LEVELS) if name in names]
    assert found, f"deltaw/{name} stands on no level: give it one here"
    return found[0]


def within(module: str, library: str) -> bool:
    return module == library or module.startswith(library + ".")


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_go_down_only(file: str) -> None:
    here = room(file)
    for module, name in imports(file):
        if not within(module, "deltaw"):
            continue
        there = module.split(".")[1] if "." in module else name  # `from deltaw import name` names a room too
        allowed = there == here or level(there) < level(here) or (here, there) in SIDEWAYS
        assert allowed, f"{file} imports {module}: {here} may not know {there}"


def imported_files(file: str) -> set[str]:
    """The files of deltaw that `file` imports, wherever in it, also for the type checker alone."""
    files = set()
    for module, name in imports(file):
        if within(module, "deltaw"):
            path = "/".join(module.split(".")[1:])
            files |= {f"{path}/{name}.py".lstrip("/"), f"{path}.py"} & set(FILES)
    return files - {file}


def circles() -> list[list[str]]:
    """Files that import one another, by way of others or not: each set of them once (Tarjan's components)."""
    after = {file: imported_files(file) for file in FILES if file != "__init__.py"}
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def visit(file: str) -> None:
        order[file] = low[file] = len(order)
        stack.append(file)
        for other in after.get(file, ()):
            if other not in order:
                visit(other)
            if other in stack:
                low[file] = min(low[file], low[other])
        if low[file] == order[file]:
            component = [stack.pop()]
            while component[-1] != file:
                component.append(stack.pop())
            components.append(sorted(component))

    for file in after:
        if file not in order:
            visit(file)
    return [component for component in components if len(component) > 1]


def test_no_circles_between_files() -> None:
    assert circles() == []


def meets(file: str, library: str) -> bool:
    return any(within(module, library) or within(f"{module}.{name}", library) for module, name in imports(file))


@pytest.mark.parametrize("library", [*HOMES, *NOWHERE])
def test_each_library_is_met_at_home_and_only_there(library: str) -> None:
    assert {file for file in FILES if meets(file, library)} == HOMES.get(library, set())


@pytest.mark.parametrize("file", FILES)
def test_transformers_models_and_tokenizers_are_met_only_at_home(file: str) -> None:
    for module, name in imports(file):
        assert (module, name) != ("transformers", ""), f"{file}: import names from transformers, so that they are seen"
        if within(module, "transformers"):
            strange = [
                pattern for pattern, homes in TRANSFORMERS.items() if fnmatch(name, pattern) and file not in homes
            ]
            assert not strange, f"{file} imports {name} from transformers"


def runs_code(node: ast.AST) -> str | None:
    """What in `node` could run code that a stranger wrote."""
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "compile", "__import__", "torch.load", "os.system"):
            return called
        if called.endswith((".exec_module", ".load_module", ".run_path", ".source_to_code")):
            return called
        for keyword in node.keywords:
            if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and ast.unparse(keyword.value) != "False":
                return f"{keyword.arg}={ast.unparse(keyword.value)}"
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        return next((name for name in names if name.split(".")[0] in ("pickle", "dill", "joblib", "marshal")), None)
    return None


# A file, of which its user was asked; and what a model wrote, of which he was too, in a process that can only compute.
OWN_CODE = {"files/own_code.py", "files/program_worker.py"}


@pytest.mark.parametrize("file", [file for file in FILES if file not in OWN_CODE])
def test_nothing_runs_a_strangers_code(file: str) -> None:
    found = [f"{file}:{node.lineno}: {said}" for node in ast.walk(tree(file)) if (said := runs_code(node))]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "import pickle",
        "from pickle import load",
        "torch.load(p)",
        "f(trust_remote_code=True)",
        "f(shell=x)",
        "spec.loader.exec_module(m)",
    ],
)
def test_the_check_for_strangers_code_sees_it(source: str) -> None:
    assert any(map(runs_code, ast.walk(ast.parse(source))))


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_stay_short(file: str) -> None:
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= 400
    functions = [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 60]


@pytest.mark.parametrize("module", ["deltaw", "deltaw.cli", "deltaw.config", "deltaw.runs", "deltaw.files.shards"])
def test_what_answers_at_once_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.strip() == "[]"
