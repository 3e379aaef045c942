"""A chat that is written once and cut at marks is what its beginnings are, each written by itself."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.files import bounded_worker as worker
from tests.data.toys import KINDS

LOOP = "{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
SAFE = {
    "index": LOOP + "{{ loop.index0 }}{{ m.role }}:{{ m.content | trim }}\n" + END,
    "first": "{{ bos }}{% if messages[0].role == 'user' %}U{% endif %}" + LOOP + "{{ m.content }}" + END + "{{ bos }}",
    "state": "{% set n = namespace(x=0) %}" + LOOP + "{% set n.x = n.x + 1 %}{{ n.x }}{{ m.content }}" + END,
    "raises": LOOP + "{% if 'x' in m.content %}{{ raise_exception('x') }}{% endif %}{{ m.content }}" + END,
    "leaves": LOOP + "{% if m.content == 'b' %}{% break %}{% endif %}{{ m.content }}" + END,
    "skips": LOOP + "{% if m.content == 'b' %}{% continue %}{% endif %}{{ m.content }}" + END,
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}" + LOOP + "{{ m.content }}{% for c in m.role %}{{ c }}"
    "{% endfor %}" + END,
}
UNSAFE = {
    "last": LOOP + "{{ m.content }}{% if loop.last %}!{% endif %}" + END,
    "length": "{{ messages | length }}" + LOOP + "{{ m.content }}" + END,
    "from the end": "{{ messages[-1].content }}" + LOOP + "{{ m.content }}" + END,
    "another": LOOP + "{{ messages[loop.index0 + 1] }}" + END,
    "next": LOOP + "{{ loop.nextitem }}" + END,
    "prompt inside": LOOP + "{{ m.content }}{{ add_generation_prompt }}" + END,
    "prompt before": "{{ add_generation_prompt }}" + LOOP + "{{ m.content }}" + END,
    "behind": LOOP + "{{ m.content }}" + END + "{{ messages[0].content }}",
    "state behind": "{% set n = namespace(x=0) %}" + LOOP + "{% set n.x = n.x + 1 %}" + END + "{{ n.x }}",
    "tools behind": LOOP + "{{ m.content }}" + END + "{{ tools }}",
    "renamed": "{% set messages = messages[1:] %}" + LOOP + "{{ m.content }}" + END,
    "copied": "{% set l = messages %}" + LOOP + "{{ l | length }}" + END,
    "twice": LOOP + "{{ m.content }}" + END + LOOP + "{{ m.content }}" + END,
    "filtered": "{% for m in messages if m.role != 'x' %}{{ m.content }}" + END,
    "else": LOOP + "{{ m.content }}{% else %}none" + END,
    "macro": "{% macro f() %}{{ messages | length }}{% endmacro %}" + LOOP + "{{ f() }}" + END,
    "reversed": "{% for m in messages | reverse %}{{ m.content }}" + END,
    "random": LOOP + "{{ [1, 2, 3] | random }}" + END,
    "in a block": "{% if true %}" + LOOP + "{{ m.content }}" + END + "{% endif %}",
    "thinking": KINDS["thinking"][0],
}
SAFE |= {kind: template for kind in ("chatml", "generation", "llama3", "mistral") if (template := KINDS[kind][0])}
VARIABLES = {"bos": "<s>", "bos_token": "<s>", "eos_token": "</s>"}
ENVIRONMENT = worker.make_environment()


def compiled(source: str) -> worker.Compiled:
    kept: dict[str, worker.Compiled] = {}
    assert "words" in worker.compiled(ENVIRONMENT, kept, {"id": "a", "source": source, "variables": VARIABLES})
    return kept["a"]


COMPILED = {name: compiled(source) for name, source in SAFE.items()}


def whole(texts: list[Any]) -> list[Any]:
    """The texts that are meant."""
    return [text if isinstance(text, str) else [texts[0][1][: text[0]] + text[1]] for text in texts]


@pytest.mark.parametrize("name", UNSAFE)
def test_where_it_is_not_proven_nothing_is_cut(name: str) -> None:
    assert compiled(UNSAFE[name]).marked is None


@pytest.mark.parametrize("name", SAFE)
def test_a_chat_is_cut_at_all(name: str) -> None:
    row = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}], [], [[2, False], [1, True]]]
    assert len(worker.cut_at_marks(compiled(SAFE[name]), row, 10**6)) == 2


MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.sampled_from(
        ["a", "b", "x", "", " y\n", "<|im_end|>", "\ud800", worker.MARK[:5]]
    )}), min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(MESSAGES, st.data())
def test_beginnings_are_cut_as_they_are_written(messages: list[Any], data: st.DataObject) -> None:
    prefix = st.tuples(st.integers(0, len(messages)), st.booleans()).map(list)
    prefixes = [[len(messages), False], *data.draw(st.lists(prefix, max_size=6))]
    row = [messages, data.draw(st.sampled_from([[], [{"name": "f"}]])), prefixes]
    for one in COMPILED.values():
        for most in (10**6, 40):
            assert whole(worker.written(one, row, most)) == whole(worker.written_apart(one, row, most))
