"""Fixtures that more than one folder uses."""

import copy
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: workers share the cores

import pytest
import torch
import typer.rich_utils  # noqa: F401  # reads FORCE_COLOR when it is imported, which some tests set

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


# Folders of what depends on the versions of torch and transformers.
_CORE = ("cases", "passes", "was_fx/compat", "was_fx/generate", "was_fx/modules", "was_fx/plugins", "was_fx/sparse")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the core of the tests."""
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).as_posix() if item.path.is_relative_to(root) else ""
        if folder.startswith(_CORE):
            item.add_marker(pytest.mark.core)


@pytest.fixture(scope="session")
def loops() -> None:
    """Kernels with loops run here: on a GPU, or by an interpreter that knows the present numpy."""
    if not torch.cuda.is_available() and version("triton") < "3.9" and version("numpy") >= "2.4":
        pytest.skip("the interpreter of triton < 3.9 takes no loops with numpy >= 2.4")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny products lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Graphs of one test must not serve, or exhaust the limits of, another."""
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def _embedded_model():
    from was_fx import embedded

    model, _ = embedded.load(torch.float32)
    return model


@pytest.fixture
def embedded_model(_embedded_model) -> torch.nn.Module:
    """The embedded model in fp32, dense, a copy of the test's own."""
    return copy.deepcopy(_embedded_model)


@pytest.fixture(scope="session")
def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def llama(_llama) -> torch.nn.Module:
    """A Llama of two blocks with random weights, fp32, a copy of the test's own; quick to trace."""
    return copy.deepcopy(_llama)


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """LongTensor [4, 64] in the vocabulary of `llama`."""
    return torch.randint(2, 128, (4, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def calibration(_llama, tokens):
    """Calibration of `llama` with the WAS score."""
    import was_fx

    return was_fx.calibrate(_llama, tokens)


@pytest.fixture(scope="session")
def oracle() -> Callable:
    """A dense copy of a model whose Linears see their input with the dropped channels zeroed, by forward hooks.

    Written apart from the package: thresholds are recomputed here from the weights and the schedule's numbers.
    """

    def build(model: torch.nn.Module, schedule) -> torch.nn.Module:
        copied = copy.deepcopy(model)
        for name, entry in schedule.linears.items():
            module = copied.get_submodule(name)
            weight = module.weight.detach().double()
            outputs = 1 if type(module).__name__ == "Conv1D" else 0
            norm = weight.abs().sum(outputs) if schedule.norm == 1 else weight.square().sum(outputs).sqrt()
            threshold = (entry.threshold / norm**entry.exponent).float()

            def zero_dropped(_, inputs, threshold=threshold):
                (x,) = inputs
                return (torch.where(x.abs().float() <= threshold, torch.zeros_like(x), x),)

            module.register_forward_pre_hook(zero_dropped)
        return copied

    return build


# Where a projection's histogram lies in a released folder, and the one that TEAL shares among siblings.
_PLACES = {
    "q": ("self_attn", "h1"),
    "k": ("self_attn", "h1"),
    "v": ("self_attn", "h1"),
    "o": ("self_attn", "h2"),
    "gate": ("mlp", "h1"),
    "up": ("mlp", "h1"),
    "down": ("mlp", "h2"),
}


def _histogram(scores: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts, centers): WINA's has a bin per fp16 value of |score|; the others' first and last bin hold 1 % each."""
    scores = scores.flatten().float()
    if method == "wina":
        centers, counts = torch.unique(scores.half().abs(), return_counts=True)
        return counts.float(), centers
    low, high = torch.quantile(scores, torch.tensor([0.01, 0.99])).tolist()
    edges = torch.cat([scores.min()[None], torch.linspace(low, high, 4000), scores.max()[None]])
    counts, edges = torch.histogram(scores, bins=edges)
    return counts, (edges[:-1] + edges[1:]) / 2


@pytest.fixture(scope="session")
def write_release() -> Callable:
    """A function that writes a folder of histograms and greedy tables as `teal`, `was` or `wina` releases it.

    It takes the folder, the method, scores with their signs by (block, projection), and the table's rows:
    (level, sparsity by projection). By default every projection has the level, from 5 % to 90 %.
    """

    def write(folder, method, scores, rows=None):
        rows = rows or [(level / 20, dict.fromkeys(_PLACES, level / 20)) for level in range(1, 19)]
        for block in sorted({block for block, _ in scores}):
            contents: dict = {"self_attn": {}, "mlp": {}}
            for projection, (module, shared) in _PLACES.items():
                key = shared if method == "teal" else projection
                counts, centers = _histogram(scores[block, projection], method)
                contents[module].setdefault(key, counts)
                contents[module].setdefault(f"{key}_centers", centers)
                if method == "was":
                    contents[module][f"{key}_var"] = scores[block, projection].var()
            for module, content in contents.items():
                path = folder / "histograms" / f"layer-{block}" / module / "histograms.pt"
                path.parent.mkdir(parents=True)
                torch.save(content, path)
            path = folder / "lookup" / f"layer-{block}" / "results.csv"
            path.parent.mkdir(parents=True)
            lines = [["Effective Sparsity", "Activation Error", "Baseline Error", *_PLACES]]
            lines += [[level, 0.1, 0.2, *(row[projection] for projection in _PLACES)] for level, row in rows]
            path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines), encoding="utf-8")
        return folder

    return write
