"""Matrices with room behind their rows: what makes an x writes it where the next product wants it, and that product's
own columns (joined.py) go behind it, so that nothing is copied.

`roomy` makes such a matrix. A result that lies in one carries the whole with it, since whoever reads it is handed a
tensor by the model's own code: `give_room` puts it there, `room_of` finds it. Only the object itself has it: a view, a
sum or a copy has none, and is copied to where there is room.

Letters: T rows, N columns, X columns with the room behind them.
"""

import torch
from torch import Tensor

LINE = 128  # bytes at whose multiples rows begin
NAME = "deltaw_room"


def roomy(rows: int, columns: int, room: int, like: Tensor) -> Tensor:
    """[rows, columns + room] of any numbers, in the dtype and on the device of `like`; each row begins a line."""
    line = max(1, LINE // like.element_size())
    width = columns + room
    return like.new_empty(rows, -(-width // line) * line)[:, :width]


def rows_with_room(like: Tensor, room: int) -> Tensor:
    """[..., N] of any numbers in the shape of `like`, in such a matrix."""
    columns = like.shape[-1]
    return roomy(like.numel() // max(columns, 1), columns, room, like)[:, :columns].view(like.shape)


def give_room(x: Tensor, room: int) -> Tensor:
    """x [..., N], which `rows_with_room` made, with that room, [..., N + room], to be found by `room_of`."""
    whole = x.detach().as_strided((*x.shape[:-1], x.shape[-1] + room), x.stride())
    setattr(x, NAME, whole)
    return x


def room_of(x: Tensor) -> Tensor | None:
    """x and the room behind it as a matrix [T, X] that may be written to; None where x has none."""
    whole: Tensor | None = getattr(x, NAME, None)
    return None if whole is None or torch.is_inference(x) else whole.flatten(0, -2)
