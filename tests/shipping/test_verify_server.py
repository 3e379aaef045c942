"""verify against servers: those that tell token ids, those that tell text, and everything that can go wrong."""

from pathlib import Path

import pytest

from deltaw.errors import DeltawError, InputError, RunError
from deltaw.files import client
from deltaw.shipping.verify.compare import verify
from deltaw.shipping.verify.sides.open import open_side
from deltaw.shipping.verify.sides.server import open_server
from deltaw.shipping.verify.sides.side import Asked, Prompt, Side
from deltaw.shipping.verify.verdict import Verification
from deltaw.show.progress import Display
from tests.shipping.sides import base_and_adapter, chats, merged, scaled, texts
from tests.shipping.standin import Standin, serving

QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    base, adapter = base_and_adapter(folder)
    texts(folder / "rows.jsonl")
    chats(folder / "chats.jsonl")
    merged(base, adapter, folder / "merged")
    merged(base, adapter, folder / "wrong", lambda path, delta: delta / 3)
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def right(place: Path) -> Side:
    return loaded(place / "merged")


@pytest.fixture(scope="module")
def wrong(place: Path) -> Side:
    return loaded(place / "wrong")


def loaded(folder: Path) -> Side:
    side = open_side(str(folder), display=QUIET)
    side.load()
    return side


def held(standin: Standin, data: str = "rows.jsonl", model: str = "#tuned", turned: bool = False) -> Verification:
    with serving(standin) as address:
        pair = ("adapter", address + model)
        return verify(*(reversed(pair) if turned else pair), data=data, prompts=6, tokens=8)


@pytest.mark.parametrize("data", ["rows.jsonl", "chats.jsonl"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_server_that_tells_ids_agrees(right: Side, data: str, turned: bool) -> None:
    result = held(Standin(right, ids=True), data, turned=turned)
    assert result.agree, result.text()
    assert result.kl is not None and result.tolerance.measured and result.effect.kl > 10 * result.kl
    assert all(row.same_prompt for row in result.rows)
    assert any("likeliest" in note for note in result.notes)  # a lower bound, and it is said


@pytest.mark.parametrize("data", ["rows.jsonl", "chats.jsonl"])
@pytest.mark.parametrize("ids", [True, False])
def test_a_server_with_another_model_does_not(wrong: Side, data: str, ids: bool) -> None:
    result = held(Standin(wrong, ids=ids), data)
    assert not result.agree and result.count("different") > 0


@pytest.mark.parametrize("data", ["rows.jsonl", "chats.jsonl"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_server_that_tells_text_alone(right: Side, data: str, turned: bool) -> None:
    result = held(Standin(right, ids=False), data, turned=turned)
    assert result.agree, result.text()
    assert result.kl is None and all(row.same_prompt is None for row in result.rows)
    assert len(result.notes) >= 2  # that prompts and numbers weren't compared


def test_two_sides_that_agree_cost_one_completion_a_prompt(right: Side) -> None:
    standin = Standin(right, ids=True)
    result = held(standin)
    completions = [body for path, body in standin.asked if path == "/v1/completions"]
    again = sum(8 for row in result.rows if row.parting is not None)  # at most: each position behind a near tie
    assert len(result.rows) <= len(completions) <= len(result.rows) + again


def test_the_only_model_needs_no_name(right: Side) -> None:
    assert held(Standin(right, ids=True, names=["one"]), model="").agree


@pytest.mark.parametrize("model", ["", "#nobody"])
def test_a_model_that_is_not_there_is_named_with_those_that_are(right: Side, model: str) -> None:
    with pytest.raises(InputError, match="tuned"):
        held(Standin(right, ids=True), model=model)


def test_the_key(right: Side, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not for you")
    standin = Standin(right, ids=True, key="secret")
    with pytest.raises(InputError, match=client.KEY):
        held(standin)
    assert standin.keys == [None]  # a key that was meant for another server isn't sent
    monkeypatch.setenv(client.KEY, "secret")
    assert held(standin).agree


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [("hangs", RunError), ("breaks", RunError), ("redirects", InputError), ("is no API", InputError)],
)
def test_what_goes_wrong_is_said_in_time(right: Side, behaviour: str, kind: type[DeltawError], monkeypatch) -> None:
    original = client.Client.ask

    def impatient(self, path, body=None, *, seconds=None):
        return original(self, path, body, seconds=0.5)

    monkeypatch.setattr(client.Client, "ask", impatient)
    with pytest.raises(kind) as error:
        held(Standin(right, ids=True, behaviour=behaviour))
    assert len(str(error.value).splitlines()) <= 5


def test_nobody_there() -> None:
    with pytest.raises(InputError, match="can't be reached"):
        open_server("http://127.0.0.1:9/v1#tuned")
    for name in ("http://", "https:///v1"):
        with pytest.raises(InputError):
            open_server(name)


def test_a_servers_own_answer_is_kept_to_its_end(right: Side) -> None:
    """The token that ended it is among the ids, as it is here."""
    with serving(Standin(right, ids=True)) as address:
        side = open_server(f"{address}#tuned")
        (ids,) = side.ids([Prompt("say 3 ", "")])
        (theirs,) = side.answers([Asked(Prompt("", ""), ids)], 40, lambda _: None)
    (ours,) = right.answers([Asked(Prompt("", ""), ids)], 40, lambda _: None)
    assert (theirs.ids, theirs.ended) == (ours.ids, ours.ended)


def test_a_weaker_adapter_behind_a_server(place: Path, tmp_path: Path) -> None:
    side = open_side(str(scaled(place / "adapter", tmp_path / "half", 0.5)), display=QUIET)
    side.load()
    result = held(Standin(side, ids=True))
    assert not result.agree and result.effect.strength > 0.1
