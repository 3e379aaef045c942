"""Templates are strangers' programs: they can't get out of the sandbox or fill the memory, and fail as a reason."""

import pytest

from deltaw.data.row import Rejected
from deltaw.data.template import MAX_OUTPUT, MAX_TEMPLATE, Template
from deltaw.errors import InputError

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
