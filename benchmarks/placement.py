"""A model on two devices, offloaded, or sharded over ranks, against the same model on one device.

    python benchmarks/placement.py                                  # blocks split over cuda:0 and cuda:1
    python benchmarks/placement.py --devices cuda:0 cpu             # the second half offloaded to CPU memory
    python benchmarks/placement.py --devices cpu disk               # without a GPU
    torchrun --nproc-per-node 2 benchmarks/placement.py --ranks     # tp_plan="auto"; NCCL on GPUs, gloo on CPUs

Prints one JSON line per sparsity: the largest difference of logits from those of one device, relative to the largest
logit, over a prompt and the given tokens after it; how far both are from one device in fp32 (root mean square,
relative); and ms per token of both. Exit code 1 if the difference is too large: in bf16, if the placed model is farther
from fp32.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import describe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import was_fx
from was_fx.measure.token_clock import TokenClock
from was_fx.modules.placement import input_device

EMBEDDED = Path(was_fx.__file__).parent / "embedded"
TOLERANCE = 1e-4  # of the largest logit, in fp32
WORSE = 1.5  # times as far from fp32 as one device, in bf16: a channel near its threshold can fall on either side
PROMPT = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(EMBEDDED), help="directory or Hub name")
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"], help="of the first and second half")
    parser.add_argument("--ranks", action="store_true", help="tensor parallel, under torchrun")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--tokens", type=int, default=32, help="decode steps")
    parser.add_argument("--lowering", choices=["inductor", "eager"], help="by default inductor on a GPU, else eager")
    arguments = parser.parse_args()
    rank = _start() if arguments.ranks else 0
    device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    one = _load(arguments, arguments.dtype, device_map={"": device})
    in_fp32 = arguments.dtype == "float32"
    reference = one if in_fp32 else _load(arguments, "float32", device_map={"": device})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, one.config.vocab_size, (4, PROMPT + arguments.tokens), generator=generator)
    calibration = was_fx.calibrate(one, ids)
    with tempfile.TemporaryDirectory() as folder:
        placed = _load(arguments, arguments.dtype, **_placement(arguments, one, folder))
        too_large = False
        for target in arguments.targets:
            schedule = was_fx.uniform(calibration, target)
            expected, before = _decode(was_fx.sparsify(one, schedule, lowering=arguments.lowering), ids[:1])
            found, after = _decode(was_fx.sparsify(placed, schedule, lowering=arguments.lowering), ids[:1])
            difference = float((found - expected).abs().max() / expected.abs().max())
            exact = expected
            if not in_fp32:
                exact, _ = _decode(was_fx.sparsify(reference, schedule, lowering=arguments.lowering), ids[:1])
            errors = [float((each - exact).norm() / exact.norm()) for each in (expected, found)]
            too_large |= difference > TOLERANCE if in_fp32 else errors[1] > WORSE * errors[0]
            row = {
                **describe("cuda" if device != "cpu" else "cpu"),
                "placement": "two ranks" if arguments.ranks else " + ".join(arguments.devices),
                "model": arguments.model,
                "dtype": arguments.dtype,
                "nominal": target,
                "difference": difference,
                "error_one": errors[0],
                "error_placed": errors[1],
                "ms_per_token_one": round(before, 3),
                "ms_per_token_placed": round(after, 3),
            }
            if rank == 0:
                sys.stdout.write(json.dumps(row) + "\n")
    if arguments.ranks:
        torch.distributed.destroy_process_group()
    return int(too_large)


def _start() -> int:
    """Join the ranks of torchrun."""
    rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return rank


def _load(arguments: argparse.Namespace, dtype: str, **placement: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, dtype), **placement).eval()


def _placement(arguments: argparse.Namespace, one: nn.Module, folder: str) -> dict[str, Any]:
    """Arguments of from_pretrained: the first half of the blocks on one device, the second on the other."""
    if arguments.ranks:
        return {"tp_plan": "auto"}
    first, second = arguments.devices
    blocks = len(one.model.layers)  # type: ignore[arg-type,union-attr]
    execution = second if second not in ("cpu", "disk") else first
    places = {f"model.layers.{i}": first if i < blocks // 2 else second for i in range(blocks)}
    head = first if one.config.tie_word_embeddings else execution  # tied to the embedding: one tensor, one place
    places |= {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": execution, "lm_head": head}
    return {"device_map": places, "offload_folder": folder}


@torch.no_grad()
def _decode(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    """(logits [steps, V] on the CPU, ms per token): a prompt and given tokens after it, twice; the second is timed."""
    found, times = [], []
    forced, prompt = ids[0].tolist(), ids[:, :PROMPT].to(input_device(model))
    for _ in range(2):
        clock = TokenClock()
        result = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(forced) - PROMPT,
            min_new_tokens=len(forced) - PROMPT,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, so_far: [forced[len(so_far)]],
            output_logits=True,
            return_dict_in_generate=True,
            streamer=clock,
        )
        found.append(torch.cat([each.float().cpu() for each in result.logits]))
        times.append(statistics.median(clock.steps()))
    return found[-1], times[-1]


if __name__ == "__main__":
    sys.exit(main())
