"""What a file of rows can do to a run: lines that can't be read, rows that aren't what they should be, that train
nothing, that are too long, too few, or on both sides of the border.

The rule behind all of them: every line is a row or a counted problem that names it. Where a figure is checked it is
worked out here in another way than deltaw does.
"""

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

from deltaw.config import DataConfig
from deltaw.data.prepare import prepare
from deltaw.data.read import MAX_LINE, read_rows
from tests.data.toys import CHATML, TEMPLATED
from tests.faults.common import QUIET, clear_error, config, metrics
from tests.faults.fault import expect, fault
from tests.faults.rows import END, TOOLS, chat, expect_sound, lines_of, pairs, read, renderer, said, trained, write

UNMEASURED = {"metrics": [], "general": None, "report": False}

# What is not to be trained, by form: (good row of the form, row that trains nothing)
MASKED = (
    (chat("q", "a"), chat("q", "a", weight=0)),
    (chat("q", "a"), chat("q", "a", "q", "b", weight=0)),
    (chat("q", "a"), {"messages": chat("q", "a")["messages"][:1]}),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]},
    ),
    (chat("q", "a"), chat("q", "")),
    (chat("q", "a"), chat("q", "", tool_calls=[{"function": {"name": "f", "arguments": {}}}])),
    (pairs(1)[0], {"prompt": "p", "completion": ""}),
    (pairs(1)[0], {"prompt": "p", "completion": "\n "}),
    (pairs(1)[0], {"prompt": "a b " * 40, "completion": "cut off"}),
    ({"text": "a b"}, {"text": ""}),
    ({"text": "a b"}, {"text": " \n\t "}),
)


@fault(27, "rows of which no token is trained: counted, left out, warned of", tries=55, sample=11, at_once=55)
def rows_all_masked(n: int, scratch: Path) -> None:
    good, masked = MASKED[n % len(MASKED)]
    dice = random.Random(f"masked-{n}")
    bad = {dice.randint(1, 20) for _ in range(dice.randint(1, 6))}
    rows = [masked if line in bad else good for line in range(1, 22)]
    cut = {"max_length": 40, "too_long": "truncate"}
    dataset = read(scratch, rows, **cut)
    report = dataset.report
    expect(report.train_rows == 21 - len(bad), f"{report.train_rows} rows are trained, {len(bad)} train nothing")
    expect(report.unusable + report.untrained == len(bad), report)
    expect(lines_of(report.problems or report.too_long) == sorted(bad), report.problems or report.too_long)
    expect(any(str(len(bad)) in warning for warning in report.warnings), report.warnings)
    expect_sound(dataset)
    clear_error(lambda: read(scratch, [masked] * 3, **cut), "train.jsonl")


@fault(27, "a run on a file of such rows: no 0/0, the loss is that of the others", tries=1)
def run_with_rows_all_masked(n: int, scratch: Path) -> None:
    rows = [chat(f"q {i}", f"a {i}", weight=int(i % 3 > 0)) for i in range(30)]
    losses = []
    for name, some in (("all", rows), ("good", [row for row in rows if row["messages"][1]["weight"]])):
        data = {"train": write(scratch, some), "bad_rows": 1.0}
        losses.append(_losses(config(scratch / name, data=data, evaluate=UNMEASURED)))
    expect(losses[0] == losses[1] and all(loss > 0 for loss in losses[0]), losses)


def _losses(settings: Any) -> list[float]:
    """Train, and say the steps' losses."""
    from deltaw.training.run import train

    train(settings, display=QUIET)
    return [line["loss"] for line in metrics(Path(settings.output)) if "loss" in line]


