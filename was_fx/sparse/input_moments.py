"""The second moments of what Linears read, as much as memory holds at a time."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from was_fx.modules.linears import LinearModule, looking_at_inputs

_BYTES = 2 << 30  # of moments that are held at a time


@torch.no_grad()
def input_moments(
    model: nn.Module, linears: Mapping[str, LinearModule], tokens: Tensor, batch_size: int = 4
) -> Iterator[dict[str, Tensor]]:
    """Σ x xᵀ over the inputs x [K] of each Linear, for a few Linears after the other in the model as it then is.

    Linears of later portions see what the caller made of those before. Linears that share an input share the tensor.

    Args:
        model: in which the Linears are.
        linears: in the order in which the model calls them.
        tokens: LongTensor [n, seq].
        batch_size: sequences of a forward pass.

    Yields:
        fp32 [K, K] on the device of each Linear, by qualified name; none of a Linear that was never called.
    """
    for portion in _portions(linears):
        found: dict[str, Tensor] = {}
        last: dict[int, tuple[Tensor, str]] = {}  # by K: the input seen last, and by which Linear

        def look(
            name: str, x: Tensor, found: dict[str, Tensor] = found, last: dict[int, tuple[Tensor, str]] = last
        ) -> None:
            channels = x.shape[-1]
            before, first = last.get(channels, (None, name))
            if before is x and (name not in found or found[name] is found[first]):
                found[name] = found[first]  # a sibling of the Linear before
                return
            if name not in found:
                found[name] = torch.zeros(channels, channels, device=x.device)
            rows = x.reshape(-1, channels).float()
            found[name].addmm_(rows.t(), rows)
            last[channels] = (x, name)

        with looking_at_inputs(portion, look):
            for ids in tokens.split(batch_size):
                last.clear()
                model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
        last.clear()
        yield found


def _portions(linears: Mapping[str, LinearModule]) -> Iterator[dict[str, LinearModule]]:
    portion: dict[str, LinearModule] = {}
    size = 0
    for name, linear in linears.items():
        more = 4 * linear.shape[1] ** 2
        if portion and size + more > _BYTES:
            yield portion
            portion, size = {}, 0
        portion[name] = linear
        size += more
    if portion:
        yield portion
