"""Documents -> tokens and masks. The home of the tokenizer.

An `Example` says of every token whether it is trained, that is, whether the model must produce it:

    Text         bos text eos                  all but the first token (nothing predicts it)
    Completion   bos prompt completion eos     the completion and eos
    Chat         the model's template          of each answer: what follows the generation prompt, up to and
                                               including its end-of-turn token, and nothing after it

Prompt and completion are encoded apart, and so are the parts of a chat before and after each generation
prompt. At inference the prompt is encoded alone and the model goes on from there; if a token could span the
border (" ->" + " A") the model would be trained on borders that it never meets. `prompt_ids` gives exactly
the tokens in front of a mask.

Which part of a chat is an answer is proven on prefixes, for each assistant turn i, from three texts the
template writes:

    p = messages[:i] with the generation prompt     q = messages[:i+1]     f = all messages

If q starts with p, the rest of q is what the model must write, and its last control token ends the turn; if
f starts with q up to there, the mask holds in f. Where the proof fails (a template that drops the thinking
from earlier turns) that turn is left untrained and counted; where it fails for every turn the row is
rejected. A wrong mask is not possible. Rejected: searching the text for the answer (an answer may stand in
the question), and `{% generation %}` (most templates have none, and where they do the end-of-turn token
often falls outside: the model then never stops).

The texts and not their ids are compared, because the parts are encoded apart: a border is then a border
between tokens by construction, also where an answer begins with a newline that would melt into the prompt's
last token.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from deltaw.data.encode import Encoder
from deltaw.data.example import Example
from deltaw.data.forms import Chat, Completion, Document, Message, Text
from deltaw.data.row import Rejected, one_line
from deltaw.data.template import CHATML, MAX_TEMPLATE, Asked, Template, Unfinished
from deltaw.errors import InputError

NO_TEMPLATE = "set data.template: chatml, or data.template: a .jinja file"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document that is encoded by itself. `trained` of it: 0 nothing, None all, k through control k."""

    text: str
    trained: int | None = 0


@dataclass(frozen=True, slots=True)
class _Layout:
    """A document as pieces. `closed`: bos and eos go around it (a chat template writes its own)."""

    pieces: list[Piece]
    closed: bool
    untrained_turns: int = 0


