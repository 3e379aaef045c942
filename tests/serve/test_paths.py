"""No client is told where the server keeps its files, whatever is wrong with them. (Every answer to `Running.send` is
looked through; here what could have a path in it is provoked.)"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltaw.errors import InputError
from deltaw.serve.refused import of_error
from tests.serve.canaries import Canaries
from tests.serve.serving import Running, serving

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def places(served: Canaries, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that are broken in many ways, in a folder with a blank in its name."""
    folder, whole = served.folder / "with blank" / "adapters", served.save(served.folder / "whole", 7)
    broken = {
        "short": ("adapter_model.safetensors", lambda data: data[:-5]),
        "header": ("adapter_model.safetensors", lambda data: data[:40]),
        "empty": ("adapter_model.safetensors", lambda data: b""),
        "config": ("adapter_config.json", lambda data: data[:20]),
        "list": ("adapter_config.json", lambda data: b"[]"),
        "rank": ("adapter_config.json", lambda data: data.replace(b'"r": 4', b'"r": 5')),
        "record": ("deltaw.json", lambda data: b"{"),
        "bytes": ("deltaw.json", lambda data: b"\xff"),
    }
    for name, (file, change) in broken.items():
        shutil.copytree(whole, folder / name)
        (folder / name / file).write_bytes(change((whole / file).read_bytes()))
    shutil.copytree(whole, folder / "pickle")
    (folder / "pickle/adapter_model.safetensors").rename(folder / "pickle/adapter_model.bin")
    shutil.copytree(whole, folder / "template")
    (folder / "template/chat_template.jinja").write_text("{% broken")
    shutil.copytree(whole, folder / "closed")
    (folder / "closed/adapter_model.safetensors").unlink()
    (folder / "closed/adapter_model.safetensors").mkdir()
    return folder


@pytest.fixture(scope="module")
def running(served_base: Path, places: Path) -> Iterator[Running]:
    with serving(served_base, places) as server:
        yield server


def test_what_is_wrong_with_an_adapter_is_said_without_its_place(running: Running, places: Path) -> None:
    refused = 0
    for name in sorted(entry.name for entry in places.iterdir()):
        for path, body in (
            ("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1}),
            ("/v1/chat/completions", {"model": name, "messages": HELLO, "max_tokens": 1}),
            ("/v1/chat/completions", {"model": name, "messages": HELLO, "max_tokens": 1, "stream": True}),
            ("/v1/adapters", {"name": name}),
        ):
            status, answer, _ = running.send("POST", path, body)
            refused += status != 200
            if status not in (200, 404):
                assert answer["error"]["message"]
        for path in (f"/v1/models/{name}", f"/v1/adapters/{name}/report"):
            running.send("GET", path)
    assert refused > 20
    listed = running.send("GET", "/v1/adapters")[1]["data"]
    assert {one["id"] for one in listed if one["problem"]} >= {"short", "rank"}
    running.send("GET", "/v1/models")


@pytest.mark.parametrize("path", ["/srv/some place/x.json", "/a/b", "/srv/models/adapters/x/adapter_model.safetensors"])
def test_an_error_of_the_library_tells_the_last_name_alone(path: str) -> None:
    for text in (f"{path}: no such file", f"can't read '{path}'", f"see {path}, or {path}"):
        message = of_error(InputError(text)).message
        assert path not in message and path.rpartition("/")[2] in message
    assert "/v1/models" in of_error(InputError("GET /v1/models lists them")).message