GOOD = b'{"prompt": "p", "completion": "c"}'
# Bytes of one line and what is said of it; None: it is a row like any other, "": it is empty and counts as a line.
LINES: tuple[tuple[bytes, str | None], ...] = (
    (b'{"prompt": "p", ', "not JSON"),
    (b"prompt: p", "not JSON"),
    (b"{'prompt': 'p'}", "not JSON"),
    (b'{"prompt": "p", "completion": "c"},', "not JSON"),
    (GOOD + GOOD, "not JSON"),
    (b"", ""),
    (b" \t", ""),
    (b"\r", ""),
    (GOOD + b"\r", None),
    (b"\xef\xbb\xbf" + GOOD, "BOM"),
    (b'{"prompt": "p", "completion": "\\ud83d"}', "lone surrogate"),
    (b'{"prompt": "p", "completion": "\xed\xa0\xbd"}', "not UTF-8"),
    (b'{"prompt": "p", "completion": "\xff"}', "not UTF-8"),
    (b'{"prompt": "p", "completion": "a\0b"}', "not JSON"),
    (b'{"prompt": "p", "completion": "a\\u0000b"}', "NUL"),
    (b"\0" * 100, "not JSON"),
    (b'{"prompt": "p", "completion": NaN}', "NaN"),
    (b'{"prompt": "p", "completion": "c", "completion": "d"}', "twice"),
    (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "too many digits"),
    (b'["p", "c"]', "expected an object"),
    (b"null", "expected an object"),
    (b'{"prompt": "p", "completion": "\xef\xb7\x90"}', "U+FDD0"),
)


@fault(47, "a JSONL line that can't be read: named, counted, the others are read", tries=69, sample=23, at_once=69)
def bad_line(n: int, scratch: Path) -> None:
    line, reason = LINES[n % len(LINES)]
    at = 1 + n % 7 + (n < 23)  # not the first line: there a BOM is allowed
    rows = [GOOD] * (at - 1) + [line] + [GOOD] * (9 - at)
    report = read(scratch, rows).report
    bad = bool(reason)
    expect(report.rows_read == 9 - (reason == ""), report)
    expect((report.train_rows, report.unusable) == (8 + (reason is None), int(bad)), report)
    if reason:
        expect(lines_of(report.problems) == [at] and reason in report.problems[0], report.problems)
        stopped = clear_error(lambda: read(scratch, rows, bad_rows=0.05), f"train.jsonl:{at}:", "1 of 9", "bad_rows")
        expect(reason in stopped, stopped)


@fault(47, "a JSONL file cut off in its last line, with a BOM or CRLF, in UTF-16", tries=40, sample=40, at_once=40)
def cut_off(n: int, scratch: Path) -> None:
    file = scratch / "train.jsonl"
    if 0 < n < len(GOOD):
        file.write_bytes(GOOD + b"\n" + GOOD[:n])
        rows, problems = read_rows(str(file))
        expect([row.origin for row in rows] == ["train.jsonl:1"], rows)
        expect(len(problems) == 1 and "train.jsonl:2" in str(problems[0]) and "cut off?" in str(problems[0]), problems)
    elif n in (0, len(GOOD), len(GOOD) + 1, len(GOOD) + 2):
        mark, end = b"\xef\xbb\xbf" * (n % 2), b"\r\n" if n else b"\n"
        file.write_bytes(mark + GOOD + end + end + GOOD + (end if n % 3 else b""))
        rows, problems = read_rows(str(file))
        expect([row.origin for row in rows] == ["train.jsonl:1", "train.jsonl:3"] and not problems, (rows, problems))
        expect(all(row.value == json.loads(GOOD) for row in rows), rows)
    else:
        encoding = ("utf-16", "utf-16-le", "utf-16-be", "utf-32")[n % 4]
        file.write_bytes(GOOD.decode().encode(encoding))
        clear_error(lambda: read_rows(str(file)), "train.jsonl", "UTF-8")


