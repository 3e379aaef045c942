"""A matrix by its name: each form read as it was written; whatever is no matrix is one InputError with the place."""

import math
import pickle
import struct
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deltaw.analysis import matrix
from deltaw.analysis.matrix import read_matrix
from deltaw.errors import InputError
from tests.tiny import tiny_base

X = numpy.array([[1.5, -2.0, 3.0], [0.0, 1e-3, 4.0]])


def refused(name: object, match: str) -> InputError:
    with pytest.raises(InputError, match=match) as caught:
        read_matrix(str(name))
    assert len(str(caught.value).splitlines()) <= 5
    return caught.value


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("float16", torch.float32),
        ("<f4", torch.float32),
        (">f4", torch.float32),
        (">f8", torch.float64),
        ("longdouble", torch.float64),
        ("int64", torch.float64),
        ("uint8", torch.float64),
        ("bool", torch.float64),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_every_real_type(tmp_path: Path, given: str, wanted: torch.dtype, order: str) -> None:
    x = numpy.asarray(abs(X), dtype=given, order=order)
    numpy.save(tmp_path / "x.npy", x)
    got, said, *_ = read_matrix(str(tmp_path / "x.npy"))
    assert got.dtype == wanted and got.is_contiguous() and said == "x.npy"
    assert numpy.array_equal(got.numpy(), x.astype(float).astype(got.numpy().dtype))


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (numpy.ones(3), "1 dimensions"),
        (numpy.ones((1, 2, 3)), "3 dimensions"),
        (numpy.array(1.0), "0 dimensions"),
        (numpy.ones((0, 3)), "empty"),
        (numpy.ones((2, 2), dtype=complex), "complex128 values"),
        (numpy.array([["a", "b"]]), "not real numbers"),
        (numpy.array([[1.0, math.nan], [math.inf, 1.0]]), "row 1, column 2 is nan; 2 entries"),
        (numpy.array([[1.0, 1.0], [-math.inf, 1.0]]), "row 2, column 1 is -inf; 1 entries"),
    ],
)
def test_npy_that_is_no_matrix_of_numbers(tmp_path: Path, x: numpy.ndarray, match: str) -> None:
    numpy.save(tmp_path / "x.npy", x)
    refused(tmp_path / "x.npy", match)


