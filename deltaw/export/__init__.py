"""What leaves: merged models and adapters in the forms that other programs take. Called, it is `deltaw.export(...)`.

The import system puts a package into its parent under its own name, over whatever function the parent has there. So the
function is the package itself: its class has `__call__`, and everything else of it is a module's.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """`deltaw.export.command.export`."""
        from deltaw.export.command import export

        return export(*arguments, **options)


sys.modules[__name__].__class__ = _Room
