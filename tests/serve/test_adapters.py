"""What is served under which name: what lies in the folder now, whole, and nothing that lies elsewhere."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaw.adapter.attach import attach, discard
from deltaw.adapter.file import Adapter
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.generate.cache import BASE
from deltaw.model import Model
from deltaw.serve.adapters import Adapters, Later
from deltaw.serve.ask import Unknown
from deltaw.serve.folder import AT_ONCE
from deltaw.serve.version import IDLE_SCALES
from tests.serve.canaries import Canaries, swapped


@pytest.fixture(scope="module")
def canaries(tmp_path_factory: pytest.TempPathFactory) -> Canaries:
    return Canaries(tmp_path_factory.mktemp("canaries"))


@pytest.fixture(scope="module")
def model(canaries: Canaries) -> Model:
    return canaries.open()


@pytest.fixture(scope="module")
def stored(canaries: Canaries) -> Path:
    folder = canaries.folder / "stored"
    for seed in (1, 2):
        canaries.save(folder / f"lora{seed}", seed)
    return folder


@pytest.fixture
def live(stored: Path, tmp_path: Path) -> Path:
    shutil.copytree(stored, tmp_path / "live")
    return tmp_path / "live"


@pytest.fixture
def adapters(model: Model, live: Path) -> Iterator[Adapters]:
    adapters = Adapters(model, live)
    adapters.open()
    yield adapters
    adapters.close()
    assert not any(type(module).__name__ == "AdaptedLinear" for module in model.base.model.modules())


def test_a_name_is_a_subfolder_that_is_an_adapter(adapters: Adapters, live: Path, tmp_path: Path, stored: Path) -> None:
    (live / "empty").mkdir()
    (live / "file").write_text("")
    shutil.copytree(stored / "lora1", live / ".hidden")
    shutil.copytree(stored / "lora1", live / "white space")
    shutil.copytree(stored / "lora1", tmp_path / "outside")
    (live / "out").symlink_to(tmp_path / "outside")
    (live / "latest").symlink_to("lora2")
    (live / "loop").symlink_to("loop")
    shutil.copytree(stored / "lora1", live / "leaks")
    (live / "leaks" / "adapter_model.safetensors").unlink()
    (live / "leaks" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    run = live / "run"
    shutil.copytree(stored / "lora1", run / "adapter")
    (run / "config.yaml").write_text("base: x\n")
    (live / "unfinished").mkdir()
    (live / "unfinished" / "config.yaml").write_text("base: x\n")
    names = ["latest", "lora1", "lora2", "run"]
    assert [served.name for served in adapters.all()] == names
    for name in names:
        assert adapters.take(name).version is not None
    for name in ("empty", "file", ".hidden", "white space", "out", "loop", "leaks", "unfinished", "", ".", ".."):
        with pytest.raises(Unknown):
            adapters.take(name)


PARTS = ("..", ".", "lora1", "outside", "%2e%2e", "/", "//", "\\", "\0", "~", "$HOME", "etc", "x" * 300, "é", " ")


@given(parts=st.lists(st.sampled_from(PARTS), max_size=6), between=st.sampled_from(["", "/", "\\"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_outside_has_a_name(
    adapters: Adapters, live: Path, stored: Path, parts: list[str], between: str
) -> None:
    shutil.copytree(stored / "lora1", live.parent / "outside", dirs_exist_ok=True)
    name = between.join(parts)
    if name != "lora1":
        with pytest.raises(Unknown):
            adapters.take(name)


def test_an_adapter_costs_its_name_until_it_is_asked_for(model: Model, stored: Path, tmp_path: Path) -> None:
    for number in range(200):
        shutil.copytree(stored / "lora1", tmp_path / f"a{number}", copy_function=os.link)
    adapters = Adapters(model, tmp_path)
    assert len(adapters.all()) == 200 and adapters.all()[0].rank == 4
    assert adapters.figures.adapter_loads == adapters.figures.adapter_bytes == 0


def test_the_one_used_longest_ago_makes_room(model: Model, live: Path, canaries: Canaries) -> None:
    canaries.save(live / "lora3", 3)
    size = 4 * Adapter.load(live / "lora1").parameters
    adapters = Adapters(model, live, memory=2 * size)
    adapters.open()
    try:
        taken = {name: adapters.take(name) for name in ("lora1", "lora2")}
        with pytest.raises(Later) as later:
            adapters.take("lora3")
        assert not later.value.quiet
        adapters.release(taken["lora1"])
        adapters.release(taken["lora2"])
        adapters.release(adapters.take("lora1"))
        adapters.release(adapters.take("lora3"))
        on = [served.name for served in adapters.all() if served.number is not None]
        assert on == ["lora1", "lora3"]
        figures = adapters.figures
        assert (figures.adapter_loads, figures.adapter_evictions, figures.adapter_misses) == (3, 1, 4)
        assert figures.adapters_attached == 2 and figures.adapter_bytes == 2 * size
    finally:
        adapters.close()
    small = Adapters(model, live, memory=size - 1)
    with pytest.raises(InputError):
        small.take("lora1")


def test_new_requests_take_new_files_and_running_ones_keep_theirs(adapters: Adapters, stored: Path, live: Path) -> None:
    first = adapters.take("lora1")
    swapped(stored / "lora2", live / "lora1")
    second = adapters.take("lora1")
    assert first.number != second.number and first.key != second.key
    assert adapters.take("lora1").number == second.number
    assert adapters.get("lora1").number == second.number
    assert adapters.figures.adapters_attached == 2
    adapters.release(first)
    assert adapters.figures.adapters_attached == 1


def test_the_same_contents_are_the_same_version(adapters: Adapters, stored: Path, live: Path) -> None:
    first = adapters.take("lora1")
    swapped(stored / "lora1", live / "lora1")
    again, other = adapters.take("lora1"), adapters.take("lora2")
    assert (again.number, again.key) == (first.number, first.key)
    shutil.copytree(stored / "lora1", live / "copy")
    assert adapters.take("copy").key == first.key != other.key


def test_the_key_says_what_acts(adapters: Adapters) -> None:
    keys = {adapters.take("lora1", scale).key for scale in (1.0, 0.5, 2.0)} | {adapters.take("lora2").key}
    assert len(keys) == 4
    base = adapters.take(None)
    zero = adapters.take("lora1", 0)
    assert (base.number, base.key) == (zero.number, zero.key) and base.number == BASE and base.key not in keys


def test_scales_that_nobody_runs_on_do_not_pile_up(adapters: Adapters) -> None:
    carried = adapters._carrier.carried  # type: ignore[union-attr]
    adapters.take("lora1")
    before = len(carried.numbers)
    running = [adapters.take("lora1", 0.1 * n) for n in range(1, 7)]
    numbers = {taken.number for taken in running}
    assert len(numbers) == 6 and len(carried.numbers) == before + 6
    for taken in running:
        adapters.release(taken)
    assert adapters.take("lora1", 0.6).number in numbers
    for n in range(20):
        adapters.release(adapters.take("lora1", 1.1 + n / 100))
    assert len(carried.numbers) <= before + 1 + IDLE_SCALES


def test_a_replacement_that_is_not_finished_is_not_taken(adapters: Adapters, stored: Path, live: Path) -> None:
    first = adapters.take("lora1")
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    (live / "lora1" / weights).write_bytes((stored / "lora2" / weights).read_bytes())
    assert adapters.take("lora1").number == first.number  # one file of several
    (live / "lora1" / weights).write_bytes((stored / "lora2" / weights).read_bytes()[:-9])
    for file in (config, "deltaw.json"):
        (live / "lora1" / file).write_bytes((stored / "lora2" / file).read_bytes())
    assert adapters.take("lora1").number == first.number  # the weights aren't whole
    (live / "lora1" / weights).write_bytes((stored / "lora2" / weights).read_bytes())
    assert adapters.take("lora1").number != first.number


def test_one_file_alone_counts_when_it_has_settled(adapters: Adapters, live: Path) -> None:
    first = adapters.take("lora1")
    file = live / "lora1" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    assert adapters.take("lora1").number == first.number
    time.sleep(AT_ONCE + 0.05)
    assert adapters.take("lora1").number != first.number


def test_files_that_stay_broken_are_an_error(adapters: Adapters, live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters.take("lora1")
    for file in (live / "lora1").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    adapters.take("lora1")
    later = time.time() + 60
    monkeypatch.setattr("deltaw.serve.adapters.now", lambda: later)
    for _ in range(2):
        with pytest.raises(InputError):
            adapters.take("lora1")
    assert adapters.get("lora1").problem
    assert adapters.take("lora2").version is not None


def test_one_that_is_gone_is_unknown_and_taken_off(adapters: Adapters, live: Path) -> None:
    taken = adapters.take("lora1")
    shutil.rmtree(live / "lora1")
    with pytest.raises(Unknown):
        adapters.take("lora1")
    adapters.refresh()
    assert adapters.figures.adapters_attached == 1
    adapters.release(taken)
    assert adapters.figures.adapters_attached == 0


def test_one_that_is_away_for_a_moment_is_not_gone(adapters: Adapters, live: Path) -> None:
    taken = adapters.take("lora1")
    (live / "lora1").rename(live / ".away")
    back = threading.Timer(0.02, lambda: (live / ".away").rename(live / "lora1"))
    back.start()
    assert adapters.take("lora1").number == taken.number
    back.join()


def test_dropped_is_unknown_until_it_is_loaded(adapters: Adapters, live: Path) -> None:
    taken = adapters.take("lora1")
    adapters.drop("lora1")
    for ask in (adapters.take, adapters.get, adapters.drop):
        with pytest.raises(Unknown):
            ask("lora1")
    assert adapters.names() == ["lora2"]
    assert adapters.load("lora1").number not in (None, taken.number)
    assert adapters.names() == ["lora1", "lora2"]
    with pytest.raises(Unknown):
        adapters.load("nobody")


def test_a_bad_adapter_harms_nobody(adapters: Adapters, live: Path, canaries: Canaries) -> None:
    good = adapters.take("lora1")
    modules = {path: id(module) for path, module in adapters.model.base.model.named_modules()}
    (live / "broken").mkdir()
    for file in (live / "lora1").iterdir():
        (live / "broken" / file.name).write_bytes(file.read_bytes()[:300])
    wrong = canaries.adapter(5)
    record = {"base": {"name": "x", "fingerprint": "sha256:" + "0" * 64}}
    wrong.save(live / "stranger")
    (live / "stranger" / "deltaw.json").write_text(json.dumps(record))
    wrong.save(live / "wide")
    config = json.loads((live / "wide" / "adapter_config.json").read_text())
    (live / "wide" / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    for name in ("broken", "stranger", "wide"):
        with pytest.raises(InputError):
            adapters.take(name)
    assert {path: id(module) for path, module in adapters.model.base.model.named_modules()} == modules
    assert adapters.take("lora1").number == good.number
    assert adapters.figures.adapter_failures == 3


@pytest.mark.parametrize("spec", [AdapterSpec(rank=3, alpha=6, magnitude=True), AdapterSpec(full=True)])
def test_another_kind_waits_until_nothing_runs(
    adapters: Adapters, live: Path, canaries: Canaries, spec: AdapterSpec
) -> None:
    canaries.save(live / "other", 4, spec, size=0.05)
    running = adapters.take("lora1")
    with pytest.raises(Later) as later:
        adapters.take("other")
    assert later.value.quiet
    adapters.release(running)
    changes = adapters.changes
    taken = adapters.take("other")
    assert adapters.changes == changes + 1
    with pytest.raises(InputError):
        adapters.take("other", 0.5)
    adapters.release(taken)
    adapters.take("lora2")
    assert adapters.changes == changes + 1


def test_a_lora_beside_others_is_not_tried_again(
    adapters: Adapters, monkeypatch: pytest.MonkeyPatch, canaries: Canaries, live: Path
) -> None:
    """Its stand-ins and layers stay the objects that they are, and dropout of its training doesn't change that."""
    canaries.save(live / "dropout", 6, AdapterSpec(rank=2, alpha=4, dropout=0.1, targets=("q_proj", "down_proj")))
    monkeypatch.setattr("deltaw.adapter.place.observe", None)
    before = dict(adapters.model.base.model.named_modules())
    for name in ("lora1", "lora2", "dropout"):
        adapters.take(name)
    after = dict(adapters.model.base.model.named_modules())
    assert all(after[path] is module for path, module in before.items())


def test_two_on_a_model_at_different_scales(model: Model, canaries: Canaries) -> None:
    """at_scale shares the tensors."""
    from deltaw.adapter.attach import at_scale

    attached = attach(model.base.model, canaries.adapter(1))
    half = at_scale(attached, 0.5)
    assert half.number != attached.number
    for path, layer in half.layers.items():
        mine, own = layer.kernel_factors(), attached.layers[path].kernel_factors()
        assert mine is not None and own is not None
        assert mine.a_RN is own.a_RN and mine.b_MR is own.b_MR and mine.scale == own.scale / 2
    discard(half)
    discard(attached)


def test_what_is_left_out_is_told_apart(model: Model, stored: Path, tmp_path: Path) -> None:
    for name in ("with space", "\u7801", "fine", ".hidden"):
        shutil.copytree(stored / "lora1", tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("")
    assert Adapters(model, tmp_path).left_out() == (["with space", "\u7801"], ["empty"])
