"""Chat templates that write calls of tools, each as some family of models has them, for the tokens of `toys.py`."""

import copy
from functools import cache
from typing import Any

from deltaw.data.render import Renderer
from tests.data.toys import toy

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
END = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    '{{ \'</tools> Say <tool_call>{"name": …, "arguments": …}</tool_call><|im_end|>\n\' }}{% endif %}'
)
ANSWERED = (
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
)
# Qwen 3: its last answer begins with a block of thoughts, and a line break goes in front of a call behind anything.
QWEN = (
    TOOLS + "{% for m in messages %}" + ANSWERED + "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}{% for c in m.tool_calls %}"
    "{% if not loop.first or m.content %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
    "{{ c.function.arguments | tojson }}{% endif %}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}" + TURN + "{% endif %}" + END
)
HERMES = (
    TOOLS
    + "{% for m in messages %}"
    + ANSWERED
    + "{% elif m.tool_calls %}{{ '<|im_start|>assistant' }}{% for c in m.tool_calls %}"
    "{{ '\n<tool_call>\n' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson) }}"
    "{{ '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% else %}" + TURN + "{% endif %}" + END
)
# Llama 3.1: one call, bare, and other words for its parts.
LLAMA = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{{ '<|head|>' + ('ipython' if m.role == 'tool' else m.role) + '<|/head|>\n\n' }}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls only') }}{% endif %}"
    '{% set c = m.tool_calls[0].function %}{{ \'{"name": "\' + c.name + \'", "parameters": \' }}'
    "{{ c.arguments | tojson }}{{ '}' }}{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
# Mistral: a list with ids behind a control token.
MISTRAL = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{% if m.tool_calls %}"
    "{{ '<|im_start|>assistant\n<|endoftext|>[' }}{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' }}{% if not loop.last %}{{ ', ' }}{% endif %}"
    "{% endfor %}{{ ']<|im_end|>\n' }}{% else %}" + TURN + "{% endif %}" + END
)
# DeepSeek: the name stands outside of the JSON.
DEEPSEEK = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{% if m.tool_calls %}"
    "{{ '<|im_start|>assistant\n<calls>' }}{% for c in m.tool_calls %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<call>function<sep>' + c.function.name + '\n```json\n' + (c.function.arguments | tojson) + '\n```</call>' }}"
    "{% endfor %}{{ '</calls><|im_end|>\n' }}{% else %}" + TURN + "{% endif %}" + END
)
# Arguments as JSON text, and an id between a name and them, behind a control token.
NAMED = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{% if m.tool_calls %}"
    "{{ '<|im_start|>assistant\n' }}{% for c in m.tool_calls %}"
    "{{ '<|endoftext|>' + c.function.name + '[ID]' + c.id + '[ARGS]' + c.function.arguments }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% else %}" + TURN + "{% endif %}" + END
)
TEMPLATES = {
    "qwen": (QWEN, "chatml"),
    "hermes": (HERMES, "chatml"),
    "llama": (LLAMA, "llama3"),
    "mistral": (MISTRAL, "chatml"),
    "deepseek": (DEEPSEEK, "chatml"),
    "named": (NAMED, "chatml"),
}


@cache
def renderer(name: str) -> Renderer:
    """With one of the templates."""
    template, kind = TEMPLATES[name]
    tokenizer = copy.deepcopy(toy(kind))
    tokenizer.chat_template = template
    return Renderer(tokenizer)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A function whose arguments are all required."""
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def called(*calls: tuple[str, Any], content: str = "") -> dict[str, Any]:
    """An assistant's message with calls: (name, arguments)."""
    made = [
        {"id": f"abcdefg{number:02}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}
