"""The plug-in that lets `from_pretrained` return a sparsified model.

    model = AutoModelForCausalLM.from_pretrained(DIR)              # saved by a sparsified model's save_pretrained
    model = AutoModelForCausalLM.from_pretrained(DENSE, quantization_config=was_fx.WasConfig("s.was.safetensors"))

transformers' name for what happens to weights when they are loaded is "quantizer"; most such checkpoints hold plain
weights, and some rows of int8 or int4 (`was_fx.quantize`). `import was_fx` registers it (`was_fx.plugins.announce`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from was_fx.compat.quantizers import let_given_attributes_win
from was_fx.compat.saving import came_from_file, origin
from was_fx.kernels.quantized.rows import check_rows
from was_fx.modules.quantized_embedding import TIED, QuantizedEmbedding, make_quantized_embedding, settle
from was_fx.modules.quantized_linear import NAMES, QuantizedLinear, empty_rows, format_name, make_quantized
from was_fx.sparse import saving
from was_fx.sparse.quantize import refuse_resizing, untie
from was_fx.sparse.saving import METHOD, SCHEDULE_FILE, config_entry
from was_fx.sparse.sparsify import sparsify

if TYPE_CHECKING:
    from was_fx.schedules.files.schedule import Schedule


@register_quantization_config(METHOD)
class WasConfig(QuantizationConfigMixin):
    """How a checkpoint decodes: the `quantization_config` of its config.json.

    Args:
        schedule: a `Schedule` or the path of one. In a config.json, the name of the file beside it, or None for a model
            that is quantised and not sparse.
        weights: of a config.json: the formats of its quantised Linears, by qualified name.
        prefill: as for `sparsify`.
        lowering: as for `sparsify`; not saved.
        allow_other_model: as for `sparsify`; saved where the weights have changed since the schedule was made.
        quant_method: always "was".
        was_fx_version: the version that saved the checkpoint, for the record.

    Raises:
        ValueError: another `quant_method`, or an argument that this version doesn't know.
    """

    def __init__(
        self,
        schedule: Schedule | str | Path | None = SCHEDULE_FILE,
        prefill: str = "dense",
        lowering: str | None = None,
        allow_other_model: bool = False,
        quant_method: str = METHOD,
        was_fx_version: str | None = None,
        weights: dict[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"WasConfig has no {', '.join(map(repr, unknown))}; if a checkpoint names them, it was saved by "
                f"another version of was-fx ({was_fx_version}): install that one"
            )
        if quant_method != METHOD:
            raise ValueError(f"quant_method is {quant_method!r}; WasConfig is for {METHOD!r} only")
        self.quant_method: Any = quant_method
        self.schedule = schedule
        self.prefill = prefill
        self.lowering = lowering
        self.allow_other_model = allow_other_model
        self.was_fx_version = was_fx_version
        self.weights = dict(weights or {})
        self.beside_checkpoint = True

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds. A `Schedule` stands there under the name of its file."""
        name = SCHEDULE_FILE if self.schedule is not None else None
        name = str(self.schedule) if isinstance(self.schedule, str | Path) else name
        return config_entry(self.prefill, schedule=name, allow_other_model=self.allow_other_model, weights=self.weights)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What takes the place of a checkpoint's own, when this is given to `from_pretrained` beside it."""
        found = {name: getattr(self, name) for name in ("schedule", "prefill", "lowering", "allow_other_model")}
        return {**found, "beside_checkpoint": self.schedule == SCHEDULE_FILE}


let_given_attributes_win(WasConfig)


@register_quantizer(METHOD)
class WasQuantizer(HfQuantizer):
    """Sparsifies a model when its weights are loaded."""

    quantization_config: WasConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        """Give the Linears that the checkpoint holds quantised the buffers that it is to fill."""
        modules = dict(model.named_modules())
        unknown = [name for name in self.quantization_config.weights if name not in modules]
        if unknown:
            raise ValueError(
                f"{type(model).__name__} has no {', '.join(unknown[:4])}, which the checkpoint holds quantised; "
                "load it with the model class that saved it"
            )
        weights = self.quantization_config.weights
        self._shapes: dict[str, tuple[int, int]] = {}
        for name in sorted(weights, key=lambda name: weights[name] == TIED):  # after the head
            module, format = modules[name], weights[name]
            if format == TIED:
                make_quantized_embedding(module, None, model.get_output_embeddings())
                continue
            rows = empty_rows(name, module, format)
            self._shapes[name] = rows.shape
            if isinstance(module, nn.Embedding):
                make_quantized_embedding(module, rows)
            else:
                make_quantized(module, rows, module.weight.dtype)
        if self.quantization_config.weights:
            untie(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        schedule = config.schedule
        for name, module in model.named_modules():
            if name in self._shapes:
                _check_complete(name, module)
                check_rows(name, module.was_rows, self._shapes[name])
            if isinstance(module, QuantizedLinear):
                module.was_like = module.was_like.to(module.codes.device)
            elif isinstance(module, QuantizedEmbedding):
                settle(module)
        if config.weights:
            refuse_resizing(model)
        if self.pre_quantized and config.beside_checkpoint and isinstance(schedule, str | Path):
            schedule = _beside_checkpoint(model.config, str(schedule))
        # From here on it is a model that `sparsify` made, and has none of the limits of a quantised one.
        self.remove_quantization_config(model)
        if schedule is None:
            saving.attach(model)
            return model
        return sparsify(
            model,
            schedule,
            prefill=config.prefill,  # type: ignore[arg-type]
            lowering=config.lowering,  # type: ignore[arg-type]
            allow_other_model=config.allow_other_model,
        )

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` may be called."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients are not supported."""
        return False

    @property
    def is_compileable(self) -> bool:
        """transformers may compile the model's call."""
        return True


def _check_complete(name: str, module: Any) -> None:
    """Refuse rows that the checkpoint does not hold, for which transformers only makes room.

    Raises:
        ValueError: names what is missing.
    """
    missing = [each for each in NAMES if getattr(module, each) is not None and not _is_there(getattr(module, each))]
    if missing:
        raise ValueError(
            f"the checkpoint holds no {', '.join(f'{name}.{each}' for each in missing)}, though its config.json says "
            f"that the weight is {format_name(module.was_rows)}; the file is truncated, or of another model"
        )


def _is_there(tensor: Any) -> bool:
    return tensor.is_meta or came_from_file(tensor)  # offloaded, or loaded


def _beside_checkpoint(config: Any, name: str) -> str:
    """The path of a file in the folder or the Hub repository that the model was loaded from."""
    from transformers.utils.hub import cached_file

    if Path(name).name != name:
        raise ValueError(f"the checkpoint names the schedule {name!r}; expected the name of a file beside it")
    folder, commit = origin(config)
    if Path(folder).is_dir():
        return str(Path(folder) / name)
    found: Any = cached_file(folder, name, revision=commit)
    return found
