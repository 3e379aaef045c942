"""deltaw: LoRA fine-tuning that is fast, cannot fail silently, and shows why it works.

The public names. They are imported when they are first used, so that `import deltaw` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaw.adapter.algebra import resize
    from deltaw.adapter.attach import Attached, attach, detach
    from deltaw.adapter.combine import combine
    from deltaw.adapter.file import Adapter, BaseId
    from deltaw.adapter.into import MergedInto
    from deltaw.adapter.layer import AdaptedLinear
    from deltaw.analysis.report import inspect
    from deltaw.base.forward import Forward, plan_forward
    from deltaw.base.load import Base, open_base
    from deltaw.commands.export import export
    from deltaw.config import (
        AdapterSpec,
        DataConfig,
        EvaluateConfig,
        RunConfig,
        TrainConfig,
        load_config,
        parse_config,
    )
    from deltaw.errors import DeltawError, InputError, RunError
    from deltaw.evaluation.side_by_side import evaluate
    from deltaw.factors import LowRank
    from deltaw.kernels.attention import packed_attention
    from deltaw.kernels.logprobs import linear_cross_entropy
    from deltaw.kernels.lora import lora_linear
    from deltaw.kinds import Dense, DoRA
    from deltaw.model import Model, open_model
    from deltaw.shipping.lint.lint import lint
    from deltaw.shipping.verify.compare import verify
    from deltaw.training.run import resume, train
    from deltaw.version import VERSION as __version__

_HOME = {
    "Adapter": "adapter.file",
    "AdaptedLinear": "adapter.layer",
    "AdapterSpec": "config",
    "Attached": "adapter.attach",
    "Base": "base.load",
    "BaseId": "adapter.file",
    "DataConfig": "config",
    "Dense": "kinds",
    "DoRA": "kinds",
    "DeltawError": "errors",
    "EvaluateConfig": "config",
    "Forward": "base.forward",
    "InputError": "errors",
    "LowRank": "factors",
    "MergedInto": "adapter.into",
    "Model": "model",
    "RunConfig": "config",
    "RunError": "errors",
    "TrainConfig": "config",
    "attach": "adapter.attach",
    "combine": "adapter.combine",
    "detach": "adapter.attach",
    "evaluate": "evaluation.side_by_side",
    "export": "commands.export",
    "inspect": "analysis.report",
    "linear_cross_entropy": "kernels.logprobs",
    "lint": "shipping.lint.lint",
    "load_config": "config",
    "lora_linear": "kernels.lora",
    "open_base": "base.load",
    "open_model": "model",
    "packed_attention": "kernels.attention",
    "parse_config": "config",
    "plan_forward": "base.forward",
    "resize": "adapter.algebra",
    "resume": "training.run",
    "train": "training.run",
    "verify": "shipping.verify.compare",
}
__all__ = [*_HOME, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("deltaw.version").VERSION
    if name not in _HOME:
        raise AttributeError(f"module 'deltaw' has no attribute {name!r}")
    # A package of the same name (deltaw.train) hides behind its function once that has been asked for.
    value = getattr(importlib.import_module(f"deltaw.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
