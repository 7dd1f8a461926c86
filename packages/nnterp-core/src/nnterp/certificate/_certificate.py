"""What a certificate is: lines with a measured error and a tolerance, printable and storable."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nnterp.arguments import path_of
from nnterp.certificate._drift import Drift, DriftLine
from nnterp.errors import CertificateError
from nnterp.files import write_whole
from nnterp.rendering import BAD, GOOD, SOFT, FittedTable, html_table

if TYPE_CHECKING:
    from rich.console import RenderableType

Status = Literal["passed", "failed", "skipped"]
_MARK = {"passed": "✓", "failed": "✗", "skipped": "–"}
_COLOUR = {"passed": GOOD, "failed": BAD, "skipped": SOFT}
_HEADER = ("", "claim", "error", "allowed", "")


@dataclass(frozen=True)
class Line:
    """One thing that was checked.

    Attributes:
        name: What is claimed, in a sentence.
        status: "passed", "failed", or "skipped" where the claim does not apply or could not be tried.
        error: The measured error, where the check is a comparison. Relative to the norm of what it should be, the worst
            over positions.
        tolerance: The largest error that passes, for the dtype the model computes in.
        detail: What was found; for a failure also the remedy, for a skipped line the reason.
    """

    name: str
    status: Status
    error: float | None = None
    tolerance: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Certificate:
    """All lines for one model, with what is needed to repeat them.

    Attributes:
        model: Hub id or folder, "" for a module that does not say where it came from.
        revision: The revision that was asked for, if any.
        model_class: Name of the HuggingFace class.
        dtype, device: What the model computes in and on; device "meta" means that no weights were loaded.
        versions: Versions of nnterp, nnsight, transformers and torch.
        lines: The checks, in the order they were made.
        seconds: How long they took.
        drift: How far its values are from a more precise model's, if that was asked for (`validate(against=...)`).

    Example:
        certificate = model.validate()
        print(certificate.ok, certificate.lines[0].name)
    """

    model: str
    revision: str | None
    model_class: str
    dtype: str
    device: str
    versions: dict[str, str]
    lines: tuple[Line, ...] = field(default=())
    seconds: float = 0.0
    drift: Drift | None = None

    @property
    def ok(self) -> bool:
        """Whether no line failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Line, ...]:
        """The lines that failed."""
        return tuple(line for line in self.lines if line.status == "failed")

    @property
    def complete(self) -> bool:
        """Whether the checks that need weights were made."""
        return self.device != "meta"

    def raise_if_failed(self) -> None:
        """Raise the failed lines, if there are any.

        Raises:
            CertificateError: A line fails; it names each, and holds the certificate.
        """
        if self.failures:
            lines = "\n".join(f"  {line.name}: {line.detail or f'off by {line.error:.1e}'}" for line in self.failures)
            raise CertificateError(
                f"{self.model_class} does not behave as the names found for it say:\n{lines}\n"
                f"check_renaming=False loads it all the same; then nothing about its names is proven.",
                self,
            )

    def __getitem__(self, name: str) -> Line:
        """The first line whose name begins with `name`."""
        for line in self.lines:
            if line.name.startswith(name):
                return line
        raise KeyError(f"No line begins with {name!r}; lines: {', '.join(line.name for line in self.lines)}")

    def save(self, path: str | Path) -> None:
        """Write the certificate as JSON, at once: a write that fails or is killed leaves what was there before.

        Folders are made.

        Raises:
            OSError: The folder cannot be made, or the file not be written.
        """
        path = path_of(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate written by `save`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is truncated, damaged, or no certificate; names the file.
        """
        path = path_of(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            lines = tuple(Line(**line) for line in data["lines"])
            if any(line.status not in _MARK for line in lines):
                raise ValueError("a line has a status that there is not")
            return cls(**{**data, "lines": lines, "drift": _drift_of(data.get("drift"))})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no certificate, or a damaged one ({error}).") from error

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Make the table that is printed.

        Returns:
            (mark, claim, error, tolerance, detail) of each line, as texts.
        """
        return [
            (
                _MARK[line.status],
                line.name,
                "" if line.error is None else f"{line.error:.1e}",
                "" if line.tolerance is None else f"{line.tolerance:.0e}",
                line.detail,
            )
            for line in self.lines
        ]

    @property
    def verdict(self) -> str:
        """What was certified, and whether it holds, in one line."""
        verdict = "all lines hold" if self.ok else f"{len(self.failures)} lines FAIL"
        if self.ok and not self.complete:
            verdict = "holds as far as it can be checked without weights"
        name = self.model or self.model_class
        return f"Certificate of {name} ({self.model_class}, {self.dtype} on {self.device}): {verdict}"

    def __str__(self) -> str:
        rows = [_HEADER, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        body = (
            f"  {r[0]:<{widths[0]}} {r[1]:<{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]:>{widths[3]}}  {r[4]}".rstrip()
            for r in rows
        )
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        drift = () if self.drift is None else (str(self.drift),)
        return "\n".join([self.verdict, *body, f"  {versions}; {self.seconds:.2f} s", *drift])

    def _repr_html_(self) -> str:
        colours = [_COLOUR[line.status] for line in self.lines]
        drift = "" if self.drift is None else self.drift._repr_html_()
        return html_table(self.verdict, _HEADER, self.rows(), colours=colours) + drift

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        table = FittedTable(self.verdict, _HEADER, self.rows(), colours=[_COLOUR[line.status] for line in self.lines])
        return table if self.drift is None else Group(table, self.drift)


def _drift_of(stored: dict[str, Any] | None) -> Drift | None:
    """A drift as JSON holds it."""
    if stored is None:
        return None
    return Drift(**{**stored, "lines": tuple(DriftLine(**line) for line in stored["lines"])})
