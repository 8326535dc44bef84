"""Which class of transformers loads a model: a causal LM, or a multimodal model that answers in text."""

from typing import Any


def auto_class(model_type: str, *, whole: bool = False) -> Any:
    """`AutoModelForCausalLM`, or `AutoModelForImageTextToText` for types that it alone knows.

    Args:
        model_type: as in config.json. One that transformers doesn't know may come with code of its own, as a causal LM.
        whole: load a multimodal model with its towers also where a causal LM can be made of its decoder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    multimodal = model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    causal = model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if multimodal and (whole or not causal) else AutoModelForCausalLM


def auto_class_of(architecture: str) -> Any:
    """The auto class that gives a model of the class with this name."""
    from transformers.models.auto import modeling_auto as auto

    causal, multimodal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found = next((name for name in multimodal if multimodal[name] == architecture), "")
    return auto_class(found, whole=architecture not in causal.values())
