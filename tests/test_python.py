"""deltaw from Python: what a notebook shows, which arguments can be left out, which names are understood."""

import inspect
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.adapter.file import Adapter, BaseId
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.kinds import Dense, DoRA
from tests.tiny import tiny_base

PUBLIC = [getattr(deltaw, name) for name in deltaw.__all__ if inspect.isfunction(getattr(deltaw, name))]
LOW = LowRank(torch.randn(4, 64), torch.randn(96, 4), 2.0)
SPEC = deltaw.AdapterSpec(rank=4, alpha=8, targets=("q_proj",))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("python") / "base")


def test_dir_is_the_public_names() -> None:
    assert dir(deltaw) == sorted(deltaw.__all__)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(deltaw.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_a_display_is_optional(function: object) -> None:
    parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
    assert "display" not in parameters or parameters["display"].default is not inspect.Parameter.empty


@pytest.mark.parametrize(
    "value",
    [LOW, Dense(torch.zeros(96, 64)), DoRA(LOW, torch.ones(96)), Adapter(SPEC, {"a.q_proj": LOW}, BaseId("org/name"))],
    ids=lambda value: type(value).__name__,
)
def test_a_value_shows_itself_in_a_line_without_its_numbers(value: object) -> None:
    text = repr(value)
    assert len(text) < 120 and "\n" not in text and "tensor" not in text


def test_what_is_opened_shows_itself_in_a_line(base: Path) -> None:
    model = deltaw.open_model(base)
    attached = deltaw.attach(model.base.model, SPEC)
    for value in (model, model.base, attached):
        assert len(repr(value)) < 300 and "\n" not in repr(value)
    deltaw.detach(attached)


def test_a_run_is_taken_where_an_adapter_is(tmp_path: Path, base: Path) -> None:
    model = deltaw.open_base(base).model
    adapter = deltaw.detach(deltaw.attach(model, SPEC))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("base: b\noutput: o\ndata: {train: t}\n")
    with pytest.raises(InputError, match="no finished adapter"):
        Adapter.load(run)
    adapter.save(run / "adapter")
    for name in (run, str(run), run / "adapter"):
        assert Adapter.load(name).factors.keys() == adapter.factors.keys()
    assert set(deltaw.inspect(str(run / "adapter"), base=base).measures) == set(adapter.factors)
    with pytest.raises(InputError):
        deltaw.inspect(tmp_path / "nothing")
