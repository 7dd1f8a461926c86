"""The errors of nnterp: what was asked, what was there, and what to do next."""

from __future__ import annotations


class NnterpError(Exception):
    """Base of every error that nnterp raises by a name of its own; its note names the page about it."""

    def __init__(self, *args: object) -> None:
        super(NnterpError, self).__init__(*args)  # noqa: UP008 (a function that is sent as source has no bare `super()`)
        self.add_note(f"What to do: nnterp explain {type(self).__name__}")


class RenamingError(NnterpError):
    """Base of every error about finding, naming or proving a model's parts (the 1.x name)."""


class AnatomyError(RenamingError):
    """A part of the model could not be found, or a `RenameConfig` names something that is not there."""


class Unavailable(RenamingError):
    """The model, or this layer of it, does not have what was asked for; the message says why and where it exists.

    Attributes:
        reason: Why, without naming the layer; "" where the message alone says it.
    """

    reason = ""


class Unproven(Unavailable):
    """What was asked for may exist. Only a run of the model with its weights can find it, and none was made yet."""


class UnprovenWarning(UserWarning):
    """A number was made by names that nothing has proven, because the model was loaded with `check_renaming=False`."""


class CertificateError(RenamingError):
    """A line of the certificate failed: the names found for this model are not proven, so nothing is served.

    Attributes:
        certificate: The whole `Certificate`, failed lines included.
    """

    def __init__(self, message: str, certificate: object = None) -> None:
        super().__init__(message)
        self.certificate = certificate


class ChangedModelError(RenamingError):
    """The model was changed after it was proven, or before its weights were loaded; the message says what changed."""


class ChangedModelWarning(UserWarning):
    """The model was changed after it was proven, and was proven again as it is now."""


class AnotherThreadError(NnterpError, RuntimeError):
    """A model was to run in one thread while another thread runs it."""


class OutsideTraceError(NnterpError, ValueError):
    """A value of the forward pass was read or written while no forward pass was running."""


class InsideTraceError(NnterpError, RuntimeError):
    """A function that runs the model itself was called inside a trace of the same model."""


class RemoteModelError(NnterpError, RuntimeError):
    """Something was asked for that runs here, of a model whose weights are on a remote service."""


class TrainingModeError(NnterpError, RuntimeError):
    """A function was to run a model that is in training mode with dropout, whose numbers are random."""


class ShapeError(NnterpError, ValueError):
    """A tensor written into the model does not have the shape of what it replaces."""


class PaddingError(NnterpError, ValueError):
    """Inputs of different lengths were given to a model that is not exact under padding."""
