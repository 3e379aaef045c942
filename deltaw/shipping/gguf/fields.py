"""The fields of a config that count, each handed out once, so that what nobody asked for is left: base/gguf_keys.py,
turned round."""

from typing import Any

from deltaw.base.fingerprint import settings
from deltaw.errors import InputError, listed


class Fields:
    """The config's fields that count, handed out once each."""

    def __init__(self, config: Any) -> None:
        self.config, self._problems = config, list[str]()
        self._left = set(settings(config)) - {"model"}

    def take(self, name: str, default: Any = None) -> Any:
        self._left.discard(name)
        value = getattr(self.config, name, None)
        return default if value is None else value

    def expect(self, name: str, *neutral: Any) -> None:
        """Accept a field if its value is one of these, else refuse it."""
        if name in self._left and self.take(name) not in neutral:
            self.refuse(f"{name} = {str(getattr(self.config, name))[:60]}")

    def refuse(self, problem: str) -> None:
        """Note a setting of the config that a GGUF can't express."""
        self._problems.append(problem)

    def finish(self) -> None:
        """Raise InputError naming everything that was refused or is left over."""
        self._problems += [f"{name} = {str(getattr(self.config, name))[:60]}" for name in sorted(self._left)]
        if self._problems:
            raise InputError(
                f"a GGUF of a {self.config.model_type} can't express {len(self._problems)} things that its config "
                "says:\n"
                f"{listed(self._problems, 2)}",
                fix="use another destination: deltaw merge writes a folder for transformers and vLLM",
            )
