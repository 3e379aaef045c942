"""A source of prompts -> what is to be asked, a row at a time.

Any source that training can read will do, with or without the answers (`read.py`, `forms.py`): a row that lacks one
gets a stand-in, becomes a document as in training, and what stands in front of the answer is asked. So a question's
`context`, a `system` column, `history`, ShareGPT turns and tools mean here what they mean there, and the file that a
model was measured on can be asked, too.

    prompt, question, instruction (+ input), …, text     a text, asked as the adapter was trained (asking.py)
    messages, conversations                              a chat up to its last answer, through the chat template
    .txt, .md                                            a prompt per line; blank lines are skipped
    -                                                    stdin: JSON lines if it begins with {, else a prompt per line

Rows are looked at one by one, not as one form: nothing is trained, so a row of another form is not a fault. One that
can't be asked keeps its place and says why.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.config import DataConfig
from deltaw.data.asking import Prompt
from deltaw.data.columns import Columns
from deltaw.data.document import Chat, Completion, Single
from deltaw.data.forms import detect_form
from deltaw.data.preferences import BOTH, form_for
from deltaw.data.read import read_rows
from deltaw.data.row import Problem, Row, says_something
from deltaw.errors import InputError, Rejected
from deltaw.files.encoding import without_setting
from deltaw.show.text import one_line

ANSWERS = {  # the columns that ask, in the order in which they are looked for, and the one that answers
    "prompt": "completion",
    "question": "answer",
    "query": "response",
    "instruction": "output",
    "input": "output",
    "source": "target",
}
CHATS = {  # columns of messages, and a stand-in for the answer
    "messages": {"role": "assistant", "content": "."},
    "conversations": {"from": "gpt", "value": "."},
}
LINES = (".txt", ".md")
ASKS = "prompt, question, instruction, text or messages"


@dataclass(frozen=True)
class PromptRow:
    """A row as it stood (`fields`), and what is to be asked; `problem`: why it can't be."""

    origin: str
    fields: dict[str, Any]
    prompt: Prompt = ""
    tools: tuple[dict[str, Any], ...] = ()
    problem: str = field(default="")


def read_prompts(source: str) -> list[PromptRow]:
    """The rows of `source` in order, those that can't be read or asked among them. Raises InputError for a source that
    can't be read, or that holds no row."""
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source}: is a folder", fix="name one file of prompts")
    lines = path.suffix.lower() in LINES and path.is_file()
    rows = list(_lines(_text(path), path.name)) if lines else _rows(source)
    if not rows:
        raise InputError(f"{source}: no prompts in it", fix="write one per line, or rows with prompt or messages")
    return rows


def prompts_of_text(text: str) -> list[PromptRow]:
    """The same of what came through a pipe. Raises InputError."""
    if not text.lstrip().startswith("{"):
        rows = list(_lines(text, "stdin"))
        if not rows:
            raise InputError("stdin: no prompts in it", fix="send one per line, or JSON lines")
        return rows
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stdin.jsonl"
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
        return read_prompts(str(file))


def _rows(source: str) -> list[PromptRow]:
    try:
        rows, problems = read_rows(source)
    except InputError as error:
        raise InputError(without_setting(error.what), fix=without_setting(error.fix or "") or None) from None
    problems = [Problem(problem.origin, without_setting(problem.reason)) for problem in problems]
    every = [*map(asked, rows), *(PromptRow(problem.origin, {}, problem=problem.reason) for problem in problems)]
    return sorted(every, key=lambda row: int(row.origin.rpartition(":")[2]))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start:,}", fix="save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def _lines(text: str, name: str) -> Iterator[PromptRow]:
    for number, line in enumerate(text.split("\n"), 1):
        prompt = line.removesuffix("\r")
        if prompt.strip():
            yield PromptRow(f"{name}:{number}", {"prompt": prompt}, prompt)


def asked(row: Row) -> PromptRow:
    """What a row asks, or why it doesn't."""
    try:
        prompt, tools = _prompt(row)
    except Rejected as rejected:
        return PromptRow(row.origin, row.value, problem=str(rejected))
    except InputError:  # a row without any column that asks
        names = [str(name) for name, value in row.value.items() if says_something(value)]
        why = f"none of its columns asks: with something in them there are {', '.join(names) or 'none'}, not {ASKS}"
        return PromptRow(row.origin, row.value, problem=one_line(why, 200))
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        return PromptRow(row.origin, row.value, problem="its prompt is empty")
    return PromptRow(row.origin, row.value, prompt, tools)


def _prompt(row: Row) -> tuple[Prompt, tuple[dict[str, Any], ...]]:
    """What is asked, and the tools with it. Raises Rejected, or InputError."""
    value = {name: row.value[column] for name, column in Columns().of(row.value).items()}
    if all(value.get(name) is not None for name in BOTH):  # any of its answers will do
        form, chat = form_for("any", [row], DataConfig(train=row.origin), templated=True), True
        return prompt_of(form.normalise(row).answers[0][0], chat)
    value, chat = _with_answer(value)
    if isinstance(value.get("text"), str) and not chat and not any(name in value for name in ANSWERS):
        return value["text"], ()
    document = detect_form([Row(value, row.origin)]).normalise(Row(value, row.origin))
    return prompt_of(document.answers[0][0], chat)


def prompt_of(document: Single, chat: bool) -> tuple[Prompt, tuple[dict[str, Any], ...]]:
    """What a document asks, and the tools with it. `chat`: also a single question is messages."""
    match document:
        case Completion(prompt=prompt):
            return prompt, ()
        case Chat(messages=messages, tools=tools):
            last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
            before = [{key: item for key, item in message.items() if key != "weight"} for message in messages[:last]]
            if not chat and len(before) == 1 and not tools:
                return str(before[0]["content"]), ()  # a question by itself is a text, however pairs are trained
            return before, tools
    return document.text, ()


def _with_answer(value: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The row with a stand-in for the answer that it lacks, and whether it is a chat."""
    for name, answer in CHATS.items():
        turns = value.get(name)
        if isinstance(turns, list):
            last = turns[-1] if turns and isinstance(turns[-1], dict) else {}
            answered = last.get("role", last.get("from")) in ("assistant", "gpt")
            return (value if answered or not turns else {**value, name: [*turns, answer]}), True
    for name, wanted in ANSWERS.items():
        if value.get(name) is not None:
            return {**value, wanted: "."}, isinstance(value[name], list)
    return value, False
