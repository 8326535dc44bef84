"""What is installed: versions, plug-ins that other libraries know of, and the folders that hold what was compiled."""

import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from was_fx.compat.dynamo import inductor_cache
from was_fx.kernels.parts.gemv_config import user_folder
from was_fx.kernels.parts.user_cache import user_cache
from was_fx.version import __version__

NAME = "was-fx"
# What is looked at, beside Python and was-fx itself; the last is optional.
PACKAGES = ("torch", "triton", "transformers", "safetensors", "nevergrad", "lm-eval")


@dataclass(frozen=True)
class Package:
    """One package.

    Attributes:
        name: as pip calls it.
        version: that is installed; None if it is not.
        supported: versions that was-fx is for, such as ">=2.11,<2.14"; "" where any is.
        problem: what is wrong and what to do; "" if nothing is.
    """

    name: str
    version: str | None
    supported: str
    problem: str


@dataclass(frozen=True)
class PlugIn:
    """A registration with another library.

    Attributes:
        name: what is registered.
        registered: whether that library knows it; None if the library is not installed.
        problem: what is wrong and what to do; "" if nothing is.
    """

    name: str
    registered: bool | None
    problem: str


@dataclass(frozen=True)
class Cache:
    """A folder, or some files of one.

    Attributes:
        name: what lies there.
        path: where.
        nbytes: bytes of all files; 0 where there are none.
        files: how many.
    """

    name: str
    path: str
    nbytes: int
    files: int


def packages() -> list[Package]:
    """Python, was-fx and `PACKAGES`, each with the versions that the installed was-fx is for."""
    from packaging.requirements import Requirement  # transformers needs it

    python = platform.python_version()
    found = [
        Package("python", python, ">=3.11", "" if sys.version_info >= (3, 11) else _wrong("python", python, ">=3.11"))
    ]
    try:
        lines = metadata.requires(NAME) or []
        found.append(Package(NAME, __version__, "", ""))
    except metadata.PackageNotFoundError:
        lines = []
        problem = "was-fx is not installed, only found on the path; run pip install . in its folder"
        found.append(Package(NAME, __version__, "", problem))
    needed: dict[str, Requirement] = {}
    for each in map(Requirement, lines):
        if each.marker is None or each.name not in needed:  # an extra may name a package that is needed anyway
            needed[each.name] = each
    for name in PACKAGES:
        requirement = needed.get(name)
        wanted = ",".join(sorted(map(str, requirement.specifier), reverse=True)) if requirement else ""
        optional = requirement is not None and requirement.marker is not None
        if optional and "extra" not in str(requirement.marker):  # type: ignore[union-attr]
            optional = not requirement.marker.evaluate()  # type: ignore[union-attr]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            problem = "" if optional else f'{name} is not installed; run pip install "{name}{wanted}"'
            found.append(Package(name, None, wanted, problem))
            continue
        fits = requirement is None or requirement.specifier.contains(version, prereleases=True)
        found.append(Package(name, version, wanted, "" if fits else _wrong(name, version, wanted)))
    return found


def _wrong(name: str, version: str, wanted: str) -> str:
    return f'{name} {version} is outside of {wanted}, which was-fx is tested with; run pip install "{name}{wanted}"'


def plug_ins() -> list[PlugIn]:
    """The backend of torch.compile, the quantizer of transformers and the model of lm-eval."""
    import torch

    again = "run pip install . in the folder of was-fx, which registers it"
    backends = torch.compiler.list_backends(exclude_tags=())
    found = [_plug_in('torch.compile(backend="was")', "was" in backends, again)]
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    again = "import was_fx before the model is loaded, and see that no warning says why it could not register"
    found.append(_plug_in("quantizer of from_pretrained", "was" in AUTO_QUANTIZER_MAPPING, again))
    try:
        import lm_eval.models  # noqa: F401  # when it is imported, was-fx registers itself
        from lm_eval.api.registry import model_registry
    except ImportError:
        return [*found, PlugIn("model of lm-eval", None, "")]
    return [*found, _plug_in("model of lm-eval", "was" in model_registry, again)]


def _plug_in(name: str, registered: bool, remedy: str) -> PlugIn:
    return PlugIn(name, registered, "" if registered else f"{name} is not registered; {remedy}")


def caches() -> list[Cache]:
    """Where tuned tiles, compiled kernels, and what Inductor and Triton compiled lie on this machine."""
    found = [
        _cache("C++ kernels compiled here", user_cache(), "cpu_kernels_*"),
        _cache("tile sizes tuned here", user_folder(), "*.json"),
        _cache("Inductor", Path(inductor_cache()), "**/*"),
    ]
    try:
        from triton import knobs
    except ImportError:
        return found
    return [*found, _cache("Triton", Path(knobs.cache.dir), "**/*")]


def _cache(name: str, folder: Path, pattern: str) -> Cache:
    sizes = []
    for path in folder.glob(pattern):
        try:
            if path.is_file():
                sizes.append(path.stat().st_size)
        except OSError:
            continue  # gone meanwhile
    return Cache(name, str(folder), sum(sizes), len(sizes))
