"""The folders are the architecture: imports only point down, and never in a circle.

Every import counts, wherever it stands, but those of `if TYPE_CHECKING`. Modules of one floor may import each other
inside their folder, and lower floors; folders that share a floor don't import each other unless `TOGETHER` names them.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up. A name stands for the modules right in that folder, a dotted name for one in a package of ours.
FLOORS: list[set[str]] = [
    {"was_fx/compat"},
    {"kernels/parts"},
    {"kernels/cpu"},
    {"kernels/quantized"},
    {"kernels/ops"},
    {"kernels/linear"},
    {"kernels/record"},
    {"kernels/tune"},
    {"schedules"},
    {"schedules/files"},
    {"schedules/search", "schedules/released"},
    {"passes/graph"},
    {"passes"},
    {"was_fx/modules"},
    {"was_fx/compile"},
    {"was_fx/generate"},
    {"was_fx/sparse"},
    {"was_fx/measure"},
    {"was_fx/embedded"},
    {"was_fx/choosing", "was_fx/searching", "was_fx/plugins", "was_fx/coverage", "was_fx/doctor"},
    {"was_fx"},
    {"cli/input", "cli/render"},
    {"cli/page"},
    {"cli/commands"},
    {"cli"},
]
# Folders of one floor that may import each other.
TOGETHER = [{"cli/input", "cli/render"}]
# What a top folder may import of ours, beside itself.
BELOW = {
    "kernels": set(),
    "schedules": set(),
    "passes": {"kernels"},
    "was_fx": {"kernels", "schedules", "passes"},
    "cli": {"kernels", "schedules", "passes", "was_fx"},
}
# A folder that those of another top folder may import all the same: private names of torch and transformers.
ALLOWED = {("passes", "was_fx/compat")}
# Names of modules that import nothing, so every floor may take them.
EVERYWHERE = {"was_fx.version.__version__"}


def folder_of(module: str) -> str:
    """`was_fx.kernels.ops.compact` lies in `kernels/ops`; `was_fx.sparse.saving` in `was_fx/sparse`."""
    _, *parts = module.split(".")
    top = [] if parts and parts[0] in BELOW and parts[0] != "was_fx" else ["was_fx"]
    path = [*top, *parts]
    return "/".join(path if module in PACKAGES else path[:-1])


def modules() -> dict[str, Path]:
    """The path of every module of ours, by the name that it is imported by."""
    found = {}
    for top in BELOW:
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if top == "was_fx" else ("was_fx", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for child in ast.iter_child_nodes(tree):
        unseen = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        for each in child.orelse if unseen else [child]:
            yield each
            yield from nodes(each)


def imports(module: str) -> Iterator[tuple[str, int]]:
    """(what is imported, line) of each import of ours; a name in a module counts as the module."""
    for node in nodes(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno} is a relative import"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "was_fx" and target not in EVERYWHERE:
                yield (target if target in MODULES else target.rpartition(".")[0] or target), node.lineno


def problem_of(source: str, target: str) -> str:
    """Why a module in the folder `source` must not import one in `target`; empty if it may."""
    floors = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
    unknown = [folder for folder in (source, target) if folder not in floors]
    if unknown:
        return f"no floor is set for {', '.join(unknown)}"
    tops = source.split("/")[0], target.split("/")[0]
    if source == target or {source, target} in TOGETHER:
        return ""
    if tops[0] != tops[1] and tops[1] not in BELOW[tops[0]] and (tops[0], target) not in ALLOWED:
        return f"{tops[0]}/ imports nothing of {tops[1]}/"
    return "" if floors[target] < floors[source] else f"{target} is not below {source}"


def test_imports_only_point_down():
    found: dict[str, set[str]] = {}
    for module in MODULES:
        for target, line in imports(module):
            if target not in MODULES:
                problem = f"there is no module {target}"
            else:
                problem = problem_of(folder_of(module), folder_of(target))
            if problem:
                place = MODULES[module].relative_to(ROOT)
                found.setdefault(folder_of(module), set()).add(f"  {place}:{line} imports {target}: {problem}")
    text = "\n".join(f"{folder}:\n" + "\n".join(sorted(lines)) for folder, lines in sorted(found.items()))
    assert not found, f"{sum(map(len, found.values()))} imports don't point down\n{text}"


def circles() -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's algorithm)."""
    graph = {module: {target for target, _ in imports(module) if target in MODULES} for module in MODULES}
    found, order, low, stack = [], {}, {}, []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for target in graph[module]:
            if target not in order:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1 or module in graph[module]:
                found.append(sorted(group))

    for module in graph:
        if module not in order:
            visit(module)
    return sorted(found)


def test_no_modules_import_each_other():
    assert circles() == [], "\n".join(" <-> ".join(group) for group in circles())


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("schedules/search", "schedules/files", True),
        ("schedules/search", "schedules/released", False),
        ("schedules/files", "schedules/search", False),
        ("kernels/tune", "kernels/parts", True),
        ("kernels/tune", "schedules", False),
        ("passes", "schedules", False),
        ("was_fx/sparse", "passes/graph", True),
        ("passes", "was_fx/sparse", False),
        ("cli/render", "cli/input", True),
        ("cli/input", "cli/commands", False),
        ("cli/commands", "kernels/parts", True),
        ("cli", "elsewhere", False),
    ],
)
def test_the_rules_themselves(source, target, allowed):
    assert (problem_of(source, target) == "") is allowed
