"""llama.cpp's name (`tokenizer.ggml.pre`) for the rule by which a tokenizer splits text before merging.

base/gguf_tokens.py knows what each name stands for; here its table is used in reverse. A rule is compared as patterns
in one spelling (`canonical`): published tokenizers write the same pattern in several ways. One that isn't in the table
is refused, never guessed: llama.cpp splits by whatever name it is given and answers wrongly in silence.

    Split by a pattern     the pattern                            Digits, one by one     \\p{N}
    ByteLevel              GPT-2's, if it splits at all           Digits, in runs        \\p{N}+

Rejected: trying texts out until a rule fits (two rules may differ on one text in a thousand), and llama.cpp's table of
hashes of what a tokenizer makes of one long text (it names checkpoints, not rules).
"""

from typing import Any

from deltaw.base.gguf_tokens import BLOOM, GPT2, SPLITTINGS
from deltaw.errors import InputError

SUFFIXES = "'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"  # as the table writes 's, 't, 're … in either case
SPELLINGS = (  # of the same, the optional ones (in a group) first
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", f"(?:{SUFFIXES})?"),
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", SUFFIXES),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?", f"(?:{SUFFIXES})?"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", SUFFIXES),
    ("'(?i:[sdmt]|ll|ve|re)", SUFFIXES),
    ("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d"),
    ("?+", "?"),  # what follows can't match what they took, so that they may as well give it back
    ("++", "+"),
    ("\r", r"\r"),
    ("\n", r"\n"),
)


def canonical(pattern: str) -> str:
    """The pattern in the table's spelling."""
    for written, same in SPELLINGS:
        pattern = pattern.replace(written, same)
    return pattern


NAMES: dict[tuple[tuple[str, ...], bool], str] = {}
for _name, _rule in SPLITTINGS.items():
    NAMES.setdefault((tuple(map(canonical, _rule.patterns)), _rule.whole), _name)


def splitting_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the rule of a byte-level tokenizer.json. Raises InputError for one that has none."""
    patterns, whole = _patterns(tokenizer.get("pre_tokenizer")), bool(tokenizer["model"].get("ignore_merges"))
    name = NAMES.get((patterns, whole))
    if name is None:
        raise unknown(
            f"text is split by {' then '.join(patterns)[:120]!r}" + (", and whole words aren't merged" if whole else "")
        )
    return name


def unknown(what: str) -> InputError:
    """The refusal of a tokenizer that llama.cpp would not run as it is."""
    return InputError(
        f"this tokenizer can't be written as GGUF: {what}",
        fix="llama.cpp would silently split text differently; use another destination (deltaw merge)",
    )


def _patterns(step: Any) -> tuple[str, ...]:
    """What text is split by, one pattern after the other."""
    if not step:
        return ()
    match step.get("type"):
        case "Sequence":
            return tuple(pattern for part in step["pretokenizers"] for pattern in _patterns(part))
        case "ByteLevel":
            if step.get("add_prefix_space"):
                raise unknown("it puts a space before every text")
            return (canonical(GPT2),) if step.get("use_regex", True) else ()
        case "Digits":
            return (r"\p{N}" if step["individual_digits"] else r"\p{N}+",)
        case "Split" if isinstance(pattern := step["pattern"].get("Regex"), str) and _cuts(step, pattern):
            return (canonical(pattern),)
    raise unknown(f"text is split by the step {str(step)[:100]}")


def _cuts(step: dict[str, Any], pattern: str) -> bool:
    """Whether the matches and what lies between them are the pieces. "Removed", inverted, drops what lies between,
    which is nothing for a pattern that matches everywhere."""
    kind = step.get("behavior"), bool(step.get("invert"))
    return kind == ("Isolated", False) or (kind == ("Removed", True) and r"\s+" in pattern and BLOOM not in pattern)
