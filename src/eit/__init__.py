"""EIT: a vision transformer with a decreasing share of convolution (arXiv 2203.07116).

>>> import eit
>>> model = eit.create_model("eit_mini", num_classes=10)  # or eit.load("digits"), eit.load("runs/mine")
"""

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version as _version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from eit.imports import quick_imports as _quick_imports

__version__ = _version("eit")

# Public name -> its module. Imported on first use, so that `eit --version` does not wait for torch.
_PUBLIC = {
    "EIT": "models.eit",
    "Card": "weights.card",
    "Analysis": "analysis.measure",
    "analyze": "analysis.measure",
    "complexity": "models.complexity",
    "evaluate": "inference.evaluate",
    "predict": "inference.predict",
    "create_model": "models.registry",
    "list_models": "models.registry",
    "load": "inference.predict",
    "load_weights": "weights.load",
    "train": "training.train",
    "UserError": "errors",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from eit.analysis.measure import Analysis as Analysis
    from eit.analysis.measure import analyze as analyze
    from eit.errors import UserError as UserError
    from eit.inference.evaluate import evaluate as evaluate
    from eit.inference.predict import load as load
    from eit.inference.predict import predict as predict
    from eit.models.complexity import complexity as complexity
    from eit.models.eit import EIT as EIT
    from eit.models.registry import create_model as create_model
    from eit.models.registry import list_models as list_models
    from eit.training.train import train as train
    from eit.weights.card import Card as Card
    from eit.weights.load import load_weights as load_weights


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        with _quick_imports():
            return getattr(importlib.import_module(f"eit.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'eit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _RegisterWithTimm(MetaPathFinder, Loader):
    """Registers our models as soon as timm is imported: `import eit` alone then costs neither torch nor timm."""

    searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "timm" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        self.loader: Loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module("eit.models.registry")


if "timm" in sys.modules:
    importlib.import_module("eit.models.registry")
else:
    sys.meta_path.insert(0, _RegisterWithTimm())
