"""`SteeringVector`: a direction for each of some layers, and what it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from nnterp.files import read_tensors, write_tensors
from nnterp.interventions._results import Result
from nnterp.interventions._vectors._belonging import identity_of, model_of, require_fit, require_same
from nnterp.interventions._vectors._directions import number, read_directions
from nnterp.interventions._vectors._gguf import read_gguf, write_gguf
from nnterp.interventions._vectors._promoted import promoted
from nnterp.interventions._vectors._travelling import restored
from nnterp.warn import warn

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_KIND = "steering vector"
_FIELDS = ("model", "revision", "num_layers", "model_type", "method", "prompts", "details")


class SteeringVector:
    """A direction of the residual stream for each of some layers, and a record of how it was made.

    `model.steer(None, vector)` inside a trace and `with model.steering(vector):` add it to the stream leaving each of
    its layers. Vectors of one model can be added, subtracted and scaled; a layer that only one of them has keeps that
    one's direction. They cannot be changed. In a block that runs remotely a vector has only its `directions`.

    Args:
        directions: Layer → `[hidden]`, tensors, arrays or lists; copied.
        model: Name of the model it belongs to; None if unknown.
        revision: The model's revision.
        num_layers: Number of the model's layers.
        model_type: The config's `model_type`.
        method: How it was made.
        prompts: SHA-256 of the token ids of the prompts it was made from.
        details: Anything else that JSON can hold, such as losses.

    Attributes:
        directions: Layer → `[hidden]`, float32 on the CPU, in the order of layers. Do not change the tensors.

    Raises:
        TypeError, ValueError, IndexError: Directions are missing, not finite, or not `[hidden]` of one width.

    Example:
        vector = steering_vectors(model, ["I am happy. I feel"], ["I am sad. I feel"])
        vector.save("tone")
        assert SteeringVector.load("tone") == vector
    """

    directions: Mapping[int, torch.Tensor]
    model: str | None
    revision: str | None
    num_layers: int | None
    model_type: str | None
    method: str
    prompts: str | None
    details: Mapping[str, Any]

    def __init__(
        self,
        directions: Mapping[int, Any],
        model: str | None = None,
        revision: str | None = None,
        num_layers: int | None = None,
        model_type: str | None = None,
        method: str = "given",
        prompts: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.__dict__.update(
            directions=MappingProxyType(read_directions(directions, num_layers)),
            model=model,
            revision=revision,
            num_layers=num_layers,
            model_type=model_type,
            method=method,
            prompts=prompts,
            details=MappingProxyType(dict(details or {})),
        )

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a direction."""
        return tuple(self.directions)

    @property
    def hidden_size(self) -> int:
        """Width of the directions."""
        return len(next(iter(self.directions.values())))

    @property
    def norms(self) -> dict[int, float]:
        """Layer → length of its direction."""
        return {layer: direction.norm().item() for layer, direction in self.directions.items()}

    def __getitem__(self, layer: int) -> torch.Tensor:
        """The direction of one layer, `[hidden]`; a negative layer counts from the model's last.

        Raises:
            KeyError: There is none for this layer.
        """
        index = layer + self.num_layers if layer < 0 and self.num_layers is not None else layer
        if index not in self.directions:
            raise KeyError(f"There is no direction for layer {layer}; there are: {', '.join(map(str, self.layers))}.")
        return self.directions[index]

    def select(self, layers: int | Iterable[int]) -> SteeringVector:
        """The same vector with some of its layers only.

        Raises:
            KeyError: It has no direction for one of them.
        """
        wanted = list(layers) if isinstance(layers, Iterable) else [layers]
        return self._with({self._index(layer): self[layer] for layer in wanted})

    def to_norm(self, norm: float) -> SteeringVector:
        """The same directions, each scaled to the length `norm`.

        Raises:
            ValueError: A direction is zero, or `norm` is not positive.
        """
        length = number(norm, "norm")
        if length <= 0:
            raise ValueError(f"norm must be positive, not {length}.")
        return self._with({layer: self._unit(layer) * length for layer in self.layers})

    def random(self, seed: int = 0) -> SteeringVector:
        """A random vector with the same layers and the same length in each: the null control of a steering."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {layer: torch.randn(self.hidden_size, generator=generator) for layer in self.layers}
        scaled = {layer: noise / noise.norm() * self.norms[layer] for layer, noise in drawn.items()}
        return self._with(scaled, method=f"random({seed})", prompts=None, details={})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        same = all(getattr(self, name) == getattr(other, name) for name in _FIELDS)
        return (
            same and self.layers == other.layers and all(torch.equal(d, other[i]) for i, d in self.directions.items())
        )

    def __hash__(self) -> int:
        return hash((self.model, self.revision, self.method, self.prompts, self.layers, self.hidden_size))

    def __repr__(self) -> str:
        lengths = self.norms.values()
        return (
            f"SteeringVector({self.method}; layers {', '.join(map(str, self.layers))}; hidden {self.hidden_size}; "
            f"norms {min(lengths):.3g} to {max(lengths):.3g}; {self.model or self.model_type or 'model unknown'})"
        )

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"A SteeringVector cannot be changed, so {name} cannot be set; make a new one.")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def __copy__(self) -> SteeringVector:
        return self

    def __deepcopy__(self, memo: Any) -> SteeringVector:
        return self

    def __reduce__(self) -> tuple:
        return restored, (dict(self.directions), self._record())

    # -- arithmetic ------------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> SteeringVector:
        return self._sum(other, 1.0) if isinstance(other, SteeringVector) else NotImplemented

    def __radd__(self, other: Any) -> SteeringVector:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum([a, b]) begins with 0

    def __sub__(self, other: Any) -> SteeringVector:
        return self._sum(other, -1.0) if isinstance(other, SteeringVector) else NotImplemented

    def __neg__(self) -> SteeringVector:
        return self * -1

    def __mul__(self, factor: Any) -> SteeringVector:
        if isinstance(factor, (SteeringVector, str, Mapping)):
            return NotImplemented
        scale = number(factor, "What a SteeringVector is multiplied by")
        return self._with({layer: direction * scale for layer, direction in self.directions.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> SteeringVector:
        if isinstance(divisor, (SteeringVector, str, Mapping)):
            return NotImplemented
        return self * (1 / number(divisor, "What a SteeringVector is divided by"))

    def _sum(self, other: SteeringVector, sign: float) -> SteeringVector:
        self._require_same_model(other)
        zero = torch.zeros(self.hidden_size)
        layers = sorted({*self.layers, *other.layers})
        summed = {i: self.directions.get(i, zero) + sign * other.directions.get(i, zero) for i in layers}
        hashes = [str(vector.prompts) for vector in (self, other) if vector.prompts is not None]
        prompts = hashes[0] if len(set(hashes)) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
        mine, others = model_of(self), model_of(other)
        known = {name: others[name] if value is None else value for name, value in mine.items()}
        method = (
            self.method if self.method == other.method else f"{self.method} {'+' if sign > 0 else '-'} {other.method}"
        )
        return SteeringVector(summed, **known, method=method, prompts=prompts if hashes else None)

    def _require_same_model(self, other: SteeringVector) -> None:
        if self.hidden_size != other.hidden_size:
            raise ValueError(
                f"A vector of {self.model or 'an unknown model'} has width {self.hidden_size}, and one of "
                f"{other.model or 'an unknown model'} has width {other.hidden_size}; they cannot be added or compared."
            )
        require_same(model_of(self), model_of(other))

    def similarity(self, other: SteeringVector) -> dict[int, float]:
        """Compare the directions with those of another vector.

        Returns:
            Layer → cosine of the two directions, from −1 to 1, for the layers that both have.

        Raises:
            ValueError: They are of different models, share no layer, or a direction is zero.
        """
        self._require_same_model(other)
        shared = [layer for layer in self.layers if layer in other.directions]
        if not shared:
            raise ValueError(f"One vector has the layers {self.layers}, the other {other.layers}; they share none.")
        return {i: (self._unit(i).double() @ other._unit(i).double()).clamp(-1, 1).item() for i in shared}

    # -- with a model ----------------------------------------------------------------------------------------------

    def check(self, model: StandardizedTransformer) -> None:
        """Raise if the vector is of another model.

        Models are the same if the last parts of their names are: a hub id, and a folder of that name. A vector whose
        model is unknown is only checked for its width, its layers and, from a GGUF file, the model type.

        Raises:
            ValueError: It has another width, a layer that the model does not have, or belongs to another model.

        Warns:
            UserWarning: It was made with another revision of the model.
        """
        require_fit(self, model)
        require_same(model_of(self), identity_of(model))

    def for_model(self, model: StandardizedTransformer) -> SteeringVector:
        """The same directions, said to belong to this model.

        Raises:
            ValueError: It has another width, or a layer that the model does not have.
        """
        require_fit(self, model)
        return self._with(self.directions, **identity_of(model))

    def logits(self, model: StandardizedTransformer, k: int = 10) -> Result:
        """The tokens that each layer's direction promotes and demotes when it is read out directly.

        The direction v is read out as the model reads the stream after its last layer: the logits are half the
        difference of `model.project_on_vocab(v)` and `model.project_on_vocab(-v)`. Without biases in the final norm and
        the head this is `model.project_on_vocab(v)`; with biases, what these add to every readout drops out. What later
        layers make of the direction is not in it.

        Args:
            model: The model it belongs to.
            k: How many tokens.

        Returns:
            A `Result` with `promoted` and `demoted`, logits `[layers, k]`, float32, strongest first, and
            `promoted_ids` and `demoted_ids`. `to_dataframe()` names the tokens.

        Raises:
            ValueError: The vector is of another model, or `k` is not between 1 and the vocabulary's size.
            Unavailable: It is not proven what this model does after its last layer.
            InsideTraceError: Called inside a trace of this model.
        """
        return promoted(model, self, k)

    # -- storage ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write `<path>.safetensors`: directions and the record, in one file; folders are made.

        A save that fails or is killed leaves an earlier vector as it was.

        Raises:
            FileExistsError: The file exists and holds no steering vector; it is not overwritten.
            OSError: It cannot be written.
        """
        write_tensors(path, {str(layer): d for layer, d in self.directions.items()}, self._record(), _KIND)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is truncated, damaged, or no steering vector; names the file.
        """
        stored, record = read_tensors(path, _KIND)
        return cls({int(layer): direction for layer, direction in stored.items()}, **{n: record[n] for n in _FIELDS})

    @classmethod
    def from_dict(
        cls, directions: Mapping[int, Any], model: StandardizedTransformer | None = None, method: str = "given"
    ) -> SteeringVector:
        """A vector from layer → `[hidden]`: tensors, arrays or lists.

        Args:
            directions: The directions; a negative layer counts from the last, if `model` is given.
            model: The model they belong to.
            method: How they were made.

        Raises:
            TypeError, ValueError, IndexError: They are not directions, or do not fit the model.
        """
        known = {} if model is None else identity_of(model)
        vector = cls(directions, **known, method=method)
        return vector if model is None else vector.for_model(model)

    def to_dict(self) -> dict[int, torch.Tensor]:
        """Copy the directions.

        Returns:
            Layer → `[hidden]`, float32 copies on the CPU.
        """
        return {layer: direction.clone() for layer, direction in self.directions.items()}

    def to_gguf(self, path: str | Path) -> None:
        """Write a control vector for repeng and llama.cpp: `direction.N` is that of layer N; needs the package gguf.

        Raises:
            ModuleNotFoundError: gguf is not installed: `pip install 'nnterp-interventions[gguf]'`.
            ValueError: The model type is unknown: say it with `for_model`.
            FileExistsError: The file exists and holds no control vector.
            OSError: It cannot be written.

        Warns:
            UserWarning: There is a direction for layer 0, with which llama.cpp refuses the file.
        """
        if self.model_type is None:
            raise ValueError(
                "The file names the model's type, which this vector does not know: vector.for_model(model)."
            )
        if 0 in self.directions:
            warn(
                "llama.cpp refuses control vectors with a direction for layer 0; repeng reads them. Leave it out for "
                "llama.cpp: vector.select([...])."
            )
        write_gguf(path, dict(self.directions), self.model_type)

    @classmethod
    def from_gguf(cls, path: str | Path) -> SteeringVector:
        """Read a control vector of repeng or llama.cpp; needs the package gguf.

        Of its model the file names only the type, so `check` cannot tell models of one type and width apart.

        Raises:
            ModuleNotFoundError: gguf is not installed: `pip install 'nnterp-interventions[gguf]'`.
            FileNotFoundError: There is no such file.
            ValueError: It is no control vector, or is damaged.
        """
        directions, model_type = read_gguf(path)
        return cls(directions, model_type=model_type, method="gguf")

    def _record(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in _FIELDS}, "details": dict(self.details)}

    def _with(self, directions: Mapping[int, torch.Tensor], **changes: Any) -> SteeringVector:
        return SteeringVector(directions, **{**self._record(), **changes})

    def _unit(self, layer: int) -> torch.Tensor:
        direction = self.directions[layer]
        if not direction.any():
            raise ValueError(f"The vector is zero at layer {layer}, so it has no direction there.")
        return (direction.double() / direction.double().norm()).float()

    def _index(self, layer: int) -> int:
        return layer + self.num_layers if layer < 0 and self.num_layers is not None else layer
