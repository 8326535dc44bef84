"""Tells lm-eval where its model "was" is, without importing it yet."""

from lm_eval.api.registry import model_registry

if "was" not in model_registry:
    model_registry.register("was", target="was_fx.plugins.lm_eval:WasLM")
