"""`llms.txt` of the site: what each page answers, and what each public name is, in one line each (llmstxt.org).

`docs/conf.py` writes it whenever the site is built, from the pages and from the docstrings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from typing import Any

from notebooks import markdown

# Package and the page of its reference.
PACKAGES = {
    "nnterp": "docs/api/nnterp.html",
    "nnterp.interventions": "docs/api/interventions.html",
    "nnterp.prompts": "docs/api/prompts.html",
    "nnterp.display": "docs/api/display.html",
    "nnterp.errors": "docs/api/errors.html",
    "nnterp.positions": "docs/api/positions.html",
}
HEAD = """\
# nnterp

> One interface to the inside of any HuggingFace causal language model. Its names are proven by running the model.
"""


def first_sentence(text: str) -> str:
    """The first sentence of a text of Markdown, without its links."""
    plain = " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).split())
    return re.split(r"(?<=[.?!])\s+(?=[A-Z`\"“])", plain, maxsplit=1)[0].rstrip(":")


def about_page(path: Path) -> tuple[str, str]:
    """The title of a page, and its first sentence."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = markdown(json.loads(text))
    text = re.sub(r"\A---\n.*?^---$", "", text, flags=re.M | re.S)  # what the hub reads of a model's card
    title = re.search(r"^# (.*)$", text, flags=re.MULTILINE)
    body = re.sub(r"^```.*?^```$", "", text.partition("# ")[2].partition("\n")[2], flags=re.M | re.S)
    first = next((p for p in body.split("\n\n") if re.match(r"\s*[\w`\[*\"]", p)), "")
    return title[1] if title else path.stem, first_sentence(first)


def public_names(package: str) -> list[str]:
    """The public names of a package: its `__all__`, or the classes that it defines."""
    module = import_module(package)
    listed: Iterable[str] | None = getattr(module, "__all__", None)
    if listed is None:
        listed = (name for name, kind in vars(module).items() if getattr(kind, "__module__", None) == package)
    return sorted(listed)


def lines(root: Path, pages: Iterable[str]) -> Iterator[str]:
    """The lines of `llms.txt`.

    Args:
        root: The root of the repository.
        pages: Its pages, as paths in it.
    """
    yield from (HEAD, "## Pages", "")
    for page in sorted(pages):
        title, said = about_page(root / page)
        yield f"- [{title}]({Path(page).with_suffix('.html').as_posix()}): {said}"
    for package, reference in PACKAGES.items():
        yield from ("", f"## [{package}]({reference})", "")
        for name in public_names(package):
            yield f"- `{package}.{name}`: {first_sentence(getdoc(getattr(import_module(package), name)) or '')}"


def write_llms_txt(app: Any, exception: Exception | None) -> None:
    """Called by Sphinx when the site is built."""
    if exception is None and app.builder.format == "html":
        root = Path(app.srcdir)
        pages = [Path(app.env.doc2path(name)).relative_to(root).as_posix() for name in app.env.found_docs]
        (Path(app.outdir) / "llms.txt").write_text("\n".join(lines(root, pages)) + "\n", encoding="utf-8")
