"""`calibrate`: run text through a dense model and keep the distribution of every Linear's scores."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from was_fx.linears import body_linears, check_tokens, find_linears
from was_fx.schedules.calibration import Calibration, CalibrationBuilder
from was_fx.schedules.score import Score, channel_norms
from was_fx.sparsification import model_fingerprint, sparse_state

Progress = Callable[[int, int], None]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    tokens: Tensor,
    *,
    score: Score | None = None,
    text: str = "",
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the quantiles of the score |x_j|·g_j^α of every Linear but the head.

    Activations are counted into histograms batch by batch and never kept, so memory does not grow with the text.

    Args:
        model: a dense causal LM; its dtype and device are used as they are.
        tokens: LongTensor [n, seq] of token ids, any device.
        score: WAS's |x|·‖W‖₁ by default.
        text: what the tokens are, for the record.
        batch_size: sequences per forward pass.
        progress: called with (sequences done, n).

    Returns:
        A `Calibration`.

    Raises:
        ValueError: the model is sparsified or has no Linears, or `tokens` has a bad shape or unknown ids.
        TypeError: `tokens` is not an integer tensor.
    """
    if sparse_state(model) is not None:
        raise ValueError("the model is sparsified; calibration needs the dense one: was_fx.densify(model) first")
    check_tokens(model, tokens)
    score = score or Score()
    linears = body_linears(model)
    norms = {name: channel_norms(linear.weight, score.norm) for name, linear in linears.items()}
    builder = CalibrationBuilder(score, {name: linear.shape for name, linear in linears.items()}, norms)
    hooks = [
        linear.module.register_forward_pre_hook(partial(_record, builder, name)) for name, linear in linears.items()
    ]
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        for start in range(0, tokens.shape[0], batch_size):
            model(input_ids=tokens[start : start + batch_size].to(device), use_cache=False)
            if progress is not None:
                progress(min(start + batch_size, tokens.shape[0]), tokens.shape[0])
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return builder.build(text=text, fingerprint=model_fingerprint(model, find_linears(model)))


def _record(builder: CalibrationBuilder, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    builder.add(name, args[0])
