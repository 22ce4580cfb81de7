"""Modules that have been renamed: importing an old name gives the new module, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    "dcgan.graphs": "dcgan.graphed",
    "dcgan.training.fused": "dcgan.training.fast_step",
    "dcgan.training.settings": "dcgan.settings",
    "dcgan.training.step": "dcgan.training.reference_step",
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in RENAMED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        message = f"{old} has been renamed; import {RENAMED[old]} instead"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(RENAMED[old])  # which the import statement then returns


def register() -> None:
    """Make the old names importable."""
    sys.meta_path.append(_Finder())
