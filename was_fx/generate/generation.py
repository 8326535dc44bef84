"""`model.generate` of a sparsified model: transformers' own, with fast decode steps on a GPU."""

import functools
import logging
from typing import Any, get_args

import torch
from torch import Tensor, nn

from was_fx.compat.dynamo import compiled_call, set_compiled_call, settings_for_models
from was_fx.compat.generation import CACHE_NAMES, cache_among, static_layers, uses_flash_attention
from was_fx.compile.backend import register
from was_fx.compile.options import BackendOptions, ModelLowering
from was_fx.generate.compiled_step import CompiledModel, CompiledStep
from was_fx.generate.decode_loop import AHEAD, decode
from was_fx.generate.kept_cache import KeptCache
from was_fx.generate.recorded_step import RecordedStep
from was_fx.kernels.cpu.library import library
from was_fx.modules.weights import is_sharded

log = logging.getLogger(__name__)

# Arguments of `generate()` by which a caller's code runs in the loop: it must not see steps past the end.
_CALLBACKS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
# Arguments by which another loop than ours is asked for.
_OTHER_LOOPS = ("custom_generate", "assistant_model", "prompt_lookup_num_tokens", "synced_gpus")
# Share of the GPU's free memory that a static cache may take unasked.
_CACHE_SHARE = 0.25


def check_lowering(lowering: str | None, device: torch.device | None) -> None:
    """Whether decode steps of a model can be run so.

    Args:
        lowering: as for `sparsify`.
        device: where the model is or will be; None if it is nowhere.

    Raises:
        ValueError: no such lowering, or it needs something that isn't there.
    """
    if lowering is not None and lowering not in get_args(ModelLowering):
        raise ValueError(f"lowering is {lowering!r}; it must be one of {', '.join(map(repr, get_args(ModelLowering)))}")
    if lowering != "recorded":
        return
    if device is not None and device.type != "cpu":
        raise ValueError(f"lowering 'recorded' is for a CPU, and the model is on {device}; leave it out there")
    if library() is None:
        raise ValueError("lowering 'recorded' needs the C++ kernels: install g++, or set CXX to a compiler")


def use_own_generate(model: nn.Module, options: BackendOptions, lowering: ModelLowering | None) -> None:
    """Let `model.generate` be fast, or take new options for it. With "inductor" on a CPU, compile the whole model."""
    before = vars(model).get("generate")
    if hasattr(model, "generate") and not (isinstance(before, Generation) and before.settings == (options, lowering)):
        model.generate = Generation(model, options, lowering)  # type: ignore[assignment]
    first = next(model.parameters(), None)
    if lowering == "inductor" and first is not None and not first.is_cuda and compiled_call(model) is None:
        set_compiled_call(model, CompiledModel(model, options.given))
    elif lowering != "inductor":
        _drop_compiled(model)


def use_plain_generate(model: nn.Module) -> None:
    """Undo `use_own_generate`."""
    if isinstance(vars(model).get("generate"), Generation):
        del model.generate
    _drop_compiled(model)


def _drop_compiled(model: nn.Module) -> None:
    """Take back the compilation of the whole model, if it is ours."""
    if isinstance(compiled_call(model), CompiledModel):
        set_compiled_call(model, None)