class Trap:
    """A pickle of it makes a folder when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> object:
        return Path.mkdir, (self.folder,)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    numpy.save(tmp_path / "objects.npy", numpy.array([[trap, trap]], dtype=object), allow_pickle=True)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(trap))
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(trap))
    for file in ("objects.npy", "bare.npy"):
        refused(tmp_path / file, "not an array of plain numbers")
    refused(tmp_path / "bare.pt", "pickles run code")
    assert not (tmp_path / "sprung").exists()
    pickle.loads((tmp_path / "bare.npy").read_bytes())
    assert (tmp_path / "sprung").exists()  # so the trap would have sprung


def test_a_header_that_promises_too_much(tmp_path: Path) -> None:
    for shape in ("(100000, 100000)", f"({10**30}, 2)", "(-1, 4)", "(True, 'x')"):
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
        (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        refused(tmp_path / "x.npy", "x.npy: ")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=80), magic=st.sampled_from([b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00", b"PK\x03\x04"]))
def test_no_bytes_get_through(tmp_path: Path, data: bytes, magic: bytes) -> None:
    for name in ("x.npy", "x.safetensors:x"):
        (tmp_path / name.partition(":")[0]).write_bytes(magic + data)
        with pytest.raises(InputError):
            read_matrix(str(tmp_path / name))


def test_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy.save(tmp_path / "x.npy", X)
    monkeypatch.setattr(matrix, "MAX_BYTES", 23)
    refused(tmp_path / "x.npy", "2 x 3 is too large")
    (tmp_path / "x.csv").write_text("1,2")
    monkeypatch.setattr(matrix, "MAX_TEXT_BYTES", 2)
    refused(tmp_path / "x.csv", "3 bytes of text")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("1,2\n3,4\n", [[1, 2], [3, 4]]),
        ("1;2\r\n3;4", [[1, 2], [3, 4]]),
        ("1\t-2e3\n\n3\t.5\n", [[1, -2000], [3, 0.5]]),
        ("  1   2\n3 4  \n", [[1, 2], [3, 4]]),
        ("\ufeff1, 2\n 3 , 4\n", [[1, 2], [3, 4]]),
        ("a,b\n1,2\n", [[1, 2]]),
        ('"first name","b"\n"1","2"\n', [[1, 2]]),
        ("# made by hand\n1 2\n", [[1, 2]]),
        ("7", [[7]]),
    ],
)
def test_csv(tmp_path: Path, text: str, rows: list[list[float]]) -> None:
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    got, said, *_ = read_matrix(str(tmp_path / "x.csv"))
    assert got.dtype == torch.float64 and got.tolist() == rows
    assert ("taken as names" in said) == any(letter.isalpha() and letter != "e" for letter in text)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("a,b\n", "is empty"),
        ("1,2\n3\n", "line 2: has 1 numbers, the first row has 2"),
        ("1,2\n\n3,4,5\n", "line 3: has 3 numbers"),
        ("a,b\nc,d\n1,2\n", "line 2: 'c' isn't a finite number"),
        ("1,x\n", "line 1: 'x' isn't"),
        ("1,2\n3,four\n", "line 2: 'four' isn't"),
        ("1,5;2\n", "line 1: '1,5' isn't"),
        ("1,2,\n", "line 1: cell 3 is empty"),
        ("nan,nan\n1,2\n", "line 1: 'nan' isn't a finite"),
        ("1,2\n3,-inf\n", "line 2: '-inf' isn't a finite"),
        ("1,1e999\n", "line 1: '1e999' isn't a finite"),
        ("1,1+2j\n", "line 1"),
    ],
)
def test_csv_that_is_no_matrix(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    refused(tmp_path / "x.csv", match)


def test_csv_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe1\x00")
    refused(tmp_path / "x.csv", "UTF-8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.tensor([[1.0, 0.5]]).to(dtype), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    got, said, *_ = read_matrix(f"{tmp_path / 'x.safetensors'}:a")
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.tolist() == [[1.0, 0.5]] and said == "a of x.safetensors"


def test_safetensors_without_a_tensor_or_a_wrong_one(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {"layer.a": torch.ones(2, 2), "layer.b": torch.ones(2), "i": torch.ones(1, 1, dtype=torch.int32)}
    save_file({**tensors, "n": torch.tensor([[math.nan]])}, file)
    for name in (str(file), f"{file}:"):
        assert f"{file}:" in str(refused(name, "name one of its tensors"))
    assert "layer.a" in str(refused(f"{file}:layer.c", r"no tensor 'layer.c'"))
    refused(f"{file}:layer.b", r"layer.b: has 1 dimensions, \(2,\)")
    assert read_matrix(f"{file}:i").x_MN.dtype == torch.float64
    refused(f"{file}:n", "row 1, column 1 is nan")


def test_a_weight_of_a_base(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    got, said, *_ = read_matrix(f"{base}:model.layers.0.mlp.down_proj")
    assert got.shape == (32, 48) and got.dtype == torch.float32
    assert said == f"model.layers.0.mlp.down_proj of {base}"
    assert f"{base}:model." in str(refused(base, "is a base; name one of its weights"))
    refused(f"{base}:model.layers.0.mlp.down", "no weight of a module")
    refused(f"{base}:model.norm", "isn't a matrix")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("", "no matrix"),
        ("nothing", "no matrix has such a name\na matrix is M.npy"),
        ("builtin:smollm3", "'builtin:smollm3': no such base"),
        ("no/such/folder:path", "no such base"),
        ("nothing.npy", "nothing.npy: no such file\na matrix is"),
        (".safetensors", "no matrix"),
        ("x" * 5000 + ".npy", "no such file"),
        ("\0.csv", "no such file"),
        ("\0", "no matrix"),
        ("x" * 5000, "no matrix"),
    ],
)
def test_names_that_lead_nowhere(name: str, match: str) -> None:
    refused(name, match)


def test_a_misspelt_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "matrix.csv").write_text("1")
    refused(tmp_path / "martix.csv", r"no such file\ndid you mean matrix.csv\?")
    refused(tmp_path / "matrx.npy", r"did you mean matrix.csv\?")
    refused(tmp_path / "matrix.cvs", r"no matrix has such a name\ndid you mean matrix.csv\?")
