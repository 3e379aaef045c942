"""Files from strangers: no code of theirs runs, what is wrong is named, nothing loads as what it isn't (31-46)."""

import ast
import gzip
import io
import json
import os
import resource
import shutil
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import deltaw
from deltaw.adapter.file import Adapter
from deltaw.base.load import open_base
from deltaw.base.source import find_base
from deltaw.config import RunConfig, load_config, parse_config
from deltaw.data.read import read_rows
from deltaw.files.safetensors import load_safetensors, read_header
from deltaw.model import open_model
from deltaw.training.run import resume, train
from tests.faults.broken import BOMB, BROKEN, CONFIG, CONFIGS, WEIGHTS, Canary, fields, tensors
from tests.faults.common import (
    QUIET,
    changed,
    child,
    clear_error,
    config,
    copy,
    expect_exit,
    finished_run,
    place,
    train_and_signal,
)
from tests.faults.fault import expect, fault
from tests.tiny import run_file, tiny_base

PACKAGE = Path(deltaw.__file__).parent


def adapter(scratch: Path) -> Path:
    """A copy of a healthy adapter, to do harm to."""
    return copy(finished_run() / "adapter", scratch / "adapter")


def opened(folder: Path) -> Callable[[], object]:
    """Opening it on its base, as a user does."""
    return lambda: open_model(folder, base=str(place() / "base"))


PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt", WEIGHTS)


