"""`save_pretrained` and `push_to_hub` of a sparsified model.

A sparsified model writes a plain checkpoint, which loads without was-fx too, with its schedule beside it; one with
quantised weights writes those, as small as they are in memory. Its Hub
repository gets a tag and a section of the model card. `sparsify` attaches this to the model object; its class stays
as it is.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from was_fx.compat.saving import UPLOAD, saves_adapters_only, upload
from was_fx.modules.linears import find_linears
from was_fx.modules.quantized_embedding import embedding_formats
from was_fx.modules.quantized_experts import QuantizedExperts
from was_fx.modules.quantized_linear import weight_formats
from was_fx.schedules.files.fingerprint import differences
from was_fx.schedules.files.schedule import Schedule
from was_fx.sparse.model_card import update_card
from was_fx.sparse.state import model_fingerprint, sparse_state
from was_fx.version import __version__

log = logging.getLogger(__name__)

METHOD = "was"
SCHEDULE_FILE = "schedule.was.safetensors"
_METHODS = ("save_pretrained", UPLOAD)


def attach(model: nn.Module) -> None:
    """Let the saving methods of a model of transformers know what `sparsify` did to it."""
    if hasattr(model, "save_pretrained"):
        # Of the object, so that a copy of the model saves itself and not the original.
        model.save_pretrained = partial(_save_pretrained, model)  # type: ignore[assignment]
        setattr(model, UPLOAD, partial(_upload, model))


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for name in _METHODS:
        vars(model).pop(name, None)


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor contiguous, as in the dense model.

    What has to be copied is copied to the CPU; tensors that are one stay one. Sharded tensors, which transformers
    gathers, and offloaded ones, which it loads, are left to it.
    """
    copies: dict[tuple, Tensor] = {}
    plain = {}
    for name, tensor in model.state_dict().items():
        if type(tensor) is Tensor and not tensor.is_meta and not tensor.is_contiguous():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if key not in copies:
                copies[key] = tensor.to("cpu").contiguous()
            tensor = copies[key]
        plain[name] = tensor
    return plain


def _save_pretrained(
    self: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    **arguments: Any,
) -> None:
    """Save a checkpoint, plain where no weight is quantised, its schedule as `schedule.was.safetensors`, and how it
    decodes in config.json.

    Args:
        save_directory: a folder; made if there is none.
        is_main_process, state_dict, arguments: as for `PreTrainedModel.save_pretrained`.
    """
    adapters_only = saves_adapters_only(self)
    if not adapters_only and any(isinstance(module, QuantizedExperts) for module in self.modules()):
        raise ValueError(
            "the model holds quantised experts, which can't be saved yet; save it before they are quantised, or "
            'quantise all but them, such as by weights={"*experts*": "none", "*": "int8"}'
        )
    schedule = None if adapters_only else _schedule_of(self)
    if state_dict is None:
        state_dict = plain_state_dict(self)
    if schedule is not None and is_main_process:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        schedule.save(Path(save_directory) / SCHEDULE_FILE)  # first: a config never names a file that is not there
    with _config_says_how(self, schedule, {} if adapters_only else weight_formats(self) | embedding_formats(self)):
        type(self).save_pretrained(
            self, save_directory, is_main_process=is_main_process, state_dict=state_dict, **arguments
        )


def _upload(self: Any, working_dir: str | Path, *arguments: Any, **keywords: Any) -> Any:
    """Add the schedule, a tag and a section of the model card to what is uploaded."""
    schedule = _schedule_of(self)
    if schedule is not None:
        repository = keywords.get("repo_id") or (arguments[0] if arguments else None)
        schedule.save(Path(working_dir) / SCHEDULE_FILE)  # newer than the upload's first look at the folder
        update_card(Path(working_dir) / "README.md", schedule, repository)
    return upload(self, working_dir, *arguments, **keywords)


def _schedule_of(model: nn.Module) -> Schedule | None:
    """The schedule in force, with the fingerprint of the model that it was made for; None for a dense model."""
    state = sparse_state(model)
    if state is None:
        return None
    if state.schedule.metadata.fingerprint:
        return state.schedule
    return state.schedule.replace({}, fingerprint=model_fingerprint(model, find_linears(model)))


@contextmanager
def _config_says_how(model: Any, schedule: Schedule | None, weights: dict[str, str]) -> Iterator[None]:
    """For the time of a save, let the model's config say how it decodes, and how its weights are stored."""
    if schedule is None and not weights:
        yield
        return
    before = vars(model.config).get("quantization_config")
    fingerprint = {} if schedule is None else schedule.metadata.fingerprint
    others = differences(fingerprint, model_fingerprint(model, find_linears(model))) if fingerprint else []
    if others:
        log.warning(
            "the model is no longer the one that its schedule was made for (%s); it is saved with that schedule all "
            "the same. Calibrate it anew for a schedule of its own",
            "; ".join(others),
        )
    state = sparse_state(model)
    model.config.quantization_config = config_entry(
        "dense" if state is None else state.rule.prefill,
        schedule=None if schedule is None else SCHEDULE_FILE,
        allow_other_model=bool(others),
        weights=weights,
    )
    try:
        yield
    finally:
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


def config_entry(
    prefill: str,
    *,
    schedule: str | None = SCHEDULE_FILE,
    allow_other_model: bool = False,
    weights: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint's config.json."""
    entry: dict[str, Any] = {"quant_method": METHOD, "schedule": schedule, "prefill": prefill}
    entry["was_fx_version"] = __version__
    if weights:
        entry["weights"] = dict(weights)
    return {**entry, "allow_other_model": True} if allow_other_model else entry
