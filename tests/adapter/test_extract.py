"""LoRA out of full fine-tuning: what was merged comes back, errors are the true ones, and what is left out is named."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deltaw.adapter import cut as room
from deltaw.adapter.attach import attach
from deltaw.adapter.cut import nearest
from deltaw.adapter.extract import extract, extract_adapter, extract_folders
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.targets import linear_paths
from deltaw.base.load import open_base
from deltaw.base.source import find_base
from deltaw.config import AdapterSpec
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.files.shards import INDEX
from deltaw.kernels.weight import DenseWeight, Weight
from deltaw.kinds import Dense
from deltaw.linalg.svd import randomised_svd
from tests.architectures import tiny
from tests.bases import tiny_gpt2, tiny_llama
from tests.data.toys import toy
from tests.tiny import Said, tiny_base

SIZE = 160
STEPS = torch.arange(SIZE, dtype=torch.float32)
SPECTRA = {
    "flat": torch.ones(SIZE),
    "straight": 1 - 0.9 * STEPS / SIZE,
    "1/√i": (STEPS + 1) ** -0.5,
    "1/i": 1 / (STEPS + 1),
    "geometric": torch.exp(-STEPS / 10),
    "a cliff after 3": torch.where(STEPS < 3, 1.0, 0.1),
    "no cliff near 4": torch.where(STEPS < 20, 1 - STEPS / 200, 0.3),
    "rank 3": torch.where(STEPS < 3, 1.0, 0.0),
}


def of_spectrum(sigma: Tensor, m: int = 200, seed: int = 0) -> Tensor:
    """[m, K] with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, len(sigma), generator=generator)).Q for size in (m, len(sigma)))
    return (u * sigma) @ v.T


# The nearest update of one matrix


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 10, 40])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_nearest_update_is_within_a_per_cent_of_the_optimum_and_says_its_error(
    name: str, rank: int, turned: bool
) -> None:
    delta = of_spectrum(SPECTRA[name], seed=rank)
    delta = delta.T if turned else delta
    update, stated = nearest(delta, rank=rank)
    assert update.rank == rank and update.scale == 1.0 and update.a_RN.dtype == torch.float32
    size = delta.double().norm()
    error = float((delta.double() - update.dense().double()).norm() / size)
    optimum = float(torch.linalg.svdvals(delta.double())[rank:].norm() / size)
    assert error <= 1.01 * optimum + 2e-6
    assert stated == pytest.approx(error, rel=1e-4, abs=2e-6)


def test_a_spectrum_that_power_steps_do_not_settle_is_left_to_the_full_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    powers = []

    def worse(x: Tensor, k: int, *, power: int, generator: torch.Generator) -> room.Approximation:
        """Finds nothing at first, then a little more each time."""
        powers.append(power)
        found = randomised_svd(x, k, power=power, generator=generator)
        return room.Approximation(found.u_MK, 0 * found.s_K, found.vt_KN, torch.tensor(10.0 / power), found.error_two)

    delta = of_spectrum(SPECTRA["1/i"])
    wanted, _ = nearest(delta, rank=3)
    monkeypatch.setattr(room, "randomised_svd", worse)
    update, stated = nearest(delta, rank=3)
    assert powers == [2, 4, 8]
    torch.testing.assert_close(update.dense(), wanted.dense(), rtol=1e-3, atol=1e-3)
    assert stated == pytest.approx(float((delta - update.dense()).norm() / delta.norm()), rel=1e-4)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_an_energy_is_kept_by_the_least_rank(name: str, energy: float) -> None:
    delta = of_spectrum(SPECTRA[name])
    update, stated = nearest(delta, energy=energy)
    shares = SPECTRA[name].double().square().cumsum(0) / SPECTRA[name].double().square().sum()
    near = int((shares < energy - 1e-5).sum()) + 1, int((shares < energy + 1e-5).sum()) + 1
    assert near[0] <= update.rank <= near[1]
    assert 1 - stated**2 >= energy - 1e-5
    assert stated == pytest.approx(float((delta - update.dense()).norm() / delta.norm()), abs=1e-5)


# Module by module


