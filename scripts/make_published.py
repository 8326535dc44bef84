"""Make schedules/published: the schedules of WAS and TEAL from the tables of their releases.

    python scripts/make_published.py DATA [--out DIR]

DATA holds `was_block_sparsities.json` (model → level → one sparsity per block) and `{was,teal}_<model>.safetensors`
with `level` [L], `threshold` [blocks, projections, L] in score units and `greedy_lookup` [blocks, rows, columns], NaN
after the last row, whose columns and projections the metadata names. The same DATA gives the same bytes.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from was_fx.schedules.files.fingerprint import fingerprint_without_weights
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.released.importer import released_schedule
from was_fx.schedules.released.lookup import LookupTable

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "schedules" / "published"


@dataclass(frozen=True)
class Model:
    """What a configuration says of a model of 32 equal blocks, as far as its Linears go."""

    hub_name: str
    architecture: str
    hidden: int
    key_value: int
    intermediate: int
    vocabulary: int
    blocks: int = 32

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each Linear of the blocks, in the order of the modules."""
        h, kv, f = self.hidden, self.key_value, self.intermediate
        block = {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
        }
        return {f"model.layers.{i}.{name}": shape for i in range(self.blocks) for name, shape in block.items()}

    def fingerprint(self) -> dict[str, str]:
        """Architecture and shapes, the head's included; there are no weights to sample."""
        return fingerprint_without_weights(
            self.architecture, {**self.shapes(), "lm_head": (self.vocabulary, self.hidden)}
        )


MODELS = {
    "llama-2-7b": Model("meta-llama/Llama-2-7b-hf", "LlamaForCausalLM", 4096, 4096, 11008, 32000),
    "llama-3-8b": Model("meta-llama/Meta-Llama-3-8B", "LlamaForCausalLM", 4096, 1024, 14336, 128256),
    "llama-3.1-8b": Model("meta-llama/Llama-3.1-8B", "LlamaForCausalLM", 4096, 1024, 14336, 128256),
    "mistral-7b": Model("mistralai/Mistral-7B-v0.1", "MistralForCausalLM", 4096, 1024, 14336, 32000),
}
# The names of the models in was_block_sparsities.json.
WAS_MODELS = {"llama-2-7b": "Llama-2-7B", "llama-3.1-8b": "Llama-3.1-8B", "mistral-7b": "Mistral-7B"}
WAS_LEVELS = (0.4, 0.6, 0.75)
TEAL_MODELS = ("llama-2-7b", "llama-3-8b", "mistral-7b")
TEAL_LEVELS = (0.4, 0.5)
RELEASES = {
    "was": {"repository": "https://github.com/HITSZ-Miao-Group/WAS", "licence": "Apache-2.0"},
    "teal": {"repository": "https://github.com/FasterDecoding/TEAL", "licence": "MIT"},
}
TEXTS = {"was": ("Alpaca, by the WAS release", 20480), "teal": ("Alpaca, by the TEAL release", 0)}


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of one model: a greedy table per block, and thresholds by sparsity of each projection."""

    lookups: list[LookupTable]
    levels: np.ndarray
    thresholds: np.ndarray
    projections: list[str]

    def threshold(self, block: int, projection: str, sparsity: float) -> float:
        """τ in score units, linear between the table's levels. At least 0: a median off zero gives values below."""
        if sparsity > self.levels[-1]:
            raise ValueError(f"block {block}, {projection}: {sparsity} is beyond the table's {self.levels[-1]}")
        row = self.thresholds[block, self.projections.index(projection)]
        return max(0.0, float(np.interp(sparsity, self.levels, row)))


def read_tables(path: Path) -> Tables:
    """The tables in one file of DATA."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        keys = ("level", "threshold", "greedy_lookup")
        level, threshold, rows = (file.get_tensor(key).astype(np.float64) for key in keys)
    columns, projections = metadata["lookup_columns"].split(","), metadata["projections"].split(",")
    lookups = []
    for block in rows:
        block = block[~np.isnan(block[:, 0])]
        sparsities = [{p: float(row[columns.index(p)]) for p in projections} for row in block]
        lookups.append(LookupTable([float(x) for x in block[:, columns.index("effective_sparsity")]], sparsities))
    return Tables(lookups, level, threshold, projections)


def make(method: str, model: str, level: float, block_levels: list[float], tables: Tables) -> Schedule:
    """One published schedule: the row nearest each block's level, and its thresholds."""
    sparsities = {
        (block, projection): sparsity
        for block, block_level in enumerate(block_levels)
        for projection, sparsity in tables.lookups[block].nearest(block_level).items()
    }
    text, tokens = TEXTS[method]
    source = {"method": method.upper(), "model": MODELS[model].hub_name, "level": level, **RELEASES[method]}
    schedule = released_schedule(
        method,
        sparsities,
        tables.threshold,
        MODELS[model].shapes(),
        target=level,
        calibration_text=text,
        calibration_tokens=tokens,
        fingerprint=MODELS[model].fingerprint(),
    )
    return schedule.replace({}, source={**source, "level_by_true_counts": round(schedule.sparsity, 6)})


def main() -> None:
    """Write every published schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR")
    arguments = parser.parse_args()
    block_sparsities = json.loads((arguments.data / "was_block_sparsities.json").read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = [("was", model, level) for model in WAS_MODELS for level in WAS_LEVELS]
    wanted += [("teal", model, level) for model in TEAL_MODELS for level in TEAL_LEVELS]
    for method, model, level in wanted:
        tables = read_tables(arguments.data / f"{method}_{model}.safetensors")
        uniform = [level] * MODELS[model].blocks
        levels = block_sparsities[WAS_MODELS[model]][str(level)] if method == "was" else uniform
        schedule = make(method, model, level, levels, tables)
        path = arguments.out / f"{method}-{model}-{100 * level:.0f}.safetensors"
        schedule.save(path)
        print(f"{path.name}: published as {100 * level:g} %, {100 * schedule.sparsity:.2f} % by true counts")


if __name__ == "__main__":
    main()
