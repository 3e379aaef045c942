"""The whole model, base and adapter together, as one GGUF for llama.cpp and Ollama, with a Modelfile.

    general.*       what it is and what it was made from, never a path
    <arch>.*        the config, all that counts of it (gguf_meta.py)
    tokenizer.*     the tokenizer that was trained with (gguf_vocab.py); where the base is a GGUF its own block, as it
                    stands there, but for the chat template and the end of a turn, where others were trained
    tensors         the merge's values (merged.py), under GGUF's names and in its layout (gguf_names.py)

All that can be refused is refused before a byte is written: the plan, the keys, the tokenizer and every tensor's type
follow from headers. Then one tensor after the other is read, summed in float32, rounded once and written, so that the
peak is about one tensor. The finished file is read by deltaw's own reader before it gets its name.

A head that is tied to the embedding has no tensor here: llama.cpp takes the embedding where `output.weight` is missing.
It has one where the merge untied it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltaw.base.gguf_parts import parts_of, read_model
from deltaw.base.source import HUB_ID
from deltaw.base.weights import read_tensor, write_text_atomic
from deltaw.errors import InputError, listed
from deltaw.export.destination import Destination, Options, Written
from deltaw.export.gguf_file import KEPT, Typed, read_block, text, typed, write_file
from deltaw.export.gguf_meta import check_read_back, metadata
from deltaw.export.gguf_names import family
from deltaw.export.gguf_quantizer import fallbacks, find_quantizer, quantize_file
from deltaw.export.gguf_types import EMBEDDING, HEAD, PLAIN, Place, choose, encoded, number, type_named
from deltaw.export.gguf_vocab import SLOTS, TEMPLATE, special_ids, vocabulary
from deltaw.export.merged import Planned, plan_merge
from deltaw.export.modelfile import FILE, modelfile
from deltaw.export.trained import Trained
from deltaw.progress import Display

if TYPE_CHECKING:
    import numpy as np

HEADLESS = ("gemma2",)  # llama.cpp has no place for their head
FLOAT = "F32"  # of the file that llama.cpp's quantiser is given
SPARE = 1 << 16  # bytes of keys and entries beside the tokenizer's, at most


class GgufModel(Destination):
    """`<base>-<run>-<type>.gguf` and a Modelfile."""

    def __init__(self, trained: Trained, options: Options) -> None:
        super().__init__(trained, options)
        self.type = type_named(options.type)
        self.quantizer = None if self.type in PLAIN else find_quantizer(self.type)
        self.plan = plan_merge(trained)
        self.config = self.plan.skeleton.config
        self.family = family(self.config)
        self.planned = self._planned()
        shapes = {name: self._shape(planned) for name, planned in self.planned.items()}
        self.meta = metadata(self.config, shapes[EMBEDDING][0])
        shapes |= {name: (len(values),) for name, values in self.meta.tensors.items()}
        self.places = choose(shapes, self.type if self.quantizer is None else FLOAT)
        self.notes = list(self.meta.notes)
        self.keys = self._keys(shapes[EMBEDDING][0])
        name = f"{trained.base.public_name.rpartition('/')[2]}-{_run_name(trained)}"
        self.file = f"{name}-{self.type}.gguf"
        self.modelfile, notes = modelfile(trained, self.file)
        self.notes += notes
        if self.quantizer is not None and (said := fallbacks(shapes)):
            self.notes.append(said)

    def size(self) -> int:
        floats = sum(place.size + 64 for place in self.places)
        lists = sum(_bytes(value) for value in self.keys.values())
        more = 0 if self.quantizer is None else floats // 2  # 2 bytes at most where no block fits
        return floats + more + lists + SPARE + len(self.modelfile.encode())

    def write(self, folder: Path, display: Display) -> Written:
        path = folder / self.file
        written = path if self.quantizer is None else folder / ".float.gguf"
        with display.task(f"writing {written.name if self.quantizer is None else FLOAT}", len(self.places)) as update:
            write_file(written, self.family.architecture, self.keys, self.places, self._values(update))
        check_read_back(written, self.config, self.meta)
        lines = [f"{self.file}: {len(self.places)} tensors, {_counted(self.places)}"]
        if self.quantizer is not None:
            types = quantize_file(self.quantizer, written, path, self.type, display)
            written.unlink()
            lines = [f"{self.file}: " + ", ".join(f"{count} {name}" for name, count in types.most_common())]
        write_text_atomic(folder / FILE, self.modelfile)
        more = {"file": self.file, "type": self.type, "architecture": self.family.architecture, "notes": self.notes}
        return Written(_usage(self.file), [*lines, *self.notes], more)

    def _planned(self) -> dict[str, Planned]:
        """The tensor of the plan for each of the file, by GGUF's name."""
        plan, parameters = self.plan, self.plan.by_parameter
        names = [name for name, _ in plan.skeleton.named_parameters()]
        if missing := [name for name in names if name not in parameters and not self._tied(name)]:
            raise InputError(
                f"{self.trained.base.name}: {len(missing)} of {len(names)} parameters aren't tensors of its files:\n"
                f"{listed(missing, 2)}",
                fix="load it with transformers, save it with save_pretrained, and name that folder with --base",
            )
        planned = {self.family.tensor(name): parameters[name] for name in parameters if not self._left_out(name)}
        if HEAD in planned and self.family.architecture in HEADLESS:
            raise InputError(
                f"{self.trained.name}: its head isn't the embedding any more, and llama.cpp's "
                f"{self.family.architecture} has no place for one",
                fix="train without the head (lm_head), or use another destination: deltaw merge",
            )
        return planned

    def _tied(self, name: str) -> bool:
        """Whether a parameter is another one, too."""
        shared = [p for p in self.plan.skeleton.parameters() if p is self.plan.skeleton.get_parameter(name)]
        return len(shared) == 1 and not self.plan.unties and name == self._head_name()

    def _head_name(self) -> str:
        head = self.plan.skeleton.get_output_embeddings()  # type: ignore[operator]
        return next(f"{path}.weight" for path, module in self.plan.skeleton.named_modules() if module is head)

    def _left_out(self, name: str) -> bool:
        """A tied head that the base's files hold all the same."""
        if name != self._head_name() or self.plan.unties:
            return False
        head = self.plan.skeleton.get_parameter(name)
        embedding = self.plan.skeleton.get_input_embeddings().weight  # type: ignore[operator]
        return head is embedding

    def _shape(self, planned: Planned) -> tuple[int, ...]:
        assert planned.parameter is not None
        stored = self.family.stored(planned.parameter, torch.empty(planned.shape, device="meta"))
        return tuple(next(iter(stored.values())).shape)

    def _keys(self, rows: int) -> dict[str, Typed]:
        architecture = self.family.architecture
        keys = {name: typed(value) for name, value in self._general().items()}
        keys |= {f"{architecture}.{name}": typed(value) for name, value in self.meta.keys.items()}
        file = self.trained.base.gguf
        if file is None:
            words = vocabulary(self.trained.renderer, rows)
            self.notes += words.notes
            return keys | {name: typed(value) for name, value in words.keys.items()}
        read_model(parts_of(file))  # its counts are checked before gguf-py believes them
        block = read_block(parts_of(file)[0], names=KEPT)
        return keys | block | self._trained_keys(block)

    def _trained_keys(self, block: dict[str, Typed]) -> dict[str, Typed]:
        """What was trained otherwise than the base's own tokenizer block says."""
        renderer, keys = self.trained.renderer, dict[str, Typed]()
        own = block.get(TEMPLATE)
        if renderer.template and (own is None or text(own) != renderer.template):
            keys[TEMPLATE] = typed(renderer.template)
            self.notes.append("the tokenizer is the base file's own, but the chat template the one trained under")
        uses = {f"tokenizer.ggml.{use}_token_id" for use in ("eos", *SLOTS)}
        known = {block[key].value for key in uses if key in block}
        end = renderer.tokenizer.eos_token_id if self.trained.plain else renderer.end_of_turn
        if end is not None and end not in known:
            ids = special_ids(renderer, [])
            keys |= {f"tokenizer.ggml.{name}": typed(id) for name, id in ids.items() if name == "eot_token_id"}
            keys.setdefault("tokenizer.ggml.eot_token_id", typed(end))
            self.notes.append(f"the end of a turn is token {end}, which the base's own block doesn't say")
        return keys

    def _general(self) -> dict[str, Any]:
        from gguf import GGML_QUANT_VERSION, LlamaFileType

        trained = self.trained
        public = trained.base.public_name
        kind = self.type if self.quantizer is None else FLOAT
        file_type = LlamaFileType.ALL_F32 if kind == "F32" else LlamaFileType[f"MOSTLY_{kind}"]
        organization, _, base = public.rpartition("/")
        general: dict[str, Any] = {
            "type": "model",
            "name": f"{base} {_run_name(trained)}",
            "finetune": _run_name(trained),
            "file_type": int(file_type),
            "quantization_version": int(GGML_QUANT_VERSION),
            "base_model.count": 1,
            "base_model.0.name": base,
        }
        if HUB_ID.fullmatch(public) and not Path(public).exists():
            general |= {"base_model.0.organization": organization}
            general |= {"base_model.0.repo_url": f"https://huggingface.co/{public}"}
        return {f"general.{name}": value for name, value in general.items()}

    def _values(self, update: Any) -> "Iterator[np.ndarray]":
        for done, place in enumerate(self.places, 1):
            yield self._value(place)
            update(done)

    def _value(self, place: Place) -> "np.ndarray":
        if place.name in self.meta.tensors:
            return encoded(torch.tensor(self.meta.tensors[place.name], dtype=torch.float32), place.type)
        planned = self.planned[place.name]
        assert planned.parameter is not None
        value = self.family.stored(planned.parameter, self.plan.value(planned).float())[place.name]
        data = encoded(value, place.type)
        if place.type == "F16" and not bool((abs(data) < float("inf")).all()):
            raise InputError(f"{planned.name}: holds numbers beyond 65,504, the largest of F16", fix="take BF16")
        return data.reshape(-1)


def _bytes(value: Typed) -> int:
    """Bytes of a value of the metadata, at most."""
    items = value.value if isinstance(value.value, list) else [value.value]
    sizes = (
        len(item.encode() if isinstance(item, str) else item) if isinstance(item, (str, bytes)) else 8 for item in items
    )
    return sum(sizes) + 8 * len(items) + 64


def _counted(places: list[Place]) -> str:
    kinds = {kind: sum(place.type == kind for place in places) for kind in dict.fromkeys(p.type for p in places)}
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _run_name(trained: Trained) -> str:
    """The last part of the run's or the adapter's name: a path is nobody's business."""
    return Path(trained.name).expanduser().resolve().name


def _usage(file: str) -> str:
    return (
        f"```sh\nllama-server -m {file}\n```\n\nor, with Ollama:\n\n"
        f"```sh\nollama create my-model -f {FILE}\nollama run my-model\n```\n"
    )
