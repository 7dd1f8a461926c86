"""What reads a model from outside: the table of its values, `collect` and `gradients`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from nnterp.collection import Collected, Gradients, collect, gradients
from nnterp.datasets import ActivationDataset, refuse_for_disk, write_dataset
from nnterp.errors import Unavailable
from nnterp.generation import refuse_misspelt, settings_of_generate
from nnterp.indices import Indices
from nnterp.named_transformer import NamedTransformer
from nnterp.table import LABELS, SENT_WHERE_NAMED, VALUES, Value
from nnterp.traced import LayerAccessor, accessor
from nnterp.values import Support, canonical, explain, explain_context, support
from nnterp.wording import nearest


@functools.lru_cache(maxsize=1024)  # some code asks for names that may be absent each time it reads a value
def _nearest_of(kind: type, name: str) -> str:
    """Which names of a model's class a misspelt one is near to."""
    parts = ("embed_tokens", "layers", "ln_final", "lm_head", "tokenizer")
    return nearest(name, [*parts, *(own for own in dir(kind) if not own.startswith("_"))])


class ReadTransformer(NamedTransformer):
    """The methods of a model that read it."""

    if TYPE_CHECKING:
        mixer_queries: LayerAccessor
        mixer_keys: LayerAccessor
        mixer_values: LayerAccessor
        mixer_decays: LayerAccessor
        mixer_betas: LayerAccessor
        mixer_steps: LayerAccessor
        mixer_states: LayerAccessor
        router_logits: LayerAccessor
        router_choices: LayerAccessor
        expert_weights: LayerAccessor
        expert_outputs: LayerAccessor
        expert_contributions: LayerAccessor
        cross_attentions_input: LayerAccessor
        cross_attention_queries: LayerAccessor
        cross_attention_keys: LayerAccessor
        cross_attention_values: LayerAccessor
        cross_attention_scores: LayerAccessor
        cross_attention_probabilities: LayerAccessor
        cross_attention_head_outputs: LayerAccessor
        cross_attention_head_contributions: LayerAccessor
        cross_attentions_output: LayerAccessor
        encoder_layers_input: LayerAccessor
        encoder_attentions_input: LayerAccessor
        encoder_attention_queries: LayerAccessor
        encoder_attention_keys: LayerAccessor
        encoder_attention_values: LayerAccessor
        encoder_attention_scores: LayerAccessor
        encoder_attention_probabilities: LayerAccessor
        encoder_attention_head_outputs: LayerAccessor
        encoder_attention_head_contributions: LayerAccessor
        encoder_attentions_output: LayerAccessor
        encoder_attention_contributions: LayerAccessor
        encoder_layers_mid: LayerAccessor
        encoder_mlps_input: LayerAccessor
        encoder_router_logits: LayerAccessor
        encoder_router_choices: LayerAccessor
        encoder_mlp_neurons: LayerAccessor
        encoder_shared_expert_neurons: LayerAccessor
        encoder_mlps_output: LayerAccessor
        encoder_mlp_contributions: LayerAccessor
        encoder_other_contributions: LayerAccessor
        encoder_layers_output: LayerAccessor

    # -- the table of values ----------------------------------------------------------------------------------------

    @property
    def values(self) -> dict[str, Value]:
        """The table of everything that can be read and written in a trace: name → row."""
        return dict(VALUES)

    def support(self) -> Support:
        """Find out which values this model has on which layers, and why not on the others.

        Runs the model on a short probe when it is called first (on fake tensors while the weights are not loaded).

        Returns:
            The layers of every value, and the reasons for the others.

        Raises:
            InsideTraceError: Called inside a trace of this model.
        """
        self.require_no_trace("support()")
        return support(self)

    def explain(self, name: str | None = None, layer: int | tuple[int, int] | None = None) -> None:
        """Print where a value is read in this model: native path, source lines, layout and rank.

        Without a name, print what the model does around its layers, as measured on a short probe: factors on
        embeddings, on what layers add and on logits, per-layer embeddings, heads for later tokens.
        `model.support().context` has the same as data.

        Args:
            name: A value of the table, or TransformerLens' name for it (`blocks.3.attn.hook_z`).
            layer: The layer; 0 if None. For one of several attentions in a layer, the layer and its number in it.

        Raises:
            ValueError: There is no such value.
            Unavailable: This model, or this layer of it, does not have it.
            InsideTraceError: Called without a name inside a trace of this model.
        """
        if name is None:
            self.require_no_trace("explain()")
            print(explain_context(self))
            return
        value, named = canonical(name)
        print(explain(self, value, layer if layer is not None else named))

    def __getattr__(self, name: str) -> Any:
        try:
            return NamedTransformer.__getattr__(self, name)
        except AttributeError as error:
            if not name.startswith("_") and "_module" in self.__dict__:
                error.args = (f"{error.args[0]}.{_nearest_of(type(self), name)}", *error.args[1:])  # type: ignore[arg-type]
            raise

    @overload
    def collect(
        self,
        prompts: Any,
        values: str | Iterable[str],
        layers: Indices = None,
        positions: Any = None,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        reduce: Any = None,
        progress: bool | None = None,
        max_new_tokens: int | None = None,
        remote: Any = False,
        resume: Collected | str | Path | None = None,
        *,
        to: None = None,
        prompts_per_shard: int = 1024,
        rank: tuple[int, int] | None = None,
        **generation: Any,
    ) -> Collected: ...

    @overload
    def collect(
        self,
        prompts: Any,
        values: str | Iterable[str],
        layers: Indices = None,
        positions: Any = None,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        reduce: Any = None,
        progress: bool | None = None,
        max_new_tokens: int | None = None,
        remote: Any = False,
        resume: Collected | str | Path | None = None,
        *,
        to: str | Path,
        prompts_per_shard: int = 1024,
        rank: tuple[int, int] | None = None,
        **generation: Any,
    ) -> ActivationDataset: ...

    def collect(
        self,
        prompts: Any,
        values: str | Iterable[str],
        layers: Indices = None,
        positions: Any = None,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        reduce: Any = None,
        progress: bool | None = None,
        max_new_tokens: int | None = None,
        remote: Any = False,
        resume: Collected | str | Path | None = None,
        *,
        to: str | Path | None = None,
        prompts_per_shard: int = 1024,
        rank: tuple[int, int] | None = None,
        **generation: Any,
    ) -> Collected | ActivationDataset:
        """Read values of many prompts: plain tensors, in one pass that stops after the last layer needed.

        The result does not depend on the batch size or the padding side, memory grows by the result alone, and values
        may be asked for in any order.

        Args:
            prompts: Texts, token ids, tensors, chat messages, or a list of these; see `nnterp.inputs.encode`.
            values: Names of the table (`"layers_output"`), with a layer (`"mlp_neurons[3]"`) or TransformerLens'
                (`"blocks.3.hook_resid_post"`); one or several. Also `"logits"`, at the positions asked for, and
                `"next_token_probs"`, `[prompts, vocab]`, after each prompt's last token.
            layers: The layers, for values that name none; by default all that have the value. The axis of layers stays,
                also for one (`layers=-1`: `[1, prompts, ...]`); `collected["layers_output", -1]` is without it.
            positions: Over each prompt's own tokens: an index (−1 is the last token whichever side is padded), a slice,
                a selector (`nnterp.positions.at("Paris")`, `last_of("Eiffel Tower")`), a list of these, or one list per
                prompt; all if None. With one index (`-1`), or `last_of`, the result has no axis of positions, unlike
                that of layers; with a list of one (`[-1]`) it has.
            batch_size: Prompts that share a forward pass.
            device: Where the result is kept.
            dtype: Its dtype; the model's if None.
            reduce: "mean" or "sum" over all prompts and positions (accumulated in double precision, returned in float32
                unless `dtype` says otherwise), or a function applied, on the model's device, to what is selected of a
                value, `[rows, (positions,) ...]`, which keeps the first axis.
            progress: Show a progress bar; with None, only if the work takes more than two seconds.
            max_new_tokens: Generate, and read every value at the positions from which each new token was predicted:
                `[layers, prompts, tokens, ...]`. The new tokens are the result's `generated`. A row is a prompt's own
                up to the token at which it ended (end tokens, stop strings, time, stopping criteria); beams and other
                generations of several rows for a prompt are refused.
            remote: Run on the remote service, a request for each batch; what is reduced is reduced there.
            resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was
                saved to: what is finished is not run again.
            to: A folder to which the values are written while they are computed, for results larger than memory (see
                docs/datasets.md). Prompts may then also be the path of a JSONL file, or any iterable, such as a
                generator or a `datasets` stream, which is read as it goes. The same call goes on from what an earlier
                one has written. Rows keep the order of the prompts. `device`, `reduce`, `resume` and `max_new_tokens`
                do not go with it.
            prompts_per_shard: With `to`, how many prompts one file holds. A shard that is not finished when the process
                is killed is computed again. Prompts of similar length within a shard share batches.
            rank: With `to`, the number of this process and how many write to the folder; each writes its own shards.
                RANK and WORLD_SIZE if None, as `torchrun` and `accelerate launch` set them.
            **generation: Settings of the generation, as in `generate`.

        Returns:
            A mapping from value to tensor, `[layers, prompts, (positions,) ...]`; see `nnterp.collection.Collected`.
            With `to`, the `nnterp.ActivationDataset` in the folder, which other processes may not have completed yet.

        Raises:
            ValueError: There is no such value, or a position's text is not in a prompt.
            IndexError: There is no such layer, or a prompt has no such position; names the prompt and its length.
            Unavailable: A layer that was asked for does not have the value.
            InsideTraceError: Called inside a trace of this model.
            TypeError: A setting of a generation was given without `max_new_tokens`, or an argument is misspelt.

            With `to`: BlockingIOError, another process writes the same shards; ValueError, the folder holds the dataset
            of another model, other arguments or other prompts (names what differs), or a damaged shard;
            FileExistsError, it holds something else; OSError, the disk is full. Shards that are whole stay.

            An error in a later batch, and an interrupt, carry what is finished as `error.partial`.

        Example:
            collected = model.collect(prompts, "layers_output", positions=-1)
            collected["layers_output"]  # [layers, prompts, hidden]
            dataset = model.collect(prompts, "layers_output", to="activations")
            dataset["layers_output", 3].prompt(0)  # [tokens, hidden]
        """
        if generation:
            refuse_misspelt(generation, ReadTransformer.collect, known=settings_of_generate())
        if to is not None and self.num_encoder_layers:
            raise Unavailable(
                f"collect(to=folder) keeps prompts with one input, and {self.model_class} reads two; leave out to=."
            )
        if to is not None:
            refuse_for_disk(device, reduce, max_new_tokens, resume, generation)
            on_disk = (layers, positions, batch_size, dtype, progress, remote, prompts_per_shard, rank)
            return write_dataset(self, to, prompts, values, *on_disk)
        if rank is not None:
            raise ValueError("rank is for collect(to=folder), whose shards several processes share; leave it out.")
        options = (batch_size, device, dtype, reduce, progress, max_new_tokens, remote, resume)
        return collect(self, prompts, values, layers, positions, *options, **generation)

    def gradients(
        self,
        prompts: Any,
        metric: Callable[[torch.Tensor], torch.Tensor],
        values: str | Iterable[str],
        layers: Indices = None,
        device: str | torch.device = "cpu",
        remote: Any = False,
        frozen: str | Iterable[str] = (),
    ) -> Gradients:
        """Gradients of a scalar of the logits with respect to values, in any order.

        Args:
            prompts: As in `collect`; they share one batch, padded on the left.
            metric: From the logits `[prompts, seq, vocab]` to one number, by differentiable operations.
            values, layers: As in `collect`.
            device: Where the result is kept.
            remote: Run on the remote service, the metric with it.
            frozen: What is held still in the backward pass, some of:

                - "patterns": attention probabilities; the gradient flows through the values, none reaches queries and
                  keys (Ameisen et al. 2025).
                - "norms": the scale of every norm, 1/rms or 1/std. x − mean(x), weights and biases are linear and kept.
                - "gates": in a gated feed-forward, act(gate) is a constant factor of the other branch. In a plain one
                  there is no other branch, so act(x) = x · (act(x)/x) with act(x)/x as a constant: 0 or 1 for a ReLU,
                  the identity rule of AttnLRP (Achtibat et al. 2024) for others. Routing weights of a mixture of
                  experts, and sigmoids and SiLUs that scale an attention's output, are constants too.

                The forward pass gives the same numbers. A cap on the logits after the last layer is not held. What
                holds in this model is proven once, on a short probe.

        Returns:
            Gradients and values by the same names as in `collect`, `[layers, prompts, seq, ...]` each; see
            `nnterp.gradients.Gradients`.

        Raises:
            RuntimeError: Called under `no_grad` or `inference_mode`.
            ValueError: The metric is no differentiable number, or the weights are frozen before a value.
            ValueError: `frozen` names something else.
            Unavailable: A layer that was asked for does not have the value, or the model has parts that cannot be held
                still (a state space mixer, a fused kernel); says which.
            RemoteModelError: `frozen` and `remote` are both given.
            InsideTraceError: Called inside a trace of this model.
        """
        return gradients(self, prompts, metric, values, layers, device, remote, frozen)

    # -- the vocabulary ---------------------------------------------------------------------------------------------

    def get_topk_closest_tokens(
        self, hidden_state: torch.Tensor, k: int = 5
    ) -> dict[str, float] | list[dict[str, float]]:
        """The `k` most probable tokens of hidden states read out as if they left the last layer.

        Args:
            hidden_state: `[hidden]` or `[batch, hidden]`.
            k: How many tokens.

        Returns:
            Token → probability, most probable first; a list of these for a batch.

        Raises:
            ShapeError: The hidden state has another number of axes or another width.
            ValueError: `k` is no integer from 1 to the size of the vocabulary.
        """
        return NamedTransformer.get_topk_closest_tokens(self, hidden_state, k)


for _label in LABELS.values():
    if _label.stack in ("encoder", "cross") or _label.name in SENT_WHERE_NAMED:  # others are on the half that travels
        setattr(ReadTransformer, _label.name, accessor(_label))
