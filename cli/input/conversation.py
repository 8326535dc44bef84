"""A chat: its turns, and the tokens of what the model is asked next."""

from typing import Any

from was_fx.cli.input.models import Loaded


class Conversation:
    """The turns of a chat. All of it is read anew for each answer, so that it does not matter which variant of a model
    wrote the earlier ones, and the prompt is the one that the chat template makes of it.

    Without a chat template the turns are one text, which goes on: an answer right after its question, each question on
    a line of its own.

    Attributes:
        turns: messages as chat templates take them, without the system's.
    """

    def __init__(self, system: str | None = None) -> None:
        self.turns: list[dict[str, str]] = []
        self._system = [{"role": "system", "content": system}] if system else []

    @property
    def question(self) -> str | None:
        """The last that was asked."""
        return next((turn["content"] for turn in reversed(self.turns) if turn["role"] == "user"), None)

    def ask(self, text: str) -> None:
        """Add a question."""
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add the answer to the last question, in place of the one that it has."""
        self.turns = [*self._open, {"role": "assistant", "content": text}]

    def withdraw(self) -> None:
        """Take back the last question, with its answer."""
        self.turns = self._open[:-1]

    def anew(self) -> "Conversation":
        """A chat with nothing but the system's message."""
        begun = Conversation()
        begun._system = self._system
        return begun

    def tokens(self, loaded: Loaded) -> Any:
        """What the model is given for an answer to the last question: ids and mask [1, seq], on its device.

        Raises:
            ValueError: there is nothing, or the model can't take more; or its chat template refuses the turns.
        """
        import jinja2

        messages = [*self._system, *self._open]
        if has_chat_template(loaded.tokenizer):
            try:
                inputs = loaded.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except jinja2.TemplateError as error:
                hint = "; perhaps it takes no system message: leave out --system" if self._system else ""
                raise ValueError(f"the chat template of {loaded.name} refuses this: {error}{hint}") from error
        else:
            inputs = loaded.tokenizer(plain_text(messages), return_tensors="pt")
        given = inputs["input_ids"].shape[1]
        if given == 0:
            raise ValueError("that has no tokens; give some text")
        if loaded.positions is not None and given >= loaded.positions:
            raise ValueError(
                f"the chat has {given} tokens, and {loaded.name} takes {loaded.positions} with the answer; /new begins "
                "another"
            )
        return inputs.to(loaded.model.device)

    @property
    def _open(self) -> list[dict[str, str]]:
        """The turns up to the last question."""
        answered = bool(self.turns) and self.turns[-1]["role"] == "assistant"
        return self.turns[:-1] if answered else self.turns


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how its model is talked to."""
    return bool(getattr(tokenizer, "chat_template", None))


def plain_text(messages: list[dict[str, str]]) -> str:
    """Messages as one text: an answer follows its question, and after each answer and the system's comes a new line."""
    parts = [each["content"] + ("" if each["role"] == "user" else "\n") for each in messages]
    return "".join(parts)


def plain_template(tokenizer: Any) -> str:
    """`plain_text` as a chat template, with the token that a tokenizer puts before a text."""
    ids = tokenizer("x")["input_ids"]
    begins = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    messages = "{% for m in messages %}{{ m['content'] }}{% if m['role'] != 'user' %}\n{% endif %}{% endfor %}"
    return ("{{ bos_token }}" if begins else "") + messages
