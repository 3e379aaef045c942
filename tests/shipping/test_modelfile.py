"""The Modelfile: what its TEMPLATE writes is what the chat template writes that was trained under."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.adapter.file import Adapter, BaseId
from deltaw.base.source import Source
from deltaw.config import AdapterSpec, RunConfig
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.model import PLAIN
from deltaw.shipping.base_files import BaseFiles
from deltaw.shipping.gguf.modelfile import Turns, go_text, modelfile
from deltaw.shipping.trained import Trained
from tests.data.toys import TEMPLATED, toy

from .go_template import commands, expand

FIRST = "{% if messages[0].role == 'system' %}"
LOOP = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}"
HEAD = "'<|head|>' + m.role + '<|/head|>\\n\\n'"
WRITTEN = {
    "chatml with a default": FIRST
    + "{% else %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    + LOOP
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + ASK
    + "<|im_start|>assistant\n{% endif %}",
    "the first instructions": FIRST
    + "{% set extra = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{% set rest = messages[1:] %}"
    + "{% else %}{% set extra = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    + "{% if m.role == 'user' %}<s>[INST] {{ extra if loop.first else '' }}{{ m.content.strip() }} [/INST]"
    + "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}",
    "headers and a date": "{{ bos_token }}{{ '<|head|>system<|/head|>\\n\\nToday: 26 Jul 2024\\n\\n' }}"
    + FIRST
    + "{{ messages[0].content | trim }}{% set rest = messages[1:] %}"
    + "{% else %}{% set rest = messages %}{% endif %}<|eot|>"
    + "{% for m in rest %}{{ "
    + HEAD
    + " + m.content | trim + '<|eot|>' }}{% endfor %}"
    + ASK
    + "{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}",
    "model for assistant, system in the first turn": "{{ bos_token }}"
    + FIRST
    + "{% set extra = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}"
    + "{% else %}{% set extra = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ extra if loop.first else '' }}"
    + "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    + ASK
    + "<start_of_turn>model\n{% endif %}",
    "no system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    + ASK
    + "<|assistant|>\n{% endif %}",
    "another word when it asks": LOOP
    + "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    + ASK
    + "<|assistant|><think>{% endif %}",
    "signs of Go and of a Modelfile": LOOP
    + "{{ '{{ .Prompt }} \"\"\"\"' if m.role == 'user' else '\\u200b\\\\\\u3000é漢\\r\\n\\t{' }}"
    + "{{ m.content }}{{ '}} \"\"\\n# not a comment\\n{{' }}{% endfor %}"
    + ASK
    + '"a{% endif %}',
}
LAST = (
    LOOP + "{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
ODD = {
    "system in the last turn": LAST,
    "numbers of turns": LOOP + "{{ loop.index }}. {{ m.content }}\n{% endfor %}",
    "a length": LOOP + "{{ m.content | length }} {{ m.content }}\n{% endfor %}",
    "only the last": "{{ messages[-1].content }}",
    "everything twice": LOOP + "{{ m.content }}{{ m.content }}{% endfor %}",
    "nothing": "hello",
    "a refusal": "{{ raise_exception('never') }}",
}
TALKS = [
    ["What is it?"],
    ["One.", "Two.", "Three?"],
    ["{{ .System }}", 'It\'s """quoted""".', "a\nb\n\nc", "d", "e\\u0041 漢"],
]


def trained(renderer: Renderer, *, plain: bool = False, config: RunConfig | None = None) -> Trained:
    base = BaseId("org/tiny", template=PLAIN if plain else renderer.template_fingerprint)
    return Trained(
        "x", Adapter(AdapterSpec(), {}, base), BaseFiles(Source("org/tiny", Path(), "1")), renderer, config=config
    )


def renderer_of(folder: Path, jinja: str, kind: str = "llama3") -> Renderer:
    (folder / "own.jinja").write_text(jinja, encoding="utf-8", newline="")
    return Renderer(toy(kind), template=str(folder / "own.jinja"))


def messages_of(talk: list[str], system: str = "") -> list[dict[str, str]]:
    roles = ("user", "assistant")
    told = [{"role": roles[number % 2], "content": text} for number, text in enumerate(talk)]
    return [{"role": "system", "content": system}] * bool(system) + told


def template_in(text: str) -> str:
    (template,) = [value for name, value in commands(text) if name == "TEMPLATE"]
    return template


def check(renderer: Renderer, *, systems: tuple[str, ...] = ("", "Be brief.")) -> None:
    """Server's own token and TEMPLATE together are the chat template."""
    text, _ = modelfile(trained(renderer), "m.gguf")
    template = template_in(text)
    for talk in TALKS:
        for system in systems:
            messages = messages_of(talk, system)
            written = renderer.chat_prompt(messages)
            assert written.removeprefix(renderer.opening) == expand(template, messages)


