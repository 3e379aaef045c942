"""Room behind a norm's rows: the same numbers, and columns that the next product may write to."""

import pytest
import torch
from torch import Tensor

from deltaw.kernels.joined import Joined, joined_gated_mlp, joined_linears
from deltaw.kernels.lora import Factors
from deltaw.kernels.norm import add_rms_norm, rms_norm
from deltaw.kernels.room import room_of


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def joined(outputs: int, inputs: int) -> Joined:
    made = Joined([drawn(outputs, inputs)], [None], [Factors(drawn(3, inputs), drawn(outputs, 3), 2.0)])
    for factor, place, scale in made.places:
        place.copy_(factor * scale)
    return made


@pytest.mark.parametrize("adds", [False, True])
def test_a_norm_with_room_is_the_norm(adds: bool) -> None:
    x, w, one = drawn(1, 7, 6).requires_grad_(), drawn(6), joined(5, 6)
    plain = add_rms_norm(x, 2 * x, w, 1e-6)[1] if adds else rms_norm(x, w, 1e-6)
    y = add_rms_norm(x, 2 * x, w, 1e-6, room=20)[1] if adds else rms_norm(x, w, 1e-6, room=20)
    assert torch.equal(y, plain)
    whole = room_of(y)
    assert whole is not None and whole.shape == (7, 26) and whole.data_ptr() == y.data_ptr()
    wanted = joined_linears(plain.flatten(0, 1), one)[0]
    found = joined_linears(y.flatten(0, 1), one, whole)[0]
    assert torch.equal(found, wanted) and torch.equal(y, plain), "what is behind it is written to, and nothing else"
    of_plain, of_roomy = (torch.autograd.grad(out.square().sum(), x)[0] for out in (wanted, found))
    torch.testing.assert_close(of_roomy, of_plain)


def test_an_mlp_reads_its_input_where_it_lies() -> None:
    x, w, pair, down = drawn(7, 6).requires_grad_(), drawn(6), joined(10, 6), joined(6, 5)
    plain, y = rms_norm(x, w, 1e-6), rms_norm(x, w, 1e-6, room=16)
    wanted, found = joined_gated_mlp(plain, pair, down, "silu"), joined_gated_mlp(y, pair, down, "silu", room_of(y))
    assert torch.equal(found, wanted)
    of_plain, of_roomy = (torch.autograd.grad(out.square().sum(), x)[0] for out in (wanted, found))
    torch.testing.assert_close(of_roomy, of_plain)


def test_only_the_norm_itself_has_room() -> None:
    y = rms_norm(drawn(7, 6), drawn(6), 1e-6, room=16)
    assert room_of(y) is not None
    assert all(room_of(other) is None for other in (y.view(7, 6), y + 1, y.clone(), rms_norm(y, drawn(6), 1e-6)))
