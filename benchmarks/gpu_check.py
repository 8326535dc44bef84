"""Everything that needs a GPU in one go: tests, tuning of the shapes without an entry, kernel times, decode times.

    python benchmarks/gpu_check.py                        # Llama-3-8B shapes
    python benchmarks/gpu_check.py --shape qwen2.5-7b --skip-tests

Each part runs in a process of its own; a failed one doesn't stop the others, and the exit code says whether any failed.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from was_fx.measure.shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/kernels",
    "tests/passes",
    "tests/cases",
    "tests/was_fx/test_cuda.py",
    "tests/was_fx/test_cuda_generation.py",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args()
    python = sys.executable
    parts = [] if arguments.skip_tests else [[python, "-m", "pytest", "-q", *TESTS]]
    parts += [
        [python, "-m", "was_fx.cli.main", "tune", arguments.shape],
        [python, "benchmarks/gpu_kernels.py", "--shape", arguments.shape],
        [python, "benchmarks/decode.py", "--shape", arguments.shape],
    ]
    failed = [part for part in parts if subprocess.run(part, cwd=ROOT).returncode]
    for part in failed:
        print("failed:", " ".join(part[1:]), file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
