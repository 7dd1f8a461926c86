"""Files of a repository on the Hugging Face hub: only those that a dictionary is made of."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError


def downloaded(repo: str, path: str, names: tuple[str, ...], revision: str | None) -> tuple[Path, str]:
    """The folder `path` of a repository in the hub's cache, with the files of these names in it, and the commit.

    Args:
        repo: The repository, `owner/name`.
        path: A folder in it; "" for its top.
        names: Names, or patterns of names, of the files that are wanted.
        revision: Branch, tag or commit; the main branch if None.

    Raises:
        FileNotFoundError: The repository, revision or folder is not there, or not in the cache and cannot be reached.
        ValueError: `repo` is no id.
    """
    below = f"{path}/" if path else ""
    wanted = [below + name for name in names]
    missing = f"{path or 'The repository'} of {repo} at revision {revision or 'main'}"
    try:
        at = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except HFValidationError as error:
        raise ValueError(f"A dictionary is a folder, a file, or owner/name on the hub, not {repo!r:.80}.") from error
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{missing} is not there, or cannot be reached ({type(error).__name__}: {error!s:.200})."
        ) from error
    if not (at / path).is_dir():
        raise FileNotFoundError(
            f"{missing} has no such folder in the hub's cache, or none of {', '.join(names)} in it."
        )
    return at / path, at.name
