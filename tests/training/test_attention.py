"""The choice of attention when a run opens its model: when there is one, and what it is told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MambaConfig

from deltaw.errors import InputError
from deltaw.kernels.flash import OWN, Heads
from deltaw.kernels.race import Race
from deltaw.training import attention
from deltaw.training.attention import choose_attention, heads_of

LLAMA = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
BF16 = torch.bfloat16


def model_of(config: Any = LLAMA, device: str = "cuda", dtype: torch.dtype = BF16, packed: bool = True) -> Any:
    base = SimpleNamespace(model=SimpleNamespace(config=config), device=torch.device(device), dtype=dtype)
    return SimpleNamespace(base=base, forward=SimpleNamespace(packed=packed))


@pytest.mark.parametrize(
    ("config", "dtype", "heads"),
    [
        (LLAMA, BF16, (6, 2, 16)),
        (LlamaConfig(hidden_size=96, num_attention_heads=6, head_dim=32), torch.float16, (6, 6, 32)),
        (GPT2Config(n_embd=64, n_head=4), BF16, (4, 4, 16)),
        (LLAMA, torch.float32, None),  # PyTorch's flash kernels can't
        (LlamaConfig(hidden_size=96, num_attention_heads=6, head_dim=12), BF16, None),
        (LlamaConfig(hidden_size=96, num_attention_heads=6, head_dim=512), BF16, None),
        (MambaConfig(), BF16, None),
        (SimpleNamespace(num_attention_heads=[4, 8], hidden_size=64), BF16, None),
        (SimpleNamespace(num_attention_heads=4, hidden_size=64, num_key_value_heads=[2, 4]), BF16, None),
    ],
)
def test_the_heads_that_a_config_states(config: Any, dtype: torch.dtype, heads: tuple | None) -> None:
    if isinstance(config, SimpleNamespace):
        config.get_text_config = lambda decoder: config
    assert heads_of(SimpleNamespace(config=config), dtype) == (heads and Heads(*heads, dtype))


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []

    def fake(*how: Any) -> Race:
        asked.append(how)
        return Race("fast", {OWN: 2.0, "fast": 1.0}, {"other": "it fails"})

    monkeypatch.setattr(attention, "fastest_attention", fake)
    monkeypatch.setattr(attention, "release", lambda device: None)
    return asked


def test_a_run_on_a_gpu_races_its_own_heads_and_says_so(
    raced: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    said: list[str] = []
    choose_attention(model_of(), 300, said.append)
    ((heads, longest, device, kept),) = raced
    assert (heads, longest, device.type) == (Heads(6, 2, 16, BF16), 300, "cuda") and kept.parent == tmp_path
    assert len(said) == 2 and "fast" in said[0] and "2.00" in said[0] and "other" in said[1]


@pytest.mark.parametrize("how", [{"device": "cpu"}, {"dtype": torch.float32}, {"packed": False}])
def test_otherwise_there_is_nothing_to_race(raced: list[Any], how: dict) -> None:
    said: list[str] = []
    choose_attention(model_of(**how), 300, said.append)
    assert not raced and not said


def test_a_race_that_cannot_be_held_costs_a_line(raced: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*how: Any) -> Race:
        raise error

    monkeypatch.setattr(attention, "fastest_attention", fails)
    said: list[str] = []
    error: Exception = torch.OutOfMemoryError("CUDA out of memory")
    choose_attention(model_of(), 300, said.append)
    assert len(said) == 1 and "out of memory" in said[0]
    error = InputError("the GPU is unusable", fix="uninstall it")
    with pytest.raises(InputError):
        choose_attention(model_of(), 300, said.append)