@fault(47, "a line of 100 MiB: counted, never held in memory", tries=2, sample=1)
def a_line_of_100_mib(n: int, scratch: Path) -> None:
    file = scratch / "train.jsonl"
    with file.open("wb") as out:
        out.write(GOOD + b'\n{"prompt": "')
        out.truncate(100 * 2**20)  # a hole: reads as zeros
        out.seek(0, 2)
        out.write(b"" if n else b"\n" + GOOD + b"\n")
    tracemalloc.start()
    try:
        rows, problems = read_rows(str(file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    expect([row.origin for row in rows] == ["train.jsonl:1", "train.jsonl:3"][: 2 - n], rows)
    expect([problem.origin for problem in problems] == ["train.jsonl:2"] and "MiB" in str(problems[0]), problems)
    expect(peak < 2.5 * MAX_LINE, f"{peak / 2**20:.0f} MiB held at once")


SPLICES = (
    b"\0",
    b"\n",
    b"\r\n",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xc3",
    b"\\ud800",
    b"NaN",
    b"9" * 99,
)


def mutated(dice: random.Random, data: bytes) -> bytes:
    """One to four of: a bit flipped, a splice put in, a stretch cut out or doubled, the end cut off."""
    for _ in range(dice.randint(1, 4)):
        a, b = sorted(dice.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + 40)
        match dice.randrange(5):
            case 0 if a < len(data):
                data = data[:a] + bytes([data[a] ^ 1 << dice.randrange(8)]) + data[a + 1 :]
            case 1:
                data = data[:a] + dice.choice(SPLICES) + data[a:]
            case 2:
                data = data[:a] + data[b:]
            case 3:
                data = data[:b] + data[a:]
            case _:
                data = data[: max(a, 30)]
    return data


@fault(47, "a JSONL file with bytes changed at random: rows + problems = lines", tries=2000, sample=100, at_once=250)
def mutated_rows(n: int, scratch: Path) -> None:
    dice = random.Random(f"bytes-{n}")
    values: list[Any] = [chat(said(dice), said(dice)) for _ in range(6)] if n % 2 else pairs(6)
    data = mutated(dice, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode())
    (scratch / "train.jsonl").write_bytes(data)
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    filled = [number for number, line in enumerate(lines, 1) if line.strip()]
    try:
        rows, problems = read_rows(str(scratch / "train.jsonl"))
    except Exception:
        clear_error(lambda: read_rows(str(scratch / "train.jsonl")), "train.jsonl", "UTF-16")
        expect(data[:2] in (b"\xff\xfe", b"\xfe\xff"), f"refused as UTF-16: {data[:8]!r}")
        return
    numbers = lines_of([row.origin for row in rows] + [problem.origin for problem in problems])
    expect(sorted(numbers) == filled, f"{sorted(numbers)} of the lines {filled}")
    for row in rows:
        expect(json.loads(lines[int(row.origin.split(":")[1]) - 1]) == row.value, f"{row.origin} is another line")
    _expect_all_told_apart(scratch / "train.jsonl", len(filled))


def _expect_all_told_apart(file: Path, lines: int) -> None:
    from deltaw.errors import InputError

    settings = DataConfig(train=str(file), bad_rows=1.0, max_length=60)
    try:
        dataset = prepare(settings, renderer())
    except InputError:
        clear_error(lambda: prepare(settings, renderer()), "train.jsonl")
        return
    report = dataset.report
    expect(report.rows_read == lines, f"{report.rows_read} read of {lines}")
    expect(report.train_rows + report.unusable + report.too_long_dropped == lines, report)
    expect_sound(dataset)


@fault(47, "a CSV whose quote never closes: an error with its row, not one long field", tries=1)
def open_quote(n: int, scratch: Path) -> None:
    (scratch / "t.csv").write_text('text\na\n"b\nc\nd\n')
    clear_error(lambda: read_rows(str(scratch / "t.csv")), "t.csv:2", "quote")


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
# Rows that can't be trained on, among good chats, and what is said of each.
ROWS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"prompt": "p", "completion": "c"}, "no messages"),
    ({"text": "t"}, "no messages"),
    ({}, "no messages"),
    ({"messages": None, "prompt": "p"}, "no messages"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "no messages"),
    ({"messages": []}, "messages is empty"),
    ({"messages": "q"}, "messages is a string"),
    ({"messages": {"role": "user"}}, "messages is an object"),
    ({"messages": [USER, "a"]}, "item 2 is a string"),
    ({"messages": [USER, None]}, "item 2 is null"),
    ({"messages": [USER, {"content": "a"}]}, "message 2 has no role"),
    ({"messages": [{"role": "narrator", "content": "q"}, ANSWER]}, "message 1: unknown role 'narrator'"),
    ({"messages": [{"role": ["user"], "content": "q"}, ANSWER]}, "message 1: unknown role"),
    ({"messages": [{"role": "Assistant", "content": "a"}]}, "unknown role 'Assistant'"),
    ({"messages": [USER, {"role": "assistant", "content": 7}]}, "message 2 has a number"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 has no content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]}, "vision and audio"),
    ({"messages": [{"role": "user"}, ANSWER]}, "message 1 has no content"),
    ({"messages": [USER]}, "no assistant message"),
    ({"messages": [{"role": "system", "content": "s"}, USER]}, "no assistant message"),
    ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "message 2 is an empty answer"),
    ({"messages": [USER, {**ANSWER, "weight": "0"}]}, "message 2 has the weight '0'"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "message 2 has the weight 0.5"),
    ({"messages": [USER, ANSWER], "tools": "{"}, "tools is a text, but not JSON"),
    ({"messages": [USER, ANSWER], "tools": 3}, "tools is a number"),
    ({"messages": [USER, ANSWER], "tools": [{"name\ud800": 1}]}, "lone surrogate"),
)


