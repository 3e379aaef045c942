"""The process in which strangers' chat templates and regular expressions run. bounded.py starts it, nothing imports it.

A template is a program. Jinja's immutable sandbox keeps it from Python's insides, as in transformers; this process is
what stands behind the sandbox, and what time and memory are taken from. After its imports it gives up, for good:

    files, sockets          RLIMIT_NOFILE is what is open now, two pipes and /dev/null: nothing can be opened
    memory                  RLIMIT_AS `memory` bytes above what the interpreter takes
    processes, core files   RLIMIT_NPROC 0, RLIMIT_CORE 0; root, whom the former doesn't bind, becomes nobody first
    time                    an alarm kills it when its parent, which has a clock of its own, is gone

It runs by itself (`python -I bounded_worker.py LIMITS`), on Jinja and the standard library only: it is up in a tenth
of a second, and what it can't see (the environment, deltaw, torch) can't be reached from it. Who got out of the sandbox
would be left with what needs no descriptor (making and removing files, sending signals) and its user's rights.

One JSON value per line. First comes {"ready": true}, then the answers to

    {id, source, variables}   {words} or {error, line}: compile a template and keep it as `id`; `words` are the texts
                              and the names of attributes that stand in its expressions
    {id, rows, late}          {unknown: true}, or as many answers as rows, each a list of texts, `late` seconds after
                              the one before at the latest or as soon as it is there
    {keys, paths, seconds}    the number of each key before it is tried (so that who waits knows which one took too
                              long), then {taken: [the number of each path's first key, or null]}, or {error: why the
                              last key is none}; a clock that counts computing time alone ends the process

Each has an `alarm`, the seconds after which the process ends by itself.

The rows stand on the lines that follow: [messages, tools, prefixes]. A prefix [n, p] asks for the text of messages[:n],
with the generation prompt where p is true. A text is [length, rest]: the rest behind so much of the first text (of
nothing for the first). The texts of a chat are mostly beginnings of one another, and this makes what is sent linear in
the chat's length. In place of a text that the template refuses stands its reason; if it was the first, no more come.

Most templates write one message after the other, and what they write of a message doesn't depend on those behind it.
Where the source proves that (`with_marks`), a chat is written once, with a mark in front of every message, and its
beginnings are cut at the marks; in any doubt each is written by itself.

    allowed    one loop over `messages`, at the top; `messages` nowhere else but in `messages[0]`; of `loop` only first,
               index, index0; `add_generation_prompt` behind the loop alone, and there nothing but it and what is fixed

Differences from transformers' environment, both for the sake of a run that can be repeated: `strftime_now` gives a
fixed date (a template that writes today's would change the data's fingerprint overnight), and `{% generation %}` writes
its body and marks nothing (masks come from prefixes, see `render.py`).
"""

import codecs
import contextlib
import html  # noqa: F401  (what is so marked is imported by Jinja when it needs it, and then nothing can be opened)
import json
import os
import pprint  # noqa: F401
import re
import resource
import signal
import sys
import textwrap  # noqa: F401
import time
import unicodedata  # noqa: F401
from datetime import datetime
from typing import Any

import jinja2
import jinja2.constants
import jinja2.debug
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_PRODUCT = 2**20  # the longest text, and the largest number, that `*` and `**` may make
TODAY = datetime(2026, 1, 1)
KEPT = 8  # compiled templates
NOBODY = 65534

MARK = os.urandom(16).hex()  # no message can know it
OF_LOOP = ("first", "index", "index0")
OTHERS = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block, nodes.Macro, nodes.CallBlock)


class Compiled:
    """A template, and where that can be had the same with marks. `tails`: what it writes behind the messages."""

    def __init__(self, template: jinja2.Template, marked: jinja2.Template | None, variables: dict[str, str]) -> None:
        self.template, self.marked, self.variables = template, marked, variables
        self.tails: dict[bool, str] = {}


class Refused(Exception):
    """The template asks for more than it may have."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a bound on products: interception also keeps the compiler from working them out."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            small = all(isinstance(value, int | float) and abs(value) <= 1024 for value in (left, right))
        else:
            size = [value if isinstance(value, int | float) else len(value) for value in (left, right)]
            small = abs(size[0] * size[1]) <= MAX_PRODUCT
        if not small:
            raise jinja2.sandbox.SecurityError(f"a product too large ({operator})")
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}` is its body."""

    tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> Sandbox:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
        # Never escaped to ASCII, so that the marks of `encode.py` stay what they are.
        known = {key: options[key] for key in ("separators", "sort_keys") if key in options}
        return json.dumps(value, ensure_ascii=False, indent=indent, **known)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment


