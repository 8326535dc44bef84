"""Private names of transformers' quantizers, each with what it is for. `tests/was_fx/compat` fails when one is gone."""

# What transformers leaves on a quantised model, and on its configuration, beside what it documents.
MODEL_MARKS = ("_weight_conversions",)
CONFIG_MARKS = ("_is_quantized",)


def let_given_attributes_win(config_class: type) -> None:
    """Let a config that is given to `from_pretrained` win over the checkpoint's own, by `get_loading_attributes()`.

    transformers asks only the classes of a constant of its own for that.
    """
    from transformers.quantizers import auto

    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, config_class)  # type: ignore[assignment]