@fault(48, "a row of another schema, without role, with content that isn't text, …", tries=26, sample=26, at_once=26)
def odd_row(n: int, scratch: Path) -> None:
    row, reason = ROWS[n]
    rows = [*[chat("q", "a")] * n, row, *[chat("q", "a")] * (50 - n)]
    report = read(scratch, rows, renderer(template=TOOLS), bad_rows=0.02).report
    expect((report.train_rows, report.unusable) == (50, 1), report)
    expect(lines_of(report.problems) == [n + 1] and reason in report.problems[0], report.problems)
    expect("1 row can't be used" in report.warnings[0], report.warnings)
    words = (f"train.jsonl:{n + 1}:", "1 of 51", "bad_rows")
    stopped = clear_error(lambda: read(scratch, rows, renderer(template=TOOLS), bad_rows=0.01), *words)
    expect(reason in stopped, stopped)


@fault(
    48, "several such rows: all counted, by line; more than data.bad_rows stop the run", tries=60, sample=6, at_once=60
)
def odd_rows(n: int, scratch: Path) -> None:
    dice = random.Random(f"odd-{n}")
    bad = sorted(dice.sample(range(1, 41), dice.randint(1, 12)))
    unreadable = [b"{", b"[]", b'{"a": 1, "a": 2}']
    rows = [
        dice.choice([*unreadable, *(row for row, _ in ROWS[:20])]) if i in bad else chat(f"q{i}", "a")
        for i in range(1, 41)
    ]
    report = read(scratch, rows).report
    expect((report.rows_read, report.unusable, report.train_rows) == (40, len(bad), 40 - len(bad)), report)
    expect(lines_of(report.problems) == bad[:10], f"{report.problems} of {bad}")
    expect(
        f"{len(bad)} row{'s' * (len(bad) > 1)} can't be used; the first: train.jsonl:{bad[0]}:" in report.warnings[0],
        report.warnings,
    )
    clear_error(
        lambda: read(scratch, rows, bad_rows=len(bad) / 40 - 0.02), f"{len(bad)} of 40", f"train.jsonl:{bad[0]}:"
    )


REFUSING = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('must start with a user') }}{% endif %}" + CHATML
)  # as many models' do


@fault(
    48, "an assistant that speaks first: trained where the mask is proven, else counted", tries=6, sample=6, at_once=6
)
def assistant_first(n: int, scratch: Path) -> None:
    row = {"messages": [{"role": "assistant", "content": "hello"}, USER, ANSWER]}
    if n == len(TEMPLATED):
        report = read(scratch, [chat("q", "a"), row], renderer(template=REFUSING)).report
        expect(lines_of(report.problems) == [2] and "must start with a user" in report.problems[0], report)
        return
    kind = TEMPLATED[n]
    (example,) = read(scratch, [row], renderer(kind)).train
    expect([text.strip() for text in trained(example, kind)] == [word + END[kind] for word in ("hello", "a")], kind)


