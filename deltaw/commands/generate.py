"""`deltaw generate`: a prompt continued, several, or a file of them."""

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deltaw.data.prompts import prompts_of_text, read_prompts
from deltaw.errors import InputError
from deltaw.evaluation.answers import (
    Answer,
    Asked,
    answer_into_file,
    answer_into_stream,
    depends,
    depends_on_model,
    summary,
)
from deltaw.files.journal import Journal
from deltaw.files.lock import claimed_file
from deltaw.generate.sampling import Sampling
from deltaw.kernels.copies import making
from deltaw.model import Model, open_model
from deltaw.named import Named
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.text import counted
from deltaw.training.stop import StopRequest

STD = "-"  # stdin, or stdout
ADVICE = "the answers so far are kept, and the same command goes on with the rest"


def generate_named(
    name: str,
    prompts: Sequence[str],
    *,
    base: str | None,
    use_adapter: bool,
    chat: bool | None,
    system: str | None,
    sampling: dict[str, Any],
    show: Callable[[str], None],
    display: Display,
) -> Result:
    """`show` is given the answer piece by piece as it comes, so the Result's text is empty: all has been shown."""
    texts = [_stdin() if prompt == STD else prompt for prompt in prompts]
    if any(not text.strip() for text in texts):
        raise InputError("the prompt is empty", fix="say what is to be answered; a file of prompts goes with --file")
    fields = Sampling.checked(**sampling).model_dump()  # before the weights are read
    model = open_model(name, base=base, chat=chat, system=system, display=display)
    display.say(model.asking.words())
    answers = []
    for text in texts:
        if len(texts) > 1:
            show(f"> {text}\n")
        answer, cut = shown(model.stream(text, adapter=use_adapter, **fields), show)
        if len(texts) > 1:
            show("\n\n")
        answers.append({"prompt": text, "text": answer, "cut": cut})
    how, cuts = _how(model, use_adapter), sum(bool(answer["cut"]) for answer in answers)
    if cuts:
        display.say("\n" * (len(texts) == 1) + _cut(cuts))  # on a terminal the answer's line is still open
    return Result({**answers[0], **how} if len(answers) == 1 else {"answers": answers, **how}, "")


def generate_file_named(
    name: str,
    source: str,
    output: str | None,
    *,
    base: str | None,
    use_adapter: bool,
    chat: bool | None,
    system: str | None,
    sampling: dict[str, Any],
    replace: bool,
    show: Callable[[str], None],
    display: Display,
) -> Result:
    """A row of answers for each row of a file, into `output` or, without one, to `show`."""
    settings = Sampling.checked(**sampling)
    rows = prompts_of_text(_stdin()) if source == STD else read_prompts(source)
    file = None if output in (None, STD) else Path(str(output))
    with ExitStack() as stack:
        stack.enter_context(making())
        if file is not None:
            _check(file, source)
            stack.enter_context(claimed_file(file))
            Journal(file, depends(rows, settings), replace=replace)  # before the weights are read
        named = Named(name)
        model = open_model(named, base=base, chat=chat, system=system, display=display)
        display.say(model.asking.words())
        if file is None:
            asked = Asked.of(model, rows, display)
            answers = answer_into_stream(model, asked, settings, show, adapter=use_adapter, display=display)
            display.say(_words(asked, answers, ""))
            return Result(_data(model, use_adapter, asked, answers, STD), "")
        adapter = named.adapter if model.attached is not None and use_adapter else None
        header = {**depends(rows, settings), **depends_on_model(model, adapter)}
        journal = Journal(file, header, replace=replace)
        if journal.complete:
            data = {"output": str(file), "rows": len(rows), "complete": True, **_how(model, use_adapter)}
            return Result(data, f"{file} is finished: the same prompts, model and settings (--replace asks again)")
        asked = Asked.of(model, rows, display)
        if journal.done:
            display.say(f"going on: {counted(len(journal.done), 'row is', 'rows are')} answered already")
        with StopRequest(ADVICE) as stop:
            answers = answer_into_file(
                model, asked, settings, journal, adapter=use_adapter, hold=stop.held, display=display
            )
        return Result(_data(model, use_adapter, asked, answers, str(file)), _words(asked, answers, str(file)))


def shown(pieces: Generator[str, None, bool], show: Callable[[str], None]) -> tuple[str, bool]:
    """The whole answer, shown piece by piece, and whether it was cut short."""
    answer = ""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return answer, bool(end.value)
        answer += piece
        show(piece)


def _cut(count: int) -> str:
    return f"{counted(count, 'answer was', 'answers were')} cut short: set a higher --max-tokens"


def _check(file: Path, source: str) -> None:
    """Raise InputError for an output that is the file of prompts."""
    if source != STD and file.exists() and file.samefile(source):
        raise InputError(f"output {file} is the file of prompts", fix="name another file: -o answers.jsonl")


def _how(model: Model, use_adapter: bool) -> dict[str, Any]:
    asking = model.asking
    return {
        "adapter": model.attached is not None and use_adapter,
        "form": "chat" if asking.chat else "raw",
        "system": asking.system,
    }


def _data(model: Model, use_adapter: bool, asked: Asked, answers: Mapping[int, Answer], output: str) -> dict[str, Any]:
    return {"output": output, **summary(asked, answers), "complete": True, **_how(model, use_adapter)}


def _words(asked: Asked, answers: Mapping[int, Answer], output: str) -> str:
    counts = summary(asked, answers)
    where = f"{output}: " if output else ""
    lines = [f"{where}{counted(counts['rows'], 'row')}, {counts['answered']:,} answered in {asked.answer!r}"]
    if counts["cut"]:
        lines.append(_cut(counts["cut"]))
    if problems := asked.named():
        shown = [f"  {problem}" for problem in problems[:10]]
        more = [f"  and {len(problems) - len(shown):,} more"] if len(problems) > len(shown) else []
        name = f"couldn't be asked, and {'says' if len(problems) == 1 else 'say'} why in {asked.error!r}:"
        lines += [f"{counted(len(problems), 'row')} {name}", *shown, *more]
    return "\n".join(lines)


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"stdin isn't {error.encoding} text", fix="send the prompt as UTF-8") from None
