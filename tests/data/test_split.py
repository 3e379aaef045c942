"""Long texts in pieces: no token lost, none trained twice, cut where the text has a seam."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import KINDS, sentencepiece, toy

from deltaw.config import DataConfig
from deltaw.data.document import Text
from deltaw.data.example import Example
from deltaw.data.prepare import prepare, prepare_held_out
from deltaw.data.render import Renderer
from deltaw.data.split import CHARACTER, LINE, PARAGRAPH, SECTION, SENTENCE, TAIL, WORD, places, split
from deltaw.errors import InputError

RENDERERS = {kind: Renderer(toy(kind)) for kind in ("plain", "bos", "chatml", "llama3")} | {
    "sentencepiece": Renderer(sentencepiece())
}
words = st.sampled_from(["the", "cat", "a", "Hello", "Ünï", "日本語。", "🙂", "<|im_end|>", "</s>", "# x", "don't"])
seams = st.sampled_from([" ", " ", " ", ". ", "\n", "\n\n", "\n\n\n", "", "  \n \n", "\t"])
texts = st.lists(st.tuples(words, seams), min_size=1, max_size=80).map(lambda parts: "".join(map("".join, parts)))
fast = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("kind", RENDERERS)
@given(text=texts.filter(str.strip), length=st.integers(2, 80), share=st.floats(0, 0.5))
@fast
def test_every_token_but_the_first_is_trained_exactly_once(kind, text, length, share):
    overlap = int(share * length)
    renderer = RENDERERS[kind]
    whole, (pieces,) = (
        renderer.render(Text(text), "t:1"),
        renderer.render_pieces([Text(text)], ["t:1"], length, overlap),
    )
    bos = [renderer.tokenizer.bos_token_id] if KINDS.get(kind, [0] * 4 + [True])[4] else []
    own = [piece.tokens[piece.context :].tolist() for piece in pieces]
    assert [id for part in own for id in part] == whole.tokens.tolist()
    trained = np.concatenate([piece.tokens[piece.loss_mask] for piece in pieces])
    assert trained.tolist() == whole.tokens[whole.loss_mask].tolist() == whole.tokens[1:].tolist()
    assert [piece.goes_on for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    done = 0
    for number, piece in enumerate(pieces):
        assert len(piece.tokens) <= length
        assert not piece.loss_mask[0] and not piece.loss_mask[: piece.context].any()
        assert piece.tokens[: len(bos)].tolist() == bos[:length] or length < 3
        shown = piece.tokens[len(bos) if length > 2 else 0 : piece.context].tolist()
        assert shown == whole.tokens[:done].tolist()[done - len(shown) :]  # what stands in front of it
        assert number == 0 or length < 3 or 1 <= len(shown) <= max(overlap, 1)
        done += len(own[number])
    if len(pieces) == 1:
        assert pieces[0].origin == "t:1" and pieces[0].context == 0
    elif length >= 4 * (max(overlap, 1) + len(bos)):
        assert len(own[-1]) >= (length - max(overlap, 1) - len(bos)) // TAIL  # no scraps


@pytest.mark.parametrize("kind", RENDERERS)
@given(text=texts.filter(str.strip), length=st.integers(12, 40))
@fast
def test_no_better_seam_is_in_reach(kind, text, length):
    """A piece that ends inside a word had no blank in its last eighth; characters stay whole."""
    renderer = RENDERERS[kind]
    (pieces,) = renderer.render_pieces([Text(text)], ["t:1"], length)
    decoded = [renderer.decode(p.tokens[p.context :], skip_special=False) for p in pieces]
    assert not any("�" in part for part in decoded) or kind == "sentencepiece"
    for piece, part, after in zip(pieces, decoded, decoded[1:], strict=False):
        last = [renderer.tokenizer.decode([id]) for id in piece.tokens[-(length // 16) :].tolist()]
        seam = part[-1:].isspace() or after[:1].isspace() or part.rstrip("\"'")[-1:] in "。"
        inside = renderer.decode(piece.tokens[-max(1, length // 16) :], skip_special=False)
        assert seam or kind == "sentencepiece" or not any(c in inside[1:-1] for c in " \n\t"), (last, part, after)


def text_places(text):
    """Of a text in which every character is a token."""
    return places(text, [(n, n + 1) for n in range(len(text))])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ab|cd", CHARACTER),
        ("ab |cd", WORD),
        ("ab| cd", WORD),
        ("ab. |cd", SENTENCE),
        ('ab." |cd', SENTENCE),
        ("1.|5", CHARACTER),
        ("日本。|日本", SENTENCE),
        ("ab\n|cd", LINE),
        ("ab\n|  cd", LINE),
        ("ab\n|\ncd", WORD),
        ("ab\n\n|cd", PARAGRAPH),
        ("ab\n \t\n|cd", PARAGRAPH),
        ("ab\n\n\n|cd", SECTION),
        ("ab\n\n|# cd", SECTION),
        ("ab\n\n|  # cd", SECTION),
    ],
)
def test_kinds_of_places(text, kind):
    at = text.index("|")
    assert text_places(text.replace("|", ""))[at] == kind
    trimmed = [(n, n + 1) for n, c in enumerate(text.replace("|", "")) if c not in " \t"]  # offsets without blanks
    if text[at + 1] not in " \t":
        assert places(text.replace("|", ""), trimmed)[[n for n, _ in trimmed].index(at)] == kind


def test_the_best_seam_within_reach_and_the_latest_of_its_kind():
    text = "".join(f"{'x' * 7} " if n % 5 else f"{'x' * 6}.\n" for n in range(60))  # a line is 40 characters
    text = text[:130] + "\n\n" + text[130:]
    example = Example(np.arange(len(text), dtype=np.int32), np.arange(len(text)) > 0, "t:1")
    pieces = split(example, text_places(text), 201)
    ends = np.cumsum([len(piece.tokens) - piece.context for piece in pieces])
    assert ends[0] == 132  # the paragraph, though lines end later
    assert all(text[end - 1] == "\n" for end in ends[:-1])
    assert (ends[1] - ends[0]) > 150


def long_text(paragraphs, seed="the cat"):
    return "\n\n".join(f"{seed} {n} sat here. And there it was {n * 7}." for n in range(paragraphs))


def write(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def tokens_of(rows):
    return sorted(tuple(row.tokens[row.context :].tolist()) for row in rows)


def test_of_several_documents_whole_ones_are_held_out(tmp_path):
    path = write(tmp_path / "t.jsonl", *(long_text(20, f"cat {n}") for n in range(6)))
    config = DataConfig(train=path, eval=2, max_length=64)
    prepared = prepare(config, RENDERERS["bos"])
    parts = [{row.origin.split(" ")[0] for row in part} for part in (prepared.train, prepared.eval)]
    assert [len(part) for part in parts] == [4, 2] and not parts[0] & parts[1]
    assert len(prepared.eval) > 2
    assert tokens_of(prepare_held_out(config, RENDERERS["bos"])) == tokens_of(prepared.eval)
    report = prepared.report
    assert (report.split_rows, report.pieces) == (6, len(prepared.train) + len(prepared.eval))
    assert report.kept == 1 and report.warnings == []
    with pytest.raises(InputError, match="6 usable rows"):
        prepare(DataConfig(train=path, eval=6, max_length=64), RENDERERS["bos"])


@pytest.mark.parametrize("name", ["book.txt", "book.md"])
def test_of_a_single_document_pieces_are_held_out(tmp_path, name):
    (tmp_path / name).write_text(long_text(200))
    config = DataConfig(train=str(tmp_path / name), eval=20, max_length=128, overlap=16)
    prepared = prepare(config, RENDERERS["bos"])
    assert len(prepared.eval) == 20 and len(prepared.train) > 20
    alone = prepare(DataConfig(train=config.train, max_length=128, overlap=16), RENDERERS["bos"]).train
    assert tokens_of([*prepared.train, *prepared.eval]) == tokens_of(alone)
    assert [row.origin for row in prepared.eval] != [row.origin for row in alone[:20]]  # not all from the beginning
    assert tokens_of(prepare_held_out(config, RENDERERS["bos"])) == tokens_of(prepared.eval)
    assert any("one document" in note for note in prepared.report.notes)
    with pytest.raises(InputError) as refused:
        prepare(DataConfig(train=config.train, eval=20, max_length=100_000), RENDERERS["bos"])
    smaller = int(refused.value.fix.split("data.max_length to ")[1].split()[0])
    assert len(prepare(DataConfig(train=config.train, eval=20, max_length=smaller), RENDERERS["bos"]).eval) == 20


def test_text_is_dropped_or_cut_only_where_that_is_asked_for(tmp_path):
    path = write(tmp_path / "t.jsonl", long_text(20), "short text", "another")
    whole = prepare(DataConfig(train=path, max_length=64), RENDERERS["bos"]).report
    dropped = prepare(DataConfig(train=path, max_length=64, too_long="drop"), RENDERERS["bos"])
    cut = prepare(DataConfig(train=path, max_length=64, too_long="truncate"), RENDERERS["bos"])
    assert (len(dropped.train), dropped.report.too_long_dropped, len(cut.train), cut.report.truncated) == (2, 1, 3, 1)
    assert dropped.report.tokens_read == cut.report.tokens_read == whole.tokens_read
    assert dropped.report.kept == dropped.report.tokens / whole.tokens_read < cut.report.kept < whole.kept == 1


@pytest.mark.parametrize("setting", [{"too_long": "split"}, {"overlap": 8}])
def test_answers_are_not_split(tmp_path, setting):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": "q ", "completion": "a " * 50}) + "\n")
    with pytest.raises(InputError, match="for texts"):
        prepare(DataConfig(train=str(path), **setting), RENDERERS["bos"])


def test_names_of_control_tokens_are_counted_once(tmp_path):
    path = write(tmp_path / "t.jsonl", "<s> " + long_text(20) + " </s> and <s> again")
    report = prepare(DataConfig(train=path, max_length=64, overlap=30), RENDERERS["bos"]).report
    assert report.named_tokens == 3


@pytest.mark.parametrize("kind", RENDERERS)
def test_a_text_that_is_encoded_in_portions_has_the_tokens_of_the_whole(kind, monkeypatch):
    text = long_text(80) + " <|im_end|> Ünï 日本語。 " + "no blank here".replace(" ", "_") * 90 + long_text(40)
    renderer = RENDERERS[kind]
    whole, (pieces,) = renderer.render(Text(text), "t:1"), renderer.render_pieces([Text(text)], ["t:1"], 90)
    told = []
    for portion in (300, 500, 1700):
        monkeypatch.setattr("deltaw.data.encode.PORTION", portion)
        (portioned,) = renderer.render_pieces([Text(text)], ["t:1"], 90, progress=told.append)
        assert renderer.render(Text(text), "t:1").tokens.tolist() == whole.tokens.tolist()
        assert [piece.tokens.tolist() for piece in portioned] == [piece.tokens.tolist() for piece in pieces]
    assert len(told) > 6 and max(told) >= len(text) - 9


def test_a_share_of_a_single_document_is_of_its_pieces(tmp_path):
    (tmp_path / "book.txt").write_text(long_text(200))
    config = DataConfig(train=str(tmp_path / "book.txt"), eval=0.25, max_length=128)
    prepared = prepare(config, RENDERERS["bos"])
    assert len(prepared.eval) == (len(prepared.train) + len(prepared.eval)) // 4 > 1
    assert tokens_of(prepare_held_out(config, RENDERERS["bos"])) == tokens_of(prepared.eval)


def test_of_several_files_whole_ones_are_held_out(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(long_text(20, name))
    config = DataConfig(train=[str(tmp_path / f"{name}.txt") for name in "abc"], eval=1, max_length=64)
    prepared = prepare(config, RENDERERS["bos"])
    parts = [{row.origin.split(":")[0] for row in part} for part in (prepared.train, prepared.eval)]
    assert [len(part) for part in parts] == [2, 1] and not parts[0] & parts[1]
