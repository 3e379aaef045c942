"""From a transformers tokenizer to a GGUF's `tokenizer.*` keys, for the two kinds that llama.cpp can run.

    gpt2     byte-level BPE: tokens, merges, and the name of the rule by which text is split (splitting.py)
    llama    SentencePiece's BPE (Llama 2, Mistral, Gemma, Phi-3): tokens with scores, bytes as <0x00> … <0xFF>

Everything comes from the loaded tokenizer, not from its files: transformers rewrites some of them on reading, and the
loaded one was trained with. What it adds before and after a text is found by encoding one.

SentencePiece's scores aren't in a tokenizer.json, its merges are, made of them: for each token all pairs that give it,
in the order of the scores. So a token's score is minus the place of its pairs. llama.cpp merges whatever is a token,
the best score first; a list of merges allows only what it lists, in its order. They are the same where the pairs of a
token stand together and all are there, which is checked, and refused where it isn't (a BPE trained on its own).

    types    normal 1 · unknown 2 · control 3 · user-defined 4 (found in any text, before merging) · unused 5 · byte 6
    rows     of the embedding beyond the vocabulary, and ids that no token has: [PAD…], unused

The tokens that end a turn must be known to llama.cpp as such, or it never stops: eos, then in the slots for end of turn
and of message what the adapter was trained to end with and the generation config's others.
"""

import json
from typing import Any, NamedTuple

from deltaw.base.gguf_tokens import BYTE_LEVEL, SENTENCES
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.shipping.gguf.splitting import splitting_name, unknown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BLANK = "▁"
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
TEMPLATE = "tokenizer.chat_template"
STRIPS = ("lstrip", "rstrip", "single_word")
SLOTS = ("eot", "eom")  # beside eos, for tokens that end an answer


class Vocabulary(NamedTuple):
    """`keys`: texts, flags, ids and lists. `notes`: what llama.cpp does otherwise, for the user."""

    keys: dict[str, Any]
    notes: list[str]


def vocabulary(renderer: Renderer, rows: int, *, chats: bool = False) -> Vocabulary:
    """The tokenizer of a model whose embedding has `rows` rows; `chats`: it was trained through its chat template.

    Raises InputError for a tokenizer that llama.cpp can't run.
    """
    tokenizer = renderer.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise unknown(f"a {type(tokenizer).__name__} consists of code, not of a tokenizer.json")
    described = json.loads(backend.to_str())
    model, notes = described["model"], list[str]()
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model.get("type") != "BPE" or odd:
        raise unknown(f"it is a {model.get('type')}{' with ' + odd[0] if odd else ''}, not a plain BPE")
    tokens, types = _tokens(tokenizer, described, rows)
    if greedy := [item["content"] for item in described["added_tokens"] if any(item[how] for how in STRIPS)]:
        notes.append(
            f"spaces beside {', '.join(greedy)[:80]} belong to the token, but llama.cpp leaves them in the text"
        )
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    keys: dict[str, Any] = {}
    if _byte_level(described):
        keys |= {"model": BYTE_LEVEL, "pre": splitting_name(described), "tokens": tokens, "token_type": types}
        keys["merges"] = [" ".join(pair) for pair in merges]
        if not merges:
            raise unknown("it has no merges, which llama.cpp needs")
        _check_normalizer(described.get("normalizer"), notes)
    else:
        prefix = _blank_before(described, notes, chats and _begins_with_control(renderer))
        _check_sentences(model, types, tokens)
        keys |= {"model": SENTENCES, "pre": "default", "tokens": tokens, "token_type": types}
        keys |= {"scores": _scores(tokens, types, merges), "add_space_prefix": prefix}
    keys |= _additions(tokenizer) | _special_ids(renderer, notes)
    named = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return Vocabulary(named | ({TEMPLATE: renderer.template} if renderer.template else {}), notes)


def _special_ids(renderer: Renderer, notes: list[str]) -> dict[str, int]:
    """The ids of tokens with a use, by the names that GGUF has for them."""
    tokenizer = renderer.tokenizer
    uses = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: getattr(tokenizer, f"{use}_token_id") for use, name in uses.items()}
    stops = sorted(renderer.stop_ids - {ids["eos"]}, key=lambda id: (id != renderer.end_of_turn, id))
    ids |= dict(zip(SLOTS, stops, strict=False))
    if more := stops[len(SLOTS) :]:
        names = ", ".join(tokenizer.convert_ids_to_tokens(more))
        notes.append(f"a GGUF has no place for more tokens that end an answer: {names}; name them to the server")
    return {f"{name}_token_id": id for name, id in ids.items() if id is not None}


