"""Every causal language model of transformers in small, and what deltaw makes of it.

A row is examined, not looked up: the model is built with random weights, planned, given an adapter, and the loss and
gradients of a packed batch, with documents longer than every window and chunk, are held to PEFT's on the untouched
model, document by document. `python -m tests.every_causal_type > docs/models.md` writes the table again; a test holds
the table to the code (tests/base/test_every_architecture.py).
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deltaw.adapter.attach import Attached, attach
from deltaw.adapter.expert_targets import GROUP, experts_of
from deltaw.adapter.experts import ExpertsUpdate
from deltaw.adapter.file import BaseId
from deltaw.adapter.peft_config import missed_by_peft
from deltaw.adapter.peft_experts import joined, wrappers
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.kernels.logprobs import IGNORE

# Whatever of these a config knows is set; windows and chunks are 16 tokens, less than the documents' 30.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "d_ff", "n_inner"), 96),
    "decoder_ffn_dim": 96,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "d_kv", "v_head_dim", "qk_head_dim", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "state_size", "time_step_rank", "mamba_n_heads"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "local_window", "attention_window"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "max_window_layers", "mamba_expand", "encoder_layers"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_dim", "q_lora_rank"), 32),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "decoder_sparse_step", "first_k_dense_replace"), 1),
    **dict.fromkeys(("interleave_moe_layer_step", "bos_token_id"), 1),
    **dict.fromkeys(("use_sliding_window", "is_decoder"), True),
    "vocab_size": 211, "pad_token_id": 0, "eos_token_id": 2, "mamba_d_head": 16,
}  # fmt: skip
LATENT = {"head_dim": 8, "num_key_value_heads": 4, "qk_head_dim": 16}
SPARSE = LATENT | {"index_head_dim": 16, "index_n_heads": 4, "index_topk": 8}
OWN: dict[str, dict[str, Any]] = {  # what a type needs beside
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa"), SPARSE),
    "bailing_hybrid": {"num_expert_group": 1, "num_experts_per_token": 2, "layer_group_size": 2, "linear_num_heads": 4,
                       "linear_head_dim": 16, "num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 211, "hidden_size_per_layer_input": 16},
    "gemma4_text": {"vocab_size_per_layer_input": 211, "hidden_size_per_layer_input": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 16), "attn_layers": ["local", "lsh"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "layer_types": ["mamba", "hybrid"] * 2, "mamba_ngroups": 1,
               "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
BY_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
PARTS = "of several models: the one for text stands under a name of its own, or is too large"
SENSES = "reads more than text"
SEVERAL = ("dots3_note", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "llama4", "qwen3_5", "qwen3_5_moe")
SEEING = ("emu3", "fuyu", "git", "got_ocr2", "mllama", "phi4_multimodal")
HEARING = ("moss_transcribe_diarize", "musicgen", "musicgen_melody")
DRAFTING = ("gemma4_assistant", "gemma4_unified_assistant")
UNBUILT = dict.fromkeys(SEVERAL, PARTS) | dict.fromkeys(SEEING + HEARING, SENSES) | dict.fromkeys(DRAFTING, "a drafter")
LARGEST = 14_000_000  # parameters

LENGTHS = (30, 1, 12, 3)
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class NotBuilt(Exception):
    """transformers doesn't build this type in small; why."""


@dataclass(frozen=True)
class Row:
    """What deltaw makes of a type. `loss` and `gradient`: relative differences from PEFT's."""

    name: str
    way: str
    head: str = ""
    stand_ins: str = ""
    adapted: str = ""
    experts: str = ""
    left: str = ""
    loss: float = 0.0
    gradient: float = 0.0

    @property
    def equal(self) -> bool:
        """Up to rounding in float32."""
        return self.loss <= 1e-4 and self.gradient <= 1e-3

    def line(self) -> str:
        """Of the table."""
        return (
            "| "
            + " | ".join((self.name, self.way, self.head, self.stand_ins, self.adapted, self.experts, self.left))
            + " |"
        )


def build(name: str) -> nn.Module:
    """A model of the type, float32, frozen, with eager attention. Raises NotBuilt."""
    if name in UNBUILT:
        raise NotBuilt(UNBUILT[name])
    try:
        config = _config(name)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            raise NotBuilt(f"{size:,} parameters at least")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.requires_grad_(False).parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15, generator=generator)
        model(input_ids=tokens()[None, :2], use_cache=False)
    except Exception as error:  # of whatever kind: not ours
        if isinstance(error, NotBuilt):
            raise
        raise NotBuilt(f"{type(error).__name__} in transformers") from None
    return model


def _config(name: str) -> Any:
    known = type(AutoConfig.for_model(name))().to_dict()
    options = {k: v for k, v in SMALL.items() if k in known and not isinstance(known[k], dict | list)}
    if known.get("attention_types"):
        options["attention_types"] = [[["global", "local"], 2]]
    options |= {k: None for k in BY_LAYER if k in known}
    options |= OWN.get(name, {})
    cls = type(AutoConfig.for_model(name))
    for without in ((), [k for k in BY_LAYER if k not in OWN.get(name, {})], ["head_dim"], ["hidden_size"]):
        options = {k: v for k, v in options.items() if k not in without}
        try:
            return cls(**options)
        except Exception as error:  # a strict config refuses in many ways
            refused = error
    raise refused


def tokens() -> Tensor:
    return torch.randint(3, 200, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))


