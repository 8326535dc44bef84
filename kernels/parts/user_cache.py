"""The folder for what was-fx keeps on this machine: compiled files, tuning data."""

from pathlib import Path

import platformdirs


def user_cache() -> Path:
    """`was_fx` in the user's cache folder; it need not exist, nor be writable."""
    return Path(platformdirs.user_cache_dir("was_fx", appauthor=False))
