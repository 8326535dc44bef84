"""What a small multimodal model is given for an image: pixels, and as many tokens in the prompt as it makes of them."""

import inspect
from typing import Any

import torch
from torch import Tensor

from was_fx.coverage.tiny_models import IMAGE

_SIDE = 4  # patches, where a model takes images of any size
_KINDS = ("mm_token_type_ids", "token_type_ids")  # names that transformers has for what kind each token is of


@torch.no_grad()
def image_prompt(model: Any, text: Tensor) -> dict[str, Any]:
    """Arguments of `generate()` for a prompt of an image and text.

    Args:
        model: a small multimodal model of `tiny_model`.
        text: LongTensor [1, n], n ≥ 2, of token ids.

    Raises:
        Exception: this class takes images in another way than most.
    """
    pixels = _pixels(model)
    takes = inspect.signature(model.get_image_features).parameters
    given = {name: each for name, each in pixels.items() if name in takes}
    strategy = "vision_feature_select_strategy"  # which transformers 5.17 asks for in some classes
    if strategy in takes and hasattr(model.config.vision_config, strategy):
        given[strategy] = getattr(model.config.vision_config, strategy)
    rows = _rows(model.get_image_features(**given))
    ids = torch.cat([text[:, :1], torch.full((1, rows), IMAGE), text[:, 1:]], 1)
    kinds = {
        name: (ids == IMAGE).long() for name in _KINDS if name in inspect.signature(type(model).forward).parameters
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels, **kinds}


def _pixels(model: Any) -> dict[str, Tensor]:
    """One image of noise, as the model's processor would give it."""
    takes = inspect.signature(type(model).forward).parameters
    vision = model.config.vision_config
    generator = torch.Generator().manual_seed(1)
    channels = int(getattr(vision, "num_channels", 0) or getattr(vision, "in_channels", 3))
    side = int(getattr(vision, "image_size", 0) or _SIDE * vision.patch_size)
    if "image_grid_thw" in takes:  # patches one after the other
        size = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        pixels = torch.randn(_SIDE * _SIDE, size, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, _SIDE, _SIDE]])}
    if "image_position_ids" in takes:
        place = torch.arange(_SIDE)
        pixels = torch.rand(1, _SIDE * _SIDE, channels * vision.patch_size**2, generator=generator)
        return {"pixel_values": pixels, "image_position_ids": torch.cartesian_prod(place, place)[None]}
    pixels = torch.randn(1, channels, side, side, generator=generator)
    takes = inspect.signature(model.get_image_features).parameters
    sizes = {"image_sizes": torch.tensor([[side, side]])} if "image_sizes" in takes else {}
    return {"pixel_values": pixels, **sizes}


def _rows(features: Any) -> int:
    """How many tokens there are in what a model makes of an image, however it returns them."""
    found = getattr(features, "pooler_output", features)
    found = features.last_hidden_state if found is None else found
    parts = found if isinstance(found, (list, tuple)) else [found]
    return sum(each.shape[:-1].numel() for each in parts)
