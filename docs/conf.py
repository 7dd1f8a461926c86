"""The site, built from the root of the repository so that links between pages are those of the repository:

uv run sphinx-build -W -c docs . build/site
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version as version_of
from os.path import join, normpath
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from llms import write_llms_txt
from notebooks import markdown

project = "nnterp"
author = "The nnterp authors"
copyright = "the nnterp authors"
version = release = version_of("nnterp-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/**",
    "notebooks/*.ipynb",
    "packages/*/README.md",
    "packages/*/CHANGELOG.md",
    "packages/nnterp-core/src/nnterp/_toy*/README.md",
]
html_theme = "furo"
html_title = "nnterp"

myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write code in single backticks
autodoc_mock_imports = ["vllm", "nnsight.modeling.vllm"]  # nnterp.vllm is documented without vLLM
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures are in the text; types of torch would be links that lead nowhere
autodoc_class_signature = "separated"
napoleon_use_rtype = False
napoleon_use_ivar = True


def blocks(app, what, name, obj, options, lines):
    """Before napoleon: tables of Markdown, and examples without a prompt, are shown as they are written."""
    made, table = [], False
    for i, line in enumerate(lines):
        is_row = line.startswith("|")
        if is_row and not table:
            made += ["::", ""]
        elif table and not is_row:
            made.append("")
        table = is_row
        if line == "Example:" and not "".join(lines[i + 1 : i + 2]).strip().startswith(">>>"):
            made += ["Example::", ""]
        else:
            made.append(f"    {line}" if is_row else line)
    lines[:] = made


def inline(app, what, name, obj, options, lines):
    """After napoleon: links of Markdown are links, and a star is no emphasis."""
    for i, line in enumerate(lines):
        line = re.sub(r"\[([^\]]+)\]\((https?://[^)]+)\)", r"`\1 <\2>`__", line)
        lines[i] = line if "`" in line else re.sub(r"(?<!\\)\*", r"\\*", line)


def read_notebooks(app, docname, source):
    """A notebook is read as the page that it makes, with what it shows."""
    if Path(app.env.doc2path(docname)).suffix == ".ipynb":
        source[0] = markdown(json.loads(source[0]))


def list_pages(app, docname, source):
    """The table of contents is made of the links of docs/index.md, in their order."""
    if docname == root_doc:
        links = dict.fromkeys(re.findall(r"\]\(([^)#:]+)\.(?:md|ipynb)\)", source[0]))
        pages = "\n".join("/" + normpath(join("docs", link)) for link in links)
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", read_notebooks)
    app.connect("source-read", list_pages)
    app.connect("autodoc-process-docstring", blocks, priority=400)
    app.connect("autodoc-process-docstring", inline, priority=600)
    app.connect("build-finished", write_llms_txt)
