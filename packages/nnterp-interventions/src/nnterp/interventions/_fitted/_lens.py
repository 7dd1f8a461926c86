"""`Lens`: affine maps from the residual stream after each layer to the stream after a later one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnterp.defaults import plain_defaults
from nnterp.errors import ShapeError
from nnterp.files import read_tensors, write_tensors
from nnterp.indices import Indices, read_index, read_indices
from nnterp.interventions._fitted._belonging import Belonging, Origin
from nnterp.interventions._fitted._published import (
    read_jacobian_file,
    read_tuned_folder,
    write_jacobian_file,
    write_tuned_folder,
)
from nnterp.interventions._fitted._readout import readout_directions
from nnterp.interventions._fitted._sound import read_maps, require_details, require_sound
from nnterp.interventions._tokens import token_id
from nnterp.interventions._vectors import SteeringVector
from nnterp.interventions._vectors._belonging import identity_of

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_FILE = "lens"


class Lens:
    """Maps the stream after a layer to what it becomes by the end: `hidden @ weight.T + bias`, which the head reads.

    Made by `fit_tuned_lens`, `fit_jacobian_lens`, `Lens.load`, or from published files. `logit_lens(model, prompts,
    lens=lens)` reads with it. The last layer needs no map; it is read as it is.

    `fit_jacobian_lens(to_layer=...)` makes one that leads to the stream after an earlier layer, `maps_to`. The head
    does not read that; `patchscope_lens(lens=lens)` writes it into another prompt.

    Args:
        kind: "tuned" or "jacobian".
        weights: Layer → `[hidden, hidden]`.
        biases: Layer → `[hidden]`; layers without one have none.
        origin: The model it was fitted on.
        details: How it was fitted, as JSON can hold it.
        lenient: Whether `check` warns where it otherwise raises.

    Attributes:
        weights, biases: Float32 on the CPU, in the order of layers. Do not change the tensors.

    Raises:
        ValueError: Maps are missing, not finite, no dense floating point tensors, or of different widths; a layer is
            not before `maps_to`; or `kind` is another.
        TypeError: A layer is no integer.

    Example:
        lens = fit_tuned_lens(model, ["The capital of France is Paris.", "The capital of Japan is Tokyo."], epochs=1)
        lens.save("lens.safetensors")
        read = logit_lens(model, prompts, lens=Lens.load("lens.safetensors"))  # [prompts, layers, vocab]
    """

    def __init__(
        self,
        kind: str,
        weights: Mapping[int, torch.Tensor],
        biases: Mapping[int, torch.Tensor],
        origin: Origin,
        details: Mapping[str, Any] | None = None,
        lenient: bool = False,
    ) -> None:
        self.kind, self.origin, self.details = kind, origin, dict(details or {})
        self.weights, self.biases = read_maps(weights, "map"), read_maps(biases, "bias")
        self.lenient, self._fits = lenient, Belonging(origin)
        require_sound(kind, self.weights, self.biases, self.maps_to, origin.num_layers)

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a map."""
        return tuple(self.weights)

    @property
    def maps_to(self) -> int:
        """The layer to whose stream the maps lead: the last one, unless the fit was given another."""
        return int(self.details.get("maps_to", self.origin.num_layers - 1))

    def require_last(self, what: str) -> None:
        """Raise if the maps lead to a layer that the head does not read.

        Raises:
            ValueError: They do; says what can be done with this lens.
        """
        if self.maps_to != self.origin.num_layers - 1:
            raise ValueError(
                f"{what} needs a lens to the last layer ({self.origin.num_layers - 1}), and this one leads to the "
                f"stream after layer {self.maps_to}: write it into a prompt with patchscope_lens(lens=...), or fit one "
                "without to_layer."
            )

    @property
    def hidden_size(self) -> int:
        """Width of the stream."""
        return next(iter(self.weights.values())).shape[-1]

    @property
    def report(self) -> dict[str, Any]:
        """What the fit was worth on text that was held out of it: layer → KL in nats, as `evaluate_lens` measures it.

        A tuned lens chooses its maps on one half of that text, and is measured on the other (on the same, if one text
        was held out).

        `{"layers": {"3": {"lens": …, "lens_sd": …, "logit_lens": …, "logit_lens_sd": …}, …}, "texts": …}`; empty if
        no text was held out.
        """
        return self.details.get("report", {})

    @property
    def worse(self) -> tuple[int, ...]:
        """Layers at which the logit lens was better on the text that was held out."""
        each = self.report.get("layers", {})
        return tuple(int(layer) for layer, own in each.items() if not own["lens"] < own["logit_lens"])

    def __repr__(self) -> str:
        worse = f"; worse than the logit lens at layers {', '.join(map(str, self.worse))}" if self.worse else ""
        return (
            f"Lens({self.kind}; layers {self.layers[0]} to {self.layers[-1]}, mapped to layer {self.maps_to}; "
            f"hidden {self.hidden_size}; "
            f"{self.origin.model or 'model unknown'}{worse})"
        )

    def __reduce__(self) -> tuple:
        return Lens, (self.kind, self.weights, self.biases, self.origin, self.details, self.lenient)

    def select(self, layers: Indices) -> Lens:
        """The same lens with some of its layers only.

        Raises:
            KeyError: It has no map for one of them.
        """
        wanted = self._indices(layers)
        biases = {layer: self.biases[layer] for layer in wanted if layer in self.biases}
        maps = {layer: self.weights[layer] for layer in wanted}
        return Lens(self.kind, maps, biases, self.origin, self.details, self.lenient)

    def _indices(self, layers: Indices) -> list[int]:
        """The layers asked for, all of which have a map; negative ones count from the model's last."""
        chosen = read_indices(layers, self.origin.num_layers, "layers", "layers")
        for layer in chosen:
            self._require(layer)
        return chosen

    def _require(self, layer: int) -> None:
        if layer not in self.weights:
            raise KeyError(
                f"The lens has no map for layer {layer}; it has maps for {', '.join(map(str, self.layers))}."
            )

    # -- with a model ----------------------------------------------------------------------------------------------

    @plain_defaults()
    def check(self, model: StandardizedTransformer, strict: bool | None = None) -> None:
        """Raise if the lens was fitted on another model, other weights, or another forward pass.

        Compared are the width and the number of layers; the class; the logits after a fixed row of tokens, for which
        the model is run once; and, if the model has the dtype of the fit, a digest of all weights. Steerings that
        stand (`model.steering`) are left aside. Of a model whose weights are not loaded, and of a lens from a
        published file, only shapes and the config, or the name, can be compared.

        Args:
            model: The model.
            strict: With False, every difference but one of shape is a warning; None as the lens was loaded.

        Raises:
            ValueError: It does not fit; says what differs.
            Unavailable: The model has several streams side by side.

        Warns:
            UserWarning: It does not fit, and `strict` is False.
        """
        self._fits.check(model, self.hidden_size, not self.lenient if strict is None else strict)

    def maps_for(self, layers: Iterable[int]) -> list[tuple[torch.Tensor, torch.Tensor | None] | None]:
        """Look up the maps of layers; returns each one's weight and bias, float32, CPU, and None for `maps_to`, which
        has none.

        Raises:
            KeyError: There is no map for a layer.
        """
        found: list[tuple[torch.Tensor, torch.Tensor | None] | None] = []
        for layer in layers:
            if layer == self.maps_to:
                found.append(None)
                continue
            self._require(layer)
            found.append((self.weights[layer], self.biases.get(layer)))
        return found

    def to_last_layer(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """Map a stream after `layer` by a lens to the last layer; returns `[..., hidden]`, in the dtype and on the
        device of `hidden`.

        Raises:
            ValueError: The lens leads to an earlier layer.
        """
        self.require_last("Lens.to_last_layer()")
        return self.apply(hidden, layer)

    def apply(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """Map a stream after `layer`; returns `[..., hidden]`, in the dtype and on the device of `hidden`.

        Args:
            hidden: `[..., hidden]`.
            layer: An index from 0, or from −1 backwards. The stream of layer `maps_to` is returned as it is.

        Raises:
            KeyError: There is no map for this layer.
            IndexError: There is no such layer.
            TypeError, ShapeError: `hidden` is no tensor of floating point numbers, or of another width.
        """
        if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point():
            raise TypeError(
                f"hidden is a tensor of floating point numbers, [..., {self.hidden_size}], not {hidden!r:.80}."
            )
        if hidden.shape[-1:] != (self.hidden_size,):
            raise ShapeError(f"hidden has shape {list(hidden.shape)}; it must be [..., {self.hidden_size}].")
        index = read_index(layer, self.origin.num_layers, "layer", "layers")
        (own,) = self.maps_for([index])
        return hidden if own is None else mapped(hidden, *own)

    @torch.no_grad()
    @plain_defaults()
    def to_vocab(self, model: StandardizedTransformer, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """Logits of a stream `[..., hidden]` after `layer`, read through the lens.

        Returns:
            `[..., vocab]` in the model's dtype, on the head's device.

        Raises:
            KeyError: There is no map for this layer.
            ValueError: The lens is of another model, or leads to an earlier layer than the last.
            TypeError, ShapeError: `hidden` is no tensor of floating point numbers, or of another width.
        """
        self.require_last("Lens.to_vocab()")
        self.check(model)
        return model.project_on_vocab(self.to_last_layer(hidden, layer).to(model._module.dtype))

    @plain_defaults()
    def from_vocab(self, model: StandardizedTransformer, token: int | str, layers: Indices = None) -> SteeringVector:
        """At each layer, the direction of the stream along which the lens's logit of a token rises fastest.

        It is `weightᵀ g`, where `g` is the gradient of the token's logit by the stream after the last layer, the mean
        over 256 orthogonal states of unit root mean square (all, if the stream is narrower). Without a softcap this
        is the token's row of the head, times the final norm's weight. (Gurnee et al., 2026, call these the token's
        lens vectors.)

        Args:
            model: The model.
            token: A token id, or a text of one token.
            layers: For which layers; all of the lens if None.

        Returns:
            A `SteeringVector`, float32 on the CPU: for steering, for projecting out, and for swapping one token's
            direction for another's.

        Raises:
            ValueError: The text has several tokens, or the lens is of another model, or leads to an earlier layer.
            KeyError: There is no map for a layer.
        """
        self.require_last("Lens.from_vocab()")
        self.check(model)
        wanted = list(self.layers) if layers is None else self._indices(layers)
        index = token_id(model, token)
        gradient = readout_directions(model, [index])[0]
        directions = {layer: self.weights[layer].T @ gradient for layer in wanted}
        return SteeringVector(directions, **identity_of(model), method=f"{self.kind} lens", details={"token": index})

    # -- storage ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write `<path>.safetensors`: the maps and the record of the fit, in one file; folders are made.

        Raises:
            FileExistsError: The file exists and holds no lens; it is not overwritten.
            OSError: It cannot be written.
        """
        write_tensors(path, self._tensors(), self._record(), _FILE)

    def _tensors(self) -> dict[str, torch.Tensor]:
        maps = {f"weight.{layer}": weight for layer, weight in self.weights.items()}
        biases = {f"bias.{layer}": bias for layer, bias in self.biases.items()}
        probe = {} if self.origin.probe is None else {"probe": self.origin.probe}
        return {**maps, **biases, **probe}

    def _record(self) -> dict[str, Any]:
        return {"kind": self.kind, "origin": self.origin.record(), "details": self.details}

    @classmethod
    def load(cls, path: str | Path, model: StandardizedTransformer | None = None, strict: bool = True) -> Lens:
        """Read what `save` wrote.

        Args:
            path: The file.
            model: The model it is for: checked at once.
            strict: With False, a lens of another model is a warning, now and whenever it is used.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is truncated, damaged, no lens, or a lens of another model; names the file or the model.
        """
        tensors, record = read_tensors(path, _FILE)
        try:
            require_details(record["details"])
            parts: dict[str, dict[int, torch.Tensor]] = {"weight": {}, "bias": {}}
            for name, tensor in tensors.items():
                part, _, layer = name.partition(".")
                if part in parts:
                    parts[part][int(layer)] = tensor
            origin = Origin.read(record["origin"], tensors.get("probe"))
            lens = cls(record["kind"], parts["weight"], parts["bias"], origin, record["details"], not strict)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no sound lens ({type(error).__name__}: {error!s:.300}).") from error
        if model is not None:
            lens.check(model)
        return lens

    @classmethod
    def from_tuned_lens(cls, folder: str | Path, model: StandardizedTransformer, strict: bool = True) -> Lens:
        """Read a folder of the tuned-lens repository: `config.json` and `params.pt`.

        Its translator i reads the stream that enters layer i, so it becomes the map of layer i − 1; the first, which
        reads the embeddings, has no place here.

        Args:
            folder: The folder.
            model: The model it was fitted on.
            strict: With False, another model's name or revision in the config is a warning.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: The files are damaged, hold code, or are of a model of another name, revision or shape.
        """
        weights, biases, details = read_tuned_folder(folder, model, strict)
        config = details["config"]
        origin = Origin(config["base_model_name_or_path"], config.get("base_model_revision"), model.num_layers)
        return cls("tuned", weights, biases, origin, details, not strict)

    def to_tuned_lens(self, folder: str | Path) -> None:
        """Write `config.json` and `params.pt` as the tuned-lens package reads them.

        Its first translator, for the embeddings, is written as the identity.

        Raises:
            ValueError: A layer has no map, or the lens leads to an earlier layer than the last.
            OSError: The folder cannot be written.
        """
        self.require_last("The format of the tuned-lens package")
        write_tuned_folder(folder, self.weights, self.biases, self.origin)

    @classmethod
    def from_jacobian_lens(cls, path: str | Path, model: StandardizedTransformer) -> Lens:
        """Read a Jacobian lens as it is published for Neuronpedia: a `.pt` file with `J`, `n_prompts`, `d_model`.

        The file does not name its model, so only its shape is checked: `evaluate_lens` says whether it fits.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, holds code, or has another width or more layers than the model.
        """
        weights, details = read_jacobian_file(path, model)
        lens = cls("jacobian", weights, {}, Origin(None, None, model.num_layers), details)
        lens.check(model)
        return lens

    def to_jacobian_lens(self, path: str | Path) -> None:
        """Write a `.pt` file as it is published for Neuronpedia, in half precision, as is the custom there.

        Raises:
            ValueError: The lens has biases, which the format does not hold, or leads to an earlier layer than the last.
            OSError: It cannot be written.
        """
        self.require_last("The format of Jacobian lenses")
        if self.biases:
            raise ValueError(f"A {self.kind} lens has biases, which the format of Jacobian lenses does not hold.")
        write_jacobian_file(path, self.weights, int(self.details.get("prompts", 0)))


def mapped(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`hidden @ weight.T + bias`, computed in float32, in the dtype and on the device of `hidden`."""
    found = hidden.float() @ weight.to(hidden.device).T
    if bias is not None:
        found = found + bias.to(hidden.device)
    return found.to(hidden.dtype)
