"""Strangers' chat templates (43): no way out of the sandbox, nor out of the process that stands behind it; no template
takes longer than two and a half seconds, this process's memory with it, or the next row."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltaw.errors import InputError, Rejected
from deltaw.files import bounded
from deltaw.files.template import Asked, Template
from tests.faults.common import changed
from tests.faults.fault import expect, fault

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
GOOD = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SECONDS, MEGABYTES = 2.5, 300
SECRET = "a-secret-of-the-environment"

# What gets strangers out of Jinja elsewhere. CANARY is a file that none of them may make.
COMMAND = "popen('touch CANARY; id').read()"
BUILTINS = "__globals__['__builtins__']"
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    f"{{{{ cycler.__init__.__globals__.os.{COMMAND} }}}}",
    "{{ messages | attr('__class__') | attr('__base__') | attr('__subclasses__')() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ ('{0.__class__.__mro__}' | format)(messages) }}",
    f"{{{{ (messages.append | attr('__self__')).__class__.{BUILTINS}.open('CANARY', 'w') }}}}",
    "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
    "{{ ''[['__cl', 'ass__'] | join].__mro__ }}",
    "{{ ''['\\x5f\\x5fclass\\x5f\\x5f']['\\x5f\\x5fmro\\x5f\\x5f'] }}",
    "{{ messages[0].content.__class__.__base__.__subclasses__()[140].__init__.__globals__ }}",
    f"{{{{ joiner.__init__.__globals__.os.{COMMAND} }}}}",
    f"{{{{ namespace.__init__.__globals__.os.{COMMAND} }}}}",
    f"{{{{ lipsum.__globals__['os'].{COMMAND} }}}}",
    f"{{{{ lipsum | attr('__globals__') | attr('get')('os') | attr('{COMMAND[:5]}')('id') }}}}",
    f"{{{{ self._TemplateReference__context.cycler.__init__.__globals__.os.{COMMAND} }}}}",
    f"{{{{ self.__init__.{BUILTINS}.__import__('os').{COMMAND} }}}}",
    f"{{{{ raise_exception.{BUILTINS}.exec('open(\"CANARY\", \"w\")') }}}}",
    f"{{{{ strftime_now.__self__.__class__.__init__.{BUILTINS} }}}}",
    "{{ raise_exception.__closure__ }}{{ raise_exception.__code__ }}",
    "{{ (messages | list).__reduce_ex__(2) }}",
    "{{ (messages | map('string')).gi_frame.f_globals }}",
    "{{ (messages | select('defined')).gi_frame.f_back.f_builtins }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | groupby('__class__') }}",
    "{{ messages | sum(attribute='__class__.__base__', start='') }}",
    "{{ messages | selectattr('__class__') | map(attribute='__class__.__mro__') | list }}",
    "{{ [messages] | map('attr', '__class__') | list }}",
    "{{ dict.mro() }}{{ dict.__subclasses__() }}",
    "{{ range.__class__.__base__ }}",
    "{{ loop.__init__.__globals__ }}{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m._func.__globals__ }}",
    "{% call m() %}{% endcall %}{% macro m() %}{{ caller.__globals__ }}{{ caller._environment }}{% endmacro %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__init__.__globals__ }}",
    "{{ ''.format_map }}{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ ('{0.__init__.__globals__}' | safe).format(lipsum) }}",
    "{{ ('{0.__class__}' | escape).format(messages) }}{{ ('{x.__class__}' | safe).format_map({'x': messages}) }}",
    "{{ '%s' | format(messages.__class__) }}{{ '%(a)s' % {'a': messages.__class__.__mro__} }}",
    "{{ messages | tojson(default=lipsum.__globals__.os.system) }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as p %}{{ p }}",
    "{% extends '/etc/passwd' %}",
    "{% from 'os' import popen %}{{ popen('touch CANARY') }}",
    "{{ environment.globals }}{{ self.environment }}{{ context.environment.loader }}",
    "{{ self._TemplateReference__context.environment.from_string('{{ 1 }}') }}",
    "{{ self._TemplateReference__context.eval_ctx.environment.sandboxed }}",
    "{{ config }}{{ request.application.__globals__ }}{{ g.pop.__globals__ }}{{ url_for.__globals__ }}",
    "{% set x = messages.__class__.append(messages, 1) %}{{ messages | length }}",
    "{% do messages.append(1) %}",
    "{{ eos_token.encode('utf-8').__class__.fromhex('41').__class__.__mro__ }}",
    "{{ 1 .__class__.__base__.__subclasses__() }}{{ (1).real.__class__.__mro__ }}",
    "{{ messages.sort.__self__.__class__.__base__ }}{{ messages.index.__objclass__ }}",
]  # fmt: skip
TRACES = (
    "<class '",
    "<module '",
    "<function ",
    "root:",
    "uid=",
    "<code object",
    "subclasses",
    SECRET,
    "built-in function open",
)

LONG = "{% for i in range(100000) %}"
BOMBS = [
    LONG + "{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    LONG * 4 + "x" + "{% endfor %}" * 4,
    "{{ [0] * 10**9 }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ 'a' | center(10 ** 9) }}",
    "{{ messages[0].content | center(900000000) | center(1800000000) | length }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, messages | length) }}",
    "{{ '{:>1000000000}'.format(messages[0].content) }}",
    "{{ range(100000) | map('string') | join('a' * 1000000) }}",
    "{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}",
    "{% set a = 'a' * 1000000 %}{{ a | replace('a', 'b' * 1000000) | length }}",
    "{{ range(10**9) | list }}",
    "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'a' * 1000000 }}{% endfor %}{% endfor %}",
    "{% set n = namespace(x=[0]) %}" + LONG + "{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[0]) %}" + LONG + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 2 ** 1024 ** 1024 }}",
    "{% set n = namespace(x=2) %}" + LONG + "{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set n = namespace(x=3) %}" + LONG + "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{{ lipsum(n=100000, min=1000, max=2000) }}",
    "{% for i in range(100) %}{{ lipsum(n=100000) | length }}{% endfor %}",
    "{{ range(100000) | map('center', 100000) | join }}",
    "{{ range(100000) | batch(1) | map('list') | list | map('string') | map('center', 9999) | list }}",
    "{{ messages | slice(100000000) | list }}",
    "{{ messages | batch(1000000000, 'x') | list }}",
    "{{ 'a b ' * 200000 | wordwrap(1) | indent(1000000) }}",
    "{{ ('http://' ~ 'a.' * 500000) | urlize }}",
    "{{ ('a' * 1000000) | wordwrap(1) }}",
    "{{ ('<' * 1000000) | striptags }}{{ ('<!--' * 250000) | striptags }}",
    "{{ range(100000) | tojson(indent=1000000) }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ 'a' | indent(1000000000, true) }}",
    "{{ range(100000) | sort | unique | list | string | length }}" + LONG + "{{ range(100000) | sort }}{% endfor %}",
    "{% for i in range(100000) recursive %}{{ loop(range(100000)) }}{% endfor %}",
    "{% macro f(n) %}{% for i in range(100000) %}{{ f(n + 1) }}{% endfor %}{% endmacro %}{{ f(0) }}",
    "{% macro f() %}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 200 + "{% endcall %}" * 200,
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "{{" + "-" * 100000 + "1}}",
    "{{ " + "1 + " * 100000 + "1 }}",
    "{{ " + "[" * 100000 + "}}",
    "{% if x %}" * 200 + "{% endif %}" * 200,
    "{% for i in messages %}" * 30 + "{% endfor %}" * 30,
    "{{ x }}" * 100000,
    "{% set x = 1 %}" * 60000,
    "{{ 'a' ~ " * 20000 + "'b'" + "}}" * 20000,
    "{{ '9' * 1000000 | int }}{{ ('9' * 1000000) | int }}",
    "{{ cycler(*range(100000)) }}" + "{% set c = cycler(1) %}" + LONG * 2 + "{{ c.next() }}" + "{% endfor %}" * 2,
    "{{ (range(100000) | list | string | list) * 1000 }}",
    "{{ dict(range(100000) | map('string') | batch(2)) | dictsort | string | center(99999999) }}",
]  # fmt: skip

# With the sandbox taken away, what the process still doesn't allow.
OS = "{{ cycler.__init__.__globals__.os"
IMPORT = "{{ cycler.__init__.__globals__['__builtins__']['__import__']"
OPEN = "{{ cycler.__init__.__globals__['__builtins__']['open']"
BEHIND = [
    f"{OS}.popen('touch CANARY; id').read() }}}}",
    f"{OPEN}('/etc/passwd').read() }}}}",
    f"{OPEN}('CANARY', 'w') }}}}",
    f"{OS}.fork() }}}}",
    f"{OS}.system('touch CANARY') }}}}",
    f"{IMPORT}('socket').socket() }}}}",
    f"{IMPORT}('subprocess').run(['touch', 'CANARY']) }}}}",
    f"{IMPORT}('threading').Thread(target=lipsum).start() }}}}",
    f"{OS}.listdir('/') }}}}",
    f"{OS}.open('CANARY', 65) }}}}",
    f"{OS}.memfd_create('x') }}}}",
    f"{OS}.pipe() }}}}",
    f"{OS}.execv('/usr/bin/touch', ['touch', 'CANARY']) }}}}",
    f"{OS}.posix_spawn('/usr/bin/touch', ['touch', 'CANARY'], {{}}) }}}}",
    f"{IMPORT}('resource').setrlimit(7, (99, 99)) }}}}",
    f"{OS}.environ['SECRET'] }}}}",
    f"{OS}._exit(0) }}}}",
    f"{OS}.kill({OS[3:]}.getpid(), 9) }}}}",
    f"{OS}.write(1, messages[0].content.encode() + '\\n'.encode()) }}}}",
    "{{ 'a' * 10**9 }}" + OPEN + "('CANARY', 'w') }}",
]  # fmt: skip


def peak(process: int | str = "self") -> int:
    """Bytes of a process's highest residence, for this one since it was last reset."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if "VmHWM" in line)


