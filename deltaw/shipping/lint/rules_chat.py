"""The chat template, stop tokens and added tokens: why a correct update may still answer wrongly.

Servers take template, tokenizer and stop tokens from the base that they serve, not from the adapter's folder. So what
counts is whether it was trained with those.
"""

import shlex
from collections.abc import Iterator

from deltaw.data.prepare import prepare
from deltaw.data.render import TEMPLATE, Renderer
from deltaw.errors import DeltawError
from deltaw.files.safetensors import read_rows
from deltaw.shipping.lint.chat import NO_TEMPLATE, Chat
from deltaw.shipping.lint.finding import (
    LLAMA_CPP,
    LOADS,
    MLX,
    OLLAMA,
    PEFT,
    TRANSFORMERS,
    UNSURE,
    VLLM,
    WRONG,
    Finding,
    code,
    everywhere,
    some,
)
from deltaw.shipping.lint.keys import NORM
from deltaw.shipping.lint.subject import Subject
from deltaw.show.text import counted, percent

SERVERS = (VLLM, LLAMA_CPP, OLLAMA, MLX)
ROWS = 200  # of a run's data that are checked
SAMPLE = 256  # about so many rows of the head
FAINT = 0.01  # of the rows' median length: a shorter row was never trained
NO_CHAT_TEMPLATE = code(
    "DW601",
    "it was trained on chats, and neither its folder nor the base has the chat template",
    everywhere(WRONG),
    "put the template that it was trained under beside the weights, as chat_template.jinja",
)
OTHER_TEMPLATE = code(
    "DW602",
    "it was trained under another chat template than the base's, which servers use",
    everywhere(WRONG),
    "give the server the template that it was trained under",
)
STOP_UNKNOWN = code(
    "DW603",
    "the token that ends an answer isn't among the base's stop tokens, so answers go on",
    {PEFT: WRONG, TRANSFORMERS: WRONG, VLLM: WRONG, LLAMA_CPP: UNSURE, OLLAMA: UNSURE, MLX: WRONG},
    "name it as a stop token to the server; deltaw's exports write it",
)
STOP_UNTRAINED = code(
    "DW604",
    "the base's row for the token that ends an answer was never trained, and the adapter can't fix that",
    everywhere(WRONG),
    "train with a template whose end-of-turn token the base knows",
)
STOP_UNSEEN = code(
    "DW605",
    "the run's rows train no token that ends an answer, so answers go on",
    everywhere(WRONG),
    "end each answer with a stop token in the data, and train again",
)
ADDED_TOKENS = code(
    "DW606",
    "the tokenizer beside it has tokens that the base lacks, and the adapter holds no embeddings for them",
    everywhere(WRONG),
    "ask its author for the embeddings, or use the base's own tokenizer if the tokens aren't needed",
)


def template(s: Subject) -> Iterator[Finding]:
    chat = s.chat
    wanted = chat.trained_under or chat.own
    if chat.plain or not wanted or not chat.bases or wanted == chat.bases:
        return
    if wanted == chat.own:
        words = (
            f"{s.folder.name}/ has a chat template of its own, the base has {_its(chat)}, and servers use the base's"
        )
        file = shlex.quote(str(s.folder / TEMPLATE))
        fix = f"vLLM: --chat-template {file}; llama.cpp: --chat-template-file {file}; or export it to gguf, mlx"
        yield OTHER_TEMPLATE.finding(words, fix, dict.fromkeys(SERVERS, WRONG) | {PEFT: LOADS, TRANSFORMERS: LOADS})
    elif chat.renderer is not None:
        words = f"its run has the template that it was trained under, but the base has {_its(chat)}"
        yield OTHER_TEMPLATE.finding(words, s.export("peft"))
    elif chat.bases == NO_TEMPLATE and not chat.own:
        yield NO_CHAT_TEMPLATE.finding("the template that it records is neither in its folder nor in the base")
    else:
        yield OTHER_TEMPLATE.finding(
            f"the template that it records is neither its folder's nor {s.base and s.base.source.name}'s"
        )


def _its(chat: Chat) -> str:
    return "none" if chat.bases == NO_TEMPLATE else "another"


def stop_unknown(s: Subject) -> Iterator[Finding]:
    chat = s.chat
    if chat.plain or not (chat.trained_under or chat.own) or (renderer := chat.renderer) is None:
        return
    if renderer.end_of_turn is not None and renderer.end_of_turn not in renderer.model_stop_ids:
        name = renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn)
        words = f"answers end with {name!r:.60} ({renderer.end_of_turn}), but the base stops at {_names(renderer)}"
        yield STOP_UNKNOWN.finding(words, f"vLLM: stop_token_ids [{renderer.end_of_turn}]; {STOP_UNKNOWN.fix}")


def _names(renderer: Renderer) -> str:
    ids = sorted(renderer.model_stop_ids)
    return some([repr(name) for name in renderer.tokenizer.convert_ids_to_tokens(ids)], 3)


def stop_untrained(s: Subject) -> Iterator[Finding]:
    """A row of the head that is almost zero gives its token the same logit after any prompt."""
    renderer = s.chat.renderer
    if renderer is None or s.base is None or {s.base.head, s.base.embedding} & {key.path for key in s.keys}:
        return
    stored = s.base.files.checkpoint.find(f"{s.base.head}.weight")
    stop = renderer.end_of_turn if renderer.end_of_turn is not None and not s.chat.plain else None
    ids = sorted(renderer.model_stop_ids) if stop is None else [stop]
    if stored is None or not ids or max(ids) >= stored.shape[0]:
        return
    step = max(1, stored.shape[0] // SAMPLE)
    try:
        usual = float(read_rows(stored.file, stored.name, range(0, stored.shape[0], step)).float().norm(dim=1).median())
        lengths = read_rows(stored.file, stored.name, ids).float().norm(dim=1).tolist()
    except DeltawError:
        return
    if usual > 0 and max(lengths) < FAINT * usual:
        names = some([repr(name) for name in renderer.tokenizer.convert_ids_to_tokens(ids)])
        yield STOP_UNTRAINED.finding(
            f"{names}: its row in {stored.name} is {percent(max(lengths) / usual, 2)} of the median length"
        )


def stop_unseen(s: Subject) -> Iterator[Finding]:
    """Whether the first rows of a run's data, as the files are now, train a stop token."""
    renderer = s.chat.renderer
    if s.run is None or renderer is None:
        return
    few = s.run.data.model_copy(update={"limit": min(ROWS, s.run.data.limit or ROWS), "eval": None})
    try:
        examples = prepare(few, renderer).train
    except DeltawError:  # its data has been moved since
        return
    endless = sum(renderer.stop_ids.isdisjoint(e.tokens[e.loss_mask].tolist()) for e in examples)
    if endless:
        effects = everywhere(WRONG if endless > len(examples) / 2 else UNSURE)
        yield STOP_UNSEEN.finding(
            f"{endless} of {len(examples)} rows train no token that ends an answer", effects=effects
        )


def added_tokens(s: Subject) -> Iterator[Finding]:
    chat = s.chat
    if s.base is None or not chat.added or chat.tokenizers is None:
        return
    known = chat.tokenizers.tokenizer.get_vocab()
    new = [token for token, id in chat.added.items() if known.get(token) != id]
    shipped = any(key.path == s.base.embedding and key.part != NORM for key in s.keys)
    if new and not shipped:
        yield ADDED_TOKENS.finding(f"{counted(len(new), 'token')}: {some([repr(token) for token in new], 3)}")


RULES = (template, stop_unknown, stop_untrained, stop_unseen, added_tokens)
