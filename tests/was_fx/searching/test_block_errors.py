"""Errors of a block's output: candidates as rows of a batch are those alone."""

import pytest
import torch

import was_fx
from was_fx.coverage.tiny_models import tiny_model
from was_fx.schedules.blocks import find_blocks
from was_fx.schedules.search.threshold_table import from_calibration
from was_fx.searching.block_errors import BlockErrors, BlockInputs


def errors_of(model, tokens):
    table = from_calibration(was_fx.calibrate(model, tokens))
    block = find_blocks(table.shapes)[-1]
    candidates = [
        dict.fromkeys(block.shapes, 0.3),
        *({**dict.fromkeys(block.shapes, 0.3), n: 0.8} for n in block.shapes),
    ]
    return lambda: BlockErrors(model, BlockInputs(model, [block], tokens), block, table, 0.5), candidates


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gemma3_text", "bloom", "gpt2", "mamba2", "falcon", "mixtral", "opt"]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_candidates_together_have_the_errors_they_have_alone(kind, rows):
    model, tokens = tiny_model(kind), torch.randint(3, 128, (rows, 48), generator=torch.Generator().manual_seed(0))
    make, candidates = errors_of(model, tokens)
    errors = make()
    together = errors(candidates)
    alone = [errors([each])[0] for each in candidates]
    assert together == pytest.approx(alone, rel=1e-4)
    assert errors.calls == 1 + 2 * len(candidates)
    assert min(alone) > 0


def test_a_block_is_called_once_for_all_candidates(llama, tokens):
    make, candidates = errors_of(llama, tokens)
    errors, calls = make(), []
    llama.model.layers[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    errors(candidates)
    assert len(calls) == 1
