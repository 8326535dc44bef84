"""The text decoder of a model, found through what models of transformers say of themselves: `get_decoder()`,
`input_modalities`, `is_encoder_decoder`.

A multimodal model wraps a decoder, which runs in every step of `generate()`, and towers for images or audio, which run
once in a prompt. Only what lies in the decoder is worth making sparse.
"""

from typing import Any

from torch import nn

_TEXT = "text"


def decoder_path(model: nn.Module) -> str:
    """Qualified name of the decoder in a model: of the innermost, where one wraps another; "" if it is the model."""
    decoder: Any = model
    while hasattr(decoder, "get_decoder"):
        inner = decoder.get_decoder()
        if inner is None or inner is decoder:
            break
        decoder = inner
    return next((name for name, module in model.named_modules() if module is decoder), "")


def takes_more_than_text(model: nn.Module) -> bool:
    """Whether a model takes images or audio beside text: it says so, or its configuration has one of its own for text,
    which some classes of transformers 5.17 tell by alone."""
    config: Any = getattr(model, "config", None)
    composite = hasattr(config, "get_text_config") and config.get_text_config(decoder=True) is not config
    return composite or bool(_modalities(model) - {_TEXT})


class TextDecoder:
    """Which part of a model is its text decoder: all of it, unless the model takes more than text.

    Attributes:
        path: qualified name of the decoder; "" if all of the model counts as that.
        towers: qualified names of the models that take no text: for images, audio, …
    """

    def __init__(self, model: nn.Module) -> None:
        wraps = takes_more_than_text(model)
        self.path = decoder_path(model) if wraps else ""
        inner = model.named_modules() if wraps else ()
        self.towers = tuple(
            name for name, each in inner if name and _modalities(each) and _TEXT not in _modalities(each)
        )

    def holds(self, name: str) -> bool:
        """Whether a module, a parameter or a Linear of this qualified name lies in it."""
        inside = not self.path or name.startswith(f"{self.path}.")
        return inside and not any(name.startswith(f"{tower}.") for tower in self.towers)


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Refuse a model whose decoder reads what an encoder makes of the text.

    Raises:
        ValueError: with what to do.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, which was-fx leaves alone: its loops and its cache "
            "are others; take a decoder-only model, such as AutoModelForCausalLM or AutoModelForImageTextToText loads"
        )


def _modalities(module: Any) -> set[str]:
    """What a model of transformers takes; nothing for any other module."""
    found = getattr(module, "input_modalities", ())
    return {found} if isinstance(found, str) else set(found)
