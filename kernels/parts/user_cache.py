"""The folder for what was-fx keeps on this machine: compiled files, tuning data."""

import os
from pathlib import Path


def user_cache() -> Path:
    """`was_fx` in the user's cache folder; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "was_fx"