def open_tokenizer(directory: Path) -> Any:
    """The tokenizer in `directory`. No code from it is run, nothing is fetched. Raises InputError."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder, a tokenizer is expected there")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what a broken folder raises is not documented and differs by version
        fix = "the folder needs tokenizer.json and tokenizer_config.json; code that a tokenizer brings is not run"
        raise InputError(f"{directory}: no usable tokenizer: {one_line(str(error), 200)}", fix=fix) from None


class Renderer:
    """Renders documents with one tokenizer. `template`: None is the tokenizer's own, `chatml`, or a .jinja file."""

    def __init__(self, tokenizer: Any, train_on: str = "auto", template: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no end-of-sequence token, so a model could not learn to stop",
                fix="set eos_token in tokenizer_config.json",
            )
        self.tokenizer = tokenizer
        self._train_on = train_on
        self._encoder = Encoder(tokenizer)
        self._eos: int = tokenizer.eos_token_id
        self._bos = _opening(tokenizer)
        source = _template_source(tokenizer, template, self._encoder)
        self._template = Template(source, tokenizer.special_tokens_map) if source else None
        self.template_fingerprint = self._template.fingerprint if self._template else "none"
        self.end_of_turn = self._find_end_of_turn()
        self.model_stop_ids = frozenset({self._eos, *_generation_stops(tokenizer)})
        """What servers stop at: eos and the generation config's."""

    @property
    def stop_ids(self) -> set[int]:
        """Where generation ends: eos, the template's end-of-turn token, the generation config's stops."""
        return set(self.model_stop_ids) | ({self.end_of_turn} if self.end_of_turn is not None else set())

    def render(self, document: Document, origin: str) -> Example:
        """One document. Raises Rejected when nothing of it can be trained or it can't be rendered."""
        example = self.render_all([document], [origin])[0]
        if isinstance(example, Rejected):
            raise example
        return example

    def render_all(self, documents: Sequence[Document], origins: Sequence[str]) -> list[Example | Rejected]:
        """Many documents with one call of the tokenizer; in place of one that can't be used, the reason."""
        layouts = self._layouts(documents)
        good = [layout for layout in layouts if isinstance(layout, _Layout)]
        encoded = iter(self._encoder.encode([[piece.text for piece in layout.pieces] for layout in good]))
        results: list[Example | Rejected] = []
        for layout, origin in zip(layouts, origins, strict=True):
            if isinstance(layout, Rejected):
                results.append(layout)
                continue
            try:
                results.append(self._assemble(layout, next(encoded), origin))
            except Rejected as rejected:
                results.append(rejected)
        return results

    def prompt_ids(self, prompt: str | Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """What the model is given at inference: a text as a completion's prompt, messages with the generation prompt.

        Raises InputError where training would have rejected the row.
        """
        try:
            if isinstance(prompt, str):
                return [*self._bos, *self._encode(self._encoder.guard(prompt))]
            return self._encode(self._write(self._guarded(prompt), self._encoder.guard_all(tools), True))
        except Rejected as rejected:
            raise InputError(f"this prompt can't be used: {one_line(str(rejected))}") from None

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        )

    def end_of_turn_problems(self, examples: Sequence[Example]) -> list[str]:
        """Why the trained model may not stop, in words for the user; nothing when all is well."""
        problems = []
        stops = self.stop_ids
        endless = sum(stops.isdisjoint(example.tokens[example.loss_mask].tolist()) for example in examples)
        if endless:
            problems.append(
                f"{endless} of {len(examples)} rows train no end-of-turn token: the model doesn't learn to stop there"
            )
        if self.end_of_turn is not None and self.end_of_turn not in self.model_stop_ids:
            token = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
            problems.append(
                f"turns end with {token!r}, which is not among the model's stop tokens: name it to the server"
            )
        return problems

    def _layouts(self, documents: Sequence[Document]) -> list[_Layout | Rejected]:
        """How every document is cut into pieces; the chats after the template has written them all."""
        layouts: list[_Layout | Rejected | None] = []
        chats: list[Asked] = []
        for document in documents:
            try:
                if isinstance(document, Chat):
                    chats.append(self._ask(document))
                    layouts.append(None)
                else:
                    layouts.append(self._layout(document))
            except Rejected as rejected:
                layouts.append(rejected)
            except RecursionError:
                layouts.append(Rejected("nested too deeply"))
        written = iter(self._opened_template().render_rows(chats) if chats else ())
        return [self._chat_layout(next(written)) if layout is None else layout for layout in layouts]

    def _layout(self, document: Text | Completion) -> _Layout:
        guard = self._encoder.guard
        match document:
            case Text(text):
                self._must_train_on("text", "all")
                return _Layout([Piece(guard(text), None)], closed=True)
            case Completion(prompt, completion):
                self._must_train_on("prompt / completion", "completion", "all")
                given = None if self._train_on == "all" else 0
                return _Layout([Piece(guard(prompt), given), Piece(guard(completion), None)], closed=True)

    def _must_train_on(self, form: str, *possible: str) -> None:
        if self._train_on not in ("auto", *possible):
            fix = f"set data.train_on: {' or '.join(('auto', *possible))}"
            raise InputError(f"data.train_on: {self._train_on} has no meaning for {form} rows", fix=fix)

    def _ask(self, chat: Chat) -> Asked:
        """What the template has to write of a chat: all of it, then p and q (see above) of every answer wanted."""
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        wanted = {"all": [], "completion": turns[-1:]}.get(self._train_on, turns)
        prefixes = [(len(chat.messages), False)]
        for i in wanted:
            if chat.messages[i].get("weight") != 0:
                prefixes += [(i, True), (i + 1, False)]
        return Asked(self._guarded(chat.messages), self._encoder.guard_all(chat.tools), prefixes)

    def _chat_layout(self, texts: list[str | Rejected] | Rejected) -> _Layout | Rejected:
        """The pieces of a chat, from what the template wrote."""
        if isinstance(texts, Rejected):
            return texts
        full = str(texts[0])
        if self._train_on == "all":
            return _Layout([Piece(full, None)], closed=False)
        borders: list[tuple[int, int | None]] = [(0, 0)]
        untrained = 0
        for prompt, upto in zip(texts[1::2], texts[2::2], strict=True):
            answer = self._find_answer(prompt, upto, full)
            if answer is None or answer[0] < borders[-1][0]:
                untrained += 1
                continue
            begin, end, controls = answer
            # Cut in front of the answer only: behind it a token may swallow the whitespace that follows (rstrip).
            borders += [(begin, controls)] if controls else [(begin, None), (end, 0)]
        ends = [begin for begin, _ in borders[1:]] + [len(full)]
        pieces = [Piece(full[begin:end], trained) for (begin, trained), end in zip(borders, ends, strict=True)]
        return _Layout(pieces, closed=False, untrained_turns=untrained)

    def _find_answer(self, prompt: str | Rejected, upto: str | Rejected, full: str) -> tuple[int, int, int] | None:
        """(begin, end, control tokens inside) of the answer between p and q in f; None where that can't be proven."""
        if isinstance(prompt, Rejected) or isinstance(upto, Rejected):
            return None  # the template refuses to begin with an answer, or to end there
        controls = self._encoder.controls(upto[len(prompt) :])
        end = len(prompt) + controls[-1].end() if controls else len(upto)
        if not upto.startswith(prompt) or not full.startswith(upto[:end]):
            return None
        if len(upto[len(prompt) : end].strip()) <= sum(len(control[0]) for control in controls):
            return None  # the template leaves out what is said or called: training on it would teach silence
        return len(prompt), end, len(controls)

    def _assemble(self, layout: _Layout, ids: list[list[int]], origin: str) -> Example:
        tokens: list[int] = list(self._bos) if layout.closed else []
        mask = [self._train_on == "all"] * len(tokens)
        control_ids = self._encoder.control_ids
        for piece, piece_ids in zip(layout.pieces, ids, strict=True):
            controls = [index for index, id in enumerate(piece_ids) if id in control_ids]
            if len(controls) != len(self._encoder.controls(piece.text)):
                raise Rejected("the tokenizer makes a control token out of plain text in it")
            trained = len(piece_ids) if piece.trained is None else 0
            if piece.trained:
                trained = controls[piece.trained - 1] + 1
            tokens += piece_ids
            mask += [True] * trained + [False] * (len(piece_ids) - trained)
        if layout.closed:
            tokens.append(self._eos)
            mask.append(True)
        if mask:
            mask[0] = False
        if not any(mask):
            raise Rejected(_nothing_trained(layout.untrained_turns))
        return Example(np.array(tokens, np.int32), np.array(mask, bool), origin, layout.untrained_turns)

    def _guarded(self, messages: Sequence[Message]) -> list[Message]:
        return [
            {key: self._encoder.guard_all(value) for key, value in message.items() if key != "weight"}
            for message in messages
        ]

    def _write(self, messages: list[Message], tools: list[Any], generation_prompt: bool) -> str:
        return self._opened_template().render(messages, tools, generation_prompt=generation_prompt)

    def _opened_template(self) -> Template:
        if self._template is None:
            raise InputError("this base has no chat template, and the rows are chat", fix=NO_TEMPLATE)
        return self._template

    def _encode(self, text: str) -> list[int]:
        return self._encoder.encode([[text]])[0][0]

    def _find_end_of_turn(self) -> int | None:
        """The control token that ends an answer, found on a small conversation; None where there is none."""
        if self._template is None:
            return None
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (texts,) = self._template.render_rows([Asked(messages, [], [(2, False), (1, True), (2, False)])])
        if isinstance(texts, Unfinished):
            raise InputError(f"already two short messages are too much: {texts}", fix=NO_TEMPLATE)
        if isinstance(texts, Rejected):
            return None
        full, prompt, upto = texts
        answer = self._find_answer(prompt, upto, str(full))
        if answer is None or not answer[2]:
            return None
        try:
            ids = self._encode(str(full)[answer[0] : answer[1]])
        except Rejected:
            return None
        return next((id for id in reversed(ids) if id in self._encoder.control_ids), None)


