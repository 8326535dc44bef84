"""`was chat`: talk to a model, dense, sparse or quantised, and hear the difference."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

from was_fx.cli.input import options
from was_fx.cli.input.conversation import Conversation, has_chat_template
from was_fx.cli.input.prompts import written
from was_fx.cli.input.variants import AS_SAVED, Variant, Variants, load_variants
from was_fx.cli.render.console import note, print_json, print_labelled, stderr, stdout
from was_fx.schedules.names import suggestion, visible

EXAMPLES = options.examples(
    "was chat ./llama --schedule s.was.safetensors  [dim]/help lists what can be switched[/]",
    'was chat ./llama --weights int8 --system "Answer in one sentence." --temperature 0.7 --top-p 0.9',
    "was chat embedded --schedule s.was.safetensors < questions.txt  [dim]a line for each turn[/]",
    "was chat ./llama-sparse --json < questions.txt > answers.jsonl",
)
# What a line that begins with a slash does.
SWITCHES = {
    "/dense": "answer again, densely",
    "/sparse": "answer again, by the schedule",
    "/full": "answer again, with the weights as they were saved",
    "/int8": "answer again, with weights of int8",
    "/int4": "answer again, with weights of int4",
    "/compare": "the plain dense model's answer, and this one below it",
    "/again": "answer again",
    "/new": "begin another chat",
    "/help": "these lines",
    "/quit": "leave; so does Ctrl-D",
}


def chat(
    model: options.Model,
    schedule: options.ScheduleOrSaved = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told before the chat begins.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="End an answer after so many tokens.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.01, metavar="T", help="Draw each token; lower is more predictable. By default the likeliest."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, metavar="P", help="Draw from the likeliest tokens that make up this share."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed draws the same tokens, in every answer.")] = 0,
    lowering: options.LoweringOption = None,
    weights: options.Weights = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    allow_other_model: options.OtherModel = False,
    json: options.Json = False,
) -> None:
    """Chat with a model; what it writes appears as it comes, with its speed and realised sparsity below.

    /dense, /sparse, /int8, /int4 and /full answer the same question with another variant, /compare shows two; /help
    lists all. Each format of the weights is loaded once and stays in memory.

    Ctrl-C ends an answer and not the chat; once more, or Ctrl-D, leaves. Of what is piped each line is a turn. With
    --json each answer is a line on stdout.
    """
    sampling: dict[str, Any] = {"do_sample": temperature is not None or top_p is not None}
    sampling.update({name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value})
    variants = load_variants(
        model,
        schedule,
        weights=weights,
        dtype=dtype,
        device=device,
        lowering=lowering,
        allow_other_model=allow_other_model,
    )
    how = {"max_new_tokens": max_new_tokens, "seed": seed, "sampling": sampling}
    watched = sys.stdin.isatty()
    if not has_chat_template(variants.loaded.tokenizer):
        note(f"{model} has no chat template: it goes on from your text as it stands.")
    session = _Session(variants, Conversation(system), how, json, watched)
    if watched:
        note(f"{variants.name()} (weights in memory: {_memory(variants)}). /help lists what can be switched.")
    with _interrupts(signal.default_int_handler):
        for line in _typed(session) if watched else (each.rstrip("\r\n") for each in sys.stdin):
            if line.strip() == "/quit":
                break
            try:
                session.take(line)
            except (ValueError, OSError, RuntimeError) as error:
                if not watched:
                    raise
                print_labelled("Error:", "bold red", visible(error))
            except KeyboardInterrupt:
                if not watched:
                    raise
                if session.interrupted:
                    break
                session.interrupted = True
                note("Stopped.")


class _Session:
    """A chat with the variants of a model.

    Attributes:
        interrupted: Ctrl-C was the last that was heard.
        watched: somebody types.
    """

    def __init__(
        self, variants: Variants, conversation: Conversation, how: dict[str, Any], json: bool, watched: bool
    ) -> None:
        self.variants, self.conversation, self.how, self.json = variants, conversation, how, json
        self.watched = watched
        self.interrupted = False

    def take(self, line: str) -> None:
        """Answer a line, or do what it asks for."""
        word = line.strip()
        if not word.startswith("/") or word.startswith("//"):
            if word:
                self._ask(line[1:] if word.startswith("//") else line)
        elif word in ("/dense", "/sparse"):
            self._switch(sparse=word == "/sparse")
        elif word in ("/int8", "/int4"):
            self._switch(weights=word[1:])
        elif word == "/full":
            self._switch(weights=AS_SAVED)
        elif word == "/again":
            self._again()
        elif word == "/compare":
            self._compare()
        elif word == "/new":
            self.conversation = self.conversation.anew()
            note("A new chat.")
        elif word == "/help":
            width = max(map(len, SWITCHES))
            for name, what in SWITCHES.items():
                note(f"{name:{width}}  {what}")
        else:
            near = suggestion(word, SWITCHES) or f" (there are {', '.join(SWITCHES)})"
            raise ValueError(f"there is no {word}{near}; // begins a line that is to begin with /")

    def _ask(self, text: str) -> None:
        self.conversation.ask(text)
        try:
            self._answer()
        except BaseException:
            self.conversation.withdraw()
            raise

    def _switch(self, weights: str | None = None, sparse: bool | None = None) -> None:
        self._use(weights, sparse)
        self._again()

    def _use(self, weights: str | None, sparse: bool | None) -> None:
        if self.variants.use(weights, sparse):
            note(f"In memory: {_memory(self.variants)}.")

    def _again(self) -> None:
        if self.conversation.question is None:
            note(f"{self.variants.name()}. There is no question yet.")
            return
        self._answer()

    def _compare(self) -> None:
        """Both answer what was asked last; the chat goes on from the second."""
        now = self.variants.now
        other = Variant(AS_SAVED, sparse=False)
        if now == other and self.variants.schedule is None:
            raise ValueError("there is nothing to compare with: no schedule was given, and the weights are as saved")
        if self.conversation.question is None:
            raise ValueError("there is no question yet to compare answers to")
        second = Variant(AS_SAVED, sparse=True) if now == other else now
        try:
            for variant in (other, second):
                self._use(variant.weights, variant.sparse)
                if not self.json:
                    stdout().rule(self.variants.name(), align="left")
                self._answer()
        finally:
            self._use(now.weights, now.sparse)

    def _answer(self) -> None:
        """Answer what was asked last, with the variant in use."""
        import torch

        from was_fx.cli.render.answers import AnswerPrinter, about
        from was_fx.measure.answers import answer_sparsity

        loaded = self.variants.loaded
        inputs = self.conversation.tokens(loaded)
        given = inputs["input_ids"].shape[1]
        room = self.how["max_new_tokens"]
        if loaded.positions is not None:
            room = min(room, loaded.positions - given)
        printer = AnswerPrinter(loaded.tokenizer, quiet=self.json)

        def stop(*_: object) -> None:
            if printer.stop or not self.watched:
                raise KeyboardInterrupt
            printer.stop = self.interrupted = True

        with _interrupts(stop):
            found = written(loaded, inputs, **{**self.how, "max_new_tokens": room}, printer=printer)
            self.conversation.answer(found.text)
        ids = torch.cat([inputs["input_ids"].cpu(), found.ids[None]], dim=1)
        measured = answer_sparsity(loaded.model, ids, given)
        sparsity = None if measured is None else measured.sparsity
        speed = None if found.ms_per_token is None else 1000 / found.ms_per_token
        variant = self.variants.name()
        if not self.json:
            note(about(len(found.ids), speed, sparsity, variant, found.stopped))
            return
        answer = {
            "question": self.conversation.question,
            "answer": found.text,
            "tokens": len(found.ids),
            "tokens_per_second": speed,
            "realised_sparsity": sparsity,
            "variant": variant,
            "stopped": found.stopped,
        }
        print_json(answer, indent=None)


def _memory(variants: Variants) -> str:
    """What the weights in memory take."""
    return ", ".join(f"{format} {megabytes:,.0f} MB" for format, megabytes in variants.megabytes().items())


@contextmanager
def _interrupts(handler: Any) -> Iterator[None]:
    """Handle Ctrl-C so while the context lasts."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _typed(session: _Session) -> Iterator[str]:
    """Lines from the terminal, until Ctrl-D or a second Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit the line and know those before it
    while True:
        stderr().print()
        try:
            line = _input()
        except EOFError:
            stderr().print()
            return
        except KeyboardInterrupt:
            stderr().print()
            if session.interrupted:
                return
            session.interrupted = True
            note("Ctrl-C once more leaves, as does Ctrl-D.")
            continue
        session.interrupted = False
        yield line


def _input() -> str:
    """A line from the terminal. Its prompt goes to stderr where stdout is a file."""
    if sys.stdout.isatty():
        return input("> ")
    stderr().print("> ", end="")
    return input()