@fault(50, "rows longer than data.max_length: cut or left out, counted by line", tries=60, sample=6, at_once=60)
def too_long(n: int, scratch: Path) -> None:
    dice = random.Random(f"long-{n}")
    rows = [{"prompt": "a " * dice.randint(1, 40), "completion": "b " * dice.randint(1, 40)} for _ in range(30)]
    limit, cut = dice.randint(10, 60), bool(n % 2)
    whole = read(scratch, rows).train
    over = [i for i, example in enumerate(whole, 1) if len(example.tokens) > limit]
    lost = [i for i in over if not cut or not whole[i - 1].loss_mask[:limit].any()]
    if len(lost) == len(rows):
        clear_error(lambda: read(scratch, rows, max_length=limit, too_long="truncate" if cut else "drop"), "max_length")
        return
    dataset = read(scratch, rows, max_length=limit, too_long="truncate" if cut else "drop")
    report = dataset.report
    counts = (report.train_rows, report.too_long_dropped, report.untrained, report.truncated)
    expect(counts == (30 - len(lost), 0 if cut else len(lost), len(lost) if cut else 0, len(over) - len(lost)), counts)
    expect(lines_of(report.too_long) == over[:10] and report.unusable == 0, f"{report.too_long} of {over}")
    expect(sum("max_length" in warning for warning in report.warnings) == sum(map(bool, counts[1:])), report.warnings)
    for example in dataset.train:
        before = whole[int(example.origin.split(":")[1]) - 1]
        same = (example.tokens == before.tokens[:limit]).all() and (example.loss_mask == before.loss_mask[:limit]).all()
        expect(same and len(example.tokens) == min(limit, len(before.tokens)), f"{example.origin} isn't its beginning")
    expect_sound(dataset)


@fault(
    53,
    "copies of a row, rows both trained on and held out: reported with their number",
    tries=50,
    sample=10,
    at_once=50,
)
def copies_and_overlap(n: int, scratch: Path) -> None:
    dice = random.Random(f"copies-{n}")
    pool = pairs(30)
    train, held_out = ([dice.choice(pool) for _ in range(dice.randint(5, 60))] for _ in range(2))
    report = read(scratch, train, eval=write(scratch, held_out, "eval.jsonl")).report
    prompts = {row["prompt"] for row in train}
    duplicates, overlap = len(train) - len(prompts), sum(row["prompt"] in prompts for row in held_out)
    expect((report.duplicates, report.overlap) == (duplicates, overlap), report)
    wanted = {f"{duplicates} training row": duplicates, f"{overlap} held-out row": overlap}
    for words, count in wanted.items():
        expect(any(words in warning for warning in report.warnings) == (count > 0), report.warnings)
    split = read(scratch, train + train, eval=7)
    keys = {example.tokens.tobytes() for example in split.train}
    across = sum(example.tokens.tobytes() in keys for example in split.eval)
    expect(split.report.overlap == across, f"{split.report.overlap} said, {across} are")


SMALL: tuple[tuple[list[Any], dict[str, Any], tuple[str, ...]], ...] = (
    ([], {}, ("train.jsonl", "no rows")),
    ([b"", b"  "], {}, ("train.jsonl", "no rows")),
    ([b"{"], {}, ("train.jsonl:1", "not JSON")),
    (pairs(3), {"eval": 3}, ("train.jsonl", "3 usable rows", "data.eval")),
    (pairs(1), {"eval": 1}, ("train.jsonl", "1 usable row", "data.eval")),
    (pairs(1), {}, ()),
    (pairs(2), {}, ()),
    (pairs(2), {"eval": 1}, ()),
)


@fault(
    54, "no row, one row, fewer rows than the rank: a clear error or a run that learns", tries=8, sample=8, at_once=8
)
def few_rows(n: int, scratch: Path) -> None:
    rows, options, words = SMALL[n]
    data = {"train": write(scratch, rows), **options}
    settings = config(scratch / f"run-{n}", data=data, evaluate=UNMEASURED, train={"warmup_steps": 0})
    if words:
        clear_error(lambda: _losses(settings), *words)
        expect(not (scratch / f"run-{n}").exists(), "a run folder was left")
        return
    losses = _losses(settings)
    expect(len(losses) == 6 and 0 < losses[-1] < losses[0], losses)
