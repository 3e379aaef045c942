"""The keys of one architecture in a GGUF's metadata, each handed out once; what nobody asked for is left over."""

from pathlib import Path
from typing import Any

from deltaw.errors import InputError, listed

FLAGS = {"use_parallel_residual", "expert_weights_norm"}  # true or false where others are numbers


class Keys:
    """`<architecture>.<suffix>` by suffix. Whatever is neither taken nor refused is named by `finish`: there is no
    third way for a key to go."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.architecture = path, str(metadata["general.architecture"])
        prefix = f"{self.architecture}."
        self._left = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self._problems: list[str] = []

    def __contains__(self, suffix: str) -> bool:
        return suffix in self._left

    def refuse(self, problem: str) -> None:
        """Note something that this file says and no transformers config can."""
        self._problems.append(problem)

    def refuse_key(self, suffix: str, value: Any) -> None:
        self.refuse(f"{self.architecture}.{suffix} = {str(value)[:60]}")

    def number(self, suffix: str, default: float | None = None) -> Any:
        """A finite number, or `default` where the file doesn't say it. A list of equal numbers is that number."""
        value = self._left.pop(suffix, default)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value is default:
            return default
        if isinstance(value, bool) is not (suffix in FLAGS) or not self._finite(value):
            self.refuse_key(suffix, value)
            return default
        return value

    @staticmethod
    def _finite(value: Any) -> bool:
        return isinstance(value, (int, float)) and abs(value) < float("inf")

    def take(self, suffix: str, default: Any = None) -> Any:
        return self._left.pop(suffix, default)

    def expect(self, suffix: str, *neutral: Any) -> None:
        """A key that may stand there as long as it says one of these."""
        if suffix in self._left:
            value = self._left.pop(suffix)
            if not any(value == item for item in neutral):
                self.refuse_key(suffix, value)

    def finish(self) -> None:
        """Raise InputError naming everything that was refused or is left over."""
        for suffix, value in self._left.items():
            self.refuse_key(suffix, "a list" if value is None else value)
        if self._problems:
            raise InputError(
                f"{self.path}: {len(self._problems)} things it says have no place in a transformers model:\n"
                f"{listed(self._problems, 3)}",
                fix="use the safetensors version of the model",
            )
