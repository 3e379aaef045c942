"""`deltaw.__all__`: every name resolves, costs nothing before it is used, and the type checker sees the same list."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import deltaw
from tests.faults.common import child, imported_anew


def test_every_public_name_resolves() -> None:
    for name in deltaw.__all__:
        assert getattr(deltaw, name) is not None


def test_the_type_checkers_list_is_the_same() -> None:
    tree = ast.parse(Path(deltaw.__file__).read_text(encoding="utf-8"))
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert names - {"TYPE_CHECKING", "Any"} == set(deltaw.__all__)


def test_import_is_free() -> None:
    code = "import sys, deltaw; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_survive_an_import_of_their_room() -> None:
    def work() -> None:
        imported_anew("deltaw")
        import_module("deltaw.training.run")
        package = import_module("deltaw")
        assert callable(package.train) and callable(package.resume)

    ended = child(work)
    assert ended.code == 0, ended.output


def test_dir_lists_the_names_before_they_are_used() -> None:
    code = "import sys, deltaw; assert set(deltaw.__all__) <= set(dir(deltaw)) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
