"""verify against real llama.cpp: an adapter's GGUF on the base's own, right and made wrong on purpose."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from deltaw.adapter.attach import attach, detach
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.model import open_model
from deltaw.shipping.destination import Options
from deltaw.shipping.gguf.adapter import ADAPTER, GgufAdapter
from deltaw.shipping.trained import open_trained
from deltaw.shipping.verify.compare import verify
from deltaw.shipping.verify.sides.llama import LlamaCpp, numbers_of_type
from deltaw.shipping.verify.sides.open import open_side
from deltaw.shipping.verify.sides.side import Row
from deltaw.shipping.verify.verdict import Verification
from deltaw.show.progress import Display
from tests.base.gguf_models import model_of, write_model
from tests.shipping.sides import texts

pytest.importorskip("xllamacpp", reason="pip install xllamacpp, a build of llama.cpp")
QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """base.gguf, an adapter trained on it, and the adapter's own GGUF."""
    folder = tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(folder / "cache"))
        write_model(folder / "base.gguf", model_of("llama"))
        opened = open_model(folder / "base.gguf", dtype="float32")
        attached = attach(opened.base.model, AdapterSpec(rank=4, alpha=8))
        generator = torch.Generator().manual_seed(1)
        for layer in attached.layers.values():
            with torch.no_grad():
                layer.lora_b.copy_(0.15 * torch.randn(layer.lora_b.shape, generator=generator))
        detach(attached, opened.id).save(folder / "adapter")
        (folder / "out").mkdir()
        trained = open_trained(folder / "adapter", base=str(folder / "base.gguf"))
        GgufAdapter(trained, Options()).write(folder / "out", QUIET)
        shutil.copy(folder / "out" / ADAPTER, folder / "adapter.gguf")
    texts(folder / "rows.jsonl")
    return folder


@pytest.fixture(autouse=True)
def cache(place: Path, monkeypatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(place / "cache"))


def held(place: Path, other: str) -> Verification:
    return verify(
        place / "adapter", other, data=str(place / "rows.jsonl"), base=str(place / "base.gguf"), prompts=6, tokens=8
    )


def changed(place: Path, path: Path, change) -> Path:
    """The adapter's GGUF with other numbers: `change(name, array)` gives them, None leaves the tensor out."""
    reader = GGUFReader(place / "adapter.gguf")
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(reader.fields["adapter.lora.alpha"].contents()))
    for tensor in reader.tensors:
        values = change(tensor.name, np.array(tensor.data))
        if values is not None:
            writer.add_tensor(tensor.name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_adapters_gguf_on_the_bases_own_agrees(place: Path) -> None:
    result = held(place, f"{place / 'base.gguf'}+{place / 'adapter.gguf'}")
    assert result.agree, result.text()
    assert result.tolerance.measured and result.effect.kl > 100 * result.kl
    assert result.numbers[1].weights == "bfloat16"  # the very same GGUF, which deltaw reads as bfloat16


def unpermuted(name: str, values: np.ndarray) -> np.ndarray:
    if not name.endswith(("attn_q.weight.lora_b", "attn_k.weight.lora_b")):
        return values
    heads = 4 if "attn_q" in name else 2
    return values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


FAULTS = {
    "rows as transformers has them": unpermuted,
    "a lost scale": lambda name, values: values / 2 if name.endswith("lora_b") else values,
    "rsLoRA's scale": lambda name, values: values * 2 if name.endswith("lora_b") else values,
    "a dropped kind of module": lambda name, values: None if "ffn_down" in name else values,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_made_wrong_is_seen(place: Path, tmp_path: Path, fault: str) -> None:
    wrong = changed(place, tmp_path / "wrong.gguf", FAULTS[fault])
    result = held(place, f"{place / 'base.gguf'}+{wrong}")
    assert not result.agree and result.kl > result.tolerance.kl, result.text()


def test_the_base_alone_is_known_as_such(place: Path) -> None:
    result = held(place, str(place / "base.gguf"))
    assert not result.agree and result.effect.strength == pytest.approx(1, abs=0.05)


def test_two_files_in_llama_cpp_are_held_to_an_assumed_tolerance(place: Path) -> None:
    both = f"{place / 'base.gguf'}+{place / 'adapter.gguf'}"
    data = str(place / "rows.jsonl")
    right = verify(both, both, data=data, prompts=4, tokens=8)
    assert right.agree and right.kl is not None and not right.tolerance.measured
    assert not verify(both, place / "base.gguf", data=data, prompts=4, tokens=8).agree


def test_what_llama_cpp_tells_is_what_torch_says(place: Path) -> None:
    """Position by position, tokens of half a character included."""
    rows = [Row((3, 4, 5, 6, 7), tuple(range(200, 212))), Row(tuple(range(40, 60)), (66, 255, 130, 67))]
    here = open_side(str(place / "adapter"), base=str(place / "base.gguf"), display=QUIET)
    there = open_side(f"{place / 'base.gguf'}+{place / 'adapter.gguf'}", display=QUIET)
    try:
        here.load()
        ours, theirs = here.logs(rows, lambda _: None), there.logs(rows, lambda _: None)
    finally:
        there.close()
    for a, b in zip(ours, theirs, strict=True):
        assert b.ids_PK.shape == a.values_PK.shape  # the whole of a small vocabulary
        torch.testing.assert_close(a.of(b.ids_PK), b.values_PK, rtol=0, atol=0.05)


def test_nothing_is_left_running(place: Path) -> None:
    with LlamaCpp(place / "base.gguf") as llama:
        process = llama._process
        assert llama.client.ask("/health") == {"status": "ok"}
    assert process.poll() is not None
    with pytest.raises(RuntimeError), LlamaCpp(place / "base.gguf") as llama:
        process = llama._process
        raise RuntimeError
    assert process.poll() is not None


def test_what_llama_cpp_refuses_is_said(place: Path, tmp_path: Path) -> None:
    strange = changed(place, tmp_path / "strange.gguf", lambda name, values: values[:, :-1])
    with pytest.raises(InputError) as error:
        open_side(f"{place / 'base.gguf'}+{strange}", display=QUIET)
    assert len(str(error.value).splitlines()) <= 5
    for name in (str(place / "adapter.gguf"), f"{place / 'adapter.gguf'}+{place / 'base.gguf'}"):
        with pytest.raises(InputError):
            open_side(name, display=QUIET)


def test_without_the_package_it_is_said_what_to_install(place: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install xllamacpp"):
        LlamaCpp(place / "base.gguf")


def test_a_types_numbers() -> None:
    assert numbers_of_type("F32", "", cache="float16").activations == ("float32", "float16")
    assert numbers_of_type("BF16", "").weights == "bfloat16"
    assert numbers_of_type("Q4_K - Medium", "").weights == "Q4_K"
    assert numbers_of_type("Q8_0", "").activations[0] == "Q8_0"


def test_two_files_with_templates_are_asked_chats(place: Path, tmp_path: Path) -> None:
    """A template that changed between two GGUFs is seen without a run or data."""
    chatml = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    files = []
    for n, template in enumerate((chatml, chatml.replace("assistant", "model"))):
        files.append(
            write_model(tmp_path / f"{n}.gguf", model_of("llama"), keys={".tokenizer.chat_template": template})
        )
    assert verify(files[0], files[0], prompts=2, tokens=4).agree
    result = verify(*files, prompts=2, tokens=4)
    assert any("encoded differently" in reason for reason in result.reasons)
