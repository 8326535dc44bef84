"""The schedules that WAS and TEAL published, as files of this package: thresholds for models of 7 and 8 billion
parameters that no one need calibrate again. `scripts/make_published.py` made them; docs/published.md says how."""

from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.names import suggestion

_SUFFIX = ".safetensors"


@cache
def published_names() -> tuple[str, ...]:
    """The names `<method>-<model>-<level in %>`, such as `was-llama-2-7b-40`, sorted."""
    return tuple(sorted(path.name.removesuffix(_SUFFIX) for path in _folder().iterdir() if path.name.endswith(_SUFFIX)))


def load_published(name: str) -> Schedule:
    """A published schedule.

    Its metadata says where it comes from: `source["level"]` (and `target`) is the level that the publisher names,
    `source["level_by_true_counts"]` (and `sparsity`) what that is when every Linear counts by its number of weights.
    The fingerprint holds the architecture and the shapes only, for the weights were not at hand: a fine-tuned
    checkpoint of the same shapes is taken for the model itself.

    Raises:
        ValueError: if no published schedule has this name.
    """
    if name not in published_names():
        raise ValueError(
            f"there is no published schedule {name!r}{suggestion(name, published_names())}; "
            f"expected one of {', '.join(published_names())}"
        )
    with resources.as_file(_folder() / (name + _SUFFIX)) as path:
        return Schedule.load(path)


def _folder() -> Traversable:
    return resources.files("was_fx.schedules.released") / "data"