def compiled(environment: Sandbox, templates: dict[str, Compiled], request: dict[str, Any]) -> dict[str, Any]:
    """Compile and keep a template; the oldest of too many goes."""
    try:
        template = environment.from_string(request["source"])
        words = named(environment.parse(request["source"]))
        tree = with_marks(environment.parse(request["source"]), set(request["variables"]))
        marked = None if tree is None else environment.from_string(tree)
    except Exception as error:  # the compiler's own, and Python's on what it made
        return {"error": reason(error), "line": getattr(error, "lineno", None)}
    if len(templates) >= KEPT:
        del templates[next(iter(templates))]
    templates[request["id"]] = Compiled(template, marked, request["variables"])
    return {"words": words}


def named(tree: nodes.Template) -> list[str]:
    """The texts and attributes in a template's expressions."""
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    texts |= {node.attr for node in tree.find_all(nodes.Getattr)}
    return sorted(text for text in texts if text.encode(errors="ignore").decode() == text)


def with_marks(tree: nodes.Template, variables: set[str]) -> nodes.Template | None:
    """A template that writes a mark in front of every message and behind the last; None where its beginnings may not be
    beginnings of what it writes."""
    loops = [at for at, node in enumerate(tree.body) if isinstance(node, nodes.For) and _is(node.iter, "messages")]
    if len(loops) != 1 or any(next(tree.find_all(kind), None) is not None for kind in OTHERS):
        return None
    loop, behind = tree.body[loops[0]], tree.body[loops[0] + 1 :]
    assert isinstance(loop, nodes.For)
    fine = {id(loop.iter)}
    fine |= {id(node.node) for node in tree.find_all(nodes.Getitem) if _is(node.arg, 0)}
    fine |= {id(node.node) for node in tree.find_all(nodes.Getattr) if node.attr in OF_LOOP and _is(node.node, "loop")}
    after = {id(name): name.name for node in behind for name in [*_names(node)]}
    for name in tree.find_all(nodes.Name):
        if id(name) in after:
            if (name.name != "add_generation_prompt" and name.name not in variables) or name.ctx != "load":
                return None
        elif name.name in ("messages", "loop", "add_generation_prompt", "self", "lipsum") and id(name) not in fine:
            return None
    random = any(node.name == "random" for node in tree.find_all(nodes.Filter))
    if random or loop.test or loop.else_ or loop.recursive or not isinstance(loop.target, nodes.Name):
        return None
    mark = [nodes.Output([nodes.TemplateData(MARK)])]
    loop.body[:0] = mark
    tree.body[loops[0] + 1 : loops[0] + 1] = mark
    assert tree.environment is not None
    tree.set_environment(tree.environment)
    return tree


def _names(node: nodes.Node) -> list[nodes.Name]:
    return [*([node] if isinstance(node, nodes.Name) else []), *node.find_all(nodes.Name)]


def _is(node: nodes.Node, value: str | int) -> bool:
    """Whether it is the name, or the number."""
    if isinstance(value, str):
        return isinstance(node, nodes.Name) and node.name == value
    return isinstance(node, nodes.Const) and node.value == value and type(node.value) is int


def written(compiled: Compiled, row: list[Any], most: int) -> list[Any]:
    """The texts of a row."""
    return cut_at_marks(compiled, row, most) or written_apart(compiled, row, most)


def cut_at_marks(compiled: Compiled, row: list[Any], most: int) -> list[Any]:
    """The same from one text with marks; nothing where there are none, or anything is unusual."""
    messages, tools, prefixes = row
    if compiled.marked is None or len(prefixes) < 2 or not all(0 < n <= len(messages) for n, _ in prefixes):
        return []
    try:
        whole, ends = marked(compiled, messages, tools, prefixes[0][1])
        if prefixes[0][0] != len(messages) or len(ends) != len(messages) + 1:
            return []
        compiled.tails[prefixes[0][1]] = whole[ends[-1] :]
        for _, prompt in prefixes:
            if prompt not in compiled.tails:
                longer, others = marked(compiled, messages, tools, prompt)
                compiled.tails[prompt] = longer[others[-1] :]
        if 2 * (len(whole) + len(prefixes) * max(map(len, compiled.tails.values()))) > most:
            return []
        whole.encode()
    except Exception:  # whatever it is, it will be met again and said
        return []
    return [[0, whole], *([ends[n], compiled.tails[prompt]] for n, prompt in prefixes[1:])]


