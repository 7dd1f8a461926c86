"""The versions of installed packages."""

import importlib.metadata
from functools import cache


@cache
def version_of(distribution: str) -> str:
    """Return the version of an installed distribution, such as "torch"; looked up once, because that reads files.

    Raises:
        importlib.metadata.PackageNotFoundError: It is not installed.
    """
    return importlib.metadata.version(distribution)
