"""Task metrics: what a model answered against the truth, both as decoded from tokens.

A metric gives each row (points, weight); its figure is Σ points / Σ weight, divided once. Where each row weighs 1, the
figure is the mean over rows. An error rate's weight is the truth's length, so a long row counts for more and the rate
can exceed 1.

    exact_match           answer = truth, white space at their ends aside
    contains              the truth, so stripped, stands somewhere in the answer
    f1                    harmonic mean of precision and recall of the truth's words, order aside: SQuAD 1.1 (Rajpurkar
                          et al. 2016), its own normalisation: lower case, no punctuation, no "a", "an", "the"
    rouge_l               the same of the longest common subsequence of words: ROUGE-L (Lin 2004, β = 1, one sentence,
                          no stemming), lower case, words of letters and digits, as Google's rouge_score has them
    character_error_rate  ┐ insertions + deletions + substitutions that turn the answer into the truth (Levenshtein
    word_error_rate       │ 1966), of characters or of words between white space, per one in the truth. Nothing is
    phoneme_error_rate    ┘ normalised but white space at the ends; phonemes are words
    number_equal          both end in a number, and these are equal (numbers.py)

Both references of f1 and rouge_l find no word in Chinese or Japanese, or one word per sentence. Here each of
their characters is a word, as in CMRC's f1 and XL-Sum's ROUGE; on ASCII the results are the references' own. Two texts
without any word are alike: 1 (as SQuAD 2.0 has it; rouge_score says 0).

Edit distance and common subsequence are computed a row at a time with the bits of one integer (Myers 1999 as Hyyrö
2003 wrote it; Hyyrö 2004), since an answer of a thousand characters against its truth is a million cells.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from deltaw.config import METRICS as HIGHER_IS_BETTER
from deltaw.evaluation import numbers

CHARACTER_WORDS = "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
SPACED = re.compile(f"([{CHARACTER_WORDS}])")  # Han, Hiragana and Katakana: written without blanks
ARTICLES = re.compile(r"\b(a|an|the)\b")
Points = tuple[float, float]  # points, weight


@dataclass(frozen=True)
class Answer:
    """One row: what was asked, what the model gave, what the data says."""

    prompt: str
    given: str
    truth: str
    origin: str


@dataclass(frozen=True)
class Metric:
    """`of`: a row's (points, weight). `code`: sha256 of the file that a user's own metric stands in."""

    name: str
    higher_is_better: bool
    of: Callable[[Answer], Points]
    code: str = ""

    def mean(self, answers: Iterable[Answer]) -> float:
        """Σ points / Σ weight, the weight counted as 1 at least: 0 for no rows."""
        rows = [self.of(answer) for answer in answers]
        return sum(points for points, _ in rows) / max(1.0, sum(weight for _, weight in rows))

    def score(self, answer: Answer) -> float:
        """Of one row."""
        return self.mean([answer])


def exact_match(given: str, truth: str) -> Points:
    return float(given.strip() == truth.strip()), 1.0


def contains(given: str, truth: str) -> Points:
    return float(truth.strip() in given), 1.0


def f1(given: str, truth: str) -> Points:
    a, b = _squad_words(given), _squad_words(truth)
    return _f1(sum((Counter(a) & Counter(b)).values()), len(a), len(b)), 1.0


def rouge_l(given: str, truth: str) -> Points:
    a, b = _rouge_words(given), _rouge_words(truth)
    return _f1(common_subsequence(a, b), len(a), len(b)), 1.0


def character_error_rate(given: str, truth: str) -> Points:
    return _errors(given.strip(), truth.strip())


def word_error_rate(given: str, truth: str) -> Points:
    return _errors(given.split(), truth.split())


def number_equal(given: str, truth: str) -> Points:
    return float(numbers.equal(given, truth)), 1.0


def _errors(given: Sequence[str], truth: Sequence[str]) -> Points:
    return float(edit_distance(given, truth)), float(len(truth))


def _f1(common: int, given: int, truth: int) -> float:
    """2 P R / (P + R) for P = common / given, R = common / truth."""
    return 2 * common / (given + truth) if given + truth else 1.0


def _squad_words(text: str) -> list[str]:
    """In SQuAD's order: punctuation goes before the articles. `string.punctuation` has symbols such as $ and +, too."""
    kept = (c for c in text.lower() if not (unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~"))
    return SPACED.sub(r" \1 ", ARTICLES.sub(" ", "".join(kept))).split()


def _rouge_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", SPACED.sub(r" \1 ", text.lower()))


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance. The bits of `up` and `down` say where the distance of a's prefix to b's prefixes rises or
    falls by one from each to the next; a symbol of `a` moves them all at once."""
    if not b:
        return len(a)
    at, full, last = _places(b), (1 << len(b)) - 1, 1 << (len(b) - 1)
    up, down, distance = full, 0, len(b)
    for symbol in a:
        equal = at.get(symbol, 0)
        diagonal = (((equal & up) + up) ^ up) | equal
        rise, fall = down | ~(diagonal | up), up & diagonal
        distance += bool(rise & last) - bool(fall & last)
        rise, fall, equal = rise << 1 | 1, fall << 1, equal | down
        up, down = (fall | ~(equal | rise)) & full, rise & equal & full
    return distance


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest: the zeros among the bits of `row` say where in `b` it grows."""
    at, full = _places(b), (1 << len(b)) - 1
    row = full
    for symbol in a:
        new = row & at.get(symbol, 0)
        row = ((row + new) | (row - new)) & full
    return len(b) - row.bit_count()


def _places(b: Sequence[str]) -> dict[str, int]:
    """Bit j is set where b[j] is the symbol."""
    at: dict[str, int] = {}
    for j, symbol in enumerate(b):
        at[symbol] = at.get(symbol, 0) | 1 << j
    return at


def _known(name: str, of: Callable[[str, str], Points]) -> Metric:
    return Metric(name, HIGHER_IS_BETTER[name], lambda answer: of(answer.given, answer.truth))


METRICS = {
    name: _known(name, of)
    for name, of in {
        "exact_match": exact_match,
        "contains": contains,
        "f1": f1,
        "rouge_l": rouge_l,
        "character_error_rate": character_error_rate,
        "word_error_rate": word_error_rate,
        "phoneme_error_rate": word_error_rate,
        "number_equal": number_equal,
    }.items()
}
