"""The functions of nnterp 1.x: getters for the parts of a model, and activations of the last token.

They take a `StandardizedTransformer`, whose proven names they use, or any nnsight model on which `layers`, `self_attn`,
`mlp`, `ln_final` and `lm_head` exist (`TransformersModel(..., rename=get_rename_dict())`). New code is shorter with
`model.layers_output[i]`, `model.project_on_vocab(h)` and `model.collect(prompts, values)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nnterp.arguments import count, listed
from nnterp.defaults import plain_defaults
from nnterp.deprecation import renamed
from nnterp.indices import Indices, integer, read_indices
from nnterp.inputs import encode
from nnterp.module_accessor import ModuleAccessor
from nnterp.progress import bar
from nnterp.standardized_transformer import StandardizedTransformer
from nnterp.traced import TracedTransformer

__all__ = [
    "GetModuleOutput",
    "ModuleAccessor",
    "collect_last_token_activations_session",
    "collect_token_activations_batched",
    "compute_next_token_probs",
    "get_attention",
    "get_attention_output",
    "get_embed_tokens",
    "get_layer",
    "get_layer_input",
    "get_layer_output",
    "get_layers",
    "get_logits",
    "get_mlp",
    "get_mlp_output",
    "get_next_token_probs",
    "get_num_layers",
    "get_token_activations",
    "get_unembed",
    "get_unembed_norm",
    "project_on_vocab",
    "set_layer_output",
]

GetModuleOutput = Callable[[Any, int], torch.Tensor]


def get_embed_tokens(model: Any) -> Any:
    """Look up the token embedding; returns its module, as nnsight serves it."""
    return model.embed_tokens


def get_layers(model: Any) -> Any:
    """Look up the layers; returns the list, as nnsight serves it."""
    return model.layers if hasattr(model, "layers") else model.model.layers


def get_num_layers(nn_model: Any) -> int:
    """Count the layers; returns their number."""
    return len(get_layers(nn_model))


def get_layer(nn_model: Any, layer: int) -> Any:
    """Look up one layer; returns its module, as nnsight serves it."""
    return get_layers(nn_model)[layer]


def get_layer_input(nn_model: Any, layer: int) -> torch.Tensor:
    """Read the residual stream entering a layer; inside a trace.

    Returns:
        `[batch, seq, hidden]`, in the model's dtype and on the layer's device.
    """
    if isinstance(nn_model, TracedTransformer):
        return nn_model.layers_input[layer]
    return get_layer(nn_model, layer).input


def get_layer_output(nn_model: Any, layer: int) -> torch.Tensor:
    """Read the residual stream leaving a layer; inside a trace.

    Returns:
        `[batch, seq, hidden]`, in the model's dtype and on the layer's device.
    """
    if isinstance(nn_model, TracedTransformer):
        return nn_model.layers_output[layer]
    return _first(get_layer(nn_model, layer).output)


def get_attention(nn_model: Any, layer: int) -> Any:
    """Look up the attention of a layer; returns its module, as nnsight serves it."""
    return (
        nn_model.attentions[layer] if isinstance(nn_model, TracedTransformer) else get_layer(nn_model, layer).self_attn
    )


def get_attention_output(nn_model: Any, layer: int) -> torch.Tensor:
    """Read what the attention of a layer returns; inside a trace.

    Returns:
        `[batch, seq, hidden]`, in the model's dtype and on the layer's device.
    """
    if isinstance(nn_model, TracedTransformer):
        return nn_model.attentions_output[layer]
    return _first(get_attention(nn_model, layer).output)


def get_mlp(nn_model: Any, layer: int) -> Any:
    """Look up the feed-forward of a layer; returns its module, as nnsight serves it."""
    return nn_model.mlps[layer] if isinstance(nn_model, TracedTransformer) else get_layer(nn_model, layer).mlp


def get_mlp_output(nn_model: Any, layer: int) -> torch.Tensor:
    """Read what the feed-forward of a layer returns; inside a trace.

    Returns:
        `[batch, seq, hidden]`, in the model's dtype and on the layer's device.
    """
    if isinstance(nn_model, TracedTransformer):
        return nn_model.mlps_output[layer]
    return _first(get_mlp(nn_model, layer).output)


def get_logits(nn_model: Any) -> torch.Tensor:
    """Read the logits; inside a trace.

    Returns:
        `[batch, seq, vocab]`, in the dtype and on the device in which the model returns them.
    """
    output = nn_model.output
    return output if isinstance(output, torch.Tensor) else output.logits


def get_unembed_norm(nn_model: Any) -> Any:
    """Look up the norm after the last layer; returns its module, as nnsight serves it."""
    return nn_model.ln_final if hasattr(nn_model, "ln_final") else nn_model.model.norm


def get_unembed(nn_model: Any) -> Any:
    """Look up the unembedding; returns its module, as nnsight serves it."""
    return nn_model.lm_head


def project_on_vocab(nn_model: Any, h: torch.Tensor) -> torch.Tensor:
    """Compute the logits of hidden states `[..., hidden]`.

    For a `StandardizedTransformer` exactly what the model does after its last layer, final softcap and scales included.

    Returns:
        `[..., vocab]`, in the dtype and on the device of the model's logits.
    """
    if isinstance(nn_model, TracedTransformer):
        return nn_model.project_on_vocab(h)
    return get_unembed(nn_model)(get_unembed_norm(nn_model)(h))


def get_next_token_probs(nn_model: Any) -> torch.Tensor:
    """Read the probabilities after the last position of each row; inside a trace.

    Returns:
        `[batch, vocab]`, in the dtype of the logits and on their device.
    """
    if isinstance(nn_model, TracedTransformer):
        return nn_model.next_token_probs
    return get_logits(nn_model)[:, -1].softmax(-1)


def set_layer_output(nn_model: Any, layer: int, tensor: torch.Tensor) -> None:
    """Replace the residual stream leaving a layer; inside a trace."""
    if isinstance(nn_model, TracedTransformer):
        nn_model.layers_output[layer] = tensor
        return
    module = get_layer(nn_model, layer)
    output = module.output
    module.output = tensor if isinstance(output, torch.Tensor) else (tensor, *output[1:])


@plain_defaults()
def get_token_activations(
    nn_model: Any,
    prompts: Any = None,
    layers: Indices = None,
    get_activations: GetModuleOutput | None = None,
    remote: bool = False,
    idx: int | None = None,
    tracer: Any = None,
) -> torch.Tensor:
    """One token's activations of every prompt at every layer, in one forward pass.

    Args:
        nn_model: The model.
        prompts: The prompts; None inside a trace that is already running.
        layers: The layer or layers; all if None.
        get_activations: (model, layer) → activations `[batch, seq, ...]`; the layer's output if None.
        remote: Run on the remote service.
        idx: The token, counted over the padded batch; the last if None.
        tracer: The running trace, if there is one: the result then belongs to it and has to be saved.

    Returns:
        `[layers, prompts, hidden]` on the CPU, in the model's dtype; inside a running trace on the model's device.

    Raises:
        ValueError: Neither prompts nor a tracer were given, or `idx` counts from the padded side.
    """
    if tracer is None and prompts is None:
        raise ValueError("prompts must be given when there is no tracer.")
    get = get_activations or get_layer_output
    position = _checked(nn_model, idx)
    chosen = _layers_of(nn_model, layers)
    order = sorted(set(chosen))  # a trace reads in forward order
    if tracer is not None:
        found = {layer: _tokens_first(nn_model, get, layer)[:, position] for layer in order}
        return torch.stack([found[layer].to(found[order[0]].device) for layer in chosen])
    _prepare(nn_model, remote, prompts)
    with torch.no_grad(), nn_model.trace(prompts, remote=remote) as running:
        found = {layer: _tokens_first(nn_model, get, layer)[:, position].cpu() for layer in order}
        activations = torch.stack([found[layer] for layer in chosen]).save()
        running.stop()
    return activations


@plain_defaults()
def collect_last_token_activations_session(
    nn_model: Any,
    prompts: Sequence[Any],
    batch_size: int,
    layers: Indices = None,
    get_activations: GetModuleOutput | None = None,
    remote: bool = False,
    idx: int | None = None,
) -> torch.Tensor:
    """`get_token_activations` in batches, all of them one nnsight session: one request when remote.

    Returns:
        `[layers, prompts, hidden]` on the CPU, in the model's dtype.

    Raises:
        ValueError: `idx` counts from the padded side.
    """
    get = get_activations or get_layer_output
    position = _checked(nn_model, idx)
    chosen = _layers_of(nn_model, layers)
    order = sorted(set(chosen))  # a trace reads in forward order
    prompts = listed(prompts, "prompts", "a list of prompts")
    batch_size = count(batch_size, "batch_size")
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    _prepare(nn_model, remote, prompts)
    with torch.no_grad(), nn_model.session(remote=remote):
        pieces = []
        for batch in batches:
            with nn_model.trace(batch) as running:
                found = {layer: _tokens_first(nn_model, get, layer)[:, position].cpu() for layer in order}
                piece = torch.stack([found[layer] for layer in chosen]).save()
                running.stop()
            pieces.append(piece)
        activations = torch.cat(pieces, dim=1).save()
    return activations


@plain_defaults()
def collect_token_activations_batched(
    nn_model: Any,
    prompts: Sequence[Any],
    batch_size: int,
    layers: Indices = None,
    get_activations: GetModuleOutput | None = None,
    remote: bool = False,
    idx: int | None = None,
    tqdm: Callable | None = None,
    use_session: bool = True,
    progress: bool | None = None,
) -> torch.Tensor:
    """`get_token_activations` in batches.

    For the outputs of a `StandardizedTransformer`'s layers at the last token (or the first, on right-padded prompts)
    this is `model.collect`, which batches prompts of like length together.

    Args:
        nn_model, prompts, layers, get_activations, remote, idx: As in `get_token_activations`.
        batch_size: Prompts that share a forward pass.
        tqdm: Another progress bar to put around the batches (a 1.x argument).
        use_session: When remote, send all batches as one session.
        progress: Show a progress bar; with None, only if the work takes more than two seconds.

    Returns:
        `[layers, prompts, hidden]` on the CPU, in the model's dtype.

    Raises:
        ValueError: `idx` counts from the padded side.
    """
    prompts = listed(prompts, "prompts", "a list of prompts")
    batch_size = count(batch_size, "batch_size")
    if use_session and remote:
        return collect_last_token_activations_session(
            nn_model, prompts, batch_size, layers, get_activations, remote, idx
        )
    position = _checked(nn_model, idx)
    layers = _layers_of(nn_model, layers)
    plain = get_activations is None or get_activations is get_layer_output
    if isinstance(nn_model, StandardizedTransformer) and plain and not remote and tqdm is None and position == -1:
        found = nn_model.collect(
            list(prompts), "layers_output", layers, positions=position, batch_size=batch_size, progress=progress
        )
        return found["layers_output"]
    starts: Any = range(0, len(prompts), batch_size)
    pieces = []
    with bar(len(starts), "activations", progress if tqdm is None else False, "batch") as shown:
        for i in starts if tqdm is None else tqdm(starts):
            some = prompts[i : i + batch_size]
            pieces.append(get_token_activations(nn_model, some, layers, get_activations, remote, idx))
            shown.update()
    return torch.cat(pieces, dim=1)


@renamed(removed_in="3.0", prompt="prompts")
@plain_defaults()
def compute_next_token_probs(nn_model: Any, prompts: str | list[str], remote: bool = False) -> torch.Tensor:
    """Run prompts, and compute the probabilities of the token after each.

    Args:
        nn_model: The model.
        prompts: A text or a list. The name that it had, `prompt=`, works with a warning.
        remote: Passed to the trace.

    Returns:
        `[prompts, vocab]` on the CPU, in the logits' dtype.
    """
    _prepare(nn_model, remote, prompts)
    with torch.no_grad(), nn_model.trace(prompts, remote=remote):
        probs = get_next_token_probs(nn_model).cpu().save()
    return probs


def _prepare(nn_model: Any, remote: bool, prompts: Any) -> None:
    """Check the prompts of a `StandardizedTransformer` and prepare it for a run; nothing for other models."""
    if isinstance(nn_model, StandardizedTransformer):
        encoding = isinstance(prompts, Mapping) and len(prompts) > 0
        if not encoding and not (isinstance(prompts, torch.Tensor) and prompts.dim() in (1, 2)):
            encode(nn_model, prompts)
        nn_model.prepare(remote)


def _tokens_first(nn_model: Any, get: GetModuleOutput, layer: int) -> torch.Tensor:
    """Activations with batch and sequence in front, where a model keeps several streams side by side (Gemma 3n) too."""
    found = get(nn_model, layer)
    if isinstance(nn_model, TracedTransformer) and get in (get_layer_output, get_layer_input):
        batch = nn_model.readout.layout.batch
        return found if batch == 0 else found.movedim((batch, batch + 1), (0, 1))
    return found


def _layers_of(nn_model: Any, layers: Any) -> list[int]:
    """The layers asked for; all by default, of a `StandardizedTransformer` those that a text runs through."""
    if layers is None and isinstance(nn_model, StandardizedTransformer):
        return nn_model.layers_of_texts()
    return read_indices(layers, get_num_layers(nn_model), "layers", "layers")


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _checked(nn_model: Any, idx: int | None) -> int:
    """The position, which must be counted from the side that is not padded."""
    position = -1 if idx is None else integer(idx, "idx")
    side = getattr(nn_model.tokenizer, "padding_side", "left")
    if position < 0 and side != "left":
        raise ValueError(
            f"A negative idx counts from the end of the batch, which is padding when padding_side is {side!r}."
        )
    if position > 0 and side != "right":
        raise ValueError(
            f"A positive idx counts from the start of the batch, which is padding when padding_side is {side!r}."
        )
    return position
