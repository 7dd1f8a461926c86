"""The edits of a running model that have a method of their own: skipping layers, steering, an edit in every step.

Their traced halves are in `nnterp.traced`, which travels; here they are documented, and refused where unproven.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from nnterp.deprecation import deprecated
from nnterp.errors import InsideTraceError, Unavailable
from nnterp.standing import conditional, standing
from nnterp.table import SENT_WHERE_NAMED
from nnterp.traced import Condition, TracedTransformer, skip_layers, steering_of
from nnterp.turn import Turn

EDITS = frozenset(["steer", "skip_layer", "skip_layers", "each_step"])  # methods of `Edits`, as blocks name them
# Whether the remote request that is being made takes the edits along: yes, unless its block was seen to name none.
mentions_edits: ContextVar[bool] = ContextVar("mentions_edits", default=True)
# Which values of few models it takes along: all, unless its block was seen to name none.
mentions_values: ContextVar[frozenset[str]] = ContextVar("mentions_values", default=SENT_WHERE_NAMED)


class EditedTransformer(TracedTransformer):
    """The methods of a model that edit it."""

    _turn: Turn  # of the thread that runs the model

    def require_no_trace(self, what: str) -> None:
        """Raise if the model is running a trace, in which it cannot be run again.

        Raises:
            InsideTraceError: It is.
            AnotherThreadError: Another thread is running it.
        """
        self._turn.require_mine()
        if self.interleaver.interleaving:
            raise InsideTraceError(
                f"{what} runs the model itself, so it cannot be called inside a trace of the same model. "
                f"Call it before or after the `with` block."
            )

    def skip_layers(
        self,
        start_layer: int,
        end_layer: int,
        skip_with: torch.Tensor | None = None,
        layer_returns_tuple: bool | None = None,
        steps: Any = None,
    ) -> None:
        """Leave out layers `start_layer` to `end_layer`, both included.

        Args:
            start_layer: First layer to skip.
            end_layer: Last layer to skip.
            skip_with: What the skipped layers return, `[batch, seq, hidden]`; what enters `start_layer` if None.
            layer_returns_tuple: Used only without a certificate: whether layers return the stream in a tuple.
            steps: Forward passes of a generation, as in `steer`.

        Raises:
            Unavailable: It is unproven what the layers return, and `layer_returns_tuple` was not given.
            IndexError: There is no such layer.
            ValueError: `end_layer` comes before `start_layer`.
            ShapeError: `skip_with` does not have the shape of the residual stream.
        """
        returns = self.readout.returns
        if not returns:
            if layer_returns_tuple is None:
                raise Unavailable(
                    f"What the layers of {self.model_class} return beside the stream is unproven, because the model "
                    "was loaded with check_renaming=False. Call model.validate() first, or pass layer_returns_tuple=."
                )
            returns = (() if layer_returns_tuple else None,) * self.num_layers
        skip_layers(self, start_layer, end_layer, skip_with, returns, steps)

    def each_step(self, edit: Callable[[int], None], steps: Any = None) -> None:
        """Call `edit(step)` in each chosen forward pass of a generation; it reads and writes values of that pass.

        Args:
            edit: Called with the step's number, before the pass reaches the first layer.
            steps: "all" (None), "prompt" (step 0), "generated", an index, a slice, or several indices.
        """
        TracedTransformer.each_step(self, edit, steps)

    def steer(
        self,
        layers: Any,
        steering_vector: Any,
        factor: float = 1,
        positions: Any = None,
        token_positions: Any = None,
        batch_index: Any = None,
        steps: Any = None,
        mode: str = "add",
        keep_norm: bool = False,
        origin: Any = None,
    ) -> None:
        """Steer the residual stream leaving each of `layers`: by default, add `factor * steering_vector`.

        In a generation every forward pass is steered; in a `tracer.iter` loop, that of the loop's step.

        Args:
            layers: The layer or layers, each steered once; None for those of `steering_vector`, or all.
            steering_vector: `[hidden]`, what broadcasts to what is steered, or a mapping from layer to vector.
            factor: Strength.
            positions: Deprecated, `token_positions`.
            token_positions: Over each row's own tokens: an index, a slice, `at("text")`, or a list of these.
            batch_index: Rows of the batch. A list of rows and a list of positions are paired.
            steps: "all" (None), "prompt" (step 0), "generated", an index, a slice, or several indices.
            mode: "add"; "project_out": take `factor` of the component along the vector away; "clamp": set it to
                `factor`; "affine": set it to that of `origin` plus `factor` vectors.
            keep_norm: Scale what is steered back to its norm.
            origin: `[hidden]`, for "affine".

        Raises:
            ShapeError: The vector does not broadcast to the stream.
            IndexError: There is no such layer, row or position.
            ValueError, TypeError: An argument selects nothing or is of no use.
        """
        if positions is not None:
            deprecated("`steer(positions=)`", "`token_positions=`", removed_in="3.0")
        how = (positions, token_positions, batch_index, steps, mode, keep_norm, origin)
        TracedTransformer.steer(self, layers, steering_vector, factor, *how)

    def steering(
        self,
        steering_vector: Any,
        layers: Any = None,
        factor: float = 1,
        *,
        mode: str = "add",
        token_positions: Any = None,
        steps: Any = None,
        when: Condition | Callable[[tuple[int, ...]], bool] | None = None,
        keep_norm: bool = False,
        origin: Any = None,
    ) -> contextlib.AbstractContextManager[None]:
        """Steer every run of the model in a `with` block: traces, generations, and every function of nnterp.

        Each forward pass is steered, also of the HuggingFace module when it is called directly, as an evaluation
        harness does. Steerings that are nested add up; leaving the block ends the steering, also after an error.

        Args:
            steering_vector: `[hidden]`, or a mapping from layer to `[hidden]`.
            layers: The layer or layers; None for those of the mapping, or all.
            factor, mode, keep_norm, origin: What is done to the stream leaving each layer, as in `steer`.
            token_positions: Over each row's own tokens, as in `steer`; all if None.
            steps: Forward passes of a generation, as in `steer`; all if None.
            when: Steer only some rows: those whose prompt fulfils a `nnterp.Condition`, or for whose token ids this
                function returns True. The rows are chosen in the prompt's pass, and steered in all later ones too.

        Returns:
            A context manager, without a value for `as`.

        Raises:
            InsideTraceError: Called inside a trace of this model.
            IndexError, TypeError, ValueError: As `steer` raises them, when this is called. Also if `steering_vector` is
                a `SteeringVector` of another model.

        Example:
            vector = steering_vectors(model, ["I am happy. I feel"], ["I am sad. I feel"])
            with model.steering(vector, layers=[3, 4], factor=2):
                lens = logit_lens(model, prompts)
        """
        self.require_no_trace("steering()")
        check = getattr(steering_vector, "check", None)  # a SteeringVector knows its model
        if check is not None:
            check(self)
        what = (layers, steering_vector, factor)
        steering = steering_of(self.num_layers, *what, token_positions, None, steps, mode, keep_norm, origin)
        return standing(self, steering if when is None else conditional(steering, when))
