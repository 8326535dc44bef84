"""Sparse Linear on a CPU: gather only the kept rows of Wᵀ, in C++ (`cpu_gather.cpp`).

The file is compiled once, when it is first needed, with the C++ compiler that Inductor needs too, and kept in the
user's cache. Without a compiler `cpu_embedding_bag` does the same work in plain PyTorch at about half the speed.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from was_fx.kernels.parts.user_cache import user_cache

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

_FUNCTIONS = {torch.bfloat16: "sparse_linear_bf16", torch.float32: "sparse_linear_fp32"}

# Most tokens a call may hold before the dense product, which reads W once for all of them, is faster (at 50 %
# sparsity; `benchmarks/cpu_kernels.py`).
MAX_TOKENS = {torch.float32: 8, torch.bfloat16: 8}


def supports(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether this serves x [..., K] and weights [N_i, K]: few tokens on a CPU, Wᵀ row-contiguous, a compiler."""
    if x.device.type != "cpu" or x.dtype not in MAX_TOKENS or not x.numel():
        return False
    if x.numel() // x.shape[-1] > MAX_TOKENS[x.dtype]:
        return False
    return all(w.dtype == x.dtype and w.t().is_contiguous() for w in weights) and library() is not None


def sparse_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], thresholds: Sequence[Tensor]
) -> Tensor:
    """`was::sparse_linear` for the few tokens of a decode step; see `sparse_linear.reference` for the meaning."""
    loaded = library()
    assert loaded is not None  # `supports` asked
    channels = x.shape[-1]
    rows = x.reshape(-1, channels).contiguous()
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    thresholds = [threshold.contiguous() for threshold in thresholds]
    sizes = [weight.shape[0] for weight in weights]
    y = x.new_empty(*x.shape[:-1], sum(sizes))
    getattr(loaded, _FUNCTIONS[x.dtype])(
        ctypes.c_void_p(rows.data_ptr()),
        _pointers(weights),
        _pointers(biases),
        _pointers(thresholds),
        (ctypes.c_int64 * len(sizes))(*sizes),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int64(rows.shape[0]),
        ctypes.c_int64(channels),
        ctypes.c_int64(len(sizes)),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return y


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it can't be compiled (logged once)."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        log.warning("no C++ compiler found; decoding on this CPU takes about twice as long. Install g++ or clang")
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", b"") or str(error).encode()
        log.warning(
            "%s can't compile %s; decoding on this CPU takes about twice as long:\n%s",
            compiler,
            SOURCE.name,
            output.decode(errors="replace")[-2000:],
        )
        return None


def _compiled(compiler: str) -> Path:
    """Path of the shared library, compiled unless the cache holds it for this source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256()
    for part in (SOURCE.read_bytes(), version, " ".join(FLAGS).encode(), _processor().encode()):
        key.update(part)
    target = _cache() / f"cpu_gather_{key.hexdigest()[:16]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, check=True)
            os.replace(made, target)  # whole or not at all, also when two processes compile
    return target


def _cache() -> Path:
    """A folder of the user's to keep compiled files in; a temporary one when theirs can't be written."""
    folder = user_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="was_fx_"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="was_fx_"))


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])
