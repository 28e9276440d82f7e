"""Where the cache lives: an explicit directory, ``$QEFF_HOME`` or the platform's user cache directory."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from QEfficient.errors import ArtifactWriteError


def cache_home(explicit: Path | None = None) -> Path:
    """Returns the absolute path of the cache root and creates it when it does not exist yet.

    ``explicit`` wins over ``$QEFF_HOME``, which wins over the platform's user cache directory.

    Raises:
        ArtifactWriteError: the path is not a directory, cannot be created or is not writable.
    """
    home, origin = _choose(explicit)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ArtifactWriteError(
            f"The cache directory {home} ({origin}) is not a directory: pass another one or set QEFF_HOME."
        ) from None
    except OSError as error:
        raise ArtifactWriteError(
            f"The cache directory {home} ({origin}) cannot be created ({error.strerror}): "
            "pass another one or set QEFF_HOME to a directory you can write to."
        ) from error
    if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        raise ArtifactWriteError(
            f"The cache directory {home} ({origin}) is not writable: "
            "change its permissions or set QEFF_HOME to a directory you can write to."
        )
    return home


def _choose(explicit: Path | None) -> tuple[Path, str]:
    # Absolute at once: a later chdir must not move the cache. Not resolved, so that messages show what was
    # typed.
    if explicit is not None:
        return Path(explicit).expanduser().absolute(), "passed explicitly"
    # An empty variable means "unset", as in the XDG specification.
    if configured := os.environ.get("QEFF_HOME"):
        return Path(configured).expanduser().absolute(), "from QEFF_HOME"
    return platformdirs.user_cache_path("qefficient"), "the default"