class Generation:
    """`model.generate(...)`; a copy or a pickle of it compiles anew.

    Attributes:
        settings: the options of the backend and the lowering.
        step: calls the model for one token, compiled; None until it is needed.
    """

    def __init__(self, model: Any, options: BackendOptions, lowering: ModelLowering | None) -> None:
        self.settings = options, lowering
        self.step: CompiledStep | None = None
        self._model = model
        self._kept = KeptCache()
        functools.update_wrapper(self, type(model).generate)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """See `transformers.GenerationMixin.generate`."""
        model, (_, lowering) = self._model, self.settings
        generate = functools.partial(type(model).generate, model)
        if lowering == "recorded" and model.device.type == "cpu":
            return self._recorded(generate, arguments, keywords)
        if lowering == "eager" or not is_on_one_gpu(model):
            return generate(*arguments, **keywords)
        with settings_for_models():
            if self._takes(keywords):
                return self._own(generate, arguments, keywords)
            self._let_transformers_compile(keywords)
            return generate(*arguments, **keywords)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Generation":
        return Generation(memo.get(id(self._model), self._model), *self.settings)

    def __reduce__(self) -> Any:
        return Generation, (self._model, *self.settings)

    def compiled_step(self) -> CompiledStep:
        """`step`, made if it is needed for the first time."""
        if self.step is None:
            self.step = CompiledStep(self._model, self.settings[0].given)
        return self.step

    def _takes(self, keywords: dict[str, Any]) -> bool:
        """Whether our own loop may be asked to serve a call."""
        config = keywords.get("generation_config") or self._model.generation_config
        plain = not any(keywords.get(name) for name in _OTHER_LOOPS) and not config.is_assistant
        own = all(keywords.get(name) is None for name in CACHE_NAMES)
        return plain and own and (keywords.get("num_beams", config.num_beams) or 1) == 1

    def _recorded(self, generate: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """On a CPU, with decode steps that are recorded; those that can't be run as they are."""
        config = keywords.get("generation_config") or self._model.generation_config
        cached = keywords.get("use_cache", config.use_cache) is not False
        if not (cached and self._takes(keywords)):
            return generate(*arguments, **keywords)
        if keywords.get("cache_implementation", config.cache_implementation) is None:
            keywords["cache_implementation"] = "static"
        keywords["custom_generate"] = functools.partial(
            decode, streamer=keywords.get("streamer"), ahead=0, direct=RecordedStep
        )
        return generate(*arguments, **keywords)

    def _own(self, generate: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        config = keywords.get("generation_config") or self._model.generation_config
        chosen = keywords.get("cache_implementation", config.cache_implementation)
        if chosen is None and keywords.get("use_cache", config.use_cache) is not False:
            reason = self._why_no_static_cache(arguments, keywords, config)
            if reason:
                log.warning("generate() uses a cache that grows, with which decode steps are slower: %s", reason)
            else:
                keywords["cache_implementation"] = "static"
        self._let_transformers_compile(keywords)  # what our loop turns down
        ahead = 0 if any(keywords.get(name) for name in _CALLBACKS) else AHEAD
        # generate() itself keeps the streamer from a custom loop.
        streamer = keywords.get("streamer")
        keywords["custom_generate"] = functools.partial(self._decode, streamer=streamer, ahead=ahead)
        return generate(*arguments, **keywords)

    def _decode(self, model: Any, input_ids: Tensor, *arguments: Any, **keywords: Any) -> Any:
        name, cache = cache_among(keywords)
        if cache is not None:
            cache = keywords[name] = self._kept.reused(cache, model, len(input_ids))
        text = decode(model, input_ids, *arguments, step=self.compiled_step(), **keywords)  # type: ignore[misc]
        if cache is not None:
            self._kept.keep(cache)
        return text

    def _let_transformers_compile(self, keywords: dict[str, Any]) -> None:
        """A static cache makes transformers compile decode steps: with our backend, unless it is told otherwise."""
        config = keywords.get("generation_config") or self._model.generation_config
        _, cache = cache_among(keywords)
        chosen = keywords.get("cache_implementation", config.cache_implementation)
        static = str(chosen or "").startswith("static") or static_layers(cache)
        if static and keywords.get("compile_config", config.compile_config) is None:
            from transformers import CompileConfig

            register()
            settings: dict[str, Any] = {"mode": None, "dynamic": True, "options": self.settings[0].given}
            keywords["compile_config"] = CompileConfig(backend="was", **settings)

    def _why_no_static_cache(self, arguments: tuple[Any, ...], keywords: dict[str, Any], config: Any) -> str:
        """Why `generate` should not make a static cache unasked, or ""."""
        inputs = keywords.get("input_ids", keywords.get("inputs", arguments[0] if arguments else None))
        rows, prompt = (inputs.shape[0], inputs.shape[1]) if isinstance(inputs, Tensor) else (1, 0)
        new = keywords.get("max_new_tokens", config.max_new_tokens)
        length = prompt + new if new else keywords.get("max_length", config.max_length) or prompt + 20
        return why_no_static_cache(self._model, rows, length)


def why_no_static_cache(model: Any, rows: int, length: int) -> str:
    """Why not to make a static cache unasked on a GPU, for so many sequences of so many tokens; or ""."""
    if uses_flash_attention(model):
        return "flash attention can't read a static one"
    free, _ = torch.cuda.mem_get_info(model.device)
    wanted = rows * length * _bytes_per_token(model)
    if wanted > _CACHE_SHARE * free:
        return (
            f"a static one for {length} tokens takes {wanted / 2**30:.1f} of {free / 2**30:.1f} GiB that are free; "
            "give a smaller max_new_tokens, or cache_implementation='static' to have it all the same"
        )
    return ""


def is_on_one_gpu(model: Any) -> bool:
    """Whether all of a model is on one GPU, and whole: ranks that queue steps must not run apart."""
    places = set(getattr(model, "hf_device_map", {}).values())
    return model.device.type == "cuda" and len(places) <= 1 and not is_sharded(next(model.parameters()))


def _bytes_per_token(model: Any) -> int:
    """Bytes that one token takes in a static cache, as far as the configuration tells."""
    config = model.config.get_text_config()
    layers, heads = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)
    shared = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // max(heads, 1))
    return 2 * layers * shared * width * model.dtype.itemsize
