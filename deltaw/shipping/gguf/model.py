"""The whole model, base and adapter together, as one GGUF for llama.cpp and Ollama, with a Modelfile.

    general.*       what it is and what it was made from, never a path
    <arch>.*        everything in the config that counts (meta.py)
    tokenizer.*     the tokenizer that was trained with (vocab.py); if the base is a GGUF, its own block unchanged,
                    except for the chat template and the end of a turn, if others were trained
    tensors         the merge's values (merge/plan.py), under GGUF's names and in its layout (names.py)

Whatever can be refused is refused before a byte is written: the plan, the keys, the tokenizer and every tensor's type
follow from headers. Then tensors are made and written one at a time (tensors.py), so that the peak is about one tensor.
The finished file is read by deltaw's own reader, and refused if little of the update survived in it, before it gets
its name.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from deltaw.base.source import HUB_ID
from deltaw.errors import InputError, command
from deltaw.files.atomic import write_text_atomic
from deltaw.files.gguf_header import Typed, read_metadata
from deltaw.files.gguf_parts import parts_of
from deltaw.shipping.destination import Destination, Options, Written
from deltaw.shipping.gguf.file import text, typed, write_file
from deltaw.shipping.gguf.meta import check_read_back, metadata
from deltaw.shipping.gguf.modelfile import FILE, modelfile
from deltaw.shipping.gguf.names import family
from deltaw.shipping.gguf.quantizer import fallbacks, find_quantizer, quantize_file
from deltaw.shipping.gguf.tensors import Tensors
from deltaw.shipping.gguf.types import EMBEDDING, FLOATS, PLAIN, choose, general_keys, type_named
from deltaw.shipping.gguf.vocab import SLOTS, TEMPLATE, vocabulary
from deltaw.shipping.merge import survey
from deltaw.shipping.merge.plan import plan_merge
from deltaw.shipping.trained import Trained
from deltaw.shipping.usage import gguf_usage
from deltaw.show.progress import Display

COPIED = ("tokenizer.", "general.license", "general.languages")  # of a base that is a GGUF
WIDER = "--type F32"
FLOAT = "F32"  # of the file that llama.cpp's quantiser is given
SPARE = 1 << 16  # bytes of keys and entries beside the tokenizer's, at most


class GgufModel(Destination):
    """`<base>-<run>-<type>.gguf` and a Modelfile."""

    def __init__(self, trained: Trained, options: Options) -> None:
        super().__init__(trained, options)
        self.type = type_named(options.type)
        self.quantizer = None if self.type in PLAIN else find_quantizer(self.type)
        plan = plan_merge(trained)
        if plan.words and trained.base.gguf is not None:
            raise InputError(
                f"{trained.name} adds tokens, and the tokenizer of a base that is a GGUF is taken as it is",
                fix=f"the whole model: {command('merge', trained.name, options=['-o', 'merged'])}",
            )
        whole: Any = plan.skeleton.config
        self.config, self.family = whole.get_text_config(decoder=True), family(whole)
        self.meta = metadata(self.config, plan.words or len(plan.skeleton.get_input_embeddings().weight))  # type: ignore[operator]
        self.tensors = Tensors(plan, self.family)
        shapes = self.tensors.shapes
        shapes |= {name: (len(values),) for name, values in self.meta.tensors.items()}
        self.places = choose(shapes, self.type if self.quantizer is None else FLOAT)
        more = (self.family.differs, trained.form_note)
        self.notes = [*self.meta.notes, *(note for note in more if note)]
        self.keys = self._keys(shapes[EMBEDDING][0])
        name = f"{trained.base.public_name.rpartition('/')[2].removesuffix('.gguf')}-{_run_name(trained)}-{self.type}"
        self.file = re.sub(r"[^\w.-]+", "-", name) + ".gguf"  # it stands in commands and in the Modelfile
        self.modelfile, notes = modelfile(trained, self.file)
        self.notes += notes
        if self.tensors.left_out:
            self.notes.append(
                f"{self.tensors.left_out} tensors of the vision part aren't in it: llama.cpp reads those from a "
                "separate file, the base's mmproj"
            )
        if self.quantizer is not None and (note := fallbacks(shapes)):
            self.notes.append(note)

    def size(self) -> int:
        floats = sum(place.size + 64 for place in self.places)
        lists = sum(_bytes(value) for value in self.keys.values())
        more = 0 if self.quantizer is None else floats // 2  # 2 bytes at most where no block fits
        return floats + more + lists + SPARE + len(self.modelfile.encode())

    def write(self, folder: Path, display: Display) -> Written:
        path = folder / self.file
        written = path if self.quantizer is None else folder / ".float.gguf"
        with display.task("writing tensors", len(self.places)) as progress:
            values = self.tensors.values(self.places, self.meta.tensors, progress)
            write_file(written, self.family.architecture, self.keys, self.places, values)
        check_read_back(written, self.config, self.meta)
        counts = Counter(place.type for place in self.places)
        if self.quantizer is not None:
            counts = quantize_file(self.quantizer, written, path, self.type, display)
            written.unlink()
            self.tensors.survey(path)
        survivals = self.tensors.survivals
        if self.type in FLOATS:
            survey.check_floating(survivals, self.type, force=self.options.force, wider=WIDER)
        else:
            survey.check_quantised(survivals, self.type, force=self.options.force)
        write_text_atomic(folder / FILE, self.modelfile)
        types = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        warning = survey.warning(survivals, self.type, wider=WIDER) if self.type in FLOATS else None
        lines = [f"{self.file}: {types}", *survey.said(survivals, self.type), *([warning] if warning else [])]
        lines += [] if self.type in FLOATS else survey.noise(survivals, self.type)
        more: dict[str, Any] = {
            "file": self.file,
            "type": self.type,
            "architecture": self.family.architecture,
            "types": counts,
        }
        more |= {"notes": self.notes, "survival": survey.to_json(survivals), "warning": warning}
        return Written(gguf_usage(self.trained, self.file), [*lines, *self.notes], more)

    def _keys(self, rows: int) -> dict[str, Typed]:
        architecture = self.family.architecture
        keys = {name: typed(value) for name, value in self._general().items()}
        keys |= {f"{architecture}.{name}": typed(value) for name, value in self.meta.keys.items()}
        file = self.trained.base.gguf
        if file is None:
            words = vocabulary(self.trained.renderer, rows, chats=not self.trained.plain)
            self.notes += words.notes
            return keys | {name: typed(value) for name, value in words.keys.items()}
        block = read_metadata(parts_of(file)[0], lambda key: key.startswith(COPIED))
        block = {key: value for key, value in block.items() if value.value != []}  # which no reader misses
        return keys | block | self._trained_keys(block)

    def _trained_keys(self, block: dict[str, Typed]) -> dict[str, Typed]:
        """Where training differed from the base's own tokenizer block."""
        renderer, keys = self.trained.renderer, dict[str, Typed]()
        own = block.get(TEMPLATE)
        if renderer.template and (own is None or text(own) != renderer.template):
            keys[TEMPLATE] = typed(renderer.template)
            self.notes.append(
                "the tokenizer is the base file's own, but the chat template is the one it was trained under"
            )
        uses = {f"tokenizer.ggml.{use}_token_id" for use in ("eos", *SLOTS)}
        known = {block[key].value for key in uses if key in block}
        end = renderer.tokenizer.eos_token_id if self.trained.plain else renderer.end_of_turn
        if end is not None and end not in known:
            keys["tokenizer.ggml.eot_token_id"] = typed(end)
            self.notes.append(f"the end of a turn is token {end}, which isn't in the base's own block")
        return keys

    def _general(self) -> dict[str, Any]:
        public = self.trained.base.public_name
        organization, _, base = public.rpartition("/")
        general: dict[str, Any] = {
            "general.type": "model",
            "general.name": f"{base} {_run_name(self.trained)}",
            "general.finetune": _run_name(self.trained),
            **general_keys(self.type if self.quantizer is None else FLOAT),
            "general.base_model.count": 1,
            "general.base_model.0.name": base,
        }
        if HUB_ID.fullmatch(public) and not Path(public).exists():
            general["general.base_model.0.organization"] = organization
            general["general.base_model.0.repo_url"] = f"https://huggingface.co/{public}"
        return general


def _bytes(value: Typed) -> int:
    """The most bytes that a value of the metadata can take."""
    items = value.value if isinstance(value.value, list) else [value.value]
    sizes = (
        len(item.encode() if isinstance(item, str) else item) if isinstance(item, (str, bytes)) else 8 for item in items
    )
    return sum(sizes) + 8 * len(items) + 64


def _run_name(trained: Trained) -> str:
    """The last part of the run's or the adapter's name: a path is nobody's business."""
    return Path(trained.name).expanduser().resolve().name
