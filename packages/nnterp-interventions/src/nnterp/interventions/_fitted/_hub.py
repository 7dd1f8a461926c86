"""Lenses that others have published on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from nnterp.interventions._fitted._lens import Lens
from nnterp.interventions._fitted._published import CONFIG, PARAMS

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


def lens_from_hub(
    repo: str,
    path: str,
    model: StandardizedTransformer,
    *,
    revision: str | None = None,
    repo_type: str = "model",
    strict: bool = True,
) -> Lens:
    """Read a lens that is published on the Hugging Face hub, downloading only its own files.

    Files that hold more than tensors and numbers are not opened, as in `Lens.from_tuned_lens` and
    `Lens.from_jacobian_lens`, which read what was downloaded.

    Args:
        repo: The repository, `owner/name`.
        path: Where the lens is in it: a `.pt` file is a Jacobian lens, a folder one of the tuned-lens package.
        model: The model it was fitted on.
        revision: Branch, tag or commit of the repository; its main branch if None. Give a commit to read the same
            numbers later.
        repo_type: "model", "dataset" or "space" (the tuned-lens package publishes in a space).
        strict: As in `Lens.from_tuned_lens`. A Jacobian lens does not name its model.

    Returns:
        A `Lens`; `lens.details["hub"]` says where it is from, with the commit.

    Raises:
        FileNotFoundError: The repository, revision or file is not there, or cannot be reached and is not in the cache.
        ValueError: The files are damaged, hold code, or are of another model; or `repo` is no id of a repository.

    Example:
        lens = lens_from_hub("AlignmentResearch/tuned-lens", "lens/gpt2", model, repo_type="space")
    """
    if repo_type not in ("model", "dataset", "space"):
        raise ValueError(f"repo_type is 'model', 'dataset' or 'space', not {repo_type!r}.")
    alone = PurePosixPath(path).suffix == ".pt"
    names = [path] if alone else [str(PurePosixPath(path) / name) for name in (CONFIG, PARAMS)]
    files = [_downloaded(repo, name, revision, repo_type) for name in names]
    at = files[0]
    lens = Lens.from_jacobian_lens(at, model) if alone else Lens.from_tuned_lens(at.parent, model, strict)
    commit = at.parents[len(PurePosixPath(names[0]).parts) - 1].name
    lens.details["hub"] = {"repo": repo, "path": path, "repo_type": repo_type, "commit": commit}
    return lens


def _downloaded(repo: str, name: str, revision: str | None, repo_type: str) -> Path:
    """The file in the hub's cache.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: `repo` is no id.
    """
    try:
        return Path(hf_hub_download(repo, name, revision=revision, repo_type=repo_type))
    except HFValidationError as error:
        raise ValueError(f"repo is owner/name of a repository on the hub, not {repo!r} ({error!s:.200}).") from error
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{name} of the {repo_type} {repo} at revision {revision or 'main'} is not there, or cannot be reached "
            f"({type(error).__name__}: {error!s:.200})."
        ) from error
