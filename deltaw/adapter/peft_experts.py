"""Updates of experts in PEFT's form: one A and one B for all experts of a parameter, named by `target_parameters`.

    A [E·R, N]   the experts' A on top of each other:            A[e·R + r] = A_e[r]
    B [M, R·E]   their columns by turns, rank by rank:           B[:, r·E + e] = B_e[:, r]

Both in the orientation of x Wᵀ, however the model stores W (`is_transposed` is asked for by PEFT, too). A parameter has
no key of its own in the file: PEFT wraps the module once for each parameter, in the order in which the module has them,
so the wrapper that comes last is the outermost:

    <module>.lora_A.weight                 of the only parameter, or of down_proj where both are adapted
    <module>.base_layer.lora_A.weight      of gate_up_proj (up_proj) where both are

Which parameters they are is in the config alone, `target_parameters: [<module>.gate_up_proj, …]`. PEFT has one rank and
one alpha for all experts of a parameter (`rank_pattern` by the parameter's path), no DoRA, no bias and no dropout for
them. Where an update was cut to other ranks for each expert, they are filled up with zeros (algebra.py).

vLLM reads this form, and one key for each expert's matrix (`experts.3.down_proj.lora_A.weight`), which transformers 4
trained; the latter is what `split` makes (shipping/vllm.py).

Letters: E experts, M outputs, N inputs, R rank.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from deltaw.config.adapter import expert_of, expert_path, names_module, parameter_of
from deltaw.errors import InputError, listed

INNER = ".base_layer"  # once more for each wrapper around it
LAST = "down_proj"  # the parameter that modules of experts have last
FIRST = ("gate_up_proj", "up_proj")
NAMES = (*FIRST, LAST)


def is_parameter(entry: str) -> bool:
    """Whether an entry of `target_parameters` is of experts that deltaw knows."""
    return entry.rpartition(".")[2] in NAMES


def is_wrapper(path: str, entries: Sequence[str]) -> bool:
    """Whether what a file calls so is the wrapper of a parameter among `entries`."""
    module = path.removesuffix(INNER)
    return any(names_module(entry, f"{module}.{name}") for entry in entries for name in NAMES)


def named(paths: Iterable[str], entries: Sequence[str]) -> list[str]:
    """Those of `paths` that `entries` name as parameters of experts."""
    some = [entry for entry in entries if is_parameter(entry)]
    return [path for path in paths if any(names_module(entry, path) for entry in some)]


def parameters(paths: Iterable[str]) -> list[str]:
    """The parameters that experts' matrices lie in, each once."""
    return list(dict.fromkeys(parameter_of(path) for path in paths if expert_of(path) is not None))


def wrappers(paths: Sequence[str]) -> dict[str, str]:
    """What the file calls each parameter's wrapper."""
    by_module: dict[str, list[str]] = {}
    for path in paths:
        by_module.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: module + INNER * outer
        for module, own in by_module.items()
        for outer, path in enumerate(sorted(own, key=lambda one: one.endswith(f".{LAST}"), reverse=True))
    }


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A and B of all experts of a parameter, from each one's `a` [R, N] and `b` [M, R]."""
    a_EN = torch.cat([part["a"] for part in parts])
    b_MRE = torch.stack([part["b"] for part in parts], -1)
    return {"a": a_EN, "b": b_MRE.flatten(1)}


def split(a_SN: Tensor, b_MS: Tensor, rank: int) -> list[dict[str, Tensor]]:
    """The other way round. Raises ValueError where the rank doesn't divide them."""
    if a_SN.shape[0] != b_MS.shape[1] or a_SN.shape[0] % rank:
        raise ValueError(f"A {tuple(a_SN.shape)} and B {tuple(b_MS.shape)} aren't experts' of rank {rank}")
    a_ERN = a_SN.view(-1, rank, a_SN.shape[1])
    b_MRE = b_MS.view(len(b_MS), rank, -1)
    return [{"a": a_ERN[e].contiguous(), "b": b_MRE[:, :, e].contiguous()} for e in range(len(a_ERN))]


def by_parameter(wrapped: Iterable[str], entries: Sequence[str], source: str) -> dict[str, str]:
    """The parameter of each wrapper that a file has tensors for, by what `target_parameters` names. Raises InputError
    where the two don't fit."""
    depths: dict[str, set[int]] = {}
    for path in wrapped:
        module = path.removesuffix(INNER)
        depths.setdefault(module, set()).add(int(module != path))
    found, problems = dict[str, str](), list[str]()
    for module, own in depths.items():
        names = [name for name in NAMES if any(names_module(entry, f"{module}.{name}") for entry in entries)]
        inner_first = names[::-1]  # the last one is outermost
        if own != set(range(len(names))):
            named = " and ".join(names) or "none of its parameters"
            problems.append(f"{module:.100}: the weights are of {len(own)}, target_parameters names {named}")
            continue
        found |= {module + INNER * depth: f"{module}.{inner_first[depth]}" for depth in own}
    if problems:
        raise InputError(f"{source}: target_parameters doesn't name what the weights are for:\n{listed(problems)}")
    return found


def of_one(path: str, count: int) -> list[str]:
    """The paths of each expert's matrix."""
    return [expert_path(path, number) for number in range(count)]
