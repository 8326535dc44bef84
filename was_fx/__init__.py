"""was-fx: decode faster by not reading the weight columns whose input is negligible.

calibration = was_fx.calibrate(model, tokens)
schedule = was_fx.uniform(calibration, target=0.5)
model = was_fx.sparsify(model, schedule)
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_fx.version import __version__

# In a checkout passes/, kernels/, schedules/ and cli/ lie beside this folder; installed, inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "passes").is_dir():
    __path__.append(str(_root))

# Imported when first used: `import was_fx` stays light.
_HOMES = {
    "Calibration": "was_fx.schedules.files.calibration",
    "Evaluation": "was_fx.measure.evaluate",
    "LinearSchedule": "was_fx.schedules.files.schedule",
    "RewriteError": "was_fx.passes.graph.errors",
    "Schedule": "was_fx.schedules.files.schedule",
    "ScheduleError": "was_fx.schedules.errors",
    "Score": "was_fx.schedules.score",
    "WasConfig": "was_fx.plugins.quantizer",
    "calibrate": "was_fx.measure.calibrate",
    "check": "was_fx.measure.check",
    "correct_fisher": "was_fx.searching.schedule_search",
    "decode": "was_fx.generate.decode_loop",
    "densify": "was_fx.sparse.sparsify",
    "draft": "was_fx.sparse.drafting",
    "evaluate": "was_fx.measure.evaluate",
    "evaluate_text": "was_fx.measure.conventions",
    "fisher": "was_fx.schedules.search.fisher",
    "import_release": "was_fx.schedules.released.importer",
    "load_published": "was_fx.schedules.released.published",
    "perplexity": "was_fx.measure.evaluate",
    "quantize": "was_fx.sparse.quantize",
    "recalibrate": "was_fx.measure.calibrate",
    "recommend": "was_fx.searching.recommendation",
    "search": "was_fx.searching.schedule_search",
    "sparsify": "was_fx.sparse.sparsify",
    "uniform": "was_fx.schedules.search.uniform",
}

__all__ = [
    "Calibration",
    "Evaluation",
    "LinearSchedule",
    "RewriteError",
    "Schedule",
    "ScheduleError",
    "Score",
    "WasConfig",
    "__version__",
    "calibrate",
    "check",
    "correct_fisher",
    "decode",
    "densify",
    "draft",
    "evaluate",
    "evaluate_text",
    "fisher",
    "import_release",
    "load_published",
    "perplexity",
    "quantize",
    "recalibrate",
    "recommend",
    "search",
    "sparsify",
    "uniform",
]

if TYPE_CHECKING:
    from was_fx.generate.decode_loop import decode
    from was_fx.measure.calibrate import calibrate, recalibrate
    from was_fx.measure.check import check
    from was_fx.measure.conventions import evaluate_text
    from was_fx.measure.evaluate import Evaluation, evaluate, perplexity
    from was_fx.passes.graph.errors import RewriteError
    from was_fx.plugins.quantizer import WasConfig
    from was_fx.schedules.errors import ScheduleError
    from was_fx.schedules.files.calibration import Calibration
    from was_fx.schedules.files.schedule import LinearSchedule, Schedule
    from was_fx.schedules.released.importer import import_release
    from was_fx.schedules.released.published import load_published
    from was_fx.schedules.score import Score
    from was_fx.schedules.search.fisher import fisher
    from was_fx.schedules.search.uniform import uniform
    from was_fx.searching.recommendation import recommend
    from was_fx.searching.schedule_search import correct_fisher, search
    from was_fx.sparse.drafting import draft
    from was_fx.sparse.quantize import quantize
    from was_fx.sparse.sparsify import densify, sparsify


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'was_fx' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


import_module("was_fx.plugins.announce").announce()
