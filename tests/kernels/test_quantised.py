"""nf4 is bitsandbytes' own to the bit, by rows as whole; int8 is as near as half a scale."""

import sys

import pytest
import torch
from torch import Tensor

from deltaw.errors import InputError
from deltaw.kernels import nf4
from deltaw.kernels.int8 import to_int8
from deltaw.kernels.nf4 import fits_nf4, to_nf4
from deltaw.kernels.packed import PackedWeight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(m: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m * n)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(1, 64), (37, 192), (300, 64), (130, 8192)])
def test_nf4_has_the_numbers_of_bitsandbytes(m: int, n: int, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w_MN = random(m, n, torch.bfloat16)
    codes, state = functional.quantize_4bit(w_MN, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    assert torch.equal(to_nf4(w_MN, dtype).dense(), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("form", [to_nf4, to_int8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_whole(form: "type[PackedWeight]", dtype: torch.dtype) -> None:
    weight = form(random(90, 128).t().contiguous().t(), dtype)  # a view, as of a Conv1D
    whole = weight.dense()
    assert (whole.shape, whole.dtype, weight.dtype) == ((90, 128), dtype, dtype)
    for index in (slice(3, 50), slice(None), torch.tensor([7, 7, 88]), slice(80, 200), torch.tensor([]).long()):
        assert torch.equal(weight.rows(index), whole[index])
    assert all(not part.is_floating_point() for part in weight.parts.values())
    assert weight.nbytes < 90 * 128 * (0.55 if form is to_nf4 else 1.05)


def test_int8_is_within_half_a_scale() -> None:
    w_MN = torch.cat([random(20, 96), torch.zeros(1, 96), random(3, 96) * 1e-44, random(3, 96) * 1e30])
    error = (to_int8(w_MN, torch.float32).dense() - w_MN).abs()
    assert (error <= w_MN.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5) + 1e-38).all()
    assert torch.equal(to_int8(w_MN.bfloat16(), torch.bfloat16).dense()[20], torch.zeros(96, dtype=torch.bfloat16))


def test_what_does_not_fit() -> None:
    assert fits_nf4(random(3, 128)) and not fits_nf4(random(128, 96))


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="bitsandbytes") as caught:
        nf4.check_nf4()
    assert "deltaw[quant]" in str(caught.value.fix)


def test_it_is_imported_without_what_would_download() -> None:
    with nf4._apart("json.tool"), pytest.raises(ImportError):
        import json.tool  # noqa: F401
    import json.tool as found

    assert found.__name__ == "json.tool"
