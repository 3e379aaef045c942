"""A GGUF in parts is the model in one file; a set that isn't whole or isn't one set is refused by name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter

from deltaw.base.gguf import to_folder
from deltaw.base.load import fingerprint, open_base
from deltaw.errors import InputError
from deltaw.files.gguf_parts import parts_of, read_model

from .gguf_models import model_of, write_model


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A llama with factors of its rotary positions, as gguf-py splits it."""
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    model = model_of("llama", rope_parameters=scaled)
    write_model(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": [2.0] * 4}, split=12)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_any_part_may_be_named(parts: list[Path], tmp_path: Path) -> None:
    assert [part.name for part in parts] == [f"m-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    model = model_of("llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})
    folders = {to_folder(part, tmp_path / "cache") for part in parts}
    assert len(folders) == 1 and not list(folders.copy().pop().glob("*.gguf"))
    base = open_base(str(parts[1]), dtype="float32", device="cpu")
    assert base.fingerprint == fingerprint(model)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(base.model(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    # Another part is another model.
    changed = bytearray(parts[2].read_bytes())
    changed[-40] ^= 1
    parts[2].write_bytes(changed)
    assert to_folder(parts[0], tmp_path / "cache") not in folders


def alone(path: Path, no: int, count: Any, total: int, *, more: dict[str, str] | None = None, tensor: str = "") -> None:
    """One part with this said of it."""
    writer = GGUFWriter(path, "llama")
    writer.add_uint16("split.no", no)
    if isinstance(count, int):
        writer.add_uint16("split.count", count)
    else:
        writer.add_string("split.count", count)
    writer.add_int32("split.tensors.count", total)
    for key, value in (more or {}).items():
        writer.add_string(key, value)
    if tensor:
        writer.add_tensor(tensor, torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BROKEN: dict[str, tuple[Callable[[list[Path]], Any], str]] = {
    "one is missing": (lambda parts: parts[1].unlink(), "m-00002-of-00003.gguf"),
    "two change places": (lambda parts: shutil.copy(parts[1], parts[2]), "m-00003-of-00003.gguf"),
    "of another set": (lambda parts: alone(parts[2], 2, 4, 28), "m-00003-of-00003.gguf"),
    "a text for a number": (lambda parts: alone(parts[2], 2, "3", 28), "m-00003-of-00003.gguf"),
    "another number of tensors": (lambda parts: alone(parts[2], 2, 3, 999), "999"),
    "a tensor twice": (
        lambda parts: alone(parts[2], 2, 3, 25, tensor="token_embd.weight"),
        "token_embd.weight",
    ),
    "says something of its own": (
        lambda parts: alone(parts[2], 2, 3, 25, more={"llama.rope.scaling.type": "yarn"}, tensor="a"),
        "llama.rope.scaling.type",
    ),
    "cut short": (lambda parts: parts[2].write_bytes(parts[2].read_bytes()[:-200]), "m-00003-of-00003.gguf"),
    "not a part at all": (lambda parts: write_model(parts[2], model_of("llama")), "m-00003-of-00003.gguf"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_set_is_refused(parts: list[Path], tmp_path: Path, name: str) -> None:
    damage, named = BROKEN[name]
    damage(parts)
    with pytest.raises(InputError) as caught:
        to_folder(parts[0], tmp_path / "cache")
    assert named in caught.value.what and len(str(caught.value).splitlines()) <= 5


def test_a_part_under_another_name_is_refused(parts: list[Path], tmp_path: Path) -> None:
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match="one of 3 parts"):
        to_folder(tmp_path / "renamed.gguf", tmp_path / "cache")
    for odd in ("m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-00001-of-99999.gguf"):
        with pytest.raises(InputError):
            parts_of(tmp_path / odd)


def test_a_file_in_one_part_is_a_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m-00001-of-00001.gguf", model_of("llama"), keys={".split.count": 1, ".split.no": 0})
    assert read_model(parts_of(path)).shapes and to_folder(path, tmp_path / "cache")


def test_a_file_of_the_same_name_in_the_working_directory_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    write_model(tmp_path / "here/m.gguf", model_of("qwen2"))
    path = write_model(tmp_path / "there/m.gguf", model_of("llama"))
    monkeypatch.chdir(tmp_path / "here")
    assert open_base(str(to_folder(path, tmp_path / "cache"))).fingerprint == fingerprint(model_of("llama"))
