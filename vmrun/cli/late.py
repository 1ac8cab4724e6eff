"""Modules that others import and hardly ever use: they are loaded when they are used. User side of the VMM
process.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class Late(ModuleType):
    """Stands for the module of its name until something in it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def delay(name: str) -> None:
    """Let whoever imports the module `name` from now on wait for it until its first use."""
    sys.modules.setdefault(name, Late(name))