def _nothing_trained(untrained_turns: int) -> str:
    if untrained_turns:
        return "no answer can be told from its prompt in what the chat template writes"
    return "nothing in it is trained"


def _opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text by itself: [bos] or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a", add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
    return list(dressed[:at])


def _template_source(tokenizer: Any, template: str | None, encoder: Encoder) -> str | None:
    if template is None:
        own = tokenizer.chat_template
        return own.get("default") if isinstance(own, dict) else own
    if template == "chatml":
        # A base without ChatML's tokens has no trained embedding to spare; its eos can end a turn, and is known.
        known = encoder.controls("<|im_end|>")
        return CHATML if known else CHATML.replace("'<|im_end|>'", "eos_token")
    path = Path(template)
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise InputError(f"data.template: {template!r} is neither chatml nor a .jinja file", fix=NO_TEMPLATE)
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MAX_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.template: {template}: {error}") from None


def _generation_stops(tokenizer: Any) -> list[int]:
    """The stop tokens in the generation_config.json beside the tokenizer, if there is one."""
    try:
        text = (Path(tokenizer.name_or_path) / "generation_config.json").read_text(encoding="utf-8")
        stops = json.loads(text).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError):
        return []
    return [id for id in (stops if isinstance(stops, list) else [stops]) if isinstance(id, int)]
