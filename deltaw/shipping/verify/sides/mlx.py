"""An MLX adapter (or an MLX model folder) as a side, run by mlx_lm itself. The home of mlx and mlx_lm, both optional.

    mlx:adapter/   adapters.safetensors on a base that `--base` or the other side names
    mlx:model/     a folder with config.json, quantised or not

Everything is computed in float32 except a quantised model, since the question is about the files. Prompts are
written by the folder's own tokenizer where it has one, else the base's.

mlx_lm (0.32) reads `rope_theta` from the top of config.json and silently takes 10,000 where it is missing; what
transformers 5 writes has it under `rope_parameters`. A folder like that answers wrongly in MLX, and this must show
it. Only a base that deltaw made of a GGUF, which nobody gives to mlx_lm, is read as it is meant.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltaw.base.source import Source, find_base
from deltaw.data.render import open_tokenizer
from deltaw.errors import InputError
from deltaw.files.strict_json import read_json
from deltaw.shipping.verify.sides.local import Words, stored_type
from deltaw.shipping.verify.sides.side import Answer, Asked, Logs, Numbers, Progress, Prompt, Row, Side
from deltaw.show.progress import Display

INSTALL = "pip install mlx-lm (on Linux also mlx[cpu])"
ADAPTER = "adapters.safetensors"


class Mlx(Side):
    """`folder` is an adapter's or a model's. Raises InputError: no mlx_lm, no such folder, a base that isn't named."""

    def __init__(self, name: str, folder: Path, *, base: str | None, display: Display) -> None:
        if importlib.util.find_spec("mlx_lm") is None:
            raise InputError(f"{name}: asking MLX needs a package that isn't installed", fix=INSTALL)
        self.name, self.notes = name, []
        self._adapter = folder if (folder / ADAPTER).is_file() else None
        if self._adapter is None and not (folder / "config.json").is_file():
            raise InputError(f"{name}: holds neither {ADAPTER} nor config.json")
        if self._adapter is not None and base is None:
            raise InputError(f"{name} doesn't say which base it belongs to", fix="name it with --base")
        # A quantised model isn't one that find_base takes, and needn't be.
        self._model, self._meant = folder, dict[str, Any]()
        if self._adapter is not None:
            source = find_base(str(base), display=display)
            self._model = source.directory
            if source.gguf is not None:
                config = read_json(self._model / "config.json", allow_nan=True)
                rope = config.get("rope_parameters") or {}
                self._meant = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        own = (folder / "tokenizer_config.json").is_file()
        self._words = Words(open_tokenizer(folder if own else self._model))
        self.chats = self._words.has_template
        self.numbers = self._numbers()
        self._loaded: Any = None

    def load(self) -> None:
        import mlx.core as mx  # type: ignore[import-not-found, unused-ignore]
        from mlx_lm.utils import load_adapters, load_model  # type: ignore[import-not-found, unused-ignore]

        try:
            model, config = load_model(self._model, model_config=self._meant)
            if "quantization" not in config:
                model.set_dtype(mx.float32)
            self._loaded = load_adapters(model, str(self._adapter)) if self._adapter else model
        except Exception as error:  # whatever mlx_lm makes of the folder
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.name}: mlx_lm can't load it ({type(error).__name__}: {reason})") from None
        self._loaded.eval()

    def ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...] | None]:
        return [self._words.ids(prompt) for prompt in prompts]

    def answers(self, asked: Sequence[Asked], tokens: int, progress: Progress) -> list[Answer]:
        import mlx.core as mx  # type: ignore[import-not-found, unused-ignore]
        from mlx_lm.generate import generate_step  # type: ignore[import-not-found, unused-ignore]

        stops, answers = self._stops(), []
        for number, one in enumerate(asked, 1):
            ids: list[int] = []
            for token, _ in generate_step(mx.array(list(one.ids or ())), self._loaded, max_tokens=tokens):
                ids.append(int(token))
                if ids[-1] in stops:
                    break
            ended = bool(ids) and ids[-1] in stops
            answers.append(Answer(self._words.decode(ids[:-1] if ended else ids), tuple(ids), ended))
            progress(number)
        return answers

    def logs(self, rows: Sequence[Row], progress: Progress) -> list[Logs] | None:
        import mlx.core as mx

        all_logs = []
        for number, row in enumerate(rows, 1):
            logits_LV = self._loaded(mx.array([[*row.prompt, *row.answer]]))[0]
            first = len(row.prompt) - 1
            logits_PV = logits_LV[first : first + len(row.answer)].astype(mx.float32)
            all_logs.append(Logs(torch.tensor(logits_PV.tolist()).log_softmax(-1)))
            progress(number)
        return all_logs

    def decode(self, ids: Sequence[int]) -> str | None:
        return self._words.decode(ids)

    def close(self) -> None:
        self._loaded = None

    def _numbers(self) -> Numbers:
        quantised = read_json(self._model / "config.json", allow_nan=True).get("quantization")
        if isinstance(quantised, dict):
            return Numbers(f"Q{quantised.get('bits', 4)}_1", ("bfloat16",), "MLX's own quantisation")
        lost = "float32" if self._adapter else stored_type(Source(str(self._model), self._model))
        return Numbers(lost, ("float32",), "mlx_lm, run in float32")

    def _stops(self) -> set[int]:
        """As mlx_lm has them: the config's eos, else the tokenizer's."""
        files = [self._model / "generation_config.json", self._model / "config.json"]
        for file in files:
            stops = read_json(file, allow_nan=True).get("eos_token_id") if file.is_file() else None
            if stops is not None:
                return set(stops if isinstance(stops, list) else [stops])
        return {self._words.tokenizer.eos_token_id}
