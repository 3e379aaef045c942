"""What a run will train on, made visible: some examples with their trained tokens marked, and the counts.

Wrong masks and templates show here in a second, and otherwise only after the run. Trained text is coloured;
where colour is off (a pipe, `NO_COLOR`) it stands in ⟦brackets⟧, since without either the preview would
show nothing. The name of a control token that stands in a text, and is characters to the model, is shown with a
backslash (`<\\|im_end|>`): a real one looks the same otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise, zip_longest
from typing import TYPE_CHECKING, Any

from deltaw.base.parts import ANSWERED, ASKED, PART_NAMES
from deltaw.data.dataset import Dataset
from deltaw.data.encode import Encoder
from deltaw.data.example import Example
from deltaw.data.report import DataReport
from deltaw.show.text import counted

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderResult

LONGEST = 2000  # characters shown of one stretch
PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)}  # of control characters: a CR is ␍


def preview(dataset: Dataset, tokenizer: Any, n: int) -> "Group":
    """A rich renderable: the first `n` training examples, then counts and warnings."""
    from rich.console import Group
    from rich.text import Text

    lines: list[Any] = [Marked(example, tokenizer) for example in first(dataset, n)]
    lines += [Text(line) for line in summary(dataset.report)]
    lines += [Text(f"warning: {warning}", style="yellow") for warning in dataset.report.warnings]
    return Group(*lines)


def first(dataset: Dataset, n: int) -> list[Example]:
    """The first `n` rows to train on; of several sources the first of each, then the second of each, and so on."""
    rows, by_source, begin = dataset.train.distinct, [], 0
    borders = [*rows.units.tolist(), len(rows)]
    for source in dataset.report.sources:
        units = range(begin, begin + min(n, source.train_rows))
        by_source.append([list(rows[borders[unit] : borders[unit + 1]]) for unit in units])
        begin += source.train_rows
    turns = (row for turn in zip_longest(*by_source) for row in turn if row is not None)
    return [example for row in islice(turns, n) for example in row]


def mixture(report: DataReport) -> list[str]:
    """What each source gives, where there are several or one has a weight."""
    sources = [source for source in report.sources if source.visits]
    if len(sources) == 1 and sources[0].weight == 1:
        return []
    epoch = sum(source.visits for source in sources)
    lines = [
        f"  {source.name}: {counted(source.train_rows, 'row')}, {source.visits:,} of an epoch's {epoch:,} "
        f"(weight {source.weight:g}), {source.share:.1%} of the trained tokens"
        for source in sources
    ]
    forms = {source.form for source in sources}
    return [f"{line}; {source.form}" if len(forms) > 1 else line for line, source in zip(lines, sources, strict=True)]


def printed(dataset: Dataset, tokenizer: Any, n: int) -> str:
    """The same as the text that stdout can show, coloured if that is a terminal."""
    from rich.console import Console

    console = Console()
    with console.capture() as capture:
        console.print(preview(dataset, tokenizer, n))
    return capture.get().removesuffix("\n")


def summary(report: DataReport) -> list[str]:
    """The counts, one line each."""
    return [
        f"{report.source}: {report.form}",
        *mixture(report),
        f"{counted(report.rows_read, 'row')} read, {report.train_rows:,} to train on, {report.eval_rows:,} held out",
        _tokens(report),
        *([kept(report)] if report.kept < 1 or report.form.startswith("text") else []),
        *report.notes,
    ]


def _tokens(report: DataReport) -> str:
    """How many there are; of prompts nothing is trained but what will be sampled."""
    longest = f"the longest row has {report.longest_row:,} ({report.longest_origin})"
    if report.is_asked:
        return f"{report.tokens - report.supervised_tokens:,} tokens of prompts; {longest}"
    return f"{report.tokens:,} tokens, {report.supervised_tokens:,} of them trained ({report.share:.1%}); {longest}"


def kept(report: DataReport) -> str:
    """How much of what was read is trained on or held out."""
    share = f"{report.kept:.1%}" if report.kept < 1 else "100%"
    share = "99.9%" if share == "100.0%" else share
    return f"kept: {share} of the {report.tokens_read:,} tokens read"


def spans(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The example's text in stretches of (text, trained)."""
    encoder = Encoder(tokenizer) if example.names else None
    stretches: list[tuple[str, bool]] = []
    pairs = zip(example.tokens.tolist(), example.loss_mask.tolist(), strict=True)
    for control, run in groupby(pairs, key=lambda pair: encoder is not None and pair[0] in encoder.control_ids):
        parts = []
        for trained, group in groupby(run, key=lambda pair: pair[1]):
            ids = [token for token, _ in group]
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            parts.append((text, trained))
        stretches += _broken(parts, encoder) if encoder and not control else parts
    return [
        (_shortened("".join(text for text, _ in group)), trained)
        for trained, group in groupby(stretches, key=lambda stretch: stretch[1])
    ]


def _broken(parts: list[tuple[str, bool]], encoder: Encoder) -> list[tuple[str, bool]]:
    """Plain text with the names of control tokens in it broken by a backslash, also where mask borders cut them."""
    broken, begin = [], 0
    names = encoder.name_starts("".join(text for text, _ in parts))
    for text, trained in parts:
        cuts = [0, *(name + 1 - begin for name in names if 0 <= name + 1 - begin < len(text)), len(text)]
        broken.append(("\\".join(text[a:b] for a, b in pairwise(cuts)), trained))
        begin += len(text)
    return broken


@dataclass(frozen=True)
class Marked:
    """One example: colour where the console has it, brackets where not."""

    example: Example
    tokenizer: Any

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        colour = console.color_system is not None and not console.no_color
        example = asked_alone(self.example)
        counts = counted(len(example.tokens), "token")
        counts += f", {int(example.loss_mask.sum())} trained" if example.part not in (ASKED, ANSWERED) else ""
        part = f", {PART_NAMES[self.example.part]}" if self.example.part else ""
        text = Text().append(f"{self.example.origin}{part} ({counts})\n", style="bold")
        text.append_text(_marked(spans(example, self.tokenizer), colour))
        yield text
        yield Text("")


def asked_alone(example: Example) -> Example:
    """A prompt without its answer, which isn't trained; anything else as it is."""
    if example.part not in (ASKED, ANSWERED):
        return example
    return example.cut(int(example.loss_mask.argmax()))


def _marked(stretches: Sequence[tuple[str, bool]], colour: bool) -> Any:
    from rich.text import Text

    text = Text()
    for stretch, trained in stretches:
        if trained:
            text.append(stretch if colour else f"⟦{stretch}⟧", style="bold green underline")
        else:
            text.append(stretch)
    return text


def _shortened(text: str) -> str:
    """The text with control characters made visible, cut in the middle when it is long."""
    text = "".join(c if c.isprintable() or c in "\n\t" else PICTURES.get(c, "�") for c in text)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"
