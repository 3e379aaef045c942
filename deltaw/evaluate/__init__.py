"""How well a model does: losses, metrics, what was forgotten.

The room has the name of the verb, and Python puts a room that was imported where `deltaw.evaluate` is looked for. So
the room itself can be called, and is what the verb is (side_by_side.py).
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from deltaw.evaluate.side_by_side import evaluate

        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _Room
