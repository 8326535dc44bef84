"""`check`: does every scheduled Linear drop channels on the path that `generate()` takes, and by what kernel?"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compat.generation import attention_of, uses_flash_attention
from was_fx.compile.cuda_graphs import Call, noting_calls
from was_fx.generate.generation import Generation
from was_fx.kernels.parts.served import Served, noting_served
from was_fx.measure.realised import Realised, counting
from was_fx.modules.linears import find_linears, plain_name
from was_fx.modules.placement import input_device
from was_fx.modules.sparse_linear import eager_code
from was_fx.modules.tokens import check_tokens, vocabulary
from was_fx.modules.weights import local
from was_fx.schedules.experts import groups, module_of
from was_fx.sparse.sparsify import prompts_treated
from was_fx.sparse.state import sparse_state

_PROMPT = 16


@dataclass(frozen=True)
class LinearCheck:
    """One scheduled Linear, or all experts of a parameter.

    Attributes:
        name: qualified name; of experts, the parameter's.
        nominal: sparsity by the schedule.
        realised: sparsity of the tokens of the decode steps.
        tokens: tokens of decode steps that it dropped channels of.
        implementation: what computed it: "gather_gemv", "cpu_gather", "dense_product", …; "" if nothing sparse did.
        reason: why that one.
        dense: it ran dense in some decode step.
    """

    name: str
    nominal: float
    realised: float
    tokens: int
    implementation: str
    reason: str
    dense: bool


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        linears: one row for each scheduled Linear, and for each parameter that holds scheduled experts.
        path: "eager", "compiled" or "CUDA graph": how decode steps ran.
        device: where.
        steps: decode steps that were looked at.
        realised: model sparsity over them.
        bytes_saved: share of all weight bytes of a decode step that was not read.
        notes: what a user should know, one sentence each.
    """

    linears: tuple[LinearCheck, ...]
    path: str
    device: str
    steps: int
    realised: float
    bytes_saved: float
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """No scheduled Linear ran dense."""
        return not any(row.dense for row in self.linears)


@torch.no_grad()
def check(model: nn.Module, prompt: Tensor | None = None, *, new_tokens: int = 8, sequences: int = 1) -> CheckReport:
    """Run a prompt and a few decode steps as `generate()` will, and say what each scheduled Linear did.

    The prompt itself is dense here, so that the numbers are those of decode steps. What is compiled counts dropped
    channels meanwhile, and is compiled anew for that.

    Args:
        model: a sparsified model, as it will be used: on its device, compiled or not, with its adapters.
        prompt: LongTensor [B, n] of token ids, of one sequence or of several that decode together; random ones by
            default.
        new_tokens: tokens to generate, at least 2.
        sequences: B of the random prompt.

    Raises:
        ValueError: the model is not sparsified, or can't generate; or `new_tokens` is below 2, or `sequences` below 1.
    """
    state = sparse_state(model)
    if state is None:
        raise ValueError("the model is not sparsified; call was_fx.sparsify(model, schedule) first")
    if new_tokens < 2:
        raise ValueError(f"new_tokens is {new_tokens}; expected at least 2, for a decode step after the prompt")
    if sequences < 1:
        raise ValueError(f"sequences is {sequences}; expected at least 1")
    if not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} has no generate(); check a causal LM of transformers")
    if prompt is None:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(
            min(3, (vocabulary(model) or 8) - 1), vocabulary(model) or 8, (sequences, _PROMPT), generator=generator
        )
    check_tokens(model, prompt)
    prompt = prompt.to(input_device(model))
    state.keep_sparse(model)  # before anything is counted
    notes = _Notes()
    with (
        notes,
        prompts_treated(model, "dense"),
        counting(model) as counts,
        noting_served(*eager_code()) as served,
        noting_calls() as calls,
    ):
        model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        found = counts.realised()
    modules = {plain_name(name) for name, _ in model.named_modules()}
    present = [name for name in state.schedule.linears if module_of(name) in modules]
    rows = _rows(model, present, found, served, (new_tokens - 1) * len(prompt))
    own = vars(model).get("generate")
    if isinstance(own, Generation) and own.step is not None and own.step.declined:
        notes.texts.append(f"decode steps run uncompiled, because {own.step.declined}")
    if all(row.dense for row in rows):
        notes.texts.append("no call had a cache that holds tokens already, so every one was a prompt, and dense")
    if uses_flash_attention(model):
        attention = attention_of(model)
        notes.texts.append(f"{attention} can't read a static cache, so decode steps are not captured as a CUDA graph")
    absent = len(state.schedule.linears) - len(present)
    if absent:
        notes.texts.append(f"{absent} scheduled Linears are not in the model any more")
    slow = sum(row.implementation in ("dense_product", "dequantised_product") for row in rows)
    if slow:
        notes.texts.append(f"{slow} Linears are right but not faster: no kernel skips their rows here")
    whole = sum(row.implementation in ("masked_gemm", "gpu_masked") for row in rows)
    if whole:
        notes.texts.append(
            f"steps of {len(prompt)} sequences read every row of {whole} Linears, once: "
            "'Several tokens a step' in docs/performance.md says for how many that is faster than the dense model"
        )
    return CheckReport(
        linears=rows,
        path=_path(served, calls),
        device=str(prompt.device),
        steps=new_tokens - 1,
        realised=found.sparsity,
        bytes_saved=found.bytes_saved,
        notes=tuple(dict.fromkeys(notes.texts)),
    )


def _rows(
    model: nn.Module, present: Sequence[str], found: Realised, served: list[Served], expected: int
) -> tuple[LinearCheck, ...]:
    """A row for each scheduled Linear, of whose calls so many tokens were `expected` to be sparse."""
    by_weight = {weight: each for each in served for weight in each.weights}
    state: Any = sparse_state(model)
    linears = find_linears(model)
    schedule = state.schedule
    rows = []
    for group, names in groups(present).items():
        tokens = {name: found.tokens.get(name, 0) for name in names}
        total = sum(tokens.values())
        dropped = sum(count * found.linears.get(name, 0.0) for name, count in tokens.items())
        calls = round(total / schedule.metadata.experts_per_token.get(group, 1))
        # The product is made with W [N, K], a view of the parameter at the same address.
        held = [local(linears[name].matrix).data_ptr() for name in names if name in linears]
        by = next(filter(None, map(by_weight.get, held)), None)
        dense = calls < expected
        reason = by.reason if by else "no sparse product was made" if dense else "its weight lies elsewhere meanwhile"
        rows.append(
            LinearCheck(
                name=group,
                nominal=sum(schedule.linears[name].sparsity for name in names) / len(names),
                realised=dropped / total if total else 0.0,
                tokens=calls,
                implementation=by.implementation if by else "",
                reason=reason,
                dense=dense,
            )
        )
    return tuple(rows)


def _path(served: list[Served], calls: list[Call]) -> str:
    if any(call.step.captures for call in calls):
        return "CUDA graph"
    return "compiled" if any(not each.eager for each in served) else "eager"


class _Notes(logging.Handler):
    """Collects the warnings that was-fx gives through logging."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> "_Notes":
        logging.getLogger("was_fx").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("was_fx").removeHandler(self)


__all__ = ["CheckReport", "LinearCheck", "check"]
