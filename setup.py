"""The C++ kernels of kernels/cpu as part of the wheel, if there is a compiler; else they are compiled when first used.

Everything else about the package stands in pyproject.toml.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path(__file__).parent / "kernels" / "cpu"
SOURCES = (
    "kernels.cpp",
    "body.inc",
    "program.inc",
    "pairs.inc",
)  # as in kernels/cpu/library.py, which tells by the hash

digest = hashlib.sha256()
for name in SOURCES:
    digest.update((FOLDER / name).read_bytes())

setup(
    ext_modules=[
        Extension(
            "was_fx.kernels.cpu.cpu_kernels",
            sources=["kernels/cpu/kernels.cpp"],
            depends=[f"kernels/cpu/{name}" for name in SOURCES],
            define_macros=[("WAS_SOURCE", f'"{digest.hexdigest()[:16]}"')],
            extra_compile_args=["-std=c++17", "-O2", "-g0", "-w", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
    ]
)