def pairs(rank: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, LowRank]]:
    """(tuned, base, the updates between) for three modules, the last of which did not change."""
    shapes = {"a": (200, 160), "b": (30, 40), "still": (20, 20)}
    base = {path: torch.randn(shape) for path, shape in shapes.items()}
    updates = {
        path: LowRank(torch.randn(rank, n), torch.randn(m, rank) / 8)
        for path, (m, n) in shapes.items()
        if path != "still"
    }
    tuned = {path: w + updates[path].dense() if path in updates else w.clone() for path, w in base.items()}
    return tuned, base, updates


def stored(matrices: dict[str, Tensor]) -> dict[str, Weight]:
    """As a checkpoint's weights."""
    return {path: DenseWeight(matrix) for path, matrix in matrices.items()}


@pytest.mark.parametrize("size", [{"rank": 3}, {"energy": 0.99999}])
def test_what_was_merged_comes_back(size: dict) -> None:
    tuned, base, updates = pairs()
    display = Said()
    found, losses = extract(stored(tuned), stored(base), base, **size, display=display)
    assert found.keys() == updates.keys() and list(display.tasks.values()) == [(3, [1, 2, 3])]
    for loss, (path, update) in zip(losses, updates.items(), strict=True):
        assert (loss.module, loss.old_rank, loss.new_rank) == (path, min(update.shape), 3)
        rounding = float((update.dense() - (tuned[path] - base[path])).norm() / update.dense().norm())
        assert float((found[path].dense() - update.dense()).norm() / update.dense().norm()) <= 2 * rounding + 2e-6
        assert loss.relative_error <= 2 * rounding + 2e-6


def test_bfloat16_checkpoints_are_subtracted_in_float32() -> None:
    tuned, base, _ = pairs()
    narrow = [{path: w.bfloat16() for path, w in matrices.items()} for matrices in (tuned, base)]
    wanted = narrow[0]["b"].float() - narrow[1]["b"].float()
    found, _ = extract(stored(narrow[0]), stored(narrow[1]), ["b"], rank=30)
    torch.testing.assert_close(found["b"].dense(), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_a_rank_beyond_a_module_is_that_modules_own() -> None:
    tuned, base, _ = pairs()
    found, _ = extract(stored(tuned), stored(base), ["a", "b"], rank=50)
    assert (found["a"].rank, found["b"].rank) == (50, 30)


def test_weights_of_two_shapes_are_refused_by_module() -> None:
    tuned, base, _ = pairs()
    with pytest.raises(InputError, match=r"b: \(30, 39\) in the tuned model, \(30, 40\) in the base"):
        extract(stored({**tuned, "b": torch.ones(30, 39)}), stored(base), base, rank=1)
    for wrong in ({}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}):
        with pytest.raises(InputError):
            extract(stored(tuned), stored(base), base, **wrong)


def test_an_adapter_of_full_fine_tuning_becomes_a_lora() -> None:
    tuned, base, _ = pairs()
    deltas = {path: Dense(tuned[path] - base[path]) for path in base}
    full = Adapter(AdapterSpec(full=True), deltas, BaseId("someone/tiny"), fan_in_fan_out=True)
    lora, losses = extract_adapter(full, rank=2)
    assert lora.spec == AdapterSpec(rank=2, alpha=2, targets=("a", "b")) and lora.base == full.base
    assert lora.fan_in_fan_out
    for loss in losses:
        wanted = deltas[loss.module].truncate(rank=2)
        torch.testing.assert_close(lora.factors[loss.module].dense(), wanted.dense(), rtol=1e-3, atol=1e-3)
    assert extract_adapter(full, energy=0.99999)[0].spec.rank == 3


def test_adapters_with_nothing_to_extract_are_refused() -> None:
    with pytest.raises(InputError, match=r"already a LoRA\nmake it smaller with resize"):
        extract_adapter(
            Adapter(AdapterSpec(rank=1, alpha=1), {"a": LowRank(torch.ones(1, 3), torch.ones(4, 1))}), rank=1
        )
    full = Adapter(AdapterSpec(full=True), {"a": Dense(torch.zeros(4, 3))})
    with pytest.raises(InputError, match="changes nothing"):
        extract_adapter(full, rank=1)
    with pytest.raises(InputError, match="rank 4 is more than any of the modules can have \(3\)"):
        extract_adapter(full, rank=4)


