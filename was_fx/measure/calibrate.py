"""`calibrate`: run text through a dense model and keep the distribution of every Linear's scores.
`recalibrate`: the same for a schedule's thresholds, while the model drops what the schedule says."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from was_fx.measure.fisher import fisher_table, fisher_weights, share_of
from was_fx.modules.linears import (
    LinearModule,
    body_linears,
    byte_share,
    dropping,
    find_linears,
    looking_at_inputs,
)
from was_fx.modules.placement import refuse_sharded, whole_channel_norms
from was_fx.modules.quantized_linear import weight_formats
from was_fx.modules.token_rule import leading_tokens
from was_fx.modules.tokens import Tokens, batches, number_of_sequences, placed
from was_fx.modules.weights_read import noting_reads
from was_fx.schedules.files.calibration import Calibration, CalibrationBuilder
from was_fx.schedules.files.fisher_scores import FisherScores
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.progress import Progress, report
from was_fx.schedules.score import Score, channel_scale
from was_fx.schedules.search.threshold_table import ThresholdTable
from was_fx.schedules.selection import select
from was_fx.sparse.quantize import adopt_foreign
from was_fx.sparse.schedule_fit import fitted
from was_fx.sparse.sparsify import prompts_treated
from was_fx.sparse.state import model_fingerprint, sparse_state

log = logging.getLogger(__name__)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    tokens: Tokens,
    *,
    score: Score | None = None,
    text: str = "",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    fisher: bool = False,
    seed: int = 0,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the quantiles of the score |x_j|·g_j^α of Linears, all but the head by default.

    Of a multimodal model the default are the Linears of its text decoder. Linears that no token reaches, such as those
    that read an image where `tokens` has none, are then left out, and so are those whose weight the model multiplies by
    itself, without a call of the Linear; the log says which, and why.

    Activations are counted into histograms batch by batch and never kept, so memory does not grow with the text.

    Args:
        model: a dense causal LM; its dtype and device are used as they are.
        tokens: token ids: a LongTensor [n, seq], sequences of unequal length, or a tokenizer's output with
            `input_ids` and `attention_mask`; padding is left out. Of a multimodal model also what its processor
            returns for a conversation with images or audio (without padding), or a list of such, each run by itself.
        score: WAS's |x|·‖W‖₁ by default.
        text: what the tokens are, for the record.
        include: qualified names of the Linears to measure, or patterns of them (see `was_fx.schedules.selection`), the
            head among them if one matches; by default all but the head.
        exclude: those to leave out, and dense.
        fisher: measure Fisher weights too, for the recipe `fisher`: a backward pass over a third of the sequences, and
            another pass over those. See `was_fx.measure.fisher`.
        seed: of the labels that are drawn for Fisher weights.
        batch_size: sequences per forward pass.
        progress: called with (sequences done, n).

    Returns:
        A `Calibration`.

    Raises:
        ValueError: the model is sparsified or has no Linears, or `tokens` has a bad shape, unknown ids, or
            images that the model doesn't take.
        ScheduleError: a pattern matches no Linear, or a Linear that was asked for by name saw no token, or one no
                finite scores.
        TypeError: `tokens` is not an integer tensor.
    """
    if sparse_state(model) is not None:
        raise ValueError("the model is sparsified; calibration needs the dense one: was_fx.densify(model) first")
    refuse_sharded(model)
    score = score or Score()
    adopt_foreign(model)
    everything, body = find_linears(model), body_linears(model)
    linears = {name: everything[name] for name in select(everything, include, exclude, default=body)}
    norms = {name: whole_channel_norms(linear, score.norm) for name, linear in linears.items()}
    builder = CalibrationBuilder(score, {name: linear.shape for name, linear in linears.items()}, norms)
    sample = share_of(tokens)
    plain, backward = number_of_sequences(tokens), number_of_sequences(sample)
    total = plain + 2 * backward if fisher else plain
    with looking_at_inputs(linears, builder.add):
        count = run_text(model, tokens, batch_size, partial(_in_phase, progress, 0, total))
    unseen = builder.unseen() if include is None else []
    if 0 < len(unseen) < len(linears):
        _say_what_is_left_out(model, linears, unseen, tokens)
        builder.leave_out(unseen)
        linears = {name: each for name, each in linears.items() if name not in unseen}
    excluded = [name for name in body if name not in linears]
    fingerprint = model_fingerprint(model, everything)
    formats = weight_formats(model)
    found = builder.build(text=text, fingerprint=fingerprint, excluded=excluded, weights=formats, tokens=count)
    if found.pooled:
        log.info(
            "%d matrices of experts, such as %s, saw too few tokens for thresholds of their own and have those of "
            "all experts of their block together",
            len(found.pooled),
            found.pooled[0],
        )
    if not fisher:
        return found
    step = partial(_in_phase, progress, plain, total)
    weights = fisher_weights(model, linears, sample, seed=seed, batch_size=batch_size, progress=step)
    step = partial(_in_phase, progress, plain + backward, total)
    table = fisher_table(model, linears, weights, partial(run_text, model, sample, batch_size, step))
    return replace(found, fisher=FisherScores(weights, table.thresholds))


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    schedule: Schedule,
    tokens: Tokens,
    *,
    rounds: int = 2,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Schedule:
    """The same sparsities with thresholds read from the activations of the model as it runs by `schedule`.

    A model that drops channels has other activations than the dense one it was calibrated on, so what it realises
    drifts from the nominal sparsity, most in the last inputs that depend on many dropped ones. Each round runs the
    text through the model with channels dropped and takes each threshold anew.

    Args:
        model: the dense model of the schedule.
        schedule: its sparsities are kept. Linears with thresholds of their own for each channel are kept as they are.
        tokens: as for `calibrate`; a few thousand tokens do.
        rounds: how often. At high sparsity the first still drifts, the third changes little.
        batch_size: sequences per forward pass.
        progress: called with (sequences done, n · rounds).

    Returns:
        A new schedule.

    Raises:
        ScheduleError: the schedule doesn't fit the model, or the sparse model's activations are not finite.
        ValueError, TypeError: as `calibrate`.
    """
    if sparse_state(model) is not None:
        raise ValueError("the model is sparsified; give the dense one: was_fx.densify(model) first")
    refuse_sharded(model)
    schedule = fitted(model, schedule, find_linears(model))
    for done in range(rounds):
        exponents = {name: entry.exponent for name, entry in schedule.linears.items()}
        step = partial(_later_round, progress, done, rounds)
        table = measure_thresholds(
            model, exponents, tokens, norm=schedule.norm, schedule=schedule, batch_size=batch_size, progress=step
        )
        schedule = schedule.replace(
            {
                name: replace(entry, threshold=table.linear(name, entry.sparsity).threshold)
                for name, entry in schedule.linears.items()
                if entry.channel_threshold is None
            },
            weights=weight_formats(model),
        )
    return schedule


