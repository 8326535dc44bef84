"""What `was doctor` shows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from was_fx.cli.render.tables import megabytes, new_table, percent
from was_fx.schedules.names import visible

if TYPE_CHECKING:
    from was_fx.doctor.diagnosis import Diagnosis
    from was_fx.doctor.hardware import Gpu
    from was_fx.doctor.kernel_plan import KernelUse
    from was_fx.doctor.self_test import SelfTest


def show(console: Console, found: "Diagnosis") -> None:
    """Everything about the machine."""
    _heading(console, "Versions")
    table = _pairs()
    for each in found.packages:
        version = Text(each.version or "not installed", style="bold red" if each.problem else "")
        table.add_row(each.name, version, f"supported: {each.supported}" if each.supported else "")
    console.print(table)
    _heading(console, "Processor")
    table = _pairs()
    cpu = found.processor
    table.add_row("name", visible(cpu.name), "")
    table.add_row("cores", f"{cpu.cores}, of which torch uses {cpu.threads}", "")
    table.add_row("instructions", " ".join(cpu.features) or "not known", "")
    kernels = Text(cpu.kernels or "none", style="" if cpu.kernels else "bold red")
    table.add_row("C++ kernels", kernels, "")
    table.add_row("from", visible(cpu.path), "") if cpu.path else None
    console.print(table)
    _heading(console, "GPUs")
    table = _pairs()
    for gpu in found.gpus:
        memory = f"{gpu.free / 2**30:.1f} of {gpu.memory / 2**30:.1f} GiB free"
        capability = ".".join(map(str, gpu.capability))
        triton = "Triton" if gpu.triton else "no Triton"
        table.add_row(f"cuda:{gpu.index}", visible(gpu.name), f"{memory}, capability {capability}, {triton}")
        table.add_row("", *_speed(gpu))
    if not found.gpus:
        table.add_row("none", "", "")
    console.print(table)
    _heading(console, "Plug-ins")
    table = _pairs()
    for plug_in in found.plug_ins:
        state = {True: "registered", False: "not registered", None: "its library is not installed"}[plug_in.registered]
        table.add_row(plug_in.name, Text(state, style="bold red" if plug_in.problem else ""), "")
    console.print(table)
    _heading(console, "Caches")
    table = _pairs()
    for cache in found.caches:
        size = f"{megabytes(cache.nbytes)}, {cache.files} files" if cache.files else "empty"
        table.add_row(cache.name, size, visible(cache.path))
    console.print(table)
    _heading(console, f"Kernels against plain PyTorch, on {found.device}")
    _show_test(console, found.self_test)


def show_plan(console: Console, model: str, plan: "Sequence[KernelUse]") -> None:
    """Which kernel each Linear of a model would use; the reasons, once each, below."""
    _heading(console, f"What a decode step of {visible(model)} runs by")
    table = new_table("Linears", "computed by", "weights", "level", texts=3)
    for use in plan:
        by = use.implementation or "the model's own code"
        slow = use.problem or not use.served
        level = _level(use)
        name = f"{use.name} × {len(use.linears)}"
        table.add_row(name, Text(visible(by), style="bold red" if slow else ""), use.weights, level)
    console.print(table)
    sparse = {use.implementation: use.reason for use in plan if use.sparse}
    for implementation, reason in sparse.items():
        _line(console, f"{implementation}: {reason}")
    for use in plan:
        if not use.sparse:
            _line(console, f"{use.name} × {len(use.linears)} dense: {use.reason}")
    count = sum(len(use.linears) for use in plan if not use.served)
    if count:
        _line(console, f"{count} Linears would be right but not faster: no kernel skips their rows here")


def verdict(console: Console, problems: Sequence[str]) -> None:
    """All is well, or what to do."""
    console.print()
    for problem in problems:
        body = Text.assemble(("Problem: ", "bold red"), visible(problem, keep="\n"))
        console.print(body)
    if not problems:
        console.print("All is well", style="bold green")


def _speed(gpu: "Gpu") -> tuple[str, str]:
    """Whether the kernels were measured on such a GPU, and what they do there."""
    ahead = "launched ahead" if gpu.ahead else "not launched ahead"
    if gpu.measured:
        return "measured", f"tile sizes of {gpu.measured} products, others by a rule; kernels are {ahead}"
    rule = f"tile sizes by a rule for {gpu.multiprocessors} multiprocessors until `was tune MODEL` measures them"
    return "not measured", f"{rule}; kernels are {ahead}"


def _level(use: "KernelUse") -> str:
    if not use.sparse:
        return "dense"
    if use.nominal is None:
        return "sparse"
    low, high = map(percent, use.nominal)
    return low if low == high else f"{low.removesuffix(' %')} – {high}"


def _show_test(console: Console, rows: "Sequence[SelfTest]") -> None:
    table = new_table("weights", "computed by", "error", "allowed", "ms", "", texts=2)
    for key in dict.fromkeys((row.weights, row.dtype, row.implementation) for row in rows):
        those = [row for row in rows if (row.weights, row.dtype, row.implementation) == key]
        weights, dtype, implementation = key
        known = [row.error for row in those if row.error is not None]
        times = [row.ms for row in those if row.ms is not None]
        passed = all(row.passed for row in those)
        table.add_row(
            weights if weights.startswith(dtype) else f"{weights}, {dtype}",
            implementation or "–",
            f"{max(known):.0e}" if known else "–",
            f"{those[0].tolerance:.0e}",
            _range(times),
            Text("passed" if passed else "FAILED", style="green" if passed else "bold red"),
        )
    console.print(table)


def _range(times: list[float]) -> str:
    low, high = (f"{pick(times):.2f}" if times else "–" for pick in (min, max))
    return low if low == high else f"{low}–{high}"


def _pairs() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    return table


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold")


def _line(console: Console, text: str) -> None:
    console.print(visible(text))