@fault(
    31,
    "a pickle that writes a file when it is opened, as adapter, as base, as data, also under the name of a safetensors "
    "file: refused, nothing written",
    tries=100,
    sample=10,
    at_once=50,
)
def pickle_with_a_payload(n: int, scratch: Path) -> None:
    canary = scratch / "canary"
    where, name = n % 3, PICKLED[n // 3 % len(PICKLED)]
    if where == 0:
        folder = adapter(scratch)
        (folder / WEIGHTS).unlink()
        torch.save({"x": Canary(canary)}, folder / name)
        work: Callable[[], object] = opened(folder)
    elif where == 1:
        folder = copy(place() / "base", scratch / "base")
        (folder / "model.safetensors").unlink()
        renamed = "model.safetensors" if name == WEIGHTS else name.replace("adapter", "pytorch")
        torch.save({"x": Canary(canary)}, folder / renamed)
        work = lambda: open_base(str(folder))  # noqa: E731
    else:
        file = scratch / ("train.jsonl" if name == WEIGHTS else name.replace("adapter_model", "train"))
        torch.save({"x": Canary(canary)}, file)
        work = lambda: train(_with_data(scratch, file), display=QUIET)  # noqa: E731
    clear_error(work, name if where == 0 else "")
    expect(not canary.exists(), f"{name} ran")


def _with_data(scratch: Path, file: Path) -> RunConfig:
    return parse_config(run_file(place(), output=str(scratch / "run"), data={"train": str(file)}))


FORBIDDEN = ("pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle")
CALLS = ("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "numpy.load", "np.load", "os.system")


@fault(
    32,
    "what could run code out of a file: not one call of it in deltaw (a model's own programs run behind a filter of "
    "system calls), and only JSON, YAML, safetensors and text in a run",
)
def no_pickle_anywhere(n: int, scratch: Path) -> None:
    found = []
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).as_posix() == "files/program_worker.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in FORBIDDEN for name in names):
                found.append(f"{file.name}:{node.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
                loads = ast.unparse(node.func) in ("numpy.load", "np.load")
                if not (loads and any(k.arg == "allow_pickle" and not k.value.value for k in node.keywords)):
                    found.append(f"{file.name}:{node.lineno}: {ast.unparse(node.func)}")
    expect(not found, found)
    kinds = {path.suffix or path.name for path in finished_run().rglob("*") if path.is_file()}
    known = {".yaml", ".json", ".jsonl", ".safetensors", ".sha256", ".md", ".lock"}
    expect(kinds - {".0"} <= known, kinds)  # .0: TensorBoard's events, where it is installed


def _safetensors(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@fault(34, "a header of 99 MB, or of a million tensors: refused within a second", tries=3, sample=3)
def giant_header(n: int, scratch: Path) -> None:
    folder = adapter(scratch)
    entry = '"t%d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    headers: list[Callable[[], bytes]] = [
        lambda: b'{"a":"' + b"x" * 99_000_000 + b'"}',
        lambda: b"{" + b",".join(b'"":{"data_offsets"' for _ in range(1_000_000)) + b"}",
        lambda: ("{" + ",".join(entry % i for i in range(120_000)) + "}").encode(),
    ]
    _safetensors(folder / WEIGHTS, headers[n](), bytes(4))
    clear_error(opened(folder), WEIGHTS, "at most", seconds=5.0)
    began = time.monotonic()
    clear_error(lambda: load_safetensors(folder / WEIGHTS), "at most")
    expect(time.monotonic() - began < 1.0, f"{time.monotonic() - began:.2f} s")


def _entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


IMPOSSIBLE: list[tuple[bytes, int]] = [
    (json.dumps({"a": _entry([2**62, 4], [0, 16])}).encode(), 16),
    (json.dumps({"a": _entry([2**32, 2**32], [0, 0])}).encode(), 0),
    (json.dumps({"a": _entry([2**62] * 400_000, [0, 0])}).encode(), 0),
    (json.dumps({"a": _entry([4], [-16, 0])}).encode(), 0),
    (json.dumps({"a": _entry([-4], [0, 16])}).encode(), 16),
    (json.dumps({"a": _entry([4], [16, 0])}).encode(), 16),
    (json.dumps({"a": _entry([4], [0, 16]), "b": _entry([4], [8, 24])}).encode(), 24),
    (json.dumps({"a": _entry([4], [0, 16]), "b": _entry([4], [20, 36])}).encode(), 36),
    (json.dumps({"a": _entry([4], [0, 17])}).encode(), 17),
    (json.dumps({"a": _entry([4], [0, 16])}).encode(), 12),
    (json.dumps({"a": _entry([4], [0, 16])}).encode(), 20),
    (
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        16,
    ),
    (json.dumps({"a": _entry([3], [0, 2], "F4")}).encode(), 2),
    (json.dumps({"a": _entry([4], [0, 16], "F99")}).encode(), 16),
    (json.dumps({"a": _entry([1.5], [0, 6])}).encode(), 6),  # type: ignore[list-item]
    (json.dumps({"a": _entry([True], [0, 4])}).encode(), 4),
    (json.dumps({"a": {"dtype": "F32", "shape": [1]}}).encode(), 4),
    (json.dumps({"": _entry([1], [0, 4])}).encode(), 4),
    (json.dumps({"../../x\0": _entry([1], [0, 4])}).encode(), 4),
    (b'{"__metadata__":{"a":1},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    (b"[" * 100_000, 0),
    (b"", 0),
    (b"\xff\xfe{}", 0),
]


@fault(
    35,
    "shapes that overflow, offsets that overlap, leave holes or are negative, names twice, unknown types: refused",
    tries=len(IMPOSSIBLE),
    sample=6,
)
def impossible_tensor(n: int, scratch: Path) -> None:
    header, size = IMPOSSIBLE[n * 5 % len(IMPOSSIBLE)]
    path = _safetensors(scratch / "x.safetensors", header, bytes(size))
    clear_error(lambda: load_safetensors(path), "x.safetensors", seconds=1.0)


@fault(
    36,
    "adapter_config.json cut off, empty, UTF-16, nested 100,000 deep, not an object, with NaN, of 1 GB: named; a BOM "
    "is accepted",
    tries=8,
    sample=8,
)
def broken_config(n: int, scratch: Path) -> None:
    folder = adapter(scratch)
    names = [*CONFIGS, "1 GB"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if names[n] == "1 GB":
        os.truncate(folder / CONFIG, 10**9)
    else:
        (folder / CONFIG).write_bytes(CONFIGS[names[n]]((folder / CONFIG).read_bytes()))
    if names[n] == "BOM":
        Adapter.load(folder)
    else:
        clear_error(lambda: Adapter.load(folder), CONFIG, seconds=1.0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    expect(grown < 50, f"{grown} MB")


@fault(
    37,
    "eighteen broken adapters, the same that PEFT is given: an error that names the file, the field or the tensor",
    tries=len(BROKEN),
    sample=len(BROKEN),
)
def broken_adapter(n: int, scratch: Path) -> None:
    _, harm, words = BROKEN[n]
    folder = adapter(scratch)
    harm(folder)
    said = clear_error(opened(folder), seconds=5.0)
    expect(any(word in said for word in words), f"{words} in {said}")


TYPES: dict[str, list[Any]] = {
    "r": ["4", [4], True, None, 2.5, {}, -1, 2**40],
    "lora_alpha": ["8", [8], True, None, {}, 0, -2, 1e999],
    "lora_dropout": ["0", 1, 2, -1, []],
    "target_modules": [3, [], [3], "", {"q_proj": 1}, None],
    "use_rslora": [1, "yes", [], None],
    "use_dora": [1, "no"],
    "rank_pattern": [[1], "x", {"q_proj": "8"}, {"q_proj": 0}],
    "alpha_pattern": [[1], {"q_proj": None}],
    "bias": ["all", "lora_only", 3],
    "peft_type": [None, 3, "IA3", ["LORA"]],
    "something_new": [1, "on", [0]],
    "modules_to_save": [["lm_head"]],
}
WRONG = [(field, value) for field, values in TYPES.items() for value in values]


@fault(
    37,
    "a field of the wrong type or value, of an unknown kind, or itself unknown: an error that names the field",
    tries=len(WRONG),
    sample=10,
)
def wrong_field(n: int, scratch: Path) -> None:
    field, value = WRONG[n * 7 % len(WRONG)]
    folder = adapter(scratch)
    fields(**{field: value})(folder)
    clear_error(opened(folder), field, seconds=5.0)


@fault(
    38, "a pattern that takes a regex engine for ever, in every field that takes patterns: never run", tries=5, sample=5
)
def regex_bomb(n: int, scratch: Path) -> None:
    folder = adapter(scratch)
    began = time.monotonic()
    if n < 2:
        field = ("rank_pattern", "alpha_pattern")[n]
        fields(**{field: {BOMB: 4}})(folder)
        clear_error(lambda: Adapter.load(folder), "regular expression")
    elif n < 4:
        fields(**({"target_modules": BOMB} if n == 2 else {"layers_pattern": [BOMB], "layers_to_transform": [0]}))(
            folder
        )
        expect(Adapter.load(folder).parameters, "no factors")  # the tensors say what they are for
    else:
        settings = config(scratch / "run", adapter={"rank": 4, "alpha": 8, "targets": [BOMB]})
        clear_error(lambda: train(settings, display=QUIET), "matches no layer", seconds=5.0)
    expect(time.monotonic() - began < 1.0 or n == 4, f"{time.monotonic() - began:.2f} s")


NAMING: list[dict[str, Any]] = [
    {"auto_mapping": {"base_model_class": "Canary", "parent_library": "canary_module"}},
    {"megatron_core": "canary_module", "megatron_config": None},
    {"runtime_config": {"canary_module": True}},
    {"auto_map": {"AutoModel": "canary_module.Canary"}},
]
MODEL_NAMING: list[dict[str, Any]] = [
    {"auto_map": {"AutoConfig": "canary_module.Canary", "AutoModelForCausalLM": "canary_module.Canary"}},
    {"_attn_implementation_internal": "canary_module/kernel"},
    {"attn_implementation": "canary_module/kernel:run"},
    {"_attn_implementation": "canary_module"},
    {"model_type": "canary_module"},
    {"quantization_config": {"quant_method": "canary_module"}},
]


def _with_canary(folder: Path, work: Callable[[], object]) -> None:
    """`work` in a child that would find canary_module, which says so when it is imported."""
    (folder / "canary_module.py").write_text("print('THE CANARY SANG')\nclass Canary: pass\n")

    def singing() -> None:
        sys.path.insert(0, str(folder))
        os.chdir(folder)
        try:
            work()
        except Exception as error:
            print(type(error).__name__, error)
        expect("canary_module" not in sys.modules, "it was imported")

    ended = child(singing)
    expect(ended.code == 0 and "SANG" not in ended.output, ended.output[-300:])


@fault(
    39,
    "a config that names code (auto_mapping, megatron_core, auto_map, attention kernels …): never imported",
    tries=10,
    sample=10,
)
def config_that_names_code(n: int, scratch: Path) -> None:
    if n < len(NAMING):
        folder = adapter(scratch)
        fields(**NAMING[n])(folder)
        _with_canary(folder, opened(folder))
    else:
        folder = _base_with(scratch, MODEL_NAMING[n - len(NAMING)])
        _with_canary(folder, lambda: open_base(str(folder)))


def _base_with(scratch: Path, changes: dict[str, Any]) -> Path:
    folder = copy(place() / "base", scratch / "base")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


FOREIGN = {
    "another model's keys": tensors(lambda key, value: (key.replace("self_attn", "attn"), value)),
    "no B": tensors(lambda key, value: None if "lora_B" in key else (key, value)),
    "one B missing": tensors(lambda key, value: None if "0.self_attn.q_proj.lora_B" in key else (key, value)),
    "one key more": tensors(lambda key, value: (key.replace("lora_A.weight", "lora_C.weight"), value)),
    "no prefix": tensors(lambda key, value: (key.removeprefix("base_model.model."), value)),
    "more layers": tensors(lambda key, value: (key.replace("layers.1.", "layers.7."), value)),
}


@fault(
    40,
    "keys of another model, halves missing, a key too many, no prefix, layers that aren't there: refused, never "
    "partly loaded",
    tries=len(FOREIGN),
    sample=len(FOREIGN),
)
def foreign_keys(n: int, scratch: Path) -> None:
    folder = adapter(scratch)
    list(FOREIGN.values())[n](folder)
    clear_error(opened(folder), seconds=5.0)


@fault(41, "the right shapes, another base: refused by fingerprint, whatever it is called", tries=3, sample=3)
def wrong_base(n: int, scratch: Path) -> None:
    other = tiny_base(scratch / "base", seed=1 + n)  # the name is the same
    clear_error(lambda: open_model(finished_run() / "adapter", base=str(other)), "doesn't belong to this base")
    clear_error(lambda: open_model(finished_run(), base=str(other)), "doesn't belong to this base")


def _archive(kind: str, path: Path) -> Path:
    """One with members that climb out, point elsewhere, or expand to a gigabyte of zeros."""
    bomb = b"0" * 10_000_000
    if kind == "zip":
        with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("../escaped.jsonl", "{}")
            file.writestr("/tmp/escaped.jsonl", "{}")
            file.writestr("train.jsonl", bomb)
        return path.with_suffix(".zip")
    if kind == "gz":
        with gzip.open(path.with_suffix(".jsonl.gz"), "wb", compresslevel=1) as packed:
            for _ in range(30):  # beyond what a small file may become
                packed.write(bomb)
        return path.with_suffix(".jsonl.gz")
    with tarfile.open(path.with_suffix(f".{kind}"), "w:gz" if kind == "tgz" else "w") as file:
        for name, type_ in (
            ("../escaped.jsonl", tarfile.REGTYPE),
            ("link", tarfile.SYMTYPE),
            ("null", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = type_, "/etc/passwd", 2 if type_ == tarfile.REGTYPE else 0
            file.addfile(member, io.BytesIO(b"{}"))
    return path.with_suffix(f".{kind}")


@fault(
    44,
    "an archive (zip, tar, tgz, gz) with members that climb out, link, are devices or expand: refused, nothing "
    "unpacked",
    tries=12,
    sample=4,
)
def archive(n: int, scratch: Path) -> None:
    inner = scratch / f"in-{n}"
    inner.mkdir()
    file = _archive(("zip", "tar", "tgz", "gz")[n % 4], inner / "x")
    works: list[Callable[[], object]] = [
        lambda: read_rows(str(file)),
        lambda: find_base(str(file)),
        lambda: Adapter.load(file),
    ]
    clear_error(works[n // 4], file.name)
    expect(sorted(inner.iterdir()) == [file], list(inner.iterdir()))
    expect(not Path("/tmp/escaped.jsonl").exists() and not (scratch / "escaped.jsonl").exists(), "it climbed out")


@fault(
    44,
    "an index that places weights outside its folder, a record of the base that isn't one: refused",
    tries=2,
    sample=2,
)
def path_outside(n: int, scratch: Path) -> None:
    if n == 0:
        folder = copy(place() / "base", scratch / "base")
        (folder / "model.safetensors").rename(scratch / "model.safetensors")
        index = {"weight_map": dict.fromkeys(read_header(scratch / "model.safetensors").shapes, "../model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        clear_error(lambda: find_base(str(folder)), "'../model.safetensors'")
    else:
        folder = adapter(scratch)
        (folder / "deltaw.json").write_text('{"base": {"name": "../../etc", "fingerprint": 3}}')
        clear_error(opened(folder), "deltaw.json")


@fault(
    45,
    "a hub's branch that moved between two halves of a run: the commit was written down and is asked for again; "
    "other weights are refused",
    tries=2,
    sample=2,
)
def moved_revision(n: int, scratch: Path) -> None:
    import huggingface_hub

    commits = {
        "a" * 40: copy(place() / "base", scratch / ("a" * 40)),
        "b" * 40: tiny_base(scratch / ("b" * 40), seed=1),
    }
    shutil.rmtree(scratch / "run", ignore_errors=True)
    head = "a" * 40
    asked: list[Any] = []

    def snapshot_download(repo: str, *, revision: str | None = None, **_: Any) -> str:
        asked.append(revision)
        return str(commits[revision if revision in commits else head])

    with changed(huggingface_hub, "snapshot_download", snapshot_download):
        settings = parse_config({**run_file(place(), output=str(scratch / "run")), "base": "org/name"})
        ended = child(lambda: train_and_signal(settings, 3, 15))
        expect_exit(ended, 143)
        pinned = load_config(scratch / "run" / "config.yaml").base
        expect(pinned == f"org/name@{'a' * 40}", pinned)
        head = "b" * 40
        if n == 1:  # the commit itself has other weights now
            commits["a" * 40] = copy(commits["b" * 40], scratch / "other" / ("a" * 40))
            clear_error(lambda: resume(scratch / "run", display=QUIET), "base changed")
            return
        resume(scratch / "run", display=QUIET)
    expect(asked[-1] == "a" * 40, asked)
    record = json.loads((scratch / "run/adapter/deltaw.json").read_text())["base"]
    expect(record["revision"] == "a" * 40 and record["name"] == "org/name", record)


@fault(
    46,
    "trust_remote_code: no key, option or variable turns it on; a model that needs its own code is refused, the "
    "code unread",
    tries=3,
    sample=3,
)
def remote_code(n: int, scratch: Path) -> None:
    if n == 0:
        for section in ("train", "data", "adapter", "evaluate"):
            fields_ = run_file(place(), output=str(scratch / "run"))
            fields_[section] = {**fields_[section], "trust_remote_code": True}
            clear_error(lambda f=fields_: parse_config(f), "trust_remote_code")  # type: ignore[misc]
        found = [
            f"{file.name}:{node.lineno}"
            for file in PACKAGE.rglob("*.py")
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False"
        ]
        expect(not found, found)
        return
    changes = {"model_type": "canary", "auto_map": {"AutoConfig": "canary_module.Canary"}}
    folder = _base_with(scratch, changes if n == 1 else changes | {"trust_remote_code": True})
    os.environ["TRUST_REMOTE_CODE"] = "1"
    try:
        _with_canary(folder, lambda: clear_error(lambda: open_base(str(folder)), "base"))
    finally:
        del os.environ["TRUST_REMOTE_CODE"]
