"""verify against real mlx_lm."""

from pathlib import Path

import pytest

from deltaw.errors import InputError
from deltaw.files.safetensors import load_safetensors, save_safetensors
from deltaw.shipping.destination import Options
from deltaw.shipping.mlx import MlxAdapter
from deltaw.shipping.trained import open_trained
from deltaw.shipping.verify.compare import verify
from deltaw.shipping.verify.sides.open import open_side
from deltaw.show.progress import Display
from tests.shipping.sides import base_and_adapter, merged, texts

pytest.importorskip("mlx_lm", reason="pip install mlx-lm 'mlx[cpu]'")
QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mlx")
    base, adapter = base_and_adapter(folder)
    texts(folder / "rows.jsonl")
    merged(base, adapter, folder / "merged")
    (folder / "out").mkdir()
    MlxAdapter(open_trained(adapter, base=str(base)), Options()).write(folder / "out", QUIET)
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)


@pytest.mark.parametrize("pair", [("adapter", "mlx:out"), ("mlx:out", "adapter"), ("adapter", "mlx:merged")])
def test_right_pairs_agree(place: Path, pair: tuple[str, str]) -> None:
    result = verify(*pair, data="rows.jsonl", prompts=6, tokens=8)
    assert result.agree, result.text()
    assert result.tolerance.measured and result.effect.kl > 10 * result.kl


def test_factors_the_wrong_way_are_seen(place: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in (place / "out").iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    tensors = load_safetensors(wrong / "adapters.safetensors")
    halved = {name: tensor / 2 if name.endswith("lora_b") else tensor for name, tensor in tensors.items()}
    save_safetensors(halved, wrong / "adapters.safetensors")
    result = verify("adapter", f"mlx:{wrong}", data="rows.jsonl", prompts=6, tokens=8)
    assert not result.agree and result.effect.strength > 0.1


def test_what_can_not_be_asked_is_said(place: Path, tmp_path: Path) -> None:
    for name, base in (("mlx:out", None), (f"mlx:{tmp_path}", "base")):
        with pytest.raises(InputError):
            open_side(name, base=base, display=QUIET)
