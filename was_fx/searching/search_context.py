"""What the steps of one search share: its arguments, the Linears in blocks, thresholds, what was spent."""

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from was_fx.measure.calibrate import measure_thresholds, recalibrate
from was_fx.modules.linears import head_linears
from was_fx.schedules.blocks import Block, find_blocks
from was_fx.schedules.experts import group_shapes, groups, spread
from was_fx.schedules.files.calibration import Calibration
from was_fx.schedules.files.schedule import Schedule, ScheduleMetadata
from was_fx.schedules.search.block_search import SearchProgress, SearchState
from was_fx.schedules.search.latency import LatencyTable
from was_fx.schedules.search.level_table import LevelTable
from was_fx.schedules.search.recipes import Recipe
from was_fx.schedules.search.threshold_table import ThresholdTable, from_calibration
from was_fx.schedules.search.trial_log import TrialLog

# Tokens for thresholds where the search looks, measured again and again.
_THRESHOLD_TOKENS = 1024
# Tokens for the thresholds of the schedule that was found, in each of two rounds.
_FINAL_TOKENS = 4096


@dataclass(eq=False)
class SearchContext:
    """One search. The attributes are the arguments of `was_fx.search`; `samples` are its calibration tokens.

    Attributes:
        log: finished trials; set once the arguments have been checked.
        spent: forward-pass tokens by step; a pass through one block counts as its share of all blocks.
    """

    model: nn.Module
    calibration: Calibration
    recipe: Recipe
    target: float
    trials: int
    seed: int
    tokens: Tensor
    samples: Tensor
    head: bool
    latency: LatencyTable | None
    start: Schedule | None
    level_tables: dict[str, LevelTable] | None
    workers: Callable[[], Executor] | None
    batch: int
    batch_size: int
    progress: SearchProgress | None
    log: TrialLog = field(init=False)
    spent: Counter[str] = field(default_factory=Counter)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the Linears to schedule; the experts of a parameter are one of them (`schedules/experts.py`)."""
        shapes = group_shapes(self.calibration.shapes, self.calibration.experts_per_token)
        if self.head:
            shapes |= {name: linear.shape for name, linear in head_linears(self.model).items()}
        return shapes

    @cached_property
    def blocks(self) -> list[Block]:
        """The same, by block."""
        return find_blocks(self.shapes)

    def dense_table(self, exponents: Mapping[str, float] | None) -> ThresholdTable:
        """Thresholds of the dense model: by `exponents` with norm 2, or by the calibration's score."""
        if exponents is None and not self.head and not self.recipe.signed:
            return from_calibration(self.calibration)
        score = self.calibration.score
        norm = score.norm if exponents is None else 2
        exponents = dict.fromkeys(self.shapes, score.exponent) if exponents is None else exponents
        names = [
            *self.calibration.shapes,
            *(name for name in self.shapes if name not in groups(self.calibration.shapes)),
        ]
        exponents = spread(exponents, names)
        sample = first_tokens(self.samples, self.recipe.calibration_tokens)
        self.spent["thresholds"] += sample.numel()
        return measure_thresholds(
            self.model, exponents, sample, norm=norm, signed=self.recipe.signed, batch_size=self.batch_size
        )

    def table_at(self, table: ThresholdTable, sparsities: Mapping[str, float]) -> ThresholdTable:
        """The same exponents' thresholds, measured while the model drops by `table`; paper recipes keep theirs."""
        if not self.recipe.recalibrate:
            return table
        sample = first_tokens(self.samples, _THRESHOLD_TOKENS)
        self.spent["thresholds"] += sample.numel()
        return measure_thresholds(
            self.model,
            table.exponents,
            sample,
            norm=table.norm,
            schedule=table.schedule(sparsities, ScheduleMetadata()),
            batch_size=self.batch_size,
        )

    def final(self, schedule: Schedule) -> Schedule:
        """The schedule with thresholds measured while the model drops by it; paper recipes keep theirs."""
        if not self.recipe.recalibrate:
            return schedule
        self.report("final thresholds")
        rounds, sample = 2, first_tokens(self.samples, _FINAL_TOKENS)
        self.spent["thresholds"] += rounds * sample.numel()
        return recalibrate(self.model, schedule, sample, rounds=rounds, batch_size=self.batch_size)

    def report(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Tell the caller what begins."""
        if self.progress is not None:
            self.progress(SearchState(done, total, phase=phase))


def first_tokens(tokens: Tensor, count: int) -> Tensor:
    """The first rows with about `count` tokens, at least a part of one."""
    return tokens[: max(1, count // tokens.shape[1]), : max(2, count)]
