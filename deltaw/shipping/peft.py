"""PEFT's folder: the adapter on the original base, with the tokenizer and the template that it was trained under.

LoRA stays LoRA and DoRA stays DoRA, both as adapter/file.py writes them. An initialiser that moved the base (PiSSA …)
needs no mention: training has converted it back to the original base. The names in
`target_modules` are last parts wherever those mean the same modules, since readers differ in what else they take.

The base has its public name. A stranger's config may give a path on another machine instead: then the name is that of
the base that was found for it.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from deltaw.adapter.ends import Ends, ways_of
from deltaw.adapter.expert_targets import experts_of
from deltaw.adapter.file import Adapter
from deltaw.adapter.peft_config import rewritten_names
from deltaw.adapter.targets import explicit_targets
from deltaw.base.frozen import FrozenLinear
from deltaw.config.adapter import expert_of, parameter_of
from deltaw.errors import InputError, command, listed
from deltaw.shipping.beside import beside_size, write_beside
from deltaw.shipping.destination import Destination, Options, Written
from deltaw.shipping.trained import Trained
from deltaw.shipping.usage import base_name, peft_usage
from deltaw.show.progress import Display
from deltaw.show.text import counted

CONFIG_BYTES = 1_000_000  # more than config, record and card take


class PeftAdapter(Destination):
    """A folder for PeftModel.from_pretrained."""

    def __init__(self, trained: Trained, options: Options) -> None:
        super().__init__(trained, options)
        refuse_full(trained)
        self.adapter = for_peft(trained)

    def size(self) -> int:
        return adapter_size(self.adapter) + beside_size(self.trained)

    def write(self, folder: Path, display: Display) -> Written:
        self.adapter.save(folder)
        write_beside(self.trained, folder)
        kind = "DoRA" if self.adapter.spec.magnitude else "LoRA"
        lines = [
            f"{kind} for PEFT: {counted(len(self.adapter.factors), 'module')}, "
            f"{counted(self.adapter.parameters, 'parameter')}"
        ]
        return Written(peft_usage(self.trained), lines)


def refuse_full(trained: Trained) -> None:
    """Raise InputError for full fine-tuning, which an adapter can't hold."""
    if trained.adapter.spec.full:
        extract = remade("extract", trained, "--energy", "0.99")
        raise InputError(
            f"{trained.name} is full fine-tuning, which an adapter can't hold",
            fix=f"the whole model: {remade('merge', trained)}   a LoRA close to it: {extract}",
        )


def remade(verb: str, trained: Trained, *options: str) -> str:
    """The command that makes another form of it, in a folder next to it."""
    return command(verb, trained.name, options=[*options, "-o", f"{trained.name.rstrip('/')}-{verb}"])


def adapter_size(adapter: Adapter) -> int:
    """The most bytes that its folder can take."""
    return 4 * adapter.parameters + 2_000 * len(adapter.factors) + CONFIG_BYTES


def refuse_experts(trained: Trained, reader: str) -> None:
    """Raise InputError for updates of experts, where the reader has no form for them."""
    if experts := [path for path in trained.adapter.factors if expert_of(path) is not None]:
        raise InputError(
            f"{reader} has no form for updates of experts: {counted(len(experts), 'matrix', 'matrices')}, {experts[0]}",
            fix=f"the whole model: {remade('merge', trained)}",
        )


def for_peft(trained: Trained) -> Adapter:
    """The adapter with its base's public name, and modules named by their last part if that is unambiguous."""
    adapter = trained.adapter
    skeleton = trained.base_files.skeleton
    check_fits(trained, skeleton)
    body = Ends.of(skeleton).body(adapter.factors)
    targets = explicit_targets(skeleton, tuple(dict.fromkeys(map(parameter_of, body))))
    rewritten = adapter.rewritten | rewritten_names(skeleton)
    base = replace(adapter.base, name=base_name(trained))
    spec = adapter.spec.model_copy(update={"targets": targets or adapter.spec.targets})
    return replace(adapter, spec=spec, base=base, rewritten=rewritten)


def check_fits(trained: Trained, skeleton: nn.Module) -> None:
    """Raise InputError unless every update has a linear layer of its shape in the base."""
    experts = {path: update for path, update in trained.adapter.factors.items() if expert_of(path) is not None}
    problems, modules = experts_of(skeleton).misfits(experts), dict(skeleton.named_modules())
    ways_of(skeleton, trained.adapter.factors)
    for path, update in Ends.of(skeleton).body(trained.adapter.factors).items():
        if path in experts:
            continue
        if path not in modules or not FrozenLinear.can_wrap(modules[path]):
            problems.append(f"{path:.120}: no such linear layer")
            continue
        layer = FrozenLinear(modules[path])
        if update.shape != (layer.out_features, layer.in_features):
            problems.append(f"{path}: the update is {update.shape}, the layer {layer.out_features, layer.in_features}")
    if problems:
        raise InputError(f"{trained.name} doesn't fit {trained.base.name}:\n{listed(problems)}", "name its own --base")
