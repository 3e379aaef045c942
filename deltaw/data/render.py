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

Which part of a chat is an answer is proven on what the template writes of its beginnings (`turns.py`), and an answer
for which that fails isn't trained. What the template leaves out of a row is found, too (`left_out.py`), and the row
refused or the loss reported.

Rows that come rendered (`data.rendered`) hold the control tokens already: they are encoded as they stand, bos goes in
front where they don't begin with it, and eos behind where they don't end with a token that ends a turn.
"""

import copy
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from deltaw.config import Shape
from deltaw.data.added import Token, plain_ids, special_ids
from deltaw.data.asking import behind
from deltaw.data.chat import NO_TEMPLATE, ChatWriter, Layout, Piece, template_source
from deltaw.data.document import Chat, Completion, Message, Single, Text
from deltaw.data.encode import Encoded, Encoder
from deltaw.data.example import Example
from deltaw.data.examples import Examples
from deltaw.data.split import split
from deltaw.errors import InputError, Rejected
from deltaw.files.strict_json import read_json
from deltaw.files.template import Asked, Template
from deltaw.show.progress import Progress, unseen
from deltaw.show.text import one_line

TEMPLATE = "chat_template.jinja"  # in a folder: the template that goes with what lies there
RENDERED = "leave data.rendered out: the chat template writes the control tokens"


def open_tokenizer(directory: Path) -> Any:
    """The tokenizer in `directory`. No code from it is run, nothing is fetched. Raises InputError."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder, where a tokenizer is expected")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what a broken folder raises is not documented and differs by version
        fix = "the folder needs tokenizer.json and tokenizer_config.json; a tokenizer's own code isn't run"
        raise InputError(f"{directory}: no usable tokenizer: {one_line(str(error), 200)}", fix=fix) from None


