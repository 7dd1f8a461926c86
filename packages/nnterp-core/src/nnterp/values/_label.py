"""What an accessor knows of a value: how it is called and what shape it has."""

from __future__ import annotations

from nnterp.record import Record


class Label(Record):
    """The part of a row of the table that goes wherever the model goes.

    Attributes:
        name: The accessor's name on the model.
        shape: Its axes.
        description: One sentence.
        per_layer: Whether it is indexed by layer.
    """

    def __init__(self, name: str, shape: str, description: str, per_layer: bool) -> None:
        self.name, self.shape, self.description, self.per_layer = name, shape, description, per_layer

    @property
    def axes(self) -> int:
        """How many axes it has."""
        return self.shape.count(",") + 1
