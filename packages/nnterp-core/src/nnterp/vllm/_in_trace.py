"""What works inside a trace of a model in vLLM, here and in the engine's worker: values and interventions."""

from __future__ import annotations

from typing import Any

import torch
from nnsight.modeling.vllm import VLLM

from nnterp.errors import ShapeError, Unavailable
from nnterp.table import LABELS, Label
from nnterp.traced import (
    Apart,
    LayerAccessor,
    Place,
    envoy_at,
    layer_index,
    read_value,
    require_running,
    steering_of,
    write_value,
)
from nnterp.vllm._steering import require_plain, steer_prompt
from nnterp.vllm._values import Served


class InTrace(VLLM):
    """The standard names of a model in vLLM."""

    served: Served
    layer_paths: tuple[str, ...]
    model_class: str
    hidden_size: int
    final_norm: str | None
    stepping: bool

    # -- what the accessors need ------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Number of layers of the residual stream."""
        return len(self.layer_paths)

    def place(self, name: str, layer: Any = None) -> Place:
        """Look up where a value is read and written in vLLM's modules.

        Args:
            name: A value of the table, such as `"layers_output"`.
            layer: The layer; None for a value that is not per layer.

        Returns:
            The place.

        Raises:
            Unavailable: The model, or this layer, does not have it; says why, and which layers do.

        Example:
            >>> print(model.place("mlps_output", 3))
            model.layers.3.mlp.output
        """
        return self.served.place(name, layer, self.model_class)

    def envoy(self, path: str) -> Any:
        """Look up the module at a native path of vLLM's model, such as `model.layers.3.mlp`; returns nnsight's envoy of
        it.
        """
        return envoy_at(self, path)

    # -- values of the model ----------------------------------------------------------------------------------------

    @property
    def input_ids(self) -> torch.Tensor:
        """Token ids of this forward pass, int32 or int64 `[1, seq]`, a copy on the engine's device, before any layer.

        Raises:
            OutsideTraceError: No forward pass is running.
            Unavailable: vLLM was given embeddings in place of token ids.
        """
        require_running(self, "input_ids")
        args, kwargs = self.inputs
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise Unavailable("input_ids: vLLM gave the model embeddings, and no token ids.")
        return ids.clone()[None]

    @property
    def logits(self) -> torch.Tensor:
        """Logits at all positions of this forward pass, `[1, seq, vocab]`, computed here from the final norm's output.

        They have the dtype in which vLLM computes logits, and stay on the engine's device.

        vLLM itself computes logits at the last position only and samples from them: `next_token_logits`. Assigning to
        `logits` sets those, from the last position of `[1, seq, vocab]` or from `[1, vocab]`.
        """
        hidden = read_value(self, LABELS["ln_final_output"])
        with Apart(self.interleaver):
            return self._head(hidden)

    @logits.setter
    def logits(self, tensor: torch.Tensor) -> None:
        self.next_token_logits = tensor[:, -1] if tensor.dim() == 3 else tensor

    @property
    def next_token_logits(self) -> torch.Tensor:
        """The logits that vLLM samples from, `[1, vocab]`, a copy. Assign to change what is sampled.

        In the dtype in which vLLM computes logits, on the engine's device.

        Raises:
            OutsideTraceError: No forward pass is running.
            ShapeError: What is assigned has another shape.
        """
        require_running(self, "next_token_logits")
        return VLLM.logits.__get__(self, type(self)).clone()

    @next_token_logits.setter
    def next_token_logits(self, tensor: torch.Tensor) -> None:
        current = VLLM.logits.__get__(self, type(self))
        if tensor.shape != current.shape:
            raise ShapeError(f"logits of the last position have shape {list(current.shape)}, not {list(tensor.shape)}.")
        VLLM.logits.__set__(self, tensor.to(current))

    @property
    def next_token_probs(self) -> torch.Tensor:
        """The next token's probabilities, `[1, vocab]`: softmax of `next_token_logits`, no temperature.

        They have their dtype and device.
        """
        return self.next_token_logits.softmax(-1)

    # -- interventions on the running forward pass ------------------------------------------------------------------

    def project_on_vocab(self, hidden_state: torch.Tensor) -> torch.Tensor:
        """Compute the logits of hidden states `[..., hidden]`: final norm, head, softcap, scales. Only in a trace.

        Returns:
            `[..., vocab]`, as vLLM's head and logits processor give them, in their dtype, on the engine's device.

        Raises:
            OutsideTraceError: No forward pass is running: the weights are in the engine.
            ShapeError: The last axis is not the model's hidden size.
            Unavailable: The structure of the model does not tell which module is its final norm.
        """
        require_running(self, "project_on_vocab()")
        if hidden_state.shape[-1] != self.hidden_size:
            raise ShapeError(f"hidden_state has shape {list(hidden_state.shape)}; its last axis is {self.hidden_size}.")
        if self.final_norm is None:
            raise Unavailable(f"project_on_vocab: the structure of {self.model_class} does not tell its final norm.")
        with Apart(self.interleaver):
            flat = hidden_state.reshape(-1, self.hidden_size).clone()
            return self._head(self._module.get_submodule(self.final_norm)(flat)).reshape(*hidden_state.shape[:-1], -1)

    def _head(self, normed: torch.Tensor) -> torch.Tensor:
        flat = normed.reshape(-1, normed.shape[-1])
        return self._module.compute_logits(flat).reshape(*normed.shape[:-1], -1)  # type: ignore[operator]

    def skip_layer(self, layer: int, skip_with: torch.Tensor | None = None) -> None:
        """Skip one layer; see `skip_layers`."""
        self.skip_layers(layer, layer, skip_with)

    def skip_layers(self, start_layer: int, end_layer: int, skip_with: torch.Tensor | None = None) -> None:
        """Replace the output of `end_layer` by the input of `start_layer`, or by `skip_with`, in this forward pass.

        The layers still run, because other requests run through them at the same time. So skipping saves no time, and
        the layers still store keys and values for later steps.

        Args:
            start_layer, end_layer: The first and the last layer to skip; negative ones count from the end.
            skip_with: `[1, seq, hidden]`.

        Raises:
            IndexError: There is no such layer.
            ValueError: `end_layer` comes before `start_layer`.
            ShapeError: `skip_with` does not have the shape of the stream.
        """
        first = layer_index(start_layer, self.num_layers, "skip_layers(start_layer)")
        last = layer_index(end_layer, self.num_layers, "skip_layers(end_layer)")
        if last < first:
            raise ValueError(f"skip_layers({start_layer}, {end_layer}): the last layer comes before the first.")
        stream = self.layers_input[first]
        if skip_with is not None and skip_with.shape != stream.shape:
            raise ShapeError(f"skip_with has shape {list(skip_with.shape)}; the stream has {list(stream.shape)}.")
        self.layers_output[last] = stream if skip_with is None else skip_with

    def steer(
        self,
        layers: Any,
        steering_vector: Any,
        factor: float = 1,
        token_positions: Any = None,
        steps: Any = None,
        mode: str = "add",
        keep_norm: bool = False,
        origin: Any = None,
    ) -> None:
        """Steer the stream leaving each of `layers` in this forward pass.

        Arguments as in `StandardizedTransformer.steer`; `token_positions` are indices or slices, and not texts.

        Raises:
            Unavailable: The trace generates several tokens. Use `with model.steering(...)` around it instead.
            OutsideTraceError: No forward pass is running.
            TypeError, IndexError, ValueError, ShapeError: As `StandardizedTransformer.steer` raises them.
        """
        require_running(self, "steer()")
        if self.stepping or steps not in (None, "all", "prompt", 0):
            raise Unavailable(
                "steer() changes the pass that is running. To steer a generation on vLLM, use `with model.steering("
                "vector, layers, steps=...)` around model.generate(prompts, max_new_tokens=...)."
            )
        what = (layers, steering_vector, factor, token_positions, None, None, mode, keep_norm, origin)
        steer_prompt(self, require_plain(steering_of(self.num_layers, *what)))


def _accessor(label: Label) -> property:
    def read(self: InTrace) -> Any:
        return LayerAccessor(self, label) if label.per_layer else read_value(self, label)  # type: ignore[arg-type]

    def write(self: InTrace, tensor: torch.Tensor) -> None:
        if label.per_layer:
            raise TypeError(f"{label.name} is indexed by layer: model.{label.name}[i] = tensor.")
        write_value(self, label, tensor)  # type: ignore[arg-type]

    return property(read, write, doc=f"{label.shape}: {label.description}")


for _label in LABELS.values():
    setattr(InTrace, _label.name, _accessor(_label))