@contextmanager
def bounds(said: str) -> Iterator[None]:
    """The block takes no longer, and no more of this process's memory, than it may."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts over
    before, began = peak(), time.monotonic()
    yield
    took, grown = time.monotonic() - began, (peak() - before) / 2**20
    expect(took <= SECONDS, f"{took:.2f} s: {said:.80}")
    expect(grown <= MEGABYTES, f"{grown:.0f} MB: {said:.80}")


def attempt(source: str) -> str:
    """What a template writes, or "" where it is refused."""
    with bounds(f"compiling {source}"):
        try:
            made = Template(source, {"eos_token": "</s>"})
        except InputError:
            return ""
    with bounds(source):
        try:
            return made.render(MESSAGES, [], generation_prompt=False)
        except Rejected:
            return ""


def next_row_is_fine() -> None:
    (texts,) = Template(GOOD, {}).render_rows([Asked(MESSAGES, [], [(2, False)])])
    expect(texts == ["user: hi\nassistant: ho\n"], f"the next row: {texts!r:.200}")


@fault(43, "chat templates that try to get out of the sandbox", tries=len(ESCAPES), sample=6, at_once=25)
def template_escape(n: int, scratch: Path) -> None:
    os.environ["SECRET"] = SECRET
    canary = scratch / f"canary-{n}"
    scratch.chmod(0o777)
    text = attempt(ESCAPES[n].replace("CANARY", str(canary)))
    expect(not any(trace in text for trace in TRACES), f"{ESCAPES[n]}: {text:.300}")
    expect(not canary.exists(), f"{ESCAPES[n]} made a file")
    next_row_is_fine()


@fault(43, "chat templates that take time and memory: loops, products, fillings, recursion", tries=len(BOMBS), sample=4)
def template_bomb(n: int, scratch: Path) -> None:
    attempt(BOMBS[n])
    worker = bounded.worker()._process
    if worker is not None:  # it survived
        expect(peak(worker.pid) < MEGABYTES * 2**20, f"the worker has {peak(worker.pid):,} bytes: {BOMBS[n]:.80}")
    next_row_is_fine()


@fault(43, "what a template could do without the sandbox, in its process", tries=len(BEHIND), sample=4, at_once=20)
def template_without_sandbox(n: int, scratch: Path) -> None:
    os.environ["SECRET"] = SECRET
    canary = scratch / f"canary-{n}"
    scratch.chmod(0o777)
    script = scratch / "worker.py"
    own = bounded.SCRIPT.read_text()
    script.write_text(own.replace("class Sandbox(ImmutableSandboxedEnvironment)", "class Sandbox(jinja2.Environment)"))
    expect(script.read_text() != own, "the sandbox is still there")
    bounded.stop()
    try:
        with changed(bounded, "SCRIPT", script):
            free = attempt("{{ cycler.__init__.__globals__.os.getpid() }}")
            expect(free.isdigit(), f"the sandbox is still there: {free!r:.100}")
            text = attempt(BEHIND[n].replace("CANARY", str(canary)))
    finally:
        bounded.stop()
    expect(text in ("", "32512"), f"{BEHIND[n]}: {text:.300}")  # system()'s word for a shell that doesn't start
    expect(not canary.exists(), f"{BEHIND[n]} made a file")
    next_row_is_fine()


TEXTS = {
    "10 MB": "x" * 10_000_000,
    "10 MB of words": "word " * 2_000_000,
    "10 MB of emoji": "\U0001f600" * 2_500_000,
    "10 MB of newlines": "\n" * 10_000_000,
    "10 MB of quotes": '"\\' * 5_000_000,
    "30 MB": "x" * 30_000_000,
    "Jinja": "{{ 7 * 7 }}{% for %}{# #}{{ ''.__class__ }}",
    "control characters": "".join(map(chr, range(1, 32))) * 100_000,
}


@fault(43, "texts of 10 MB and of Jinja's own signs, in chats of three turns", tries=len(TEXTS), sample=2)
def template_long_text(n: int, scratch: Path) -> None:
    name, text = list(TEXTS.items())[n]
    made = Template(GOOD, {})
    messages = [{"role": "user", "content": text}, *MESSAGES]
    with bounds(name):
        (texts,) = made.render_rows([Asked(messages, [], [(3, False), (1, True), (2, False)])])
    wanted = f"user: {text}\nuser: hi\nassistant: ho\n"
    fits = len(text) < 2**24
    expect(isinstance(texts, Rejected) != fits, f"{name}: {texts!r:.100}")
    expect(not fits or texts == [wanted, wanted[: len(text) + 7], wanted[: len(text) + 16]], f"{name}: another text")
    next_row_is_fine()
