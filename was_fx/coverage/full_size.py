"""What share of a token's weight bytes is sparse in a model of full size: counted on the meta device."""

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch

from was_fx.modules.auto_class import auto_class
from was_fx.modules.linears import body_linears, byte_share, dense_expert_share
from was_fx.schedules.experts import group_of


def full_size(model_type: str, declined: Collection[str] = (), by_model: Collection[str] = ()) -> dict[str, Any]:
    """Fields of `Coverage`: share, billions, experts_dense, by_model_share.

    Args:
        model_type: whose default configuration is meant: that of the checkpoint which transformers names with it.
        declined: Linears of a small model that stay dense; those of the same name in any layer do here, too.
        by_model: others that do, since the model multiplies by their weights itself.

    Returns:
        Nothing, where the default configuration gives no model.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        with torch.device("meta"):
            model = auto_class(model_type, whole=True).from_config(CONFIG_MAPPING[model_type]())
    except Exception:
        return {}  # a composite without parts, or one that needs a package
    body = [(_general(group_of(name)), each) for name, each in body_linears(model).items()]
    others, dense = patterns(by_model), patterns([*declined, *by_model])
    return {
        "share": byte_share(model, [each for pattern, each in body if pattern not in dense]),
        "by_model_share": byte_share(model, [each for pattern, each in body if pattern in others]),
        "billions": sum(each.numel() for each in model.parameters()) / 1e9,
        "experts_dense": dense_expert_share(model),
    }


def patterns(names: Iterable[str]) -> list[str]:
    """`layers.*.mixer.dt_proj` for the same Linear of several layers, each once."""
    return list(dict.fromkeys(map(_general, names)))


def _general(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
