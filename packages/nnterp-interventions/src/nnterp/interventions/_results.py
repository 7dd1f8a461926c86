"""Results: named tensors with labelled axes, and a record of the call that made them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nnterp import plugins
from nnterp.files import read_tensors, write_tensors
from nnterp.interventions._columns import Entry, column
from nnterp.rendering import html_table
from nnterp.token_text import TokenNames, with_bytes_named
from nnterp.versions import version_of

if TYPE_CHECKING:
    import pandas

    from nnterp import StandardizedTransformer
    from nnterp.inputs import Row

_KINDS: dict[str, type[Result]] = {}
_FRAGMENT = re.compile("[\udc80-\udcff]+")  # bytes that are part of a character
SHOWN, LONGEST_LABEL = 8, 60  # rows and characters of a result's table in a notebook
_DISTRIBUTIONS = ("nnterp-core", "nnterp-interventions", "nnsight", "transformers", "torch")


@dataclass(frozen=True, eq=False)
class Result:
    """Named tensors on the CPU with labelled axes, and a record of the call that made them.

    Attributes:
        tensors: Tensors by name, the main one first. Entries that do not exist (a position past the end of a shorter
            prompt) are NaN, or -1 for integers.
        axes: The names of each tensor's axes.
        labels: The labels of each axis, in order.
        tokens: For each prompt, its token at each label of the "positions" axis, None past the prompt's end.
        vocabulary: Text of the token ids that occur in the tensors.
        about: Model, versions, function and arguments.
        token_bytes: The bytes, in hexadecimal, of each token id in `vocabulary` that is not exactly its text there:
            part of a character (decoded as `�`), or a word whose space decoding drops.
        token_pieces: As `tokens`, the bytes, in hexadecimal, of those that are part of a character (decoded as `�`),
            and None for the others; empty if there are none.

    Example:
        table = logit_lens_table(model, prompts)
        table.save("lens")  # lens.safetensors
        print(Result.load("lens").labels == table.labels)  # → True
    """

    figure: ClassVar[str] = ""

    tensors: dict[str, torch.Tensor]
    axes: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[Any, ...]]
    tokens: tuple[tuple[str | None, ...], ...] = ()
    vocabulary: dict[int, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    token_bytes: dict[int, str] = field(default_factory=dict)
    token_pieces: tuple[tuple[str | None, ...], ...] = ()

    def __init_subclass__(cls) -> None:
        _KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        if any(token is not None and _FRAGMENT.search(token) for row in self.tokens for token in row):
            pieces = tuple(tuple(_piece(token) for token in row) for row in self.tokens)
            tokens = tuple(tuple(_decoded(token) for token in row) for row in self.tokens)
            object.__setattr__(self, "token_pieces", pieces)
            object.__setattr__(self, "tokens", tokens)
        for name, tensor in self.tensors.items():
            expected = [len(self.labels[axis]) for axis in self.axes[name]]
            if list(tensor.shape) != expected:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}; its axes {self.axes[name]} have {expected} labels."
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor called `name`."""
        try:
            return self.tensors[name]
        except KeyError:
            raise KeyError(f"{type(self).__name__} has no {name!r}; it has {', '.join(self.tensors)}.") from None

    @property
    def exact_tokens(self) -> tuple[tuple[str | None, ...], ...]:
        """`tokens` with each byte that is part of a character as Python's "surrogateescape" keeps it: "\\udcf0"."""
        return tuple(
            tuple(
                token if piece is None else bytes.fromhex(piece).decode("utf-8", "surrogateescape")
                for token, piece in zip(row, pieces, strict=True)
            )
            for row, pieces in zip(
                self.tokens, self.token_pieces or [(None,) * len(r) for r in self.tokens], strict=True
            )
        )

    @property
    def main(self) -> str:
        """Name of the main tensor, the first."""
        return next(iter(self.tensors))

    @property
    def values(self) -> torch.Tensor:
        """The main tensor, on the CPU, in its own dtype, mostly float32."""
        return self.tensors[self.main]

    def __repr__(self) -> str:
        parts = [
            f"{name} [{', '.join(f'{axis} {len(self.labels[axis])}' for axis in self.axes[name])}]"
            for name in self.tensors
        ]
        return f"{type(self).__name__}({'; '.join(parts)}; {self.about.get('model', '')})"

    def _repr_html_(self) -> str:
        """Tables for a notebook: the tensors with their axes, and where the first one of numbers is largest."""
        made = (
            f"{type(self).__name__} of {self.about.get('function', 'a call')} on {self.about.get('model', 'a model')}"
        )
        sizes = [
            (name, " × ".join(f"{axis} {len(self.labels[axis])}" for axis in self.axes[name]), str(tensor.dtype)[6:])
            for name, tensor in self.tensors.items()
        ]
        tables = [html_table(made, ("tensor", "axes", "dtype"), sizes)]
        numbers = next((name for name, tensor in self.tensors.items() if tensor.is_floating_point()), None)
        cells = [] if numbers is None else [self._cell(numbers, i) for i in self._strongest(numbers, SHOWN)]
        if cells:
            rows = [[_short(value) for value in cell.values()] for cell in cells]
            tables.append(html_table(f"{numbers}: the {len(cells)} of largest magnitude", tuple(cells[0]), rows))
        return "".join(tables)

    def top(self, k: int = 10, tensor: str | None = None) -> list[dict[str, Any]]:
        """Find the cells of largest magnitude.

        Returns:
            The `k` strongest cells, largest first, each a dict: "layer", "head", "position" and the like to the label
            (a cell stands at one layer, so the axis "layers" is "layer" here), the tensor's name to its value (a Python
            number).
        """
        name = tensor or self.main
        return [self._cell(name, i) for i in self._strongest(name, k)]

    def _strongest(self, name: str, k: int) -> list[int]:
        flat = self[name].double().flatten()
        strength = torch.where(flat.isnan(), -1.0, flat.abs())
        return strength.argsort(descending=True, stable=True)[: min(k, int((strength >= 0).sum()))].tolist()

    def to_dataframe(self, tensor: str | None = None) -> pandas.DataFrame:
        """Make a table of a tensor (the main one if None).

        Returns:
            A row for each entry of the tensor. Columns are its axes, in the singular ("layer" for "layers"), the token
            where there are positions, and every tensor over the same axes.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas

        name = tensor or self.main
        beside = [other for other in self.tensors if set(self.axes[other]) <= set(self.axes[name])]
        return pandas.DataFrame(list(self._rows(name, beside)))

    def _rows(self, name: str, beside: list[str]) -> Iterator[dict[str, Any]]:
        axes = self.axes[name]
        for flat in range(self[name].numel()):
            where = dict(zip(axes, _unravel(flat, self[name].shape), strict=True))
            row = self._labels_at(where)
            if "positions" in where and row.get("token") is None and self.tokens:
                continue  # past the end of a shorter prompt
            for other in beside:
                row[other] = self.tensors[other][tuple(where[axis] for axis in self.axes[other])].item()
                if other.endswith("_ids") and row[other] in self.vocabulary:
                    row[other.removesuffix("_ids") + "_token"] = self.vocabulary[row[other]]
            yield row

    def _cell(self, name: str, flat: int) -> dict[str, Any]:
        where = dict(zip(self.axes[name], _unravel(flat, self[name].shape), strict=True))
        cell = self._labels_at(where)
        cell[name] = self[name].flatten()[flat].item()
        return cell

    def _labels_at(self, where: Mapping[str, int]) -> Entry:
        row = Entry((column(axis), self.labels[axis][i]) for axis, i in where.items())
        if "positions" in where and self.tokens:
            prompt = where.get("prompts", 0)
            row["token"] = self.tokens[prompt][where["positions"]]
        return row

    def save(self, path: str | Path) -> None:
        """Write `<path>.safetensors`: tensors, labels and the record of the call in one file; folders are made.

        A save that fails or is killed leaves an earlier result as it was.

        Raises:
            TypeError: Something in `about` or among the labels cannot be written as JSON; nothing is written.
            FileExistsError: The file exists and holds no result; it is not overwritten.
            OSError: It cannot be written.
        """
        record = {
            "kind": type(self).__name__,
            "axes": {name: list(self.axes[name]) for name in self.tensors},
            "labels": {axis: list(labels) for axis, labels in self.labels.items()},
            "tokens": [list(tokens) for tokens in self.tokens],
            "vocabulary": self.vocabulary,
            "about": self.about,
            "token_bytes": self.token_bytes,
            "token_pieces": [list(pieces) for pieces in self.token_pieces],
        }
        write_tensors(path, self.tensors, record, "result")

    @staticmethod
    def load(path: str | Path) -> Result:
        """Read a result written by `save`, as the class that wrote it.

        Returns:
            The result, with its tensors on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is truncated, damaged, or no result; names the file.
        """
        stored, content = read_tensors(path, "result")
        cls = _KINDS.get(content["kind"], Result)
        return cls(
            tensors={name: stored[name] for name in content["axes"]},
            axes={name: tuple(axes) for name, axes in content["axes"].items()},
            labels={axis: tuple(labels) for axis, labels in content["labels"].items()},
            tokens=tuple(tuple(tokens) for tokens in content["tokens"]),
            vocabulary={int(i): text for i, text in content["vocabulary"].items()},
            about=content["about"],
            token_bytes={int(i): piece for i, piece in content.get("token_bytes", {}).items()},
            token_pieces=tuple(tuple(pieces) for pieces in content.get("token_pieces", ())),
        )

    def plot(self, **kwargs: Any) -> Any:
        """Draw the result with nnterp-display.

        Returns:
            A `plotly.graph_objects.Figure`.

        Raises:
            ModuleNotFoundError: nnterp-display is not installed.
            NotImplementedError: It has no figure for this class of result.
        """
        return drawn(self, self.figure, **kwargs)


def _short(value: Any) -> str:
    """A label or a number of a table: numbers with four digits, long texts cut."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"


