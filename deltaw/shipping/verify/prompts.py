"""What two sides are asked: held-out rows as text or messages, not as ids, since each side writes them for itself.

    a run            its own held-out rows, spread over them
    --data FILE      rows of a file in any form that training takes
    neither          the first words of the built-in passages of general text, every other one as a chat where the
                     adapter wasn't trained on plain prompts

A completion row gives its prompt as it is, a chat everything before its last answer, a text the MOST_WORDS it begins
with, or its first half. A row whose text contains a control token is left out: deltaw reads it as characters, servers
read it as the token.
"""

from collections.abc import Sequence

from deltaw.config import DataConfig, RunConfig
from deltaw.config.sources import SourceValue, label
from deltaw.data.cache import prepared_held_out
from deltaw.data.document import Chat, Completion, Single
from deltaw.data.example import Example
from deltaw.data.forms import Form
from deltaw.data.preferences import form_for
from deltaw.data.read import read_rows
from deltaw.data.render import Renderer
from deltaw.data.row import Row
from deltaw.data.sources import read_sources
from deltaw.errors import InputError, Rejected
from deltaw.evaluation.held_out import spread
from deltaw.shipping.verify.sides.side import Prompt
from deltaw.show.progress import Display

GENERAL, FIRST_WORDS = "builtin:general", 24
MOST_WORDS = 200  # of a text's first half
MOST_CHARACTERS = 6_000  # of a prompt: a comparison doesn't need long ones, and servers have small contexts


def held_out_prompts(config: RunConfig, renderer: Renderer, count: int, display: Display) -> list[Prompt]:
    """`count` of a run's held-out rows. Raises InputError if it held none out."""
    data = config.data
    if data.eval is None:
        raise InputError("this run held no rows out, so there is nothing to ask", fix="name a file with --data")
    with display.task("reading held-out rows", 1) as progress:
        rows = [row for row in prepared_held_out(data, renderer, display=display) if not row.names]
        source = data.train if data.eval_sources is None else data.eval_sources
        if any(
            row.context or row.goes_on for row in rows
        ):  # pieces of texts: the rest of a text may have been trained on
            prompts = [prompt for row in rows if (prompt := _beginning(row, renderer)).content]
        else:
            templated = renderer.template is not None
            prompts = prompts_of(source, data, templated=templated, only={row.origin for row in rows})
        progress(1)
    return _chosen(prompts, count, label(source))


def file_prompts(source: str, count: int, renderers: Sequence[Renderer], display: Display) -> list[Prompt]:
    """`count` rows of a data file, without those that contain a control token of one of `renderers`."""
    templated = all(renderer.template is not None for renderer in renderers)
    prompts = prompts_of(source, DataConfig(train=source), templated=templated)
    alike = [one for one in prompts if not any(renderer.controls(str(one.content)) for renderer in renderers)]
    if len(alike) < len(prompts):
        display.say(f"{source}: {len(prompts) - len(alike)} rows contain a control token and aren't asked")
        if not alike:
            raise InputError(f"{source}: all its rows contain a control token", fix="name another file with --data")
    return _chosen(alike, count, source)


def general_prompts(count: int, *, chats: bool) -> list[Prompt]:
    """Beginnings of passages, every other one as a question in a chat if `chats`."""
    rows, _ = read_rows(GENERAL)
    prompts = []
    for number, row in enumerate(rows[:count]):
        words = " ".join(str(row.value["text"]).split()[:FIRST_WORDS])
        content = ({"role": "user", "content": f"Go on: {words}"},) if chats and number % 2 else words
        prompts.append(Prompt(content, row.origin))
    return prompts


def prompts_of(
    sources: SourceValue, data: DataConfig, *, templated: bool, only: set[str] | None = None
) -> list[Prompt]:
    """The prompts of the sources' rows (only those whose origin is in `only`, if given); empty ones are left out."""
    prompts: list[Prompt] = []
    for _, _, rows, _, _ in read_sources(sources, data):
        form = form_for("any", rows, data, templated=templated)
        prompts += _prompts(rows, form, only)
    return prompts


def _prompts(rows: Sequence[Row], form: Form, only: set[str] | None) -> list[Prompt]:
    prompts = []
    for row in rows:
        if only is not None and row.origin not in only:
            continue
        try:
            prompt = _prompt(form.normalise(row).answers[0][0], row.origin)
        except Rejected:
            continue
        if prompt is not None and len(str(prompt.content)) <= MOST_CHARACTERS:
            prompts.append(prompt)
    return prompts


def _prompt(document: Single, origin: str) -> Prompt | None:
    match document:
        case Completion(prompt=prompt):
            return Prompt(prompt, origin) if prompt else None
        case Chat(messages=messages, tools=tools):
            last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=0)
            asked = tuple({k: v for k, v in message.items() if k != "weight"} for message in messages[:last])
            return Prompt(asked, origin, tuple(tools)) if asked else None
    words = document.text.split(" ")
    half = " ".join(words[: max(1, min(len(words) // 2, MOST_WORDS))])
    return Prompt(half, origin) if half.strip() else None


def _beginning(piece: Example, renderer: Renderer) -> Prompt:
    """The beginning of what a piece of a text has of its own."""
    own = piece.tokens[piece.context :].tolist()
    return Prompt(renderer.decode(own[: max(1, min(len(own) // 2, MOST_WORDS))]), piece.origin)


def _chosen(prompts: Sequence[Prompt], count: int, source: str) -> list[Prompt]:
    chosen = spread(prompts, count)
    if not chosen:
        raise InputError(
            f"{source}: none of its rows has a prompt of at most {MOST_CHARACTERS:,} characters",
            fix="name another file with --data",
        )
    return chosen
