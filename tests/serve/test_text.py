"""The text of an answer as it comes is the text of the whole, cut where a stop text is first complete."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.serve.text import Decoder, Stops, Text
from tests.data.toys import sentencepiece, toy

TOKENIZERS = {"bytes": toy("chatml"), "pieces": sentencepiece()}
letters = st.text("ab\n", max_size=30)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def decoding(kind: str):  # type: ignore[no-untyped-def]
    tokenizer = TOKENIZERS[kind]
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Character by character: at the first place where any stop text ends."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def in_pieces(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


@given(letters, stops, st.lists(st.integers(0, 30)))
def test_a_text_in_any_pieces_is_cut_as_the_whole_is(text: str, stops: list[str], places: list[int]) -> None:
    whole, stopped = cut(text, stops)
    cutter = Stops(stops)
    sent = "".join(cutter.push(piece) for piece in in_pieces(text, places)) + cutter.rest()
    assert (sent, cutter.stopped) == (whole, stopped)


@given(letters, stops)
def test_what_is_kept_back_could_begin_a_stop_text(text: str, stops: list[str]) -> None:
    cutter = Stops(stops)
    sent = "".join(map(cutter.push, text))
    if not cutter.stopped:
        kept = text[len(sent) :]
        assert kept == "" or any(stop.startswith(kept) and stop != kept for stop in stops)


words = st.text("ab é€😀漢ß\n", max_size=20)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=words)
def test_tokens_one_by_one_give_the_whole_text(kind: str, text: str) -> None:
    decode, tokenizer = decoding(kind), TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoder = Decoder(decode)
    pieces = [decoder.push(id) for id in ids]
    assert "".join(pieces) + decoder.rest() == decode(ids)
    assert not any("�" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, len(toy("chatml")) - 1), max_size=40))
def test_so_do_tokens_that_make_no_text(ids: list[int]) -> None:
    decode, decoder = decoding("bytes"), Decoder(decoding("bytes"))
    assert "".join(map(decoder.push, ids)) + decoder.rest() == decode(ids)


@given(text=words, stops=st.lists(st.text("ab é€\n", min_size=1, max_size=3), max_size=2))
def test_an_answer_is_its_text_and_each_token_once(text: str, stops: list[str]) -> None:
    decode, ids = decoding("bytes"), toy("chatml").encode(text)
    answer, parts = Text(decode, stops), []
    for id in ids:
        parts.append(answer.push(id))
        if answer.stopped:
            break
    else:
        parts.append(answer.end())
    whole, stopped = cut(decode(ids), stops)
    assert ("".join(part.text for part in parts), answer.stopped) == (whole, stopped)
    tokens = [token for part in parts for token in part.tokens]
    assert tokens == ids[: len(tokens)]
    assert decode(tokens).startswith(whole) or "�" in decode(tokens)
    if not stopped:
        assert tokens == ids


def test_endless_halves_cost_no_more_than_so_many() -> None:
    calls: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        calls.append(len(ids))
        return "�" * len(ids)

    decoder = Decoder(decode)
    text = "".join(decoder.push(0) for _ in range(1000)) + decoder.rest()
    assert max(calls) < 200
    assert text == "�" * 1000
