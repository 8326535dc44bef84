"""The tables of `was coverage` as text: cells that the console and the page share, and the page in Markdown."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from was_fx.schedules.names import markdown_table

if TYPE_CHECKING:
    from was_fx.coverage.cover import Coverage

_MUCH = 0.1  # of the bytes of a token

COLUMNS = (
    "model type",
    "complete",
    "Linears",
    "sparse",
    "declined",
    "sparse bytes",
    "of",
    "prompt graphs",
    "decode graphs",
    "breaks",
    "at 0 %",
    "at 50 %",
    "variants",
)


def cells(row: "Coverage") -> list[str]:
    """The cells of `COLUMNS`."""
    return [
        row.model_type,
        "yes" if row.complete else "no",
        str(row.linears or "–"),
        str(row.sparse or "–"),
        str(len(row.declined)),
        "–" if row.share is None else f"{100 * row.share:.0f} %",
        "–" if row.billions is None else f"{row.billions:.1f} B",
        str(row.prompt_graphs or "–"),
        str(row.decode_graphs or "–"),
        str(len(row.graph_breaks)),
        _error(row.exact),
        _error(row.oracle),
        f"{len(row.variants)}, {_error(max(row.variants.values()))}" if row.variants else "–",
    ]


def notes(row: "Coverage") -> str:
    """What a row's numbers don't say: reasons, and the share of bytes in weights that stay dense beside the head."""
    found = [row.error] if row.error else []
    found += [f"graph break: {reason}" for reason in row.graph_breaks]
    declined = sorted(row.declined.items(), key=lambda item: item[1])
    for reason, items in groupby(declined, key=lambda item: item[1]):
        found.append(f"{_short([name for name, _ in items])}: {reason}")
    if row.sparse and not row.decode_steps:
        found.append("each step is a prompt: no cache, or all tokens are given again")
    if row.by_model:
        found.append(f"{_short(row.by_model)} stay dense, read by the model itself{_of_bytes(row.by_model_share)}")
    if row.experts_dense:
        found.append(f"{_short(row.experts)} stay dense{_of_bytes(row.experts_dense)}")
    return "; ".join(found)


def page(
    rows: "Sequence[Coverage]", left_out: Mapping[str, str], versions: Mapping[str, str], *, graphs: bool = True
) -> str:
    """The page docs/coverage.md."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault("the same class as another type" if reason.startswith("the same") else reason, []).append(
            f"{name} ({reason.removeprefix('the same class as ')})" if reason.startswith("the same") else name
        )
    found = [(reason, ", ".join(names)) for reason, names in sorted(reasons.items())]
    others = markdown_table(["reason", "model types"], found, "|---|---|")
    text = [row for row in rows if not row.multimodal]
    multimodal = [row for row in rows if row.multimodal]
    options = "" if graphs else "--no-graphs "
    return "\n".join(
        [
            "# Coverage",
            "",
            f"{_counted(text)} decoder-only causal LM classes of transformers are complete, and {_counted(multimodal)}",
            "multimodal ones.",
            *_partly(rows),
            "",
            f"Made by `was coverage {options}--markdown docs/coverage.md --force`, "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + ", on a CPU.",
            "",
            *_EXPLANATION,
            *([] if graphs else ["", "Graphs were not looked at for this page."]),
            "",
            *_table(text),
            "",
            *(["## Multimodal models", "", *_table(multimodal), ""] if multimodal else []),
            *(["## Left out", "", *others, ""] if reasons else []),
        ]
    )


def _counted(rows: "Sequence[Coverage]") -> str:
    complete = sum(row.complete for row in rows)
    return f"{complete} of {len(rows)} ({100 * complete / max(len(rows), 1):.0f} %)"


def _partly(rows: "Sequence[Coverage]") -> list[str]:
    """How many of the complete classes keep more than the head dense, so that nobody takes them for wholly sparse."""
    shares = [row.experts_dense + (row.by_model_share or 0.0) for row in rows if row.complete]
    some, much = sum(share > 0 for share in shares), sum(share > _MUCH for share in shares)
    if not some:
        return []
    return [
        f"In {some} of these some weights stay dense beside the head, because the model multiplies by them without a",
        f"Linear's module; in {much} they are more than {100 * _MUCH:.0f} % of the bytes of a token. Notes name them.",
    ]


def _of_bytes(share: float | None) -> str:
    return "" if share is None else f": {100 * share:.1f} % of the bytes"


def _table(rows: "Sequence[Coverage]") -> list[str]:
    rule = "|---|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"
    return markdown_table([*COLUMNS, "notes"], ([*cells(row), notes(row)] for row in rows), rule)


_EXPLANATION = """
Each class is built from its configuration with two layers, or one of each kind it mixes, and random weights, in fp32 on
a CPU. A prompt and the steps after it are decoded with the model's own cache, every token sparse, without a compiler.

- `Linears` counts all of them, the head among them, and the experts that one parameter holds as one; of a multimodal
  model those of its text decoder and its head. `sparse` counts those whose sparse product was made wherever they were
  called: in the prompt, and in each decode step. The head stays dense by default. Notes name what is declined, and why.
- `sparse bytes` is the share of the weight bytes of a token that lies in Linears found sparse here, in a model of full
  size: the one that the type's default configuration in transformers describes, with `of` so many parameters. It is
  counted without weights; of experts, those that a token is sent to. The rest is the head, mostly.
- `at 0 %` is the largest difference of logits from the dense model's, relative to the largest logit.
- `at 50 %` is the same from the dense model with weak channels zeroed by forward hooks.
- `variants` is how many others were compared at 50 %, and the largest difference: a static cache, rotary embeddings of
  the kinds linear, dynamic, yarn, longrope and llama3, and an image in the prompt, as far as the dense model itself
  takes them.
- `graphs` are those that `torch.compile(backend="was")` makes of the prompt and of decode steps, `breaks` are breaks in
  them. They cost speed where a model is compiled, and nothing else. A sliding window that fills up takes a second graph
  of the decode step.
- Experts that transformers holds as one 3-D parameter are sparse where it computes them by its registry of experts
  functions (docs/experts.md). Other weights that are held so stay dense, and so do those of a Linear whose module is
  never called, because the model reads its weight and multiplies by it itself (`self.dt_proj.weight @ x`): there is no
  call to make sparse. Calibrations leave them out; notes name them with their share of the weight bytes of a token at
  full size.

A class is complete when every Linear that is called, but the head, is sparse in prompts and decode steps, all
differences (and that of the compiled model) are at most 1e-4, and dropping half of the channels moves the logits by at
least a hundred times that. Weights that stay dense because no call of a Linear reads them don't count against it.
A model without a cache, or one that is given all tokens again beside its cache, is not complete: it has no call that is
known for a decode step, and each token is made by what counts as a prompt. Logits are right all the same, sparse with
`prefill="all"` and dense by default, by which nothing is gained.
""".strip().splitlines()


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def _short(names: Sequence[str]) -> str:
    """`layers.*.mixer.dt_proj` for the same Linear of several layers."""
    general = dict.fromkeys(".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names)
    return ", ".join(general)