def drawn(result: Any, figure: str, **kwargs: Any) -> Any:
    """What the figure of that name makes of a result; see `Result.plot`."""
    draw = plugins.load(plugins.FIGURES, figure)
    if draw is None:
        there = plugins.names(plugins.FIGURES)
        if there:
            raise NotImplementedError(
                f"There is no figure of a {type(result).__name__} (there are: {', '.join(there)}); draw its "
                "to_dataframe()."
            )
        raise ModuleNotFoundError("Figures are drawn by another package: pip install nnterp-display")
    return draw(result, **kwargs)


def versions() -> dict[str, str]:
    """The versions of the packages that numbers depend on."""
    return {name: version_of(name) for name in _DISTRIBUTIONS}


def describe_run(model: StandardizedTransformer, function: str, **arguments: Any) -> dict[str, Any]:
    """The record of a call for `Result.about`, of values that JSON can hold."""
    return {
        "model": model.repo_id or model.anatomy.model_class,
        "revision": model.revision,
        "versions": versions(),
        "function": function,
        "arguments": {name: _plain(value) for name, value in arguments.items()},
    }


def prompt_labels(prompts: list[Row], model: StandardizedTransformer) -> tuple[str, ...]:
    """The labels of prompts: their texts, or their decoded ids."""
    return tuple(prompt.words(model.tokenizer) for prompt in prompts)


