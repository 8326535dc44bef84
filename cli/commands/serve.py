"""`was serve`: an OpenAI-compatible server for a model, dense, sparse or quantised."""

import logging
import socket
from typing import Annotated, Any

import typer

from was_fx.cli.input import options
from was_fx.cli.input.conversation import has_chat_template, plain_template
from was_fx.cli.input.variants import load_variants
from was_fx.cli.render.console import is_quiet, note, print_json

EXAMPLES = options.examples(
    "was serve ./llama --schedule s.was.safetensors  [dim]http://localhost:8000/v1[/]",
    "was serve ./llama-sparse --host 0.0.0.0 --port 8080  [dim]for other machines too[/]",
    "was serve ./llama --weights int8 --json > requests.jsonl",
)
# Tokens by which the sparsity of an answer is told, so that no request waits for it for long.
_MEASURED = 128


def serve(
    model: options.Model,
    schedule: options.ScheduleOrSaved = None,
    host: Annotated[
        str, typer.Option(metavar="NAME", help="Address to listen on; 0.0.0.0 for every one of this machine.")
    ] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port to listen on.")] = 8000,
    lowering: options.LoweringOption = None,
    weights: options.Weights = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    allow_other_model: options.OtherModel = False,
    json: options.Json = False,
) -> None:
    """Serve a model by the API of OpenAI, with transformers' own server: /v1/chat/completions, /v1/completions, …

    Needs its extras: [bold]pip install "was-fx[serve]"[/]. Clients call the model as MODEL is given here. Requests are
    answered one after another; each leaves a line with its speed and realised sparsity, with --json an object on
    stdout.
    """
    from was_fx.compat.serving import missing_for_server, run_server

    missing = missing_for_server()
    if missing:
        raise ValueError(f'was serve needs the server of transformers: pip install "was-fx[serve]" ({missing})')
    _check_address(host, port)
    variants = load_variants(
        model,
        schedule,
        weights=weights,
        dtype=dtype,
        device=device,
        lowering=lowering,
        allow_other_model=allow_other_model,
    )
    loaded = variants.loaded
    if not has_chat_template(loaded.tokenizer):
        loaded.tokenizer.chat_template = plain_template(loaded.tokenizer)
        note(f"{model} has no chat template: the messages of a chat are joined to a text, and it goes on from that.")
    _report_answers(loaded.model, variants.name(), json)
    note(f"Serving {model} ({variants.name()}) on http://{host}:{port}/v1; Ctrl-C ends it.")
    _keep_stdout_for_results()
    try:
        run_server(model, loaded.model, loaded.tokenizer, host, port)
    except KeyboardInterrupt:
        note("Stopped.")


def _check_address(host: str, port: int) -> None:
    """Refuse an address that can't be listened on before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{host}:{port} can't be listened on ({reason}); give another --host or --port") from None


def _keep_stdout_for_results() -> None:
    """Uvicorn writes its lines about requests on stdout."""
    from uvicorn.config import LOGGING_CONFIG

    LOGGING_CONFIG["handlers"]["access"]["stream"] = "ext://sys.stderr"
    if is_quiet():
        logging.disable(logging.INFO)


def _report_answers(model: Any, variant: str, json: bool) -> None:
    """Print a line about every answer that a model generates from now on."""
    import statistics

    import torch

    from was_fx.cli.render.answers import about
    from was_fx.measure.answers import answer_sparsity
    from was_fx.measure.token_clock import TokenClock

    generate = model.generate

    def generate_and_report(*arguments: Any, **keywords: Any) -> Any:
        config = keywords.get("generation_config") or model.generation_config
        prompt = keywords.get("input_ids")
        if prompt is None or len(prompt) > 1 or (config.num_beams or 1) > 1:
            return generate(*arguments, **keywords)
        clock = TokenClock(keywords.pop("streamer", None))
        stopped = True
        try:
            text = generate(*arguments, streamer=clock, **keywords)
            stopped = False
            return text
        finally:  # also where a client has gone, and its streamer ends the answer
            steps = clock.steps()[1:]
            speed = 1000 / statistics.median(steps) if steps else None
            ids = torch.cat([prompt.cpu(), *(each[None] for each in clock.tokens)], dim=1)
            measured = answer_sparsity(model, ids, prompt.shape[1], _MEASURED)
            sparsity = None if measured is None else measured.sparsity
            if json:
                row = {"prompt_tokens": prompt.shape[1], "tokens": len(clock.tokens), "tokens_per_second": speed}
                print_json({**row, "realised_sparsity": sparsity, "variant": variant, "stopped": stopped}, indent=None)
            else:
                note(about(len(clock.tokens), speed, sparsity, variant, stopped))

    model.generate = generate_and_report
