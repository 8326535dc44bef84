"""Loading a model with its tokenizer, by directory, Hub name or `embedded`."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from was_fx.cli.input.options import EMBEDDED, Dtype, Lowering
from was_fx.cli.input.shared_options import Loading, loading
from was_fx.cli.input.weights import parse_weights, quantise
from was_fx.cli.render.console import note, progress

# What options call the dtypes of torch.
DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model, its tokenizer and what the user called it."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def weights(self) -> str | None:
        """The formats of its quantised Linears in a few words; None if it has none."""
        from was_fx.modules.quantized_linear import weight_formats
        from was_fx.schedules.weight_formats import describe

        formats = weight_formats(self.model)
        return describe(formats) if formats else None

    @property
    def positions(self) -> int | None:
        """The most tokens the model takes, if its configuration says so."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def load_model(
    name: str,
    dtype: Dtype = Dtype.auto,
    device: str = "auto",
    *,
    weights: Sequence[str] | None = None,
    tokenizer: bool = True,
    keep_schedule: bool = False,
    whole: bool = False,
) -> Loaded:
    """Load a causal LM, or a multimodal model where its type has none, in eval mode, and say so meanwhile.

    Args:
        name: directory, Hub name or `embedded`.
        dtype: of the weights.
        device: where.
        weights: what `--weights` gave: formats to quantise the model in.
        tokenizer: load it too.
        keep_schedule: leave a model sparsified that was saved so.
        whole: load a multimodal model with its towers also where its type has a causal LM.

    Raises:
        ValueError, OSError: there is no such model or device, or it is none that can be loaded or quantised.
        typer.BadParameter: `weights` is not valid.
    """
    plan = parse_weights(weights)
    how = loading()
    where = None if how.device_map else torch_device(device)
    check_name(name)
    _quiet()
    with progress(f"Loading {name}"):
        if name == EMBEDDED:
            from was_fx import embedded

            if how.arguments():
                raise ValueError(f"the embedded model is loaded in one way only; leave out --{_option(how)}")
            # fp32 is several times faster than bf16 for batches on most CPUs, and the model is tiny.
            model, words = embedded.load(torch_dtype(Dtype.fp32 if dtype is Dtype.auto else dtype))
        else:
            model, words = _from_pretrained(name, dtype, tokenizer, whole)
        model = model if keep_schedule else _dense(name, model)
        loaded = Loaded(name, (model if where is None else model.to(where)).eval(), words)
    if plan is not None:
        quantise(loaded.model, name, plan)
    return loaded


def load_skeleton(name: str) -> Any:
    """A causal LM without its weights, on the meta device: only its configuration is read.

    Raises:
        ValueError: there is no such model, or it is none that can be loaded.
    """
    import torch

    check_name(name)
    _quiet()
    from was_fx import embedded
    from was_fx.modules.auto_class import auto_class

    with _loading("configuration", name), torch.device("meta"):
        config = load_config(embedded.path() if name == EMBEDDED else name)
        return auto_class(config.model_type).from_config(config, trust_remote_code=loading().trust_remote_code)


def load_processor(name: str) -> Any:
    """What turns images and text into the input of a multimodal model.

    Raises:
        ValueError: there is no such model, or it has none.
    """
    from transformers import AutoProcessor

    from was_fx import embedded

    check_name(name)
    _quiet()
    given = loading().arguments()
    given.pop("device_map", None)
    with _loading("processor", name):
        processor = AutoProcessor.from_pretrained(embedded.path() if name == EMBEDDED else name, **given)
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{name} has no processor for images, only {type(processor).__name__}: a model of text takes none; one of "
            "images needs the files that processor.save_pretrained writes beside it"
        )
    return processor


def load_config(name: str | Path) -> Any:
    """The configuration of a model, as the command was told to load it."""
    from transformers import AutoConfig

    given = loading().arguments()
    given.pop("device_map", None)
    return AutoConfig.from_pretrained(name, **given)


def _from_pretrained(name: str, dtype: Dtype, tokenizer: bool, whole: bool) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, PreTrainedConfig

    from was_fx.modules.auto_class import auto_class

    given = loading().arguments()
    with _loading("model", name):
        wanted = {option: value for option, value in given.items() if option != "device_map"}
        known, _ = PreTrainedConfig.get_config_dict(name, **wanted)
        auto = auto_class(known.get("model_type", ""), whole=whole)
        model = auto.from_pretrained(name, dtype=torch_dtype(dtype), **given)
    given.pop("device_map", None)
    with _loading("tokenizer", name):
        return model, AutoTokenizer.from_pretrained(name, **given) if tokenizer else None


def _option(how: Loading) -> str:
    return next(iter(how.arguments())).replace("_", "-")


@contextmanager
def _loading(part: str, name: str) -> Iterator[None]:
    """Say in one line what could not be loaded."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the {part} of {name} could not be loaded: {reason}") from error


def _dense(name: str, model: Any) -> Any:
    """A checkpoint that a sparsified model was saved as comes back sparsified; here schedules are given by option."""
    from was_fx.sparse.saving import SCHEDULE_FILE
    from was_fx.sparse.sparsify import densify
    from was_fx.sparse.state import sparse_state

    if sparse_state(model) is not None:
        note(f"{name} was saved with a schedule, which counts here only if given: --schedule {name}/{SCHEDULE_FILE}")
    return densify(model)


def check_name(name: str) -> None:
    """Say at once that a path does not exist, where transformers would ask the Hub for it."""
    if name == EMBEDDED or Path(name).is_dir():
        return
    remedy = f"give a directory with a model, a Hub name such as owner/name, or {EMBEDDED!r}"
    if Path(name).exists():
        raise ValueError(f"{name} is a file, not a model; {remedy}")
    near = difflib.get_close_matches(name, [EMBEDDED], n=1)
    if near:
        raise ValueError(f"there is no model {name!r}; did you mean {near[0]!r}? Otherwise {remedy}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"there is no model directory {name!r}; {remedy}")


def torch_device(name: str) -> Any:
    """The device of a name, `auto` for a GPU where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; expected cpu, cuda, cuda:1, … or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; use --device cpu")
    return device


def lowering_name(lowering: Lowering | None, device: str, *, counted: bool = False) -> Any:
    """What `--lowering` gave, by the name that `sparsify` takes.

    Args:
        lowering: what was given.
        device: what `--device` gave.
        counted: the command counts dropped channels in each step, which is not recorded.

    Raises:
        ValueError: decode steps can't run so on this device.
        typer.BadParameter: they can't in this command.
    """
    from was_fx.generate.generation import check_lowering

    if counted and lowering is Lowering.recorded:
        raise typer.BadParameter(
            "recorded steps can't count what they drop, which this command does; leave it out here. It is for "
            "was generate, was bench and was report",
            param_hint="'--lowering'",
        )

    name = None if lowering is None else lowering.value
    if not loading().device_map:  # which `sparsify` looks at
        check_lowering(name, torch_device(device))
    return name


def torch_dtype(dtype: Dtype) -> Any:
    """torch's dtype of an option."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "auto": "auto"}[dtype.value]


def _quiet() -> None:
    """Keep transformers' own bars and notes away from ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
