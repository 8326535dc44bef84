"""The decision in words and figures."""

from was_fx.choosing.choices import Choice
from was_fx.choosing.decision import Decision, rise


def named(choice: Choice) -> str:
    """What a choice is: "int8 weights with 50 % sparsity"."""
    if choice.schedule is None:
        return f"{choice.format} weights without sparsity"
    return f"{choice.format} weights with {100 * choice.nominal:.3g} % sparsity ({choice.schedule})"


def headline(decision: Decision) -> str:
    """What to take, what it gains and what it costs, in a sentence."""
    choice, limit = decision.choice, f"{100 * decision.within:.3g} %"
    what = "cheaper" if decision.dense.ms_per_token is None else "faster"
    if choice is None:
        return f"Stay dense: nothing that was measured here is {what} than the model as it is."
    gain = f"{named(choice)} {gains(choice, decision.dense)}"
    price = f"{cost(choice, decision.dense)} in perplexity"
    if decision.fits:
        return f"{gain[:1].upper()}{gain[1:]}, at {price}."
    return f"Nothing {what} stays within {limit} of the dense perplexity. The nearest: {gain}, at {price}."


def gains(choice: Choice, dense: Choice) -> str:
    """What a choice gains against the dense model: speed where it was measured, and bytes."""
    share = 1 - choice.bytes_per_token / dense.bytes_per_token
    read = f"read {100 * share:.0f} % less" if share >= 0 else f"read {-100 * share:.0f} % more"
    return f"{read} per token" if choice.ratio is None else f"decode {choice.ratio:.2f}× as fast and {read} per token"


def cost(choice: Choice, dense: Choice) -> str:
    """How much higher perplexity is, with its sign: "+3.1 %"."""
    return f"{100 * rise(choice, dense):+.1f} %".replace("-", "−")


def size(count: float) -> str:
    """A number of bytes: `1.53 GB`, `24.0 MB`."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
