"""The plan of a merge: every update lands in one tensor, and the values are those of the attached model."""

from pathlib import Path

import pytest
import torch

from deltaw.adapter.inject import attach
from deltaw.export.merged import plan_merge
from tests.export.models import FAMILIES, base_folder, loaded, random_adapter, trained_of


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_values_are_the_fused_layers(tmp_path: Path, name: str, kind: str) -> None:
    base = base_folder(tmp_path / "base", name)
    adapter = random_adapter(base, kind)
    plan = plan_merge(trained_of(base, adapter, tmp_path / "adapter"))
    model = loaded(base)
    attached = attach(model, adapter)
    assert {planned.module for planned in plan.tensors} - {None} == set(adapter.factors)
    for planned in plan.tensors:
        if planned.module is None:
            continue
        wanted = attached.layers[planned.module].fuse().weight
        assert torch.allclose(plan.value(planned), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    assert plan.transposed == (name == "gpt2")
