"""What a GPU does with a captured pass, done on a CPU: operations are recorded and replayed on the same tensors.

As in a CUDA graph, every number that the host put into an operation is the recorded one for ever, every tensor stays
where it was, and an operation whose answer the host would have to wait for can't be recorded. Attention over documents
is stood in for by a function of the offsets' tensor, as a GPU's is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import masking_utils

from deltaw.kernels import varlen

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class Tape(TorchDispatchMode):
    """Inside, operations are run and written down."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name.startswith(WAITING) or by_mask:
            raise RuntimeError(f"{name} would wait for the device")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, tree_flatten(out)[0]))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """All of them again, results where they were."""
        for func, args, kwargs, places in self.operations:
            results = tree_flatten(func(*args, **kwargs))[0]
            for place, result in zip(places, results, strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != result.data_ptr():
                    place.copy_(result)


class Recorder:
    """Records as recorded.py's `Recorder` does, and counts. `changed`: the tensors that work may write to."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.changed: Callable[[], list[Tensor]] = list

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.recorded += 1
        generator, tensors = torch.random.get_rng_state(), self.changed()
        before = [tensor.detach().clone() for tensor in tensors]
        with Tape() as tape:
            result = work()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)  # on a GPU, what is being recorded doesn't run
        torch.random.set_rng_state(generator)

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, result


@contextmanager
def recording() -> Iterator[None]:
    """Inside, transformers looks at no positions (whether they start over), as where it sees that it is captured. For
    models that are planned and adapted."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
        yield


@contextmanager
def attention_by_offsets() -> Iterator[None]:
    """Inside, attention over packed documents is as a GPU has it: it knows the offsets and the longest document, and
    nothing else. For models that are planned and adapted."""

    def attend(
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        starts_S: Tensor,
        longest: int,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        at_T = torch.arange(len(q_THE))
        document_T = torch.bucketize(at_T, starts_S, right=True)
        behind = at_T[:, None] - at_T
        seen = (behind >= 0) & (behind < longest) & (document_T[:, None] == document_T)
        shared = q_THE.shape[1] // k_TKE.shape[1]
        k, v = (x.repeat_interleave(shared, 1).transpose(0, 1) for x in (k_TKE, v_TKE))
        s_HTT = (scale or q_THE.shape[2] ** -0.5) * (q_THE.transpose(0, 1) @ k.transpose(1, 2))
        return (s_HTT.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1)

    with recording(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(varlen, "applies", lambda *args, **kwargs: True)
        patched.setattr(varlen, "varlen_attention", attend)
        yield
