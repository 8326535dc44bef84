"""What goes wrong in a pass."""

from collections.abc import Mapping


class RewriteError(RuntimeError):
    """A scheduled Linear could not be made sparse.

    Attributes:
        linears: what is wrong with each, by qualified name, where the error is about certain ones.
    """

    def __init__(self, message: str, linears: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.linears = dict(linears or {})
