"""The tensors of a merged model as a GGUF holds them: their list, and each one's bytes when its turn comes.

    one tensor at a time   read, summed in float32, put in GGUF's layout, rounded once to its type
    survival               Q(W + Δ) − Q(W) against Δ, from the same pass (linalg/rounding.py, merge/survey.py)

A tied head has no tensor: llama.cpp uses the embedding if `output.weight` is missing. It has one if the merge untied
it; then an architecture whose head llama.cpp doesn't read is refused.

For K types there is no Q(W), since llama.cpp's quantiser handles only whole files: W itself is used, so the cosine
counts its noise, too, while `kept`, by which a type is refused, doesn't.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.base.language import language_part
from deltaw.errors import InputError, listed
from deltaw.files.gguf_parts import read_model
from deltaw.files.safetensors import read_tensor
from deltaw.linalg.rounding import Survival, survived
from deltaw.shipping.gguf.names import Family
from deltaw.shipping.gguf.types import HEAD, Place, decoded, encoded, read_values, rounded
from deltaw.shipping.merge.plan import MergePlan, Planned, not_finite
from deltaw.show.progress import Progress

if TYPE_CHECKING:
    import numpy as np

CHUNK = 1 << 22  # numbers
HEADLESS = ("gemma2",)  # llama.cpp has no place for their head


class Tensors:
    """The tensors of a plan by GGUF's names. Raises InputError where one of the model's is missing, or has no place."""

    def __init__(self, plan: MergePlan, family: Family) -> None:
        self.plan, self.family = plan, family
        self.survivals: dict[str, Survival] = {}
        tied, reads = self._tied_head(), language_part(plan.skeleton)
        every = [name for name, _ in plan.skeleton.named_parameters(remove_duplicate=False) if name != tied]
        names = [name for name in every if reads(name) or name == self._head()]
        self.left_out = len(every) - len(names)
        """How many tensors belong to what sees pictures, which a GGUF of its own has."""
        if lost := [name for name in plan.modules if name not in names and f"{name}.weight" not in names]:
            raise InputError(
                f"{len(lost)} of {len(plan.adapter.factors)} updates belong to the vision part, which llama.cpp reads "
                f"from another file:\n{listed(lost, 2)}",
                fix="use another destination: deltaw merge",
            )
        if missing := [name for name in names if name not in plan.by_parameter]:
            raise InputError(
                f"{len(missing)} of {len(names)} parameters aren't tensors of the base's files:\n{listed(missing, 2)}",
                fix="load it with transformers, save it with save_pretrained, and name that folder with --base",
            )
        self.planned = {family.tensor(name): plan.by_parameter[name] for name in names}
        if HEAD in self.planned and family.architecture in HEADLESS:
            raise InputError(
                f"the head is no longer the embedding, and llama.cpp's {family.architecture} has no place for one",
                fix="train without the head (lm_head), or use another destination: deltaw merge",
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Rows first."""
        return {name: self._shape(planned) for name, planned in self.planned.items()}

    def values(
        self, places: list[Place], more: Mapping[str, list[float]], progress: Progress
    ) -> Iterator["np.ndarray"]:
        """The bytes of every place in turn; `more`: settings that are tensors. Fills `survivals` on the way."""
        for done, place in enumerate(places, 1):
            if place.name in more:
                yield encoded(torch.tensor(more[place.name], dtype=torch.float32), place.type)
            else:
                yield self._bytes(place)
            progress(done)

    def survey(self, file: Path) -> None:
        """Fill `survivals` from a file that another program quantised."""
        header = read_model([file])
        for name, planned in self.planned.items():
            if planned.module is not None:
                value, base = self._value(planned), self._base(planned)
                now = read_values(file, header.places[name], tuple(value.shape))
                self._count(planned, now - base, value - base)

    def _bytes(self, place: Place) -> "np.ndarray":
        """The bytes, made from a few rows at a time: the survey needs several times the memory of the numbers."""
        import numpy as np

        planned = self.planned[place.name]
        value = self._value(planned)
        base = None if planned.module is None else self._base(planned)
        if not torch.isfinite(value).all():
            raise not_finite(planned)
        if place.type == "F16" and float(value.abs().max()) > torch.finfo(torch.float16).max:
            raise InputError(f"{planned.name}: holds numbers beyond 65,504, the largest in F16", fix="take BF16")
        rows, parts = value.reshape(-1, value.shape[-1]), []
        step = max(1, CHUNK // rows.shape[1])
        for at in range(0, len(rows), step):
            new = rows[at : at + step]
            parts.append(encoded(new, place.type))
            if base is not None:
                old = base[at : at + step]
                seen = decoded(parts[-1], place.type, tuple(new.shape)) - rounded(old, place.type)
                self._count(planned, seen, new - old)
        return np.concatenate(parts)

    def _count(self, planned: Planned, seen: Tensor, delta: Tensor) -> None:
        """Note what is left of an update. Its Δ is the difference of two float32 numbers: exact to a rounding of W."""
        assert planned.module is not None
        so_far = self.survivals.get(planned.module, Survival())
        self.survivals[planned.module] = so_far + survived(seen, delta)

    def _value(self, planned: Planned) -> Tensor:
        return self._stored(planned, self.plan.value(planned).float())

    def _base(self, planned: Planned) -> Tensor:
        """With zeros where tokens were added, as an update has it (replaced.py)."""
        weight = read_tensor(planned.file, planned.source).float()
        return self._stored(planned, F.pad(weight, (0, 0, 0, planned.more)) if planned.more else weight)

    def _stored(self, planned: Planned, weight: Tensor) -> Tensor:
        """In GGUF's layout."""
        assert planned.parameter is not None
        (stored,) = self.family.stored(planned.parameter, weight).values()
        return stored.contiguous()

    def _shape(self, planned: Planned) -> tuple[int, ...]:
        return tuple(self._stored(planned, torch.empty(planned.shape, device="meta")).shape)

    def _head(self) -> str:
        return self._name_of(self.plan.skeleton.get_output_embeddings())  # type: ignore[operator]

    def _name_of(self, wanted: Any) -> str:
        return next(f"{path}.weight" for path, module in self.plan.skeleton.named_modules() if module is wanted)

    def _tied_head(self) -> str | None:
        """The name of the head where it is the embedding, too: not one that the base's files hold with numbers of its
        own, which transformers takes, whatever the config says."""
        skeleton: Any = self.plan.skeleton
        head, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
        if self.plan.unties or head.weight is not embedding.weight:
            return None
        both = [self.plan.by_parameter.get(self._name_of(module)) for module in (head, embedding)]
        if None not in both and not torch.equal(*(read_tensor(p.file, p.source) for p in both if p is not None)):
            return None
        return self._head()
