"""Which tokens are trained: the answer and its end-of-turn token, under every template under which that can be proven,
also where padding is eos; and a user's text never becomes a token that only a template may write.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaw.data.pack import pack
from deltaw.data.render import Renderer
from tests.data.toys import CHATML, KINDS, TEMPLATED, toy
from tests.faults.common import clear_error
from tests.faults.fault import expect, fault
from tests.faults.rows import END, TOOLS, chat, read, renderer, said, trained


@fault(49, "no {% generation %}: the answer and its end-of-turn token are trained", tries=100, sample=20, at_once=100)
def built_in_mask(n: int, scratch: Path) -> None:
    kind, dice = TEMPLATED[n % len(TEMPLATED)], random.Random(f"mask-{n}")
    turns = [said(dice) for _ in range(2 * dice.randint(1, 4))]
    (example,) = read(scratch, [chat(*turns)], renderer(kind)).train
    wanted = [answer + END[kind] for answer in turns[1::2]]
    expect([text.removeprefix(" ") for text in trained(example, kind)] == wanted, f"{trained(example, kind)}, {wanted}")
    expect(renderer(kind).end_of_turn == toy(kind).convert_tokens_to_ids(END[kind]), renderer(kind).end_of_turn)


EACH = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
UNPROVEN = (  # templates under which no answer can be told from its prompt
    "{{ messages | tojson }}",
    "{{ messages | length }}" + CHATML,
    CHATML.replace("in messages", "in messages[::-1]"),
    CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"),
    CHATML.replace("+ message.content +", "+ (message.content if message.role == 'user' else '') +"),
    EACH + "{{ m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}{{ add_generation_prompt }}",
    EACH + "{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}" + PROMPT,
    "{{ messages[-1].content }}<|im_end|>" + PROMPT,
)


@fault(49, "a template under which no mask can be proven: refused", tries=8, sample=8, at_once=8)
def unproven_mask(n: int, scratch: Path) -> None:
    clear_error(lambda: read(scratch, [chat("q", "a")] * 5, renderer(template=UNPROVEN[n])), "train.jsonl:1", "answer")


@fault(49, "a base without template, and one whose turns never end: said before training", tries=2, sample=2, at_once=2)
def no_end_of_turn(n: int, scratch: Path) -> None:
    if n:
        clear_error(lambda: read(scratch, [chat("q", "a")], renderer("plain")), "no chat template", "data.template")
        return
    endless = (
        EACH + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    report = read(scratch, [chat("q", "a")] * 3, renderer(template=endless)).report
    expect("3 of 3 rows train no end-of-turn token" in report.warnings[0], report.warnings)


@fault(51, "padding is eos: the end of every answer is trained all the same", tries=300, sample=50, at_once=300)
def pad_is_eos(n: int, scratch: Path) -> None:
    kind, dice = tuple(KINDS)[n % len(KINDS)], random.Random(f"pad-{n}")
    tokenizer = toy(kind)
    expect(tokenizer.pad_token_id == tokenizer.eos_token_id, "the toy's padding isn't eos")
    words = [[said(dice) for _ in range(2 * dice.randint(1, 3))] for _ in range(3)]
    rows = [chat(*turns) if kind in TEMPLATED else {"prompt": turns[0], "completion": turns[1]} for turns in words]
    examples = read(scratch, rows, renderer(kind)).train
    answers = sum(len(turns) // 2 if kind in TEMPLATED else 1 for turns in words)
    batch, end = pack(examples), tokenizer.convert_tokens_to_ids(END[kind])
    expect(int((batch.labels_T == end).sum()) == answers, f"{kind}: {answers} answers, and the labels {batch.labels_T}")
    for example in examples:  # no answer's tokens go on behind its end, and each stretch has one
        stretches = trained(example, kind)
        expect(all(text.endswith(END[kind]) and text.count(END[kind]) == 1 for text in stretches), stretches)


@fault(52, "control tokens' names in users' texts never become control tokens", tries=100, sample=20, at_once=100)
def names_of_control_tokens(n: int, scratch: Path) -> None:
    kind, dice = TEMPLATED[n % len(TEMPLATED)], random.Random(f"names-{n}")
    names = KINDS[kind][3]
    parts = [name[:i] for name in names for i in (2, len(name) - 1)] + [name[1:] for name in names]
    turns = [said(dice, [*names * 3, *parts]) + dice.choice(names) for _ in range(2 * dice.randint(1, 3))]
    field = {"name": dice.choice(names)} if n % 2 else {}
    if kind in ("chatml", "generation"):
        field |= {"tools": [{"name": dice.choice(names), dice.choice(names): {dice.choice(names): said(dice, names)}}]}
        field |= {"system": dice.choice(names)}
    _expect_no_controls(scratch, renderer(kind, TOOLS if "tools" in field else None), kind, turns, field)
    tokenizer, row = toy(kind), {"prompt": turns[0], "completion": turns[1]}
    ids = read(scratch, [row], renderer(kind)).train[0].tokens.tolist()
    controls = [token for token in ids if token in tokenizer.all_special_ids]
    expect(sum(token in _ids(kind) for token in ids) == 1 + KINDS[kind][4], f"{kind}: {controls} in {row}")


def _ids(kind: str) -> set[int]:
    return set(toy(kind).convert_tokens_to_ids(KINDS[kind][3]))


def _expect_no_controls(folder: Path, by: Renderer, kind: str, turns: Sequence[str], field: dict[str, Any]) -> None:
    """As many control tokens as in the same conversation about nothing, and every character of it is still there."""
    row = chat(*turns) | {"tools": field.get("tools", [])}
    plain = chat(*["x"] * len(turns)) | {"tools": [{"name": "x", "y": {"z": "x"}}] if "tools" in field else []}
    ids, bare = (read(folder, [some], by).train[0].tokens.tolist() for some in (row, plain))
    found, wanted = ([token for token in some if token in _ids(kind)] for some in (ids, bare))
    expect(found == wanted, f"{kind}: {len(found)} control tokens, the template wrote {len(wanted)}: {row}")
    text = by.decode(ids, False)
    expect(all(turn.strip() in text for turn in turns), f"{kind}: a text was lost: {text!r}")
