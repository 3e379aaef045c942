"""`adapter:` of a run file: what to adapt and how large.

Rejected: a separate class for the adapter's options here and in `adapter/` (two definitions of one thing):
`AdapterSpec` is defined here, at the bottom of the import order, and `adapter/targets.py` gives it its meaning on a
model.
"""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from deltaw.config.strict import PositiveFloat, Strict
from deltaw.files.paths import PathText

TARGET_GROUPS = ("all-linear", "attention", "mlp", "experts")
Way = Literal["lora", "whole"]
FACTOR_FIELDS = (  # of AdapterSpec
    "rank", "alpha", "scaling", "init", "magnitude", "dropout", "rank_overrides", "alpha_overrides", "expert_rank",
)  # fmt: skip


class AdapterSpec(Strict):
    """What to adapt and how large. Scale is alpha / rank (LoRA §4.1) or alpha / sqrt(rank) (rsLoRA).

    `full`: ΔW itself is trained, a matrix of the weight's size, and the fields about factors say nothing. In a run
    file `adapter: full` is short for it.

    `tokens`: texts whose rows of the embedding (and of the head) train; the tokenizer gets those that it doesn't have.
    `also`: the embedding or the head, by name, as LoRA or whole (adapter/ends.py). A list is short for all of it as
    LoRA.

    `start`, which a run file calls `from`: the run or the adapter's folder whose adapter is trained on. All the other
    fields come from that one (training/start.py), so none of them need be given. A trained adapter's own spec has none.
    """

    section: ClassVar[str] = "adapter"
    start: PathText | None = Field(
        None, alias="from", description="a run or an adapter's folder: its adapter is trained on"
    )
    full: bool = False
    rank: int = Field(16, ge=1, le=65536)
    alpha: PositiveFloat = 32.0
    targets: str | tuple[str, ...] = "all-linear"
    scaling: Literal["lora", "rslora"] = "lora"
    init: Literal["lora", "pissa", "olora", "eva", "lora-ga"] = "lora"
    magnitude: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    rank_overrides: dict[str, Annotated[int, Field(ge=1, le=65536)]] = Field({})
    alpha_overrides: dict[str, PositiveFloat] = Field({})
    expert_rank: int | None = Field(
        None, ge=1, le=65536, description="of each expert's matrices; rank / experts per token unless given"
    )
    tokens: tuple[str, ...] = Field((), description="texts that get, or have, a token of their own, which is trained")
    also: dict[str, Way] = Field({}, description="the embedding, the head: as lora or whole, by module")

    @field_validator("tokens", mode="before")
    @classmethod
    def _tokens(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError("must be a list of texts, each of them one token: ['<tool>', '</tool>']")
        if len(set(texts)) < len(texts):
            raise ValueError("names a token twice")
        return tuple(texts)

    @field_validator("also", mode="before")
    @classmethod
    def _also(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        return dict.fromkeys(names, "lora") if isinstance(names, list | tuple) else value

    @field_validator("targets", mode="before")
    @classmethod
    def _targets(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("must be a name or a list of names")
        if not names or not all(name.strip() for name in names):
            raise ValueError("is empty: name at least one module, or all-linear, attention, mlp, experts")
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _it_begins_once(self) -> "AdapterSpec":
        if self.start is not None and self.init != "lora":
            raise ValueError(
                f"init {self.init} begins afresh, and from begins at a trained adapter: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _full_has_no_factors(self) -> "AdapterSpec":
        if self.full:
            given = [name for name in FACTOR_FIELDS if getattr(self, name) != AdapterSpec.model_fields[name].default]
            if given:
                raise ValueError(f"full fine-tuning has no {', '.join(given)}: leave these out, or full")
        return self

    @model_validator(mode="after")
    def _ends_go_with_lora(self) -> "AdapterSpec":
        given = [name for name in ("tokens", "also") if getattr(self, name)]
        if given and self.full:
            raise ValueError(f"full fine-tuning is of linear layers alone: leave {' and '.join(given)} out, or full")
        if "lora" in self.also.values() and (self.magnitude or self.init != "lora"):
            other = "magnitude (DoRA)" if self.magnitude else f"init {self.init}"
            raise ValueError(f"{other} is for linear layers: train what also names whole, or leave {other} out")
        return self

    @model_validator(mode="after")
    def _magnitude_starts_at_the_base(self) -> "AdapterSpec":
        if self.magnitude and self.moves_base:
            raise ValueError(f"magnitude (DoRA) starts at B = 0, but init {self.init} doesn't: use init lora or eva")
        return self

    @property
    def kind(self) -> Literal["lora", "dora", "full"]:
        """What kind of update it trains."""
        return "full" if self.full else "dora" if self.magnitude else "lora"

    @property
    def moves_base(self) -> bool:
        """Whether training starts at B A ≠ 0, which is taken off again: the trained update has twice the rank."""
        return self.init in ("pissa", "olora", "lora-ga")

    @property
    def from_data(self) -> bool:
        """Whether the start is made of the first batches."""
        return self.init in ("eva", "lora-ga")

    def rank_of(self, path: str) -> int:
        """The rank of the module at `path`: the first override that names it, else `rank`."""
        return next((r for name, r in self.rank_overrides.items() if names_module(name, path)), self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha of the module at `path`: the first override that names it, else `alpha`."""
        return next((a for name, a in self.alpha_overrides.items() if names_module(name, path)), self.alpha)

    def scale(self, path: str) -> float:
        """The factor in front of B A for the module at `path`."""
        if self.full:
            return 1.0
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.scaling == "rslora" else rank)


def names_module(name: str, path: str) -> bool:
    """True where `name` is the module's path or its dotted end: `q_proj` names `model.layers.0.self_attn.q_proj`. What
    names a parameter of experts names each expert's matrix in it.

    Literal, never a regular expression; what a trained adapter's patterns mean is `files/patterns.py`'s to say.
    """
    path = parameter_of(path)
    return path == name or path.endswith("." + name)


def expert_path(path: str, number: int) -> str:
    """The path of one expert's matrix in the parameter of all: `….experts.down_proj[3]`."""
    return f"{path}[{number}]"


def parameter_of(path: str) -> str:
    """The parameter that has an expert's matrix; any other path itself."""
    return path.partition("[")[0] if path.endswith("]") else path


def expert_of(path: str) -> int | None:
    """Which expert's matrix a path means, None for anything else."""
    return int(path[:-1].rpartition("[")[2]) if path.endswith("]") else None
