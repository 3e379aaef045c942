"""The push, against a stand-in of the hub: what arrives, who may see it, and what is refused before any work."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from deltaw.commands.export import export_named
from deltaw.errors import DeltawError, InputError, RunError
from deltaw.shipping.target import MARK
from tests.shipping.hub import TOKEN, Hub, Repository
from tests.shipping.models import base_folder, random_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    base_folder(folder / "base")
    random_adapter(folder / "base").save(folder / "adapter")
    return folder / "adapter"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def push(adapter: Path, output: Path, name: str, **options: bool) -> dict:
    base = str(adapter.parent / "base")
    return export_named(str(adapter), "peft", str(output), base=base, push=name, **options).data


def refused(adapter: Path, output: Path, name: str, **options: bool) -> DeltawError:
    with pytest.raises(DeltawError) as caught:
        push(adapter, output, name, **options)
    assert len(str(caught.value).splitlines()) <= 5
    return caught.value


def test_the_files_arrive_in_one_commit_and_private(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    result = push(adapter, tmp_path / "out", "me/mine")
    repository = hub.repositories["me/mine"]
    here = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*")}
    assert here.pop(MARK)  # stays at home
    assert repository.files == {".gitattributes": b"", **here}
    assert "adapter_model.safetensors" in here and "README.md" in here
    assert repository.private and repository.commits == 1
    assert result["pushed"] == f"{hub.url}/me/mine"


def test_public_and_for_an_organisation(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    push(adapter, tmp_path / "out", "org/ours", public=True)
    assert not hub.repositories["org/ours"].private


def test_what_is_there_is_replaced_only_if_asked_for(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/mine"] = Repository(True, {".gitattributes": b"", "letter.txt": b"dear"})
    assert isinstance(refused(adapter, tmp_path / "out", "me/mine"), InputError)
    assert not (tmp_path / "out").exists()
    push(adapter, tmp_path / "out", "me/mine", replace=True)
    files = hub.repositories["me/mine"].files
    assert "letter.txt" not in files and {".gitattributes", "README.md"} <= files.keys()
    assert hub.repositories["me/mine"].commits == 1


def test_an_empty_repository_is_taken(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/mine"] = Repository(True)
    push(adapter, tmp_path / "out", "me/mine")
    assert "README.md" in hub.repositories["me/mine"].files


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_of_another_visibility_is_refused(adapter: Path, hub: Hub, public: bool, tmp_path: Path) -> None:
    hub.repositories["me/mine"] = Repository(private=public)
    assert isinstance(refused(adapter, tmp_path / "out", "me/mine", public=public), InputError)
    assert hub.repositories["me/mine"].files == {".gitattributes": b""}


@pytest.mark.parametrize("name", ["mine", "me/mine/too", "me/-x", "me/a..b", "somebody/mine"])
def test_names_that_can_not_be_pushed_to(adapter: Path, hub: Hub, name: str, tmp_path: Path) -> None:
    assert isinstance(refused(adapter, tmp_path / "out", name), InputError)
    assert not hub.repositories and not (tmp_path / "out").exists()


def test_tokens_that_will_not_do_are_refused_before_any_work(
    adapter: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.role = "read"
    assert isinstance(refused(adapter, tmp_path / "out", "me/mine"), InputError)
    hub.role = "write"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    error = refused(adapter, tmp_path / "out", "me/mine")
    assert isinstance(error, InputError) and "token" in error.what and "hf auth login" in str(error.fix)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert isinstance(refused(adapter, tmp_path / "out", "me/mine"), InputError)
    assert not hub.repositories and not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["/commit/", "/preupload/"])
def test_a_hub_that_breaks_off_has_nothing_of_it(adapter: Path, hub: Hub, where: str, tmp_path: Path) -> None:
    """And the folder is whole, so that it can be pushed later."""
    hub.fail = where
    error = refused(adapter, tmp_path / "out", "me/mine")
    assert isinstance(error, RunError) and str(tmp_path / "out") in str(error.fix)
    assert hub.repositories["me/mine"].files == {".gitattributes": b""} and hub.repositories["me/mine"].private
    assert (tmp_path / "out" / MARK).is_file()


def test_no_hub_and_no_network(adapter: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert isinstance(refused(adapter, tmp_path / "out", "me/mine"), RunError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in str(refused(adapter, tmp_path / "out", "me/mine"))
    assert not (tmp_path / "out").exists()
