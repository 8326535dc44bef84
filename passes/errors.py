"""What goes wrong in a pass."""


class RewriteError(RuntimeError):
    """A scheduled Linear could not be made sparse."""
