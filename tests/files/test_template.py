"""Templates are strangers' programs: they can't get out of the sandbox, fill the memory or take long, and fail as a
reason. The process they run in follows its parent through forks and threads to its end."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from jinja2.filters import FILTERS
from jinja2.tests import TESTS

from deltaw.errors import InputError, Rejected
from deltaw.files import bounded, template
from deltaw.files.bounded import MAX_OUTPUT
from deltaw.files.template import MAX_TEMPLATE, Asked, Template, Unfinished

MESSAGES = [{"role": "user", "content": "hi"}]


def render(source: str, **options) -> str:
    return Template(source, {"eos_token": "</s>"}).render(MESSAGES, [], generation_prompt=False, **options)


def test_what_templates_in_use_need():
    assert render("{{ messages[0].content }}{{ eos_token }}{{ tools is none }}") == "hi</s>True"
    assert render("{% for m in messages %}{% break %}{% endfor %}{{ messages | tojson }}") == (
        '[{"role": "user", "content": "hi"}]'
    )
    assert render("{{ 'é' | tojson }}{% generation %}a{% endgeneration %}{{ '-' * 3 }}{{ 2 ** 3 }}") == '"é"a---8'
    assert render("  {% if true %}\na{% endif %}") == "a"


def test_the_date_stands_still():
    assert render("{{ strftime_now('%d %b %Y') }}") == "01 Jan 2026"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ ('{0.__class__}' | format)(messages) }}",
        "{{ messages | attr('__class__') }}",
        "{{ (messages | attr('__class__')).mro() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_there_is_no_way_out_of_the_sandbox(source):
    try:
        text = render(source)
    except Rejected:
        return
    assert text == ""  # Jinja's other answer to a forbidden name: something undefined


@pytest.mark.parametrize(
    "source",
    [
        "{% set x = messages.append(1) %}",
        "{{ raise_exception('no') }}",
        "{{ messages[5].content.x }}",
        "{{ 'a' * 10**9 }}",
        "{{ [0] * 10**9 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_must_not_do_rejects_the_row(source):
    with pytest.raises(Rejected, match="template refuses it"):
        render(source)


def test_output_is_bounded():
    # A million characters at a time, so that the bound and not the products is what stops it.
    with pytest.raises(Rejected, match=f"more than {MAX_OUTPUT:,}"):
        render("{% set a = 'a' * 1000000 %}{% for i in range(90) %}{{ a }}{% endfor %}")


@pytest.mark.parametrize("source", ["{% for", "{{ 'a' | nothing }}", "{% endfor %}", "a" * (MAX_TEMPLATE + 1)])
def test_a_template_that_cannot_be_compiled_is_an_error(source):
    with pytest.raises(InputError, match="chat template"):
        Template(source, {})


ENDLESS = "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
ENDLESS += "{% endfor %}{% endif %}{{ messages[0].content }}"


def asked(*texts):
    return [Asked([{"role": "user", "content": text}], [], [(1, False)]) for text in texts]


@pytest.fixture
def hurried(monkeypatch):
    """A worker that is late after a third of a second."""
    monkeypatch.setattr(template, "SECONDS", 0.3)


def test_prefixes_are_written_as_if_alone():
    messages = [{"role": role, "content": role[0] * n} for n in range(1, 4) for role in ("user", "assistant")]
    source = (
        "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}\n{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    prefixes = [(6, False), *((n, prompt) for n in range(7) for prompt in (False, True))]
    (texts,) = Template(source, {}).render_rows([Asked(messages, [], prefixes)])
    assert texts == [Template(source, {}).render(messages[:n], [], generation_prompt=prompt) for n, prompt in prefixes]


def test_a_prefix_may_be_refused_where_the_whole_is_not():
    source = "{% if messages | length == 1 %}{{ raise_exception('too few') }}{% endif %}{{ messages | length }}"
    (texts,) = Template(source, {}).render_rows([Asked(MESSAGES * 3, [], [(3, False), (1, False), (2, True)])])
    assert (texts[0], texts[2]) == ("3", "2")
    assert "too few" in str(texts[1])


def test_what_comes_back_is_what_was_written():
    text = 'é\u2028\n\r\t\x7f\U0001f600"\\ \ufdd0' * 1000
    assert render("{{ messages[0].content }}" + "{{ '" + "x" * 100_000 + "' }}") == "hi" + "x" * 100_000
    many = Template("{{ messages[0].content }}", {}).render_rows(asked(*[text, "", "b"] * 200))
    assert many == [[text], [""], ["b"]] * 200
    with pytest.raises(Rejected, match="lone surrogate"):
        render(r"{{ '\ud800' }}")


def test_nothing_that_jinja_has_needs_a_file():
    """Jinja imports some modules when a filter is first used, when the worker can no longer open any."""
    arguments = {"attr": "('x')", "batch": "(2)", "replace": "('a', 'b')", "slice": "(2)", "truncate": "(9)"}
    values = {
        "dictsort": "{'a': 1}",
        "xmlattr": "{'a': 1}",
        "items": "{'a': 1}",
        "abs": "1",
        "sum": "[1]",
        "round": "1.5",
    }
    values |= {"filesizeformat": "9", "groupby": "[{'x': 1}]", "striptags": "'a &amp; <b>b</b>'"}
    arguments |= {"groupby": "('x')", "map": "('upper')", "select": "('string')", "reject": "('string')"}
    for name in FILTERS:
        render(f"{{{{ {values.get(name, repr('a b c'))} | {name}{arguments.get(name, '')} | string }}}}")
    for name in filter(str.isidentifier, TESTS):
        with contextlib.suppress(Rejected):  # of the wrong type or number of arguments
            assert render(f"{{{{ 3 is {name} }}}}") in ("True", "False")
    assert len(render("{{ lipsum() }}{{ '\\N{BULLET}' }}")) > 100


def test_a_late_row_is_rejected_and_the_next_one_rendered(hurried):
    late = Template(ENDLESS, {})
    began = time.monotonic()
    results = late.render_rows(asked("a", "loop", "b", "loop", "loop", "c"))
    assert [isinstance(result, Unfinished) for result in results] == [False, True, False, True, True, False]
    assert "takes more than 0.3 s" in str(results[1])
    assert results[5] == ["c"]
    assert time.monotonic() - began < 3


def test_a_template_that_is_always_late_is_an_error(hurried):
    with pytest.raises(InputError, match=r"^my\.jinja can't be used: it takes more than 0.3 s, 3 rows in a row"):
        Template(ENDLESS, {}, name="my.jinja").render_rows(asked(*["loop"] * 1000))


@pytest.mark.parametrize(
    "source",
    [
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{{ messages[0].content | center(900000000) }}",
        "{{ '%1000000000d' % (messages | length) }}",
    ],
)
def test_memory_is_bounded(source):
    with pytest.raises(Rejected, match=r"memory|MB"):
        render(source)


def test_a_worker_that_was_killed_costs_no_row():
    good = Template("{{ messages[0].content }}", {})
    os.kill(bounded.worker()._process.pid, signal.SIGKILL)
    assert good.render_rows(asked("a", "b")) == [["a"], ["b"]]


def test_more_templates_than_a_worker_keeps():
    many = [Template(f"{i}{{{{ x }}}}", {"x": "y"}) for i in range(20)]
    assert [one.render(MESSAGES, [], generation_prompt=False) for one in many] == [f"{i}y" for i in range(20)]


def test_a_fork_has_a_worker_of_its_own():
    shared = Template("{{ messages[0].content }}", {})
    mine = bounded.worker()._process.pid
    child = os.fork()
    if child == 0:
        right = shared.render_rows(asked("c")) == [["c"]] and bounded.worker()._process.pid != mine
        os._exit(0 if right else 1)
    assert shared.render_rows(asked(*"ab" * 100)) == [["a"], ["b"]] * 100
    assert os.waitpid(child, 0)[1] == 0
    assert bounded.worker()._process.pid == mine


def test_threads_get_their_own_answers():
    shared, wrong = Template("{{ messages[0].content }}", {}), []

    def work(name):
        texts = [f"{name}{i}" for i in range(50)]
        wrong.extend(text for text in texts if shared.render_rows(asked(text)) != [[text]])

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


PROGRAM = """
import sys, time
from deltaw.files import bounded, template
one = template.Template(sys.argv[1], {})
print(bounded.worker()._process.pid, flush=True)
one.render([{"content": "loop"}], [], generation_prompt=False)
time.sleep(float(sys.argv[2]))
"""


def gone(pid, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):  # an orphan's zombie is init's to bury
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(("source", "killed"), [("{{ 1 }}", False), ("{{ 1 }}", True), (ENDLESS, True)])
def test_the_worker_ends_with_its_process(source, killed):
    """Told to at exit, without its input when the process is killed, and by its own alarm when it is busy then; the
    program runs with stdin closed."""
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-c", PROGRAM, source, "60" if killed else "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        worker = int(program.stdout.readline())
        if killed:
            time.sleep(0.1)
            program.kill()
        program.wait()
    assert gone(worker, 5)