@torch.no_grad()
def measure_thresholds(
    model: nn.Module,
    exponents: Mapping[str, float],
    tokens: Tokens,
    *,
    norm: int,
    schedule: Schedule | None = None,
    signed: bool = False,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> ThresholdTable:
    """Thresholds by sparsity of Linears with a score |x_j|·g_j^α of their own, dense or while the model drops.

    Args:
        model: a causal LM; run dense but for `schedule`, also if it is sparsified.
        exponents: α by qualified name of the Linears to measure, which may include the head.
        tokens: LongTensor [n, seq] of token ids.
        norm: p of the channel norms.
        schedule: what the model drops meanwhile, in all tokens but the first 1 % of each sequence, which are then not
            measured either: entries for all of these Linears; by default nothing.
        signed: measure max(x_j, 0) for `ThresholdTable.signed`.
        batch_size: sequences per forward pass.
        progress: called with (sequences done, n).

    Raises:
        ScheduleError: a Linear saw no token, or activations that are not finite.
    """
    found = find_linears(model)
    linears = {name: found[name] for name in exponents}
    norms = {name: whole_channel_norms(linear, norm) for name, linear in linears.items()}
    # The exponent differs from Linear to Linear, so it goes into the scale: |x|·g^α is the score of norms g^α.
    scales = {name: channel_scale(norms[name], exponent) for name, exponent in exponents.items()}
    builder = CalibrationBuilder(Score(1.0, norm), {name: linear.shape for name, linear in linears.items()}, scales)
    thresholds = {
        name: None if schedule is None else schedule.linears[name].channel_thresholds(norms[name]) for name in linears
    }

    def record(name: str, x: Tensor) -> None:
        builder.add(name, x.clamp(min=0) if signed else x)

    with dropping(linears, thresholds, first=0 if schedule is None else leading_tokens, look=record):
        count = run_text(model, tokens, batch_size, progress)
    return ThresholdTable(builder.build(text="", fingerprint={}, tokens=count), dict(exponents), norm, signed)


def run_text(model: nn.Module, tokens: Tokens, batch_size: int, progress: Progress | None) -> int:
    """Run the text through the model, every Linear dense, and say how many tokens it has."""
    training, count = model.training, 0
    model.eval()
    try:
        with prompts_treated(model, "dense"):
            for batch, done, total in batches(model, tokens, batch_size):
                model(**placed(model, batch), use_cache=False)
                count += batch["input_ids"].numel()
                report(progress, done, total)
    finally:
        model.train(training)
    return count


def _say_what_is_left_out(
    model: nn.Module, linears: Mapping[str, LinearModule], unseen: Sequence[str], tokens: Tokens
) -> None:
    """The reasons, for which the first sequence is run again, with the share of bytes that is dense for good."""
    first, _, _ = next(batches(model, tokens, 1))
    with noting_reads({name: linears[name] for name in unseen}) as read:
        run_text(model, first, 1, None)
    by_model = [name for name in unseen if name in read]
    if by_model:
        log.warning(
            "%d of %d Linears are left out and stay dense, such as %s: the model multiplies by their weights itself, "
            "without a call of the Linear; they are %.1f %% of the bytes of a token",
            len(by_model),
            len(linears),
            by_model[0],
            100 * byte_share(model, [linears[name] for name in by_model]),
        )
    unreached = [name for name in unseen if name not in read]
    if unreached:
        log.warning(
            "%d of %d Linears are left out and stay dense, such as %s: no token reaches them",
            len(unreached),
            len(linears),
            unreached[0],
        )


def _in_phase(progress: Progress | None, before: int, total: int, done: int, _of: int) -> None:
    report(progress, before + done, total)


def _later_round(progress: Progress | None, done: int, rounds: int, sequences: int, of: int) -> None:
    report(progress, done * of + sequences, rounds * of)
