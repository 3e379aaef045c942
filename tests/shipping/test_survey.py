"""What follows from what survives: quantised blocks are refused by what is lost, not by their noise."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from deltaw.errors import InputError
from deltaw.linalg.rounding import Survival, survival
from deltaw.shipping.merge.survey import check_floating, check_quantised, said, to_json, warning, whole


def quantised(x: torch.Tensor, kind: str) -> torch.Tensor:
    """As a GGUF of that type holds it."""
    number = GGMLQuantizationType[kind]
    return torch.from_numpy(np.array(quants.dequantize(quants.quantize(x.numpy(), number), number)))


def survives(base_kind: str | None, kind: str, size: float) -> dict[str, Survival]:
    """An update of `size` times a random base, which was quantised itself or wasn't."""
    generator = torch.Generator().manual_seed(0)
    w, delta = (torch.randn(64, 256, generator=generator) for _ in range(2))
    w = quantised(w, base_kind) if base_kind else w
    return {"module": survival(w, size * delta, lambda x: quantised(x, kind))}


@pytest.mark.parametrize(
    "base_kind, kind, size, refused",
    [
        (None, "Q8_0", 0.03, False),
        (None, "Q4_0", 0.03, False),  # much noise, on average all of it
        ("Q8_0", "Q8_0", 0.03, False),
        ("Q8_0", "Q8_0", 3e-4, True),  # below half a step of the base's own grid
        ("Q4_0", "Q4_0", 0.003, True),
    ],
)
def test_a_quantised_target_is_refused_where_little_survives(
    base_kind: str | None, kind: str, size: float, refused: bool
) -> None:
    found = survives(base_kind, kind, size)
    assert (whole(found).kept < 0.5) == refused
    check_quantised(found, kind, force=True)
    if refused:
        with pytest.raises(InputError, match="--force"):
            check_quantised(found, kind, force=False)
    else:
        check_quantised(found, kind, force=False)


def test_floating_types_are_warned_of_and_refused_where_nothing_is_left() -> None:
    nothing = {"a": Survival(100, 0, 0.0, 1.0, 1.0)}
    some = {**nothing, "b": Survival(100, 30, 0.5, 1.0, 0.7)}
    with pytest.raises(InputError):
        check_floating(nothing, "bfloat16", force=False)
    check_floating(nothing, "bfloat16", force=True)
    check_floating(some, "bfloat16", force=False)
    assert warning(some, "bfloat16") and not warning({"c": Survival(100, 99, 1.0, 1.0, 1e-4)}, "bfloat16")


def test_an_update_of_zeros_is_the_base() -> None:
    zero = {"a": Survival(100, 0, 0.0, 0.0, 0.0)}
    check_floating(zero, "bfloat16", force=False)
    check_quantised(zero, "Q4_0", force=False)
    assert warning(zero, "bfloat16") is None and said(zero, "bfloat16")
    assert to_json(zero)["modules"]["a"]["entries"] == 100