# Two folders


@torch.no_grad()
def tune(model: nn.Module, rank: int = 2, also: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """The model with a random LoRA of `rank` merged into every linear layer, and `also` done to it."""
    attached = attach(model, AdapterSpec(rank=rank, alpha=rank))
    for parameter in attached.parameters:
        parameter.normal_(std=0.3)
    for path, layer in attached.layers.items():
        model.set_submodule(path, layer.fuse())
    for path, stand_in in attached.stand_ins.items():
        model.set_submodule(path, stand_in.original)
    if also:
        also(model)
    return model


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    return model(input_ids=(torch.arange(16).view(2, 8) * 7) % 97, use_cache=False).logits


def assert_answers_alike(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(answers(a), answers(b), rtol=0, atol=1e-3 * float(answers(a).abs().max()))


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2", "bare gpt2"])
@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.99999}])
def test_a_merged_lora_comes_back_out_of_two_folders(kind: str, size: dict, tmp_path: Path) -> None:
    model = tiny_gpt2() if "gpt2" in kind else tiny_llama(tied="tied" in kind)
    (model.base_model if "bare" in kind else model).save_pretrained(tmp_path / "base")
    if "bare" in kind:  # as on the hub: the whole model's class over the bare model's names
        config = json.loads((tmp_path / "base/config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
        (tmp_path / "base/config.json").write_text(json.dumps(config))
    tune(model).save_pretrained(tmp_path / "tuned", max_shard_size="8KB")
    assert (tmp_path / "tuned" / INDEX).is_file()

    adapter, report = extract_folders(tmp_path / "tuned", tmp_path / "base", **size)
    base = open_base(str(tmp_path / "base"), dtype="float32")
    assert report.warning() is None
    assert adapter.base == BaseId("base", None, base.fingerprint, "")
    assert adapter.spec.rank == 2 and not adapter.spec.rank_overrides
    assert set(adapter.factors) == set(linear_paths(base.model))
    assert adapter.fan_in_fan_out == ("gpt2" in kind)
    assert max(loss.relative_error for loss in report.losses) < 1e-4

    tuned = open_base(str(tmp_path / "tuned"), dtype="float32").model
    adapter.save(tmp_path / "adapter")
    peft = PeftModel.from_pretrained(open_base(str(tmp_path / "base"), dtype="float32").model, tmp_path / "adapter")
    assert_answers_alike(peft, tuned)
    assert_answers_alike(attach(base.model, adapter).model, tuned)


@torch.no_grad()
def other_parts(model: nn.Module) -> None:
    model.model.norm.weight.mul_(1.5)
    model.model.embed_tokens.weight[3] += 1
    model.lm_head.weight.mul_(0.75)


def test_what_no_lora_can_hold_is_listed_with_its_change(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    before = model.model.embed_tokens.weight.detach().clone()
    tune(model, also=other_parts)
    model.config.rms_norm_eps = 1e-3
    model.save_pretrained(tmp_path / "tuned")
    _, report = extract_folders(tmp_path / "tuned", find_base(str(tmp_path / "base")), rank=2)
    changes = {change.name: change.relative for change in report.unadapted}
    moved = float((model.model.embed_tokens.weight.detach() - before).norm() / before.norm())
    assert changes == pytest.approx(
        {"model.norm.weight": 0.5, "lm_head.weight": 0.25, "model.embed_tokens.weight": moved}, rel=1e-5
    )
    assert report.config == ["rms_norm_eps"]
    said = report.warning() or ""
    assert "linear layers only" in said and "changed by" in said and len(said.splitlines()) <= 4


def save_changed(source: Path, target: Path, **config: object) -> dict[str, Tensor]:
    """A copy of a model's folder with its config changed; its tensors, to be saved over with `put`."""
    shutil.copytree(source, target)
    (target / "config.json").write_text(json.dumps(json.loads((target / "config.json").read_text()) | config))
    return load_file(target / "model.safetensors")


def put(tensors: dict[str, Tensor], folder: Path) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_a_head_of_its_own_in_a_tied_model_is_reported(tmp_path: Path) -> None:
    """As transformers loads it: the file's head counts, whatever the config says."""
    tune(tiny_llama(tied=True)).save_pretrained(tmp_path / "tuned")
    tiny_llama(tied=True).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "tuned/model.safetensors")
    put(tensors | {HEAD: 1.5 * tensors[EMBEDDING]}, tmp_path / "tuned")
    assert not torch.equal(
        (loaded := AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")).lm_head.weight,
        loaded.model.embed_tokens.weight,
    )
    _, report = extract_folders(tmp_path / "tuned", tmp_path / "base", rank=2)
    assert [(c.name, c.relative, c.rows) for c in report.unadapted] == [(HEAD, pytest.approx(0.5), 0)]
    # The other way round: the base has a head of its own, the tuned model's is the embedding.
    put(tensors, tmp_path / "tuned")
    base = load_file(tmp_path / "base/model.safetensors")
    put(base | {HEAD: 2 * base[EMBEDDING]}, tmp_path / "base")
    _, report = extract_folders(tmp_path / "tuned", tmp_path / "base", rank=2)
    assert [(c.name, c.relative) for c in report.unadapted] == [(HEAD, pytest.approx(0.5))]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [3, 31, -7])
def test_another_vocabulary_is_reported_and_the_rest_extracted(tmp_path: Path, rows: int, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    model.save_pretrained(tmp_path / "base")
    tune(model)
    model.resize_token_embeddings(97 + rows)
    with torch.no_grad():
        model.model.embed_tokens.weight[:97] *= 1.25
    model.bfloat16().save_pretrained(tmp_path / "tuned")
    adapter, report = extract_folders(tmp_path / "tuned", tmp_path / "base", rank=2)
    moved = {c.name: (c.relative, c.rows) for c in report.unadapted if "norm" not in c.name}
    assert moved[EMBEDDING] == (pytest.approx(0.25, abs=0.01), rows)
    assert (HEAD in moved) == (not tied) and (tied or moved[HEAD] == (pytest.approx(0, abs=0.01), rows))
    assert report.config == ["vocab_size"] and set(adapter.factors) == set(linear_paths(model))
    assert max(loss.relative_error for loss in report.losses) < 0.1


def test_what_only_one_of_the_two_has_is_reported(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    tune(tiny_llama()).save_pretrained(tmp_path / "plain")
    bias = "model.layers.0.self_attn.{}_proj.bias"
    tensors = save_changed(tmp_path / "plain", tmp_path / "tuned", attention_bias=True)
    more = {bias.format(n).replace("0", layer): torch.ones(8 if n in "kv" else 16) for n in "qkvo" for layer in "01"}
    put(tensors | more | {"v_head.weight": torch.ones(1, 16)}, tmp_path / "tuned")
    adapter, report = extract_folders(tmp_path / "tuned", tmp_path / "base", rank=2)
    assert len(adapter.factors) == 14 and report.config == ["attention_bias"]
    assert {(c.name, c.only_in) for c in report.unadapted} == {(name, "tuned") for name in {*more, "v_head.weight"}}
    _, report = extract_folders(tmp_path / "plain", tmp_path / "base", rank=2)
    assert report.unadapted == []


def test_a_parameter_that_was_zero_has_no_relative_change(tmp_path: Path) -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.bias.zero_()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.bias.fill_(1.0)
    tune(model).save_pretrained(tmp_path / "tuned")
    _, report = extract_folders(tmp_path / "tuned", tmp_path / "base", rank=2)
    assert [(c.name, c.relative) for c in report.unadapted] == [("transformer.h.0.attn.c_attn.bias", None)]


def test_directions_of_rounding_are_not_kept_for_an_energy() -> None:
    """A change of rank 4 in weights that were then saved in bfloat16, as bfloat16 and as float32 again."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(256, 192, generator=generator) * 0.05
    change = 0.0002 * torch.randn(256, 4, generator=generator) @ torch.randn(4, 192, generator=generator)
    for tuned in ((base + change).bfloat16(), (base + change).bfloat16().float()):
        factors, _ = extract(stored({"w": tuned}), stored({"w": base}), ["w"], energy=0.99)
        assert factors["w"].rank == 4
        assert float((factors["w"].dense() - change).norm() / change.norm()) < 0.1
    rounded = (base + change).bfloat16().float() - base
    assert nearest(rounded, energy=0.99)[0].rank > 20  # without the edge
    assert nearest(rounded, energy=1.0, edge=1.0)[0].rank == 192  # all is all
    exact, _ = extract(stored({"w": base + change}), stored({"w": base}), ["w"], energy=0.9999999)
    assert exact["w"].rank == 4


def test_the_share_of_rounding_is_said(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    tune(tiny_llama()).save_pretrained(tmp_path / "exact")
    tune(tiny_llama()).bfloat16().save_pretrained(tmp_path / "rounded")
    _, exact = extract_folders(tmp_path / "exact", tmp_path / "base", energy=0.99)
    _, rounded = extract_folders(tmp_path / "rounded", tmp_path / "base", energy=0.99)
    assert exact.rounding < 1e-9 < 1e-6 < rounded.rounding < 1e-2
    assert exact.warning() is None and "rounding" in (dataclasses.replace(exact, rounding=0.3).warning() or "")
    assert {loss.new_rank for loss in rounded.losses} <= {1, 2}


def test_experts_that_are_no_linear_layers_are_listed_not_dropped(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "q_proj" in name:
                parameter.mul_(1.25)
    model.save_pretrained(tmp_path / "tuned")
    adapter, report = extract_folders(tmp_path / "tuned", tmp_path / "base", rank=2)
    assert {path.rpartition(".")[2] for path in adapter.factors} == {"q_proj"}
    assert report.unadapted and all("experts" in c.name and c.relative == pytest.approx(0.25) for c in report.unadapted)


def test_the_template_is_that_of_the_tuned_model_where_it_has_one(tmp_path: Path) -> None:
    tiny_base(tmp_path / "base")
    tune(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "tuned")
    chatml = Renderer(toy("chatml")).template_fingerprint
    assert extract_folders(tmp_path / "tuned", tmp_path / "base", rank=2)[0].base.template == chatml
    own = copy.deepcopy(toy("chatml"))  # others are given the very same
    own.chat_template = own.chat_template.replace("<|im_start|>", "<|im_end|>")
    own.save_pretrained(tmp_path / "tuned")
    template = extract_folders(tmp_path / "tuned", tmp_path / "base", rank=2)[0].base.template
    assert template == Renderer(own).template_fingerprint != chatml


def test_a_tied_head_and_old_buffers_may_be_written_or_not(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    tune(model).save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned/model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, file, {"format": "pt"})
    _, report = extract_folders(tmp_path / "tuned", tmp_path / "base", rank=2)
    assert report.warning() is None


def refusal(folder: Path, **size: float) -> str:
    with pytest.raises(InputError) as caught:
        extract_folders(folder / "tuned", folder / "base", **size or {"rank": 2})
    assert len(str(caught.value).splitlines()) <= 5
    return str(caught.value)


def test_folders_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    tiny_gpt2().save_pretrained(tmp_path / "tuned")
    assert "different architectures: gpt2 and llama" in refusal(tmp_path)

    tune(model).save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned/model.safetensors").rename(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole")
    norm = "model.norm.weight"
    save_file({k: v for k, v in tensors.items() if k != norm}, tmp_path / "tuned/model.safetensors", {"format": "pt"})
    assert f"{norm}: not in {tmp_path / 'tuned'}" in refusal(tmp_path)
    save_file({**tensors, norm: torch.ones(17)}, tmp_path / "tuned/model.safetensors", {"format": "pt"})
    assert f"{norm}: (17,) and (16,)" in refusal(tmp_path)
    with pytest.raises(InputError, match="isn't a model folder"):
        extract_folders(tmp_path, tmp_path / "base", rank=1)


def test_nothing_to_extract_is_refused_and_says_what_did_change(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    assert "nothing to extract" in refusal(tmp_path) and "norm" not in refusal(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "tuned")
    said = refusal(tmp_path)
    assert "nothing to extract" in said and "model.norm.weight changed by 50.00 %" in said


def test_sizes_are_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    tune(model).save_pretrained(tmp_path / "tuned")
    assert "rank 17 is more than any of the modules can have (16)" in refusal(tmp_path, rank=17)
    assert "not 1.5" in refusal(tmp_path, energy=1.5)
