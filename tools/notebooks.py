"""Run the notebooks of notebooks/ and write into them what they show.

    uv run python tools/notebooks.py                               # all, on the toy model; pictures need a Chromium
    uv run python tools/notebooks.py lens --model FOLDER_OR_HUB_ID # prints what one shows on another model

`docs/conf.py` takes `markdown` from here, which makes a page of a notebook, and tests/core/test_notebooks_run.py `run`.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"
CHOICE = re.compile(r"^checkpoint = .*$", flags=re.MULTILINE)  # the line of a notebook that chooses the model


def source_of(cell: dict[str, Any]) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def described(figure: dict[str, Any]) -> str:
    """A figure in words: its title, and what is drawn."""
    title = figure["layout"].get("title", {}).get("text") or "Figure"
    kinds = dict.fromkeys(trace.get("type", "scatter") for trace in figure["data"])
    return f"{re.sub('<[^>]*>', ' ', title)} [{', '.join(kinds)}]"


def picture(figure: Any) -> str:
    """A figure as a PNG, in base64."""
    from nnterp import display

    with tempfile.TemporaryDirectory() as folder:
        path = display.save(figure, Path(folder) / "figure.png", scale=1.25)
        return base64.b64encode(path.read_bytes()).decode()


def show_figures(shell: Any, pictures: bool) -> None:
    """From now on, a session shows a figure as words, and as a picture too if `pictures`."""
    from IPython.display import display
    from plotly.graph_objects import Figure

    def show(figure: Any) -> None:
        made = figure.to_dict()
        bundle = {"text/plain": described(made)}
        display({**bundle, "image/png": picture(figure)} if pictures else bundle, raw=True)

    shell.display_formatter.ipython_display_formatter.for_type(Figure, show)


@contextmanager
def session() -> Iterator[Any]:
    """An IPython session with nothing in it, which keeps no history on disk."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    existed = InteractiveShell.initialized()
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.reset(new_session=True)
    try:
        yield shell
    finally:
        shell.reset(new_session=True)
        if not existed:
            InteractiveShell.clear_instance()


def shown(captured: Any, number: int, last: Any) -> list[dict[str, Any]]:
    """What a cell shows, as a notebook keeps it."""
    outputs: list[dict[str, Any]] = []
    if captured.stdout:
        text = captured.stdout.splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    shown_data = [output.data for output in captured.outputs if output.data]
    for place, kinds in enumerate(shown_data, 1):
        data = {kind: text if kind == "image/png" else text.splitlines(True) for kind, text in kinds.items()}
        kept = {"data": data, "metadata": {}}
        if last is not None and place == len(shown_data) and "image/png" not in data:
            outputs.append({"output_type": "execute_result", "execution_count": number, **kept})
        else:
            outputs.append({"output_type": "display_data", **kept})
    return outputs


def run(notebook: dict[str, Any], pictures: bool, checkpoint: str | None = None) -> dict[str, Any]:
    """A notebook with what its cells show when they are run in order, in this process.

    Args:
        notebook: As it is stored (nbformat 4.5).
        pictures: Draw figures, which needs a Chromium; else they are only described.
        checkpoint: A model to run it on, in place of the one that the notebook chooses.

    Raises:
        Exception: Whatever a cell raises.
    """
    from IPython.utils.capture import capture_output

    cells, number = [], 0
    with session() as shell:
        show_figures(shell, pictures)
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                cells.append(cell)
                continue
            number += 1
            code = source_of(cell)
            if checkpoint is not None:
                code = CHOICE.sub(lambda _: f"checkpoint = {checkpoint!r}", code)
            with capture_output() as captured:
                shell.display_trap.hook = sys.displayhook  # that of capture_output, not the session's own
                result = shell.run_cell(code, store_history=False)
            result.raise_error()
            outputs = shown(captured, number, result.result)
            cells.append({**cell, "execution_count": number, "outputs": outputs})
    return {**notebook, "cells": cells}


def markdown(notebook: dict[str, Any]) -> str:
    """A notebook as a page: its text, its code, and what the code shows."""
    parts = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(source_of(cell))
            continue
        parts.append(f"```python\n{source_of(cell)}\n```")
        for output in cell["outputs"]:
            data = {"text/plain": output["text"]} if output["output_type"] == "stream" else output["data"]
            text = "".join(data["text/plain"]).rstrip("\n")
            if "image/png" in data:
                parts.append(f"![{escape(text)}](data:image/png;base64,{data['image/png'].strip()})")
            elif "text/html" in data:
                parts.append("```{raw} html\n" + "".join(data["text/html"]) + "\n```")
            else:
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which notebooks; all if none is named")
    parser.add_argument("--model", help="print what they show on this model, and write nothing")
    arguments = parser.parse_args()
    for path in sorted(FOLDER.glob("*.ipynb")):
        if arguments.names and path.stem not in arguments.names:
            continue
        made = run(json.loads(path.read_text(encoding="utf-8")), arguments.model is None, arguments.model)
        if arguments.model is not None:
            print(markdown(made))
            continue
        path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