def marked(compiled: Compiled, messages: list[Any], tools: list[Any], prompt: bool) -> tuple[str, list[int]]:
    """What is written, and where each message begins in it and the last one ends."""
    assert compiled.marked is not None
    chunks, size = [], 0
    ends: list[int] = []
    variables = compiled.variables
    for chunk in compiled.marked.generate(
        messages=messages, tools=tools or None, add_generation_prompt=prompt, **variables
    ):
        if chunk == MARK:
            ends.append(size)
            continue
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_PRODUCT:
            raise Refused("too long to be kept whole")
    return "".join(chunks), ends


def written_apart(compiled: Compiled, row: list[Any], most: int) -> list[Any]:
    """The texts of a row, each written by itself."""
    messages, tools, prefixes = row
    texts: list[Any] = []
    whole, size = "", 0
    for prefix in prefixes:
        try:
            if texts and prefix == prefixes[0]:
                texts.append([len(whole), ""])
                continue
            text = write(compiled, messages[: prefix[0]], tools, prefix[1], most)
            length = common(whole, text)
            size += len(text) - length
            if size > most:
                raise Refused(f"it writes more than {most:,} characters")
            whole = whole if texts else text
            texts.append([length, text[length:]])
        except Exception as error:  # a template is a program: it can fail in any way that Python can
            texts.append(reason(error))
            if len(texts) == 1:
                break
    return texts


def write(compiled: Compiled, messages: list[Any], tools: list[Any], prompt: bool, most: int) -> str:
    chunks, size = [], 0
    variables = compiled.variables
    for chunk in compiled.template.generate(
        messages=messages, tools=tools or None, add_generation_prompt=prompt, **variables
    ):
        chunks.append(chunk)
        size += len(chunk)
        if size > most:
            raise Refused(f"it writes more than {most:,} characters")
    text = "".join(chunks)
    text.encode()  # a lone surrogate isn't text
    return text


def common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    if one.startswith(other):
        return len(other)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def match(keys: list[str], paths: list[str], seconds: float) -> None:
    """PEFT's rule for its patterns, as in patterns.py."""
    taken: list[int | None] = [None] * len(paths)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # its signal's default is to end the process
    for number, key in enumerate(keys):
        left = [at for at, key_number in enumerate(taken) if key_number is None]
        if not left:
            break
        write_line(number)
        try:
            rule = re.compile(rf"(.*\.)?({key})$")
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            return write_line({"error": str(error) or type(error).__name__})
        for at in left:
            if rule.match(paths[at]):
                taken[at] = number
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    write_line({"taken": taken})


def reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    if isinstance(error, UnicodeEncodeError):
        return "it writes a lone surrogate (a broken character)"
    try:
        words = str(error).encode("utf-8", "replace").decode()
    except Exception:  # whatever was raised may be the template's own object
        words = ""
    return words[:1000] or type(error).__name__


def lock_down(memory: int) -> None:
    """Give up what a template has no use for. What the system refuses to take away is left."""
    for encoding in ("ascii", "unicode-escape"):  # looked up by importing, too
        codecs.lookup(encoding)
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        lower(resource.RLIMIT_AS, int(file.read().split()[0]) * resource.getpagesize() + memory)
    lower(resource.RLIMIT_NPROC, 0)
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_FSIZE, 0)
    lower(resource.RLIMIT_NOFILE, 3)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])


def lower(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def write_all(compiled: Compiled, rows: list[bytes], request: dict[str, Any], most: int) -> None:
    """Answer every row; what is quick is told together."""
    told = time.monotonic()
    for row in rows:
        signal.alarm(request["alarm"])
        answer = json.dumps(written(compiled, json.loads(row), most), ensure_ascii=False).encode()
        signal.alarm(0)
        sys.stdout.buffer.write(answer + b"\n")
        if time.monotonic() - told >= request["late"]:
            sys.stdout.buffer.flush()
            told = time.monotonic()
    sys.stdout.buffer.flush()


def tell(answer: Any) -> None:
    signal.alarm(0)  # whoever waits for the answer may take his time
    write_line(answer)


def write_line(answer: Any) -> None:
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    memory, characters = json.loads(sys.argv[1])
    environment = make_environment()
    templates: dict[str, Compiled] = {}
    lock_down(memory)
    tell({"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # All of them before the first answer: else each side could wait for the other to read.
        rows = [sys.stdin.buffer.readline() for _ in range(request.get("rows", 0))]
        signal.alarm(request["alarm"])
        if "keys" in request:
            match(request["keys"], request["paths"], request["seconds"])
            signal.alarm(0)
        elif "source" in request:
            tell(compiled(environment, templates, request))
        elif request["id"] not in templates:
            tell({"unknown": True})
        else:
            write_all(templates[request["id"]], rows, request, characters)


if __name__ == "__main__":
    main()
