"""Announce was-fx to libraries that have no entry points for it, once they are imported and not before.

`import was_fx` must not import transformers. So a finder waits for the module with the library's registry, lets Python
import it as ever, and then imports what registers was-fx there. Without it, transformers would load a checkpoint saved
by a sparsified model as a dense one, with a warning only.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The module with the registry, and the module of ours that registers itself there.
PLUG_INS = {
    "transformers.quantizers.auto": "was_fx.plugins.quantizer",
    "lm_eval.models": "was_fx.plugins.lm_eval_registration",
}


class _AfterImport(MetaPathFinder):
    """Imports a plug-in right after the module it is for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PLUG_INS:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def then_plug_in(module: ModuleType) -> None:
            execute(module)
            _plug_in(fullname)

        loader.exec_module = then_plug_in
        return spec


def announce() -> None:
    """Register with what is imported already, and with the rest as soon as it is."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for module in PLUG_INS:
        if module in sys.modules:
            _plug_in(module)


def _plug_in(module: str) -> None:
    """Import the plug-in for a module; a version of the library that it does not fit must not break the library."""
    try:
        import_module(PLUG_INS[module])
    except (ImportError, AttributeError, TypeError) as error:
        warnings.warn(f"was-fx could not register with this version of {module}: {error}", stacklevel=2)