def _tokens(tokenizer: Any, described: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Texts and types in the order of ids."""
    vocabulary: dict[str, int] = described["model"]["vocab"]
    added = {item["id"]: item for item in described["added_tokens"]}
    texts = {id: text for text, id in vocabulary.items()} | {id: item["content"] for id, item in added.items()}
    if max(texts) >= rows:
        raise InputError(
            f"the tokenizer has tokens up to id {max(texts):,}, the embedding {rows:,} rows",
            fix="a model for llama.cpp needs a row for every token; resize the base's embedding first",
        )
    special = {*tokenizer.all_special_ids, *(id for id, item in added.items() if item["special"])}
    sentences = not _byte_level(described)
    tokens, types = list[str](), list[int]()
    for id in range(rows):
        text = texts.get(id)
        if text is None:
            text, kind = _padding(id, vocabulary), UNUSED
        elif sentences and id == tokenizer.unk_token_id:
            kind = UNKNOWN
        elif id in special:
            kind = CONTROL
        elif id in added:
            text, kind = text.replace(BLANK, " ") if sentences else text, USER_DEFINED  # found in the text as it comes
        else:
            kind = BYTE if sentences and text in BYTES else NORMAL
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _padding(id: int, vocabulary: dict[str, int]) -> str:
    name = f"[PAD{id}]"
    while name in vocabulary:
        name = f"[{name}]"
    return name


def _byte_level(described: dict[str, Any]) -> bool:
    step = described.get("pre_tokenizer") or {}
    return any(part.get("type") == "ByteLevel" for part in step.get("pretokenizers", [step]))


def _check_normalizer(step: Any, notes: list[str]) -> None:
    """llama.cpp changes nothing before it splits."""
    for part in (step or {}).get("normalizers", [step] if step else []):
        if part["type"] != "NFC":
            raise unknown(f"text is changed before it is split, by {part['type']}")
        notes.append("llama.cpp doesn't compose accents (NFC): decomposed text gets other tokens")


def _begins_with_control(renderer: Renderer) -> bool:
    """Whether what the chat template writes begins with a control token."""
    if renderer.template is None:
        return False
    try:
        return renderer.prompt_ids([{"role": "user", "content": "a"}])[0] in renderer.tokenizer.all_special_ids
    except InputError:
        return False


def _blank_before(described: dict[str, Any], notes: list[str], none_in_chats: bool) -> bool:
    """Whether one more blank goes before a text. Raises InputError for any other change of it.

    llama.cpp puts it before every text and behind every control token, or nowhere. A tokenizer that puts it before a
    text alone puts none into a chat that begins with a control token: then nowhere is right for what was trained.
    """
    step = described.get("normalizer")
    before, replaced = False, False
    for part in (step or {}).get("normalizers", [step] if step else []):
        if part["type"] == "Prepend" and part["prepend"] == BLANK:
            before = True
        elif part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == BLANK:
            replaced = True
        else:
            raise unknown(f"text is changed before it is split, by {str(part)[:80]}")
    pre = described.get("pre_tokenizer")
    if pre and pre["type"] == "Metaspace" and pre["replacement"] == BLANK and not pre.get("split", True):
        scheme = pre.get("prepend_scheme", "always")
        if scheme == "first" and none_in_chats:
            notes.append("as in chats, llama.cpp puts no space before a text: a text without the template lacks one")
            return before
        if scheme == "first":
            notes.append(
                "llama.cpp puts a space after every control token, this tokenizer only before a text, "
                "so chats have more tokens in llama.cpp"
            )
        return before or scheme != "never"
    by_blanks = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if not replaced or (pre and pre != by_blanks):  # there are no blanks left for Gemma's to split by
        raise unknown(f"spaces are treated by {str(pre)[:80]}")
    return before


def _check_sentences(model: dict[str, Any], types: list[int], tokens: list[str]) -> None:
    if not model.get("byte_fallback") or len(BYTES.intersection(tokens)) < len(BYTES):
        raise unknown("it has no token for each byte")


def _scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    """The score of each token: the earlier it is merged, the higher."""
    place: dict[str, int] = {}
    last = ""
    for pair in merges:
        text = "".join(pair)
        if text != last and place.setdefault(text, len(place)) != len(place) - 1:
            raise unknown(f"the merges that give {text!r} aren't next to each other, as SentencePiece's do")
        last = text
    listed = {(left, right) for left, right in merges}
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    for text in normal:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal and (left, right) not in listed:
                raise unknown(f"{left!r} and {right!r} aren't merged, but {text!r} is a token; SentencePiece would")
    return [
        -float(place.get(text, len(place))) if kind == NORMAL else 0.0 for text, kind in zip(tokens, types, strict=True)
    ]


def _additions(tokenizer: Any) -> dict[str, bool]:
    """What it adds around a text. Raises InputError for anything but bos before and eos after it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    at = next((at for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare), 0)
    before, behind = dressed[:at], dressed[at + len(bare) :]
    if before not in ([], [tokenizer.bos_token_id]) or behind not in ([], [tokenizer.eos_token_id]):
        names = tokenizer.convert_ids_to_tokens([*before, *behind])
        raise unknown(f"it puts {' '.join(names)[:80]} around a text, not bos before it and eos behind")
    return {"add_bos_token": bool(before), "add_eos_token": bool(behind)}
