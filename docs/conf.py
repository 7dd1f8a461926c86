"""The site, built from the root of the repository so that links between pages are those of the repository:

uv run sphinx-build -W -c docs . build/site
"""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from os.path import join, normpath
from pathlib import Path

project = "nnterp"
author = "The nnterp authors"
copyright = "the nnterp authors"
version = release = version_of("nnterp-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/**",
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


def write_llms_txt(app, exception):
    """`llms.txt`: every page with its first sentence, as plain text for language models."""
    if exception is not None or app.builder.format != "html":
        return
    root = Path(app.srcdir)
    entries = [
        "# nnterp",
        "",
        "> One interface to the inside of any HuggingFace causal language model.",
        "",
        "## Pages",
        "",
    ]
    for name in sorted(app.env.found_docs):
        text = (root / app.env.doc2path(name)).read_text(encoding="utf-8")
        title = re.search(r"^# (.*)$", text, flags=re.MULTILINE)
        body = re.sub(r"^```.*?^```$", "", text.partition("\n")[2], flags=re.M | re.S)
        first = next((p for p in body.split("\n\n") if re.match(r"\s*[\w`\[]", p)), "").split(". ")[0]
        said = " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", first).split()).rstrip(".")
        entries.append(f"- [{title[1] if title else name}]({name}.html): {said}{'' if said.endswith('?') else '.'}")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")


def list_pages(app, docname, source):
    """The table of contents is made of the links of docs/index.md, in their order."""
    if docname == root_doc:
        links = dict.fromkeys(re.findall(r"\]\(([^)#:]+)\.md\)", source[0]))
        pages = "\n".join("/" + normpath(join("docs", link)) for link in links)
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", list_pages)
    app.connect("autodoc-process-docstring", blocks, priority=400)
    app.connect("autodoc-process-docstring", inline, priority=600)
    app.connect("build-finished", write_llms_txt)
