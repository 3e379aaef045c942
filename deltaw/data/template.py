"""A chat template: untrusted Jinja -> text.

Templates come from strangers, so they run in Jinja's immutable sandbox, as in transformers, over plain JSON
values only, and with bounds: on the template's own size, on what it writes, and on `*` and `**`, of which
one suffices to fill the memory (`'a' * 10**9`, which Jinja would work out while compiling). Not bounded
yet: time. A template that loops without writing needs a subprocess with a deadline.

Differences from transformers' environment, both for the sake of a run that can be repeated: `strftime_now`
gives a fixed date (a template that writes today's would change the data's fingerprint overnight), and `{%
generation %}` writes its body and marks nothing (masks come from prefixes, see `render.py`).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deltaw.data.row import Rejected
from deltaw.errors import InputError

MAX_TEMPLATE = 2**20  # characters; the longest in use are under 100,000
MAX_OUTPUT = 2**24
MAX_PRODUCT = 2**20  # the longest text, and the largest number, that `*` and `**` may make
TODAY = datetime(2026, 1, 1)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Template:
    """A compiled chat template. `variables` are what it may name besides the messages (`eos_token`, …)."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE:
            raise InputError(f"the chat template has {len(source):,} characters; at most {MAX_TEMPLATE:,} are read")
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError, OverflowError) as error:
            line = getattr(error, "lineno", None)
            fix = "set data.template: chatml, or a .jinja file that is right"
            where = f" (line {line})" if line else ""
            raise InputError(f"the chat template can't be compiled{where}: {error}", fix=fix) from None
        self._variables = dict(variables)
        self.fingerprint = sha256(source.encode("utf-8", "surrogatepass")).hexdigest()

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any], *, generation_prompt: bool) -> str:
        """The text of `messages`, which are plain JSON. Raises Rejected with whatever the template objects to."""
        chunks, size = [], 0
        try:
            for chunk in self._template.generate(
                messages=list(messages),
                tools=list(tools) or None,
                add_generation_prompt=generation_prompt,
                **self._variables,
            ):
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_OUTPUT:
                    raise Rejected(f"the chat template writes more than {MAX_OUTPUT:,} characters")
        except Rejected:
            raise
        except Exception as error:  # a template is a program: it can fail in any way that Python can
            raise Rejected(f"the chat template refuses it: {error}") from None
        return "".join(chunks)


class _Sandbox(ImmutableSandboxedEnvironment):
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


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` is its body."""

    tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Sandbox:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
        # Never escaped to ASCII, so that the marks of `encode.py` stay what they are.
        known = {key: options[key] for key in ("separators", "sort_keys") if key in options}
        return json.dumps(value, ensure_ascii=False, indent=indent, **known)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment


_ENVIRONMENT = _environment()
