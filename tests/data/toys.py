"""Tiny tokenizers, made in memory: byte-level BPE with four chat templates, and a SentencePiece-like one."""

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The capital of France is Paris, and the user asked for it.",
    "a b c -> AH B AE N D; system prompt, assistant answer, user question",
    "Hello world! How are you today?\n\nFine, thanks.",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Drops what was thought in all but the last answer, as reasoning models do.
THINKING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# name: (template, bos, eos, control tokens, the tokenizer itself adds bos)
KINDS = {
    "chatml": (CHATML, None, "<|im_end|>", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], False),
    "generation": (GENERATION, None, "<|im_end|>", ["<|im_start|>", "<|im_end|>"], False),
    "llama3": (LLAMA3, "<|bot|>", "<|eos|>", ["<|bot|>", "<|eos|>", "<|eot|>", "<|head|>", "<|/head|>"], True),
    "mistral": (MISTRAL, "<s>", "</s>", ["<s>", "</s>", "[INST]", "[/INST]"], True),
    "thinking": (THINKING, None, "<|im_end|>", ["<|im_start|>", "<|im_end|>"], False),
    "plain": (None, None, "<|end|>", ["<|end|>"], False),
    "bos": (None, "<s>", "</s>", ["<s>", "</s>"], True),
}
TEMPLATED = ("chatml", "generation", "llama3", "mistral", "thinking")


@cache
def toy(kind: str) -> Any:
    """A byte-level BPE tokenizer of one of KINDS; pad is eos throughout."""
    template, bos, eos, controls, adds_bos = KINDS[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=controls, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return _finish(tokenizer, template, bos, eos, adds_bos)


@cache
def sentencepiece() -> Any:
    """One that puts a space in front of whatever it is given, like Llama 2's."""
    words = ["▁", "▁the", "▁cat", "▁a", *"actehsnim|<>/\n"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), *words]:
        vocabulary.setdefault(piece, len(vocabulary))
    model = models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return _finish(tokenizer, CHATML.replace("<|im_start|>", "").replace("<|im_end|>", "</s>"), "<s>", "</s>", True)


@cache
def lowercasing() -> Any:
    """Words, an unknown token that ordinary text becomes, and a normaliser that makes a control token of `<END>`."""
    vocabulary = {"<unk>": 0, "<end>": 1, "the": 2, "cat": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = AddedToken("<end>", special=True, normalized=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=end)


def _finish(tokenizer: Tokenizer, template: str | None, bos: str | None, eos: str, adds_bos: bool) -> Any:
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)
    fast.chat_template = template
    return fast
