"""What a run's config.yaml means by leaving out a setting: it was written before there was one.

A run writes every default into its config.yaml, so a setting that lacks there is younger than the run, which goes on,
and is measured, as it began. Only settings whose default changes what an older run did are listed. A section without
`WRITTEN` was written by hand, in part.

    data.split_text   a .txt file was documents with blank lines between them
    data.join         pairs of columns were text glued together, whatever their names, not chats
"""

from collections.abc import Mapping
from typing import Any

BEFORE: dict[str, dict[str, Any]] = {"data": {"split_text": "blank_lines", "join": ""}}
WRITTEN = "max_length"  # a setting of the data section from the first


def as_it_was(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The plain mapping of a run's own config.yaml with what it took for granted written out."""
    whole = {name: raw[name] for name in BEFORE if isinstance(raw.get(name), dict) and WRITTEN in raw[name]}
    return {**raw, **{name: {**BEFORE[name], **section} for name, section in whole.items()}}