class Renderer:
    """Renders documents with one tokenizer. `template`: None is the tokenizer's own, `chatml`, or a .jinja file.

    `rendered`: texts, prompts and completions hold control tokens, bos and eos already, and they are taken as such.
    `shape`: what a row is to give (config/objective.py). `tokens`: those that are trained by name (added.py).
    """

    def __init__(
        self,
        tokenizer: Any,
        train_on: str = "auto",
        template: str | None = None,
        rendered: bool = False,
        shape: Shape = "one",
        tokens: Sequence[Token] = (),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no end-of-sequence token, so a model could not learn to stop",
                fix="set eos_token in tokenizer_config.json",
            )
        self.tokenizer, self.shape, self.tokens = tokenizer, shape, tuple(tokens)
        self._train_on, self._rendered = train_on, rendered
        self._system = ""  # of chats that have none
        self._encoder = Encoder(tokenizer)
        self._eos: int = tokenizer.eos_token_id
        self._bos = _opening(tokenizer)
        self.model_stop_ids = frozenset({self._eos, *_generation_stops(tokenizer)})
        """What servers stop at: eos and the generation config's."""
        self.end_of_turn: int | None = None
        self.template_fingerprint, self.chats = "none", None
        """The template at work, where there is one."""
        self.template = template_source(tokenizer, template, self._encoder) or None
        """The chat template's text, whoever it is from."""
        self._plain_ids = plain_ids(tokenizer, self.tokens, self.template or "")
        self._special = special_ids(tokenizer)
        if self._plain_ids:
            self._encoder = Encoder(tokenizer, [token.text for token in tokens if token.id in self._plain_ids])
        if source := self.template:
            compiled = Template(source, tokenizer.special_tokens_map)
            self.template_fingerprint = compiled.fingerprint
            self.chats = ChatWriter(compiled, self._encoder, self._stop_names())
            self.end_of_turn = self._encoder.ids.get(self.chats.end_of_turn)

    @property
    def grown(self) -> bool:
        """Whether tokens were added to the base's tokenizer."""
        return any(token.pieces for token in self.tokens)

    def behind(self, system: str) -> "Renderer":
        """The same, but a chat without a system prompt gets this one."""
        other = copy.copy(self)
        other._system = system
        return other

    def of_shape(self, shape: Shape) -> "Renderer":
        """The same for rows that give something else."""
        other = copy.copy(self)
        other.shape = shape
        return other

    @property
    def rules(self) -> dict[str, Any]:
        """All that decides what becomes of a document, beside the tokenizer's files, as JSON has it."""
        return {
            "train_on": self._train_on,
            "rendered": self._rendered,
            "template": self.template,
            "system": self._system,
            "shape": self.shape,
            **({"tokens": {token.text: token.id for token in self.tokens}} if self.tokens else {}),
        }

    @property
    def own_template(self) -> bool:
        """Whether the template is the tokenizer's own, so that it needn't go along with what is trained under it."""
        own = self.tokenizer.chat_template
        return self.template == ((own.get("default") if isinstance(own, dict) else own) or None)

    @property
    def stop_ids(self) -> set[int]:
        """Where generation ends: eos, the template's end-of-turn token, the generation config's stops."""
        return set(self.model_stop_ids) | ({self.end_of_turn} if self.end_of_turn is not None else set())

    def render(self, document: Single, origin: str) -> Example:
        """One document. Raises Rejected when nothing of it can be trained or it can't be rendered."""
        example = self.render_all([document], [origin])[0]
        if isinstance(example, Rejected):
            raise example
        return example

    def render_all(self, documents: Sequence[Single], origins: Sequence[str]) -> list[Example | Rejected]:
        """Many documents with one call of the tokenizer; in place of one that can't be used, the reason."""
        return [
            result if isinstance(result, Rejected) else result[0] for result in self.render_pieces(documents, origins)
        ]

    def render_pieces(
        self,
        documents: Sequence[Single],
        origins: Sequence[str],
        length: int = 0,
        overlap: int = 0,
        progress: Progress = unseen,
    ) -> list[list[Example] | Rejected]:
        """The same, with texts of more than `length` tokens in pieces (`split.py`); none is split where it is 0.
        `progress` is told of characters."""
        layouts = self._layouts(
            [behind(document, self._system) for document in documents] if self._system else documents
        )
        good = [layout for layout in layouts if isinstance(layout, Layout)]
        texts = [[piece.text for piece in layout.pieces] for layout in good]
        encoded = iter(self._encoder.encode(texts, progress, places=length > 0))
        results: list[list[Example] | Rejected] = []
        for layout, document, origin in zip(layouts, documents, origins, strict=True):
            if isinstance(layout, Rejected):
                results.append(layout)
                continue
            try:
                pieces = next(encoded)
                example = self._assemble(layout, [piece.ids for piece in pieces], document, origin)
                splits = isinstance(document, Text) and 0 < length < len(example.tokens)
                results.append(self._split(example, layout, pieces, length, overlap) if splits else [example])
            except Rejected as rejected:
                results.append(rejected)
        return results

    def controls(self, text: str) -> list[str]:
        """The names of control tokens in a text, for whoever reads them as such."""
        return [name[0] for name in self._encoder.controls(text)]

    def prompt_ids(self, prompt: str | Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """What the model is given at inference: a text as a completion's prompt, messages with the generation prompt.

        Raises InputError where training would have rejected the row.
        """
        try:
            if isinstance(prompt, str):
                return [*self._opening(prompt), *self._encode(self._taken(prompt))]
            return self._encode(self._writer().prompt(prompt, tools))
        except Rejected as rejected:
            raise InputError(f"this prompt can't be used: {one_line(str(rejected))}") from None

    def raw_ids(self, text: str) -> list[int]:
        """The same of a text whose control tokens are meant as such, since whoever asks writes his own template: bos
        goes in front unless the text begins with it. Raises InputError."""
        try:
            opening = () if self.opening and text.startswith(self.opening) else self._bos
            return [*opening, *self._encode(self._encoder.checked(text))]
        except Rejected as rejected:
            raise InputError(f"this prompt can't be used: {one_line(str(rejected))}") from None

    def answer_ids(self, text: str) -> list[int]:
        """A text as it goes on behind a prompt, encoded by itself as answers are that are trained."""
        try:
            return self._encode(self._taken(text))
        except Rejected as rejected:
            raise InputError(f"this answer can't be used: {one_line(str(rejected))}") from None

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """The text that the chat template makes of messages to be answered. Raises InputError as `prompt_ids`."""
        try:
            return self._writer().prompt(messages, ())
        except Rejected as rejected:
            raise InputError(f"this prompt can't be used: {one_line(str(rejected))}") from None

    @property
    def opening(self) -> str:
        """What the tokenizer puts in front of a text by itself."""
        return "".join(self.tokenizer.convert_ids_to_tokens(list(self._bos)))

    def decode(self, ids: Sequence[int], skip_special: bool = True, shown: frozenset[int] = frozenset()) -> str:
        """The text of `ids`; `skip_special`: without control tokens but those that are `shown`."""
        shown |= self._plain_ids
        skip = skip_special and not shown  # else the tokenizer does it itself
        left = [id for id in ids if not skip_special or skip or id in shown or id not in self._special]
        return str(self.tokenizer.decode(left, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def end_of_turn_problems(self, examples: Examples) -> list[str]:
        """Why the trained model may not stop, in words for the user; nothing when all is well."""
        problems = []
        ending = ~examples.is_kind(lambda kind: kind.goes_on)
        endless = int(np.count_nonzero(ending & ~examples.train_any(self.stop_ids)))
        if endless:
            problems.append(
                f"{endless} of {np.count_nonzero(ending)} rows train no end-of-turn token: the model won't learn to "
                "stop after them"
            )
        if self.end_of_turn is not None and self.end_of_turn not in self.model_stop_ids:
            token = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
            problems.append(
                f"turns end with {token!r}, which is not among the model's stop tokens: name it to the server"
            )
        return problems

    def header_problems(self) -> list[str]:
        """Whether servers that use the template ask the model for an answer as it is trained here."""
        header = self.chats.header if self.chats else ""
        what = f"the answer is trained after {header!r}, which servers don't write"
        return [f"the chat template never asks for an answer: {what}"] if header else []

    def _layouts(self, documents: Sequence[Single]) -> list[Layout | Rejected]:
        """How every document is cut into pieces; the chats after the template has written them all."""
        layouts: list[Layout | Rejected | None] = []
        chats: list[Asked] = []
        for document in documents:
            try:
                if isinstance(document, Chat):
                    chats.append(self._writer().ask(document, self._train_on))
                    layouts.append(None)
                else:
                    layouts.append(self._layout(document))
            except Rejected as rejected:
                layouts.append(rejected)
            except RecursionError:
                layouts.append(Rejected("nested too deeply"))
        written = iter(self._writer().layouts(chats, self._train_on) if chats else ())
        return [next(written) if layout is None else layout for layout in layouts]

    def _layout(self, document: Text | Completion) -> Layout:
        match document:
            case Text(text=text):
                self._must_train_on("text", "all")
                pieces = [Piece(self._taken(text), None)]
            case Completion(prompt=prompt, completion=completion):
                self._must_train_on("prompt / completion", "completion", "all")
                given = None if self._train_on == "all" else 0
                pieces = [Piece(self._taken(prompt), given), Piece(self._taken(completion), None)]
        ends = self._rendered and pieces[-1].text.rstrip().endswith(self._stop_names())
        return Layout(pieces, self._opening(pieces[0].text), () if ends else (self._eos,))

    def _taken(self, text: str) -> str:
        """A row's text as it goes to the tokenizer."""
        return self._encoder.checked(text) if self._rendered else self._encoder.guard(text)

    def _opening(self, text: str) -> tuple[int, ...]:
        """What goes in front of `text`: bos, if the tokenizer has one there and the text doesn't."""
        begins = self._rendered and text.startswith(self.opening)
        return () if begins else self._bos

    def _stop_names(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids)))

    def _must_train_on(self, form: str, *possible: str) -> None:
        if self._train_on not in ("auto", *possible):
            fix = f"set data.train_on: {' or '.join(('auto', *possible))}"
            raise InputError(f"data.train_on: {self._train_on} has no meaning for {form} rows", fix=fix)

    def _assemble(self, layout: Layout, ids: list[list[int]], document: Single, origin: str) -> Example:
        tokens = np.array([*layout.opening, *chain.from_iterable(ids), *layout.closing], np.int32)
        mask = np.zeros(len(tokens), bool)
        mask[: len(layout.opening)] = self._train_on == "all"
        mask[len(tokens) - len(layout.closing) :] = True
        controls = self._encoder.control_places(tokens)
        end = len(layout.opening)
        for piece, piece_ids in zip(layout.pieces, ids, strict=True):
            begin, end = end, end + len(piece_ids)
            own = controls[bisect_left(controls, begin) : bisect_left(controls, end)]
            if len(own) != len(self._encoder.controls(piece.text)):
                raise Rejected("the tokenizer turns plain text in it into a control token")
            if piece.trained is None:
                mask[begin:end] = True
            elif piece.trained:
                mask[begin : own[piece.trained - 1] + 1] = True
        mask[:1] = False
        if not mask.any():
            raise Rejected(_nothing_trained(layout.untrained_turns))
        names = tuple(name for piece in layout.pieces for name in self._encoder.names(piece.text))
        return Example(
            tokens,
            mask,
            origin,
            untrained_turns=layout.untrained_turns,
            unused=document.unused,
            left_out=layout.left_out,
            names=names,
            glued=isinstance(document, Completion) and not self._rendered and _meet(document),
        )

    def _split(
        self, example: Example, layout: Layout, encoded: Sequence[Encoded], length: int, overlap: int
    ) -> list[Example]:
        kinds = np.zeros(len(example.tokens), np.uint8)
        body = np.concatenate([piece.places() for piece in encoded])
        kinds[len(layout.opening) : len(layout.opening) + len(body)] = body
        pieces = split(example, kinds, length, overlap, self._bos)
        return [replace(piece, names=self._names_in(piece)) for piece in pieces] if example.names else pieces

    def _names_in(self, piece: Example) -> tuple[str, ...]:
        """The names of control tokens in the part of a text that a piece has of its own."""
        own = [id for id in piece.tokens[piece.context :].tolist() if id not in self._encoder.control_ids]
        text = self.decode(own, skip_special=False)
        return tuple(self._encoder.names(self._encoder.guard(text.replace("\0", ""))))

    def _writer(self) -> ChatWriter:
        if self._rendered:
            raise InputError(
                "data.rendered is for text and for prompt / completion, but the rows are chats", fix=RENDERED
            )
        if self.chats is None:
            raise InputError("this base has no chat template, but the rows are chats", fix=NO_TEMPLATE)
        return self.chats

    def _encode(self, text: str) -> list[int]:
        return self._encoder.encode([[text]])[0][0].ids


def _meet(document: Completion) -> bool:
    """Whether prompt and completion meet without a blank, in a script that puts one between words."""
    border = document.prompt[-1:] + document.completion[:1]
    apart = any(character.isspace() or unicodedata.east_asian_width(character) in "WF" for character in border)
    return len(border) == 2 and not apart


def _nothing_trained(untrained_turns: int) -> str:
    if untrained_turns:
        return "in what the chat template writes, no answer can be told from its prompt"
    return "nothing in it is trained"


def _opening(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts in front of a text by itself: [bos] or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a", add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
    return tuple(dressed[:at])


def _generation_stops(tokenizer: Any) -> list[int]:
    """The stop tokens in the generation_config.json beside the tokenizer, if there is one."""
    try:
        file = Path(tokenizer.name_or_path) / "generation_config.json"
        stops = read_json(file, allow_nan=True).get("eos_token_id")
    except InputError:
        return []
    return [id for id in (stops if isinstance(stops, list) else [stops]) if isinstance(id, int)]