def token_texts(model: StandardizedTransformer, ids: Any) -> list[str]:
    """The text of each token id, decoded on its own."""
    return [model.tokenizer.decode([int(i)]) for i in ids]


def exact_texts(model: StandardizedTransformer, ids: Any) -> list[str]:
    """As `token_texts`; a byte that is part of a character is a lone surrogate, "\\udcf0". For `Result(tokens=)`."""
    names = TokenNames(model.tokenizer)
    made = []
    for token, text in zip(ids, token_texts(model, ids), strict=True):
        raw = names.raw(token) if "�" in text else None
        made.append(raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else text)
    return made


def named_texts(model: StandardizedTransformer, ids: Any) -> list[str]:
    """As `token_texts`; a byte that is part of a character is written out, "⟨F0⟩"."""
    return [with_bytes_named(text) for text in exact_texts(model, ids)]


def joined(texts: list[str]) -> str:
    """Texts of neighbouring tokens as one: bytes that are a character together are that character."""
    return "".join(texts).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _piece(token: str | None) -> str | None:
    return None if token is None or not _FRAGMENT.search(token) else token.encode("utf-8", "surrogateescape").hex()


def _decoded(token: str | None) -> str | None:
    return None if token is None else token.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def vocabulary_of(model: StandardizedTransformer, ids: torch.Tensor) -> dict[int, str]:
    """The text of every token id in a tensor, except -1."""
    unique = [i for i in ids.unique().tolist() if i >= 0]
    return dict(zip(unique, token_texts(model, unique), strict=True))


def token_bytes_of(model: StandardizedTransformer, vocabulary: Mapping[int, str]) -> dict[int, str]:
    """The bytes, in hexadecimal, of the ids whose text in `vocabulary` is not exact; see `Result.token_bytes`."""
    names = TokenNames(model.tokenizer)
    found = {}
    for token, text in vocabulary.items():
        raw = names.raw(token)
        piece = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
        if piece is not None and piece != text.encode("utf-8", "surrogatepass"):
            found[token] = piece.hex()
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return value.tolist() if value.numel() <= 64 else f"tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range, set)):
        return [_plain(item) for item in value]
    return getattr(value, "__name__", None) or repr(value)


def _unravel(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        index.append(i)
    return tuple(reversed(index))
