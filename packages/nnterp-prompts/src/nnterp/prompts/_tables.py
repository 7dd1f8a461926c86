"""`read_table`: dicts, data frames and files as a list of rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Table = Iterable[Mapping[str, Any]] | str | Path | Any


def read_table(table: Table) -> list[dict[str, Any]]:
    """Read a table.

    Args:
        table: Dicts, a pandas DataFrame, or the path of a `.csv` file with a header, a `.jsonl` file, or a `.json` file
            that holds a list of objects. The values of a CSV file are texts.

    Returns:
        Its rows as dicts, column → value.

    Raises:
        ValueError: The table is empty, a row has more or fewer columns than the header, or the file is of another kind.
        TypeError: It is not a table, or a row is not a dict.

    Example:
        from pathlib import Path

        Path("capitals.csv").write_text("country,capital\\nFrance,Paris\\n", encoding="utf-8")
        print(read_table("capitals.csv"))  # → [{'country': 'France', 'capital': 'Paris'}]
    """
    if isinstance(table, (str, Path)):
        rows = _from_file(Path(table))
    elif hasattr(table, "to_dict") and hasattr(table, "columns"):
        rows = table.to_dict(orient="records")
    elif isinstance(table, Iterable) and not isinstance(table, Mapping):
        rows = list(table)
    else:
        raise TypeError(
            f"A table is a list of dicts, a DataFrame, or the path of a CSV or JSONL file, not {type(table).__name__}."
        )
    if not rows:
        raise ValueError(f"The table {'' if not isinstance(table, (str, Path)) else f'{table} '}has no rows.")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"Row {i} of the table is a {type(row).__name__}, not a dict: {row!r:.80}")
    return [dict(row) for row in rows]


def _from_file(path: Path) -> list[Any]:
    readers = {".csv": _from_csv, ".jsonl": _from_jsonl, ".json": _from_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: tables are read from .csv, .jsonl and .json files; pass rows as dicts or a DataFrame for others."
        )
    return reader(path)


def _from_csv(path: Path) -> list[Any]:
    try:
        rows: list[Any] = list(csv.DictReader(io.StringIO(_text(path), newline=""), restkey="", restval=None))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV: {error}") from error
    for i, row in enumerate(rows):
        if "" in row or None in row.values():
            raise ValueError(
                f"{path}: row {i} has {'more' if '' in row else 'fewer'} columns than the header: {row!r:.120}"
            )
    return rows


def _from_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):  # a JSON text may hold other separators of lines
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    return rows


def _from_json(path: Path) -> list[Any]:
    try:
        rows = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; a list of objects was expected.")
    return rows


def _text(path: Path) -> str:
    """Return the text of a file in UTF-8, line ends as they are.

    Raises:
        ValueError: It is not in UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
