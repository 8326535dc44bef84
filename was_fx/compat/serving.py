"""transformers' OpenAI-compatible server, and the names of it that are private or undocumented."""

from typing import Any


def missing_for_server() -> str:
    """What keeps transformers' server from starting, in a few words; "" if nothing does."""
    try:
        from transformers.cli.serve import Serve  # noqa: F401
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        return str(error)
    return "" if is_serve_available() else "FastAPI, Uvicorn, the openai package or pydantic is missing"


def run_server(name: str, model: Any, processor: Any, host: str, port: int) -> None:
    """Serve a loaded model under a name until the process is told to stop.

    Args:
        name: what clients call it.
        model: a causal LM of transformers.
        processor: its tokenizer or processor.
        host, port: where to listen.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelManager

    if not hasattr(ModelManager, "list_models"):  # /v1/models of 5.17 lists what the Hub's cache holds
        listed = {"id": name, "object": "model", "created": 0, "owned_by": "local"}
        ModelManager.get_gen_models = staticmethod(lambda *_: [listed])  # type: ignore[attr-defined]
    # The manager loads by name what it serves, and again after its /reset.
    before = ModelManager._load_model, ModelManager._load_processor
    ModelManager._load_model = lambda *_, **__: model  # type: ignore[method-assign]
    ModelManager._load_processor = lambda *_, **__: processor  # type: ignore[method-assign]
    try:
        Serve(force_model=name, host=host, port=port, log_level="error")
    finally:
        ModelManager._load_model, ModelManager._load_processor = before  # type: ignore[method-assign]
