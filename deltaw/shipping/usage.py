"""How to load what was exported, as Markdown for its card: code that runs as it stands, in the folder itself.

A block begins with the folder as "."; on the hub, put its name there. A prompt is asked as in training: through the
chat template, or as it is. Stop tokens are spelt out, since a base's own settings often lack the one that ends a turn.
"""

import json
import shlex
from pathlib import Path

from deltaw.base.source import HUB_ID
from deltaw.shipping.beside import missing_stop, stop_ids
from deltaw.shipping.trained import TEMPLATE, Trained

QUESTION = "What is the capital of France?"


def peft_usage(trained: Trained) -> str:
    """For PEFT on transformers."""
    revision = trained.adapter.base.revision
    pinned = f", revision={_literal(revision)}" if revision else ""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained({_literal(base_name(trained))}{pinned})
{resized(trained)}model = PeftModel.from_pretrained(base, folder)

{answer_lines(trained)}
```
"""


def resized(trained: Trained) -> str:
    """What PEFT's loader needs for tokens that the base doesn't have."""
    if not trained.renderer.grown:
        return ""
    return "base.resize_token_embeddings(len(tokenizer))  # the adapter brings tokens of its own\n"


def transformers_usage(trained: Trained) -> str:
    """For a merged model in transformers."""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

{answer_lines(trained)}
```
"""


def answer_lines(trained: Trained) -> str:
    """Code for one answer of `model`, asked as in training. With a mask: without one, `generate` makes one that leaves
    out whatever is the pad token, and that may be a token of the prompt."""
    if chats(trained):
        ids = f"""messages = [{{"role": "user", "content": "{QUESTION}"}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)"""
    else:
        ids = f'ids = tokenizer("{QUESTION}", return_tensors="pt").input_ids'
    return f"""{ids}
answer = model.generate(
    ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=64, do_sample=False, eos_token_id={stop_ids(trained)}
)
print(tokenizer.decode(answer[0, ids.shape[1]:], skip_special_tokens=True))"""


def vllm_usage(trained: Trained, max_lora_rank: int) -> str:
    """For vLLM's server."""
    options = ["--enable-lora", f"--max-lora-rank {max_lora_rank}", "--lora-modules tuned=."]
    if trained.renderer.template and not trained.renderer.own_template:
        options.append(f"--chat-template ./{TEMPLATE}")  # the server takes the base's otherwise
    if missing_stop(trained):
        options.append("--generation-config .")  # which names the token that ends a turn
    revision = trained.adapter.base.revision
    pinned = f" --revision {shlex.quote(revision)}" if revision else ""
    lines = " \\\n    ".join([f"vllm serve {shlex.quote(base_name(trained))}{pinned}", *options])
    if chats(trained):
        route, asked = "chat/completions", f'"messages": [{{"role": "user", "content": "{QUESTION}"}}]'
    else:
        route, asked = "completions", f'"prompt": "{QUESTION}"'
    return f"""```sh
{lines}
curl localhost:8000/v1/{route} -H "Content-Type: application/json" \\
    -d '{{"model": "tuned", {asked}, "max_tokens": 64, "temperature": 0}}'
```

Other weights need another name than `tuned`: the server's prefix cache goes by the adapter's name.
"""


def mlx_usage(trained: Trained) -> str:
    """For mlx_lm, in Python."""
    more = ""
    if trained.renderer.template and not trained.renderer.own_template:
        more = f', tokenizer_config={{"chat_template": open(f"{{folder}}/{TEMPLATE}").read()}}'
    lines = [f"model, tokenizer = load({_literal(base_name(trained))}, adapter_path=folder{more})"]
    if stop := missing_stop(trained):
        lines.append(f"tokenizer.add_eos_token({_literal(stop)})")
    if chats(trained):
        lines.append(f'messages = [{{"role": "user", "content": "{QUESTION}"}}]')
        lines.append("prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)")
    else:
        lines.append(f'prompt = "{QUESTION}"')
    text = "\n".join([*lines, "print(generate(model, tokenizer, prompt, max_tokens=64))"])
    return f"""```python
from mlx_lm import generate, load

folder = "."  # this folder, downloaded
{text}
```
"""


def gguf_usage(trained: Trained, model: str, *, adapter: str = "", template: str = "") -> str:
    """For llama.cpp's server and Ollama: files of this folder. `template`: one that the model's GGUF doesn't have."""
    options = [f"-m {shlex.quote(model)}"]
    options += [f"--lora {adapter}"] * bool(adapter) + [f"--jinja --chat-template-file {template}"] * bool(template)
    if chats(trained):
        route, asked = "chat/completions", f'"messages": [{{"role": "user", "content": "{QUESTION}"}}]'
    else:
        route, asked = "completions", f'"prompt": "{QUESTION}"'
    return f"""```sh
llama-server {" ".join(options)}
curl localhost:8080/v1/{route} -H "Content-Type: application/json" \\
    -d '{{{asked}, "max_tokens": 64, "temperature": 0}}'
```

or with Ollama:

```sh
ollama create tuned -f Modelfile
ollama run tuned "{QUESTION}"
```
"""


def base_name(trained: Trained) -> str:
    """The base as the world knows it: a hub id, or the name of a folder. A path on somebody's machine is neither."""
    name = trained.adapter.base.name
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else trained.base.public_name


def _literal(text: str) -> str:
    """A text in Python's quotes, whatever quotes are in it."""
    return json.dumps(text, ensure_ascii=False)


def chats(trained: Trained) -> bool:
    """Whether it is to be asked through the chat template."""
    return trained.renderer.template is not None and not trained.plain