def examine(name: str) -> Row:
    """Build, plan, adapt, train one step and hold it to PEFT. Raises whatever isn't a refusal."""
    try:
        model = build(name)
    except NotBuilt as error:
        return Row(name, f"not tried: {error}")
    original = copy.deepcopy(model)
    forward = plan_forward(model)
    try:
        targets = ("all-linear", GROUP) if experts_of(model).shapes else "all-linear"
        attached = attach(model, AdapterSpec(rank=1, alpha=4.0, targets=targets))
    except InputError as error:
        return Row(name, f"refused: {error}".splitlines()[0])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_(0, 0.05, generator=generator)
    ours, theirs = _ours(forward, attached), _peft(original, attached)
    way = f"{forward.way}: {forward.why}" if forward.why else forward.way
    experts = tuple(path for path, layer in attached.layers.items() if isinstance(layer, ExpertsUpdate))
    linear = tuple(path for path in attached.paths if path not in experts)
    missed = missed_by_peft(model, linear)
    return Row(
        name,
        way,
        "fused" if forward.head else "its own",
        attached.describe(),
        _named(linear) + (f"; PEFT's loader misses {len(missed)}" if missed else ""),
        _named(experts),
        _named(attached.unmatched),
        abs(float(ours[0] - theirs[0])) / abs(float(theirs[0])),
        float((ours[1] - theirs[1]).norm() / theirs[1].norm()),
    )


def _ours(forward: Forward, attached: Attached) -> tuple[Tensor, Tensor]:
    """(loss, gradients of all factors) of the packed batch."""
    labels = tokens().roll(-1)
    labels[STARTS[1:] - 1] = IGNORE
    loss, _ = forward.loss(Batch.of(tokens(), STARTS.tolist(), labels))
    loss.backward()
    return loss.detach(), _flat([part for layer in attached.layers.values() for part in _as_peft(layer, grads=True)])


def _as_peft(layer: Any, *, grads: bool) -> list[Tensor]:
    """What trains in a layer, or its gradients, in the shapes that PEFT has for it."""
    tensors = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in layer.trained().items()}
    if not grads:
        tensors = {name: p.detach() for name, p in layer.trained().items()}
    if isinstance(layer, ExpertsUpdate):
        tensors = joined([dict(zip(tensors, each, strict=True)) for each in zip(*tensors.values(), strict=True)])
    return list(tensors.values())


def _peft(original: nn.Module, attached: Attached) -> tuple[Tensor, Tensor]:
    """The same of PEFT's model, which reads the adapter from disk, a document at a time.

    What it doesn't find there (`missed_by_peft`, and nothing else) is handed to it.
    """
    with tempfile.TemporaryDirectory() as folder:
        attached.adapter(BaseId("x")).save(folder)
        model = PeftModel.from_pretrained(original, folder, is_trainable=True).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs: list[Tensor] = []
    missed = set()
    experts = [path for path, layer in attached.layers.items() if isinstance(layer, ExpertsUpdate)]
    called = wrappers(experts)
    for path, layer in attached.layers.items():
        for key, own in zip(layer.trained(), _as_peft(layer, grads=False), strict=True):
            prefix = f"base_model.model.{called.get(path, path)}.lora_{key.upper()}."
            (parameter,) = (p for name, p in trained.items() if name.startswith(prefix))
            theirs.append(parameter)
            if not torch.equal(parameter, own):
                missed.add(path)
                parameter.data.copy_(own.data)
    linear = [path for path in attached.paths if path not in experts]
    assert missed == set(missed_by_peft(attached.model, linear)), "PEFT reads other factors than were saved"
    loss = torch.zeros(())
    for start, end in pairwise(STARTS.tolist()):
        if end - start > 1:
            logits = model(input_ids=tokens()[None, start:end], use_cache=False).logits[0, :-1]
            loss = loss + F.cross_entropy(logits.float(), tokens()[start + 1 : end], reduction="sum")
    loss.backward()
    return loss.detach(), _flat([p.grad if p.grad is not None else torch.zeros_like(p) for p in theirs])


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts]) if parts else torch.zeros(0)


def _named(paths: tuple[str, ...]) -> str:
    """What modules are called, and how many there are."""
    names = sorted({path.split(" ")[0].split(".")[-1] for path in paths})
    return f"{', '.join(names)} ({len(paths)})" if names else ""


HEADER = """# How each model runs

Every type of causal language model in transformers {version}, built small with random weights. For each one that
trains, the loss and the gradients of a batch of documents equal PEFT's on the untouched model, document by document.
`python -m tests.every_causal_type > docs/models.md` writes this page, and a test checks it against the code.

*Documents* are packed (end to end, without padding), padded (one row each: slower, equally right) or run one at a time;
where a faster way is ruled out, the reason is given. *Head* says whether it is fused into the loss, *stand-ins* which
modules run on the hand-written kernels. *Adapted* is what `all-linear` adapts, *experts* what `experts` does (`targets:
[all-linear, experts]`), and the last column what both leave as it is: weights that don't belong to plain linear layers.
A model whose experts stand in the last column keeps them in a form of its own, and they can't be adapted.

| type | documents | head | stand-ins | adapted | experts | left as it is |
|---|---|---|---|---|---|---|"""


def table() -> Iterator[str]:
    """The page, line by line; what went wrong is told on stderr."""
    yield HEADER.format(version=transformers.__version__)
    for name in TYPES:
        try:
            row = examine(name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            row = Row(name, f"fails: {type(error).__name__}")
        if not row.equal:
            print(f"{name}: loss off by {row.loss:.1e}, gradient by {row.gradient:.1e}", file=sys.stderr)
            row = Row(name, "fails: differs from PEFT")
        yield row.line()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for line in table():
        print(line, flush=True)
