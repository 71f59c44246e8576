"""Registers `HSIVIPipeline` where `DiffusionPipeline.from_pretrained` looks up the classes of a saved pipeline.

These are the pipeline modules of diffusers and its namespace. Without both, every repo of the Hub is refused.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register(package: str) -> None:
    """Registers a package with an `HSIVIPipeline`, now or as soon as diffusers is imported."""
    if "diffusers" in sys.modules:
        _add_to_diffusers(package)
    else:
        sys.meta_path.insert(0, _Finder(package))


def _add_to_diffusers(package: str) -> None:
    module, diffusers = sys.modules[package], sys.modules["diffusers"]

    class Diffusers(type(diffusers)):  # type: ignore[misc]
        """The module of diffusers with one more class, which is imported lazily."""

        @property
        def HSIVIPipeline(self) -> Any:  # noqa: N802
            return module.HSIVIPipeline

    diffusers.__class__ = Diffusers
    setattr(diffusers.pipelines, package, module)


class _Finder(MetaPathFinder):
    """Finds diffusers as the other finders do, and calls `_add_to_diffusers` after its import."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "diffusers":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return None
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            _add_to_diffusers(self.package)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
