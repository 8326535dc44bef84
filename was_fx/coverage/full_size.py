"""What share of a token's weight bytes is sparse in a model of full size: counted on the meta device."""

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch

from was_fx.modules.auto_class import auto_class
from was_fx.modules.linears import body_linears, bytes_per_token, dense_expert_share, weight_bytes_per_token
from was_fx.schedules.experts import group_of


def full_size(model_type: str, declined: Collection[str] = ()) -> dict[str, Any]:
    """Fields of `Coverage`: share, billions, experts_dense.

    Args:
        model_type: whose default configuration is meant: that of the checkpoint which transformers names with it.
        declined: Linears of a small model that stay dense; those of the same name in any layer do here, too.

    Returns:
        Nothing, where the default configuration gives no model.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        with torch.device("meta"):
            model = auto_class(model_type, whole=True).from_config(CONFIG_MAPPING[model_type]())
    except Exception:
        return {}  # a composite without parts, or one that needs a package
    dense = patterns(declined)
    body = body_linears(model)
    sparse = sum(bytes_per_token(model, each) for name, each in body.items() if _general(group_of(name)) not in dense)
    return {
        "share": sparse / weight_bytes_per_token(model),
        "billions": sum(each.numel() for each in model.parameters()) / 1e9,
        "experts_dense": dense_expert_share(model),
    }


def patterns(names: Iterable[str]) -> list[str]:
    """`layers.*.mixer.dt_proj` for the same Linear of several layers, each once."""
    return list(dict.fromkeys(map(_general, names)))


def _general(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
