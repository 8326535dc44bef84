"""Private names of transformers' saving and loading, each with what it is for. `tests/was_fx/compat` fails when one is
gone."""

from typing import Any

# The method of a model that uploads a folder, for `push_to_hub`: with the repository's name, as nothing public is.
UPLOAD = "_upload_modified_files"


def upload(model: Any, *arguments: Any, **keywords: Any) -> Any:
    """The class's own `UPLOAD`."""
    return type(model)._upload_modified_files(model, *arguments, **keywords)


def saves_adapters_only(model: Any) -> bool:
    """Whether transformers itself has put adapters into the model, and `save_pretrained` writes nothing else."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def origin(config: Any) -> tuple[str, str | None]:
    """(folder or name on the Hub, commit there) of the checkpoint that a configuration was loaded from."""
    return config._name_or_path, getattr(config, "_commit_hash", None)


def came_from_file(tensor: Any) -> bool:
    """Whether `from_pretrained` has filled a tensor from a checkpoint, and did not just make room for it."""
    return bool(getattr(tensor, "_is_hf_initialized", False))
