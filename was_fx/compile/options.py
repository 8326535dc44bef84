"""The `options` of `torch.compile(..., backend="was")`."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from was_fx.compat.dynamo import inductor_options
from was_fx.modules.token_rule import check_prefill
from was_fx.passes.graph.context import Numbers, Options
from was_fx.passes.pipeline import check_disabled
from was_fx.schedules.files.schedule import Schedule

Lowering = Literal["inductor", "eager"]
# How a sparsified model generates: as a graph of it is compiled, or by decode steps that are recorded on a CPU.
ModelLowering = Literal["inductor", "eager", "recorded"]


@dataclass(frozen=True)
class BackendOptions:
    """What a graph is compiled with.

    Attributes:
        schedule: a `Schedule` or the path of one, for a model that was not sparsified.
        prefill: with a schedule: "dense" prompts or "all" tokens of them sparse. A sparsified model has its own.
        disable: names of optional passes to leave out.
        lists: whether decode steps list their kept channels; None: on a GPU.
        lowering: "inductor", or "eager" to run the rewritten graph node by node (debugging; no C++ compiler).
        cuda_graphs: replay decode steps on a GPU as CUDA graphs.
        compile_prompts: compile the graph of a dense prompt with Inductor too; None: not on a GPU, where that takes as
            long as the decode step's and saves little.
        as_step: take every graph for a decode step, to compile and capture it, however many tokens it has and though
            nothing in it is sparse.
        inductor: any setting of `torch._inductor.config`, by its own name.
    """

    schedule: Any = None
    prefill: str = "dense"
    disable: tuple[str, ...] = ()
    lists: bool | None = None
    lowering: Lowering = "inductor"
    cuda_graphs: bool = True
    compile_prompts: bool | None = None
    as_step: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "BackendOptions":
        """From the `options` of torch.compile.

        Raises:
            ValueError: an unknown option, or a bad value of one of our own; says which are known.
        """
        own = {f.name for f in fields(cls)} - {"inductor"}
        known = inductor_options()
        unknown = [key for key in options if key not in own | known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], own | known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f'backend "was" has no option {unknown[0]!r}{hint} '
                f"(its own are {', '.join(sorted(own))}; all others must be options of torch._inductor.config)"
            )
        ours = {key: item for key, item in options.items() if key in own}
        disable = ours.pop("disable", ())
        disable = (disable,) if isinstance(disable, str) else tuple(disable)
        others = {key: item for key, item in options.items() if key not in own}
        parsed = cls(**ours, disable=disable, inductor=others)
        if parsed.lowering not in get_args(Lowering):
            raise ValueError(f"lowering is {parsed.lowering!r}; it must be 'inductor' or 'eager'")
        check_prefill(parsed.prefill)
        if parsed.prefill in ("sparse", "half") and parsed.schedule is not None:
            raise ValueError(
                f"prefill={parsed.prefill!r} can't be told from a graph; use 'dense' or 'all', or call "
                "was_fx.sparsify(model, schedule, prefill=…) before torch.compile"
            )
        check_disabled(parsed.disable)
        return parsed

    @property
    def given(self) -> dict[str, Any]:
        """As `options` of torch.compile: what is not the default."""
        ours = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "inductor"}
        default = BackendOptions()
        return {key: item for key, item in ours.items() if item != getattr(default, key)} | dict(self.inductor)

    @property
    def passes(self) -> Options:
        """The part that the passes read."""
        numbers = None
        if self.schedule is not None:
            schedule = self.schedule if isinstance(self.schedule, Schedule) else Schedule.load(self.schedule)
            numbers = {
                name: Numbers(
                    schedule.shapes[name], each.threshold, each.exponent, schedule.norm, each.channel_threshold
                )
                for name, each in schedule.linears.items()
            }
        return Options(numbers, self.prefill == "all", self.disable, self.lists)
