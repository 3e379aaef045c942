"""Under any template for which it can be known, exactly the answers and their end-of-turn tokens are trained."""

import copy
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import KINDS, TEMPLATED, toy

from deltaw.data.document import Chat
from deltaw.data.render import Renderer
from deltaw.errors import Rejected

# name: (in front of the role, behind it, the end of a turn, what separates turns)
STYLES = {
    "chatml": ("<|im_start|>", "\n", "<|im_end|>", "\n"),
    "no line between": ("<|im_start|>", "\n", "<|im_end|>", ""),
    "header tokens": ("<|im_start|>", "<|endoftext|>\n\n", "<|im_end|>", ""),
    "words": ("### ", ":\n", "<|im_end|>", "\n\n"),
    "words alone": ("### ", ":\n", "[END]", "\n"),
    "ends in words": ("<|im_start|>", "\n", "[END]", "\n"),
}
HEADERS = ("asked", "always", "never")
SYSTEM = "{% if messages[0].role != 'system' %}{{ '<<system>>Be kind.<<>>' }}{% endif %}"


def template(style, header, *, trim=False, thinking=False, system=False, closing=""):
    before, behind, end, between = STYLES[style]
    text = "m.content | trim" if trim else "m.content"
    if thinking:  # dropped from all but the last answer
        text = f"({text} if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1])"
    turn = f"{{{{ '<<' + m.role + '>>' + ({text}) + '<<>>' }}}}"
    source = (SYSTEM if system else "") + "{% for m in messages %}" + turn + "{% endfor %}"
    ask = "{{ '<<assistant>>' }}"
    source += {"asked": f"{{% if add_generation_prompt %}}{ask}{{% endif %}}", "always": ask, "never": ""}[header]
    source += f"{{% if not add_generation_prompt %}}{closing}{{% endif %}}" if closing else ""
    source = source.replace("<<>>", end + between)
    source = source.replace("'<<' + m.role + '>>'", repr(before) + " + m.role + " + repr(behind))
    for role in ("system", "assistant"):
        source = source.replace(f"<<{role}>>", (before + role + behind).replace("\n", "\\n"))
    return source.replace("\n", "\\n")


def renderer(source, kind="chatml"):
    tokenizer = copy.deepcopy(toy(kind))
    tokenizer.chat_template = source
    return Renderer(tokenizer)


def trained(example, by):
    pairs = zip(example.tokens.tolist(), example.loss_mask.tolist(), strict=True)
    stretches = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [by.decode([token for token, _ in group], False) for on, group in stretches if on]


words = st.text(st.sampled_from("ab <|>#\né:") | st.sampled_from("xyz"), min_size=1, max_size=9)
answers = words.filter(lambda text: text.strip() == text and "<|" not in text)


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(answers)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(words)})
        messages.append({"role": "assistant", "content": draw(answers)})
    return Chat(tuple(messages))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("header", HEADERS)
@given(chat=conversations(), trim=st.booleans(), system=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_answer_and_its_end_of_turn_are_trained_and_nothing_else(style, header, chat, trim, system):
    before, behind, end, between = STYLES[style]
    by = renderer(template(style, header, trim=trim, system=system))
    example = by.render(chat, "o")
    texts = [message["content"] for message in chat.messages if message["role"] == "assistant"]
    end = end if "im_end" in end else end + between  # an end in words has no token that it could stop at
    assert trained(example, by) == [text + end for text in texts]
    assert example.untrained_turns == 0
    assert by.end_of_turn == (toy("chatml").eos_token_id if "im_end" in end else None)
    prompt = by.prompt_ids(chat.messages[:-1])
    assert by.decode(prompt, False).endswith(before + "assistant" + behind)
    last = len(example.tokens) - 1 - example.loss_mask[::-1].tolist().index(True)
    begin = last - example.loss_mask[: last + 1][::-1].tolist().index(False) + 1
    assert example.tokens[:begin].tolist() == prompt


@pytest.mark.parametrize("style", ["chatml", "header tokens", "words"])
@pytest.mark.parametrize("header", HEADERS)
def test_thoughts_dropped_from_earlier_turns_leave_those_untrained(style, header):
    by = renderer(template(style, header, thinking=True))
    turns = [("user", "q"), ("assistant", "<think>x</think>a"), ("user", "q"), ("assistant", "<think>y</think>b")]
    example = by.render(Chat(tuple({"role": role, "content": text} for role, text in turns)), "o")
    assert trained(example, by) == ["<think>y</think>b<|im_end|>"]
    assert example.untrained_turns == 1


@pytest.mark.parametrize("style", ["chatml", "header tokens", "words"])
def test_an_end_of_document_is_no_end_of_turn(style):
    by = renderer(template(style, "asked", closing="{{ '<|endoftext|>' }}"))
    turns = [("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two")]
    example = by.render(Chat(tuple({"role": role, "content": text} for role, text in turns)), "o")
    assert trained(example, by) == ["one<|im_end|>", "two<|im_end|>"]
    assert by.end_of_turn == toy("chatml").eos_token_id


def test_what_ends_the_last_answer_only_is_still_trained():
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    source += "{{ 'assistant: ' if add_generation_prompt else eos_token }}"
    by = renderer(source, "bos")
    turns = [("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two")]
    example = by.render(Chat(tuple({"role": role, "content": text} for role, text in turns)), "o")
    assert trained(example, by) == ["two\n</s>"]
    assert example.untrained_turns == 1


def test_a_header_that_is_never_asked_for_is_warned_of():
    assert ["im_start" in line for line in renderer(template("chatml", "never")).header_problems()] == [True]
    for header in ("asked", "always"):
        assert renderer(template("chatml", header)).header_problems() == []
    for kind in TEMPLATED:
        assert Renderer(toy(kind)).header_problems() == []


@pytest.mark.parametrize("header", HEADERS)
def test_a_template_that_refuses_two_of_a_role(header):
    refusing = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    refusing += "{{ raise_exception('by turns') }}{% endif %}{% endfor %}"
    by = renderer(refusing + template("chatml", header))
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert trained(by.render(Chat((user, answer, user, answer)), "o"), by) == ["a<|im_end|>"] * 2
    with pytest.raises(Rejected, match="by turns"):
        by.render(Chat((answer, user)), "o")


def test_one_control_token_ends_an_answer_and_opens_none():
    """Vicuna's: `USER: q ASSISTANT: a</s>USER: …`, in which the token stands right in front of a role."""
    source = (
        "{% for m in messages %}{{ m.role | upper + ': ' + m.content + (eos_token if m.role == 'assistant' else ' ') }}"
    )
    for ask in ("{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}", "{{ 'ASSISTANT:' }}"):
        by = renderer(source + "{% endfor %}" + ask, "bos")
        turns = [("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two")]
        example = by.render(Chat(tuple({"role": role, "content": text} for role, text in turns)), "o")
        assert trained(example, by) == [" one</s>", " two</s>"]
        assert KINDS["bos"][2] == "</s>"