@pytest.mark.parametrize("kind", TEMPLATED)
def test_templates_of_tokenizers(kind: str) -> None:
    check(Renderer(toy(kind)), systems=("",) if kind == "mistral" else ("", "Be brief."))


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_template_writes_ollama_writes(tmp_path: Path, name: str) -> None:
    check(renderer_of(tmp_path, WRITTEN[name]), systems=("",) if name == "no system" else ("", "Be brief."))


@pytest.mark.parametrize("name", ODD)
def test_no_template_rather_than_another_one(tmp_path: Path, name: str) -> None:
    text, notes = modelfile(trained(renderer_of(tmp_path, ODD[name])), "m.gguf")
    assert "TEMPLATE" not in dict(commands(text)) and any("TEMPLATE" in note for note in notes)
    assert dict(commands(text))["FROM"] == "./m.gguf"


def test_an_answer_begun_is_left_open() -> None:
    renderer = Renderer(toy("chatml"))
    template = template_in(modelfile(trained(renderer), "m.gguf")[0])
    begun = expand(template, messages_of(["Count.", "1, 2, "]))
    assert begun == renderer.chat_prompt(messages_of(["Count."])) + "1, 2, "


def test_without_a_system_message_it_is_said(tmp_path: Path) -> None:
    _, notes = modelfile(trained(renderer_of(tmp_path, WRITTEN["no system"], "chatml")), "m.gguf")
    assert any("SYSTEM" in note for note in notes)


def test_a_token_that_the_server_puts_in_front_alone_is_said(tmp_path: Path) -> None:
    _, notes = modelfile(trained(renderer_of(tmp_path, WRITTEN["chatml with a default"], "llama3")), "m.gguf")
    assert any("<|bot|>" in note for note in notes)
    assert not modelfile(trained(Renderer(toy("llama3"))), "m.gguf")[1]


@pytest.mark.parametrize("kind", ["chatml", "plain"])
def test_plain_prompts_stay_as_they_are(kind: str) -> None:
    text, notes = modelfile(trained(Renderer(toy(kind)), plain=True), "m.gguf")
    assert expand(template_in(text), messages_of(["a b ->"])) == "a b ->" and not notes


def test_every_stop_token_and_the_length_of_training(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"base": "org/tiny", "output": "x", "data": {"train": "t.jsonl", "max_length": 777}}
    )
    renderer = Renderer(toy("llama3"))
    text, _ = modelfile(trained(renderer, config=config), "m.gguf", adapter="a.gguf", about="one\nline")
    lines = commands(text)
    stops = {value.removeprefix("stop ") for name, value in lines if value.startswith("stop ")}
    assert stops == {"<|eos|>", "<|eot|>"} == {renderer.decode([id], skip_special=False) for id in renderer.stop_ids}
    assert ("PARAMETER", "num_ctx 777") in lines and ("ADAPTER", "./a.gguf") in lines


printed = st.text(st.sampled_from('"{}\\ \n\t\r\u200b\u00a0é漢ab.#-'), max_size=12)


@given(printed, printed, printed, printed, st.none() | st.tuples(printed, printed))
def test_any_text_survives_go_and_the_modelfile(
    bare: str, turn: str, following: str, ask: str, system: tuple[str, str] | None
) -> None:
    turns = Turns(bare, turn, following, ask, system)
    ((_, template),) = commands(f'TEMPLATE """{turns.go()}"""\n')
    for talk in TALKS:
        for instruction in ("", "Be.") if system else ("",):
            assert expand(template, messages_of(talk, instruction)) == turns.write([instruction, *talk])


def test_half_a_character_is_refused() -> None:
    with pytest.raises(InputError):
        go_text("a\ud800")
