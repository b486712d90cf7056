"""Where nfflax keeps what it can make or fetch again."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` in nfflax's part of the user's cache: `$XDG_CACHE_HOME`, or `~/.cache`."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "nfflax" / name
