"""Kernels become machine code of GPUs that are not here: the interpreter lets pass what the compiler refuses."""

import json
import os
import subprocess
import sys

import pytest

from was_fx.kernels.ops.argmax import BLOCK
from was_fx.kernels.ops.decode_attention import segment_size

# Run without the interpreter, which replaces kernels by functions that have no code.
PROGRAM = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module, name, types, constants, capability, warps = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module(module), name)
names = kernel.arg_names
signature = {each: "constexpr" if each in constants else types.get(each, "i32") for each in names}
source = ASTSource(kernel, signature, {(names.index(each),): value for each, value in constants.items()})
print(len(triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["cubin"]))
"""

POINTERS = {
    "fp32": ("best_ptr", "norm_ptr", "part_ptr", "t0", "t1", "t2", "t3"),
    "bf16": ("q_ptr", "k_ptr", "v_ptr", "y_ptr"),
    "i32": ("arrivals_ptr", "index_ptr", "count_ptr"),
    "i1": ("mask_ptr",),
}


def assert_compiles(module, name, types, constants, capability):
    asked = json.dumps([f"was_fx.kernels.ops.{module}", name, types, constants, capability, 8])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, asked], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 1000


@pytest.mark.parametrize(
    ("capability", "splits", "bundles", "lists"), [(80, 4, 0, 1), (90, 1, 0, 1), (90, 4, 0, 0), (90, 64, 4, 2)]
)
def test_attention(capability, splits, bundles, lists):
    group, width = 4, 128
    constants = {
        "D": width, "WIDTH": width, "HEADS": 16, "ROWS": group, "BLOCK": 64, "SPLITS": splits, "FAN": min(16, splits),
        "BUNDLES": bundles, "SEGMENT": segment_size(group, width), "G": lists, "MASKED": True, "UPCAST": False,
        "PDL": capability >= 90,
    }  # fmt: skip
    constants |= {each: None for each in ("best_ptr", "norm_ptr", "part_ptr", "arrivals_ptr") if splits == 1}
    constants |= {each: None for each in ("t0", "t1", "t2", "t3") if not lists}
    types = {each: f"*{dtype}" for dtype, names in POINTERS.items() for each in names} | {"scale": "fp32"}
    assert_compiles("decode_attention", "_decode_attention", types, constants, capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_argmax(capability):
    types = {"x_ptr": "*bf16", "best_ptr": "*i64", "index_ptr": "*i64", "arrivals_ptr": "*i32"}
    constants = {"BLOCK": BLOCK, "PARTS": 64, "PDL": capability >= 90}
    assert_compiles("argmax", "_argmax", types, constants, capability)
