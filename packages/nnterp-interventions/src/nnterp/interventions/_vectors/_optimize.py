"""A steering vector by gradient descent: the one under which the model continues prompts as wished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnterp.discovery import require_passes_with_gradients
from nnterp.errors import Unavailable
from nnterp.inputs import Batch, Row, batches, encode, forward_flags, left_padded, token_ids
from nnterp.interventions._running import bar, weights_at_rest
from nnterp.interventions._vectors._belonging import identity_of
from nnterp.interventions._vectors._directions import hash_of, number
from nnterp.interventions._vectors._vector import SteeringVector
from nnterp.values import layer_index

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


def optimize_vector(
    model: StandardizedTransformer,
    prompts: Any,
    targets: Any,
    layer: int,
    steps: int = 50,
    lr: float = 0.1,
    norm: float | None = None,
    *,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool | None = None,
) -> SteeringVector:
    """The vector at one layer under which prompts are continued by targets, found by gradient descent.

    It is added to the stream leaving `layer` at every position, as `model.steering` does, and Adam maximises the
    log-probability of the targets, the mean over prompts of the sum over a target's tokens (Subramani et al.,
    [Extracting latent steering vectors](https://arxiv.org/abs/2205.05124), 2022). The weights and their `.grad` stay
    as they are. Costs `steps + 1` forwards of all prompts with their targets, and `steps` backward passes.

    Args:
        model: The model, with its weights here: this does not run remotely.
        prompts: Texts, token ids, chats, or a list of these.
        targets: How they are to be continued: a text or token ids, one for all prompts or one for each. A text begins
            with a space where the word that it begins with would have one.
        layer: The layer.
        steps: Steps of Adam.
        lr: Its learning rate: about how far a component of the vector moves in a step. Compare with the stream's own.
        norm: The greatest length of the vector; after each step a longer one is scaled back. None for no limit.
        seed: Of the vector that it begins with, which is random and short.
        batch_size: Prompts that share a forward pass.
        progress: Show a progress bar; None: after two seconds.

    Returns:
        A `SteeringVector`, float32 on the CPU. `details["losses"]` are the negative log-probabilities before each step,
        and of the returned vector, the last.

    Raises:
        ValueError: A target has no tokens, there is not one for each prompt, or the loss is not finite.
        IndexError: There is no such layer.
        Unavailable: The layer runs only with an image; the model reads two inputs, or runs passes without gradients.
        InsideTraceError: Called inside a trace of this model.

        An error in a later step, or an interrupt, carries the vector so far as `error.partial`.

    Example:
        vector = optimize_vector(model, "The capital of Japan is", " Paris", layer=2, steps=5, norm=12)
        print(len(vector.details["losses"]))  # → 6
    """
    model.require_no_trace("optimize_vector()")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}; give the number of steps, at least 1.")
    rate, limit = number(lr, "lr"), None if norm is None else number(norm, "norm")
    if rate <= 0 or (limit is not None and limit <= 0):
        raise ValueError(f"lr and norm must be positive, not {lr!r} and {norm!r}.")
    chosen = layer_index(layer, model.num_layers, "optimize_vector(layer=...)")
    if model.num_encoder_layers:
        raise Unavailable(
            f"optimize_vector() does not serve {model.model_class}, which reads two inputs. Take steering_vectors(), "
            "with EncoderDecoderPrompts as prompts."
        )
    model.prepare()
    model.layers_of_texts([chosen])
    rows, lengths = _continued(model, prompts, targets)
    losses: list[float] = []

    def vector() -> SteeringVector:
        details = {"losses": list(losses), "steps": steps, "lr": rate, "norm": limit, "seed": seed}
        found = {chosen: value.detach().cpu()}
        return SteeringVector(found, **identity_of(model), method="optimized", prompts=hash_of(rows), details=details)

    require_passes_with_gradients(model._module, model.anatomy)
    with torch.inference_mode(False), torch.enable_grad(), weights_at_rest(model._module), left_padded(model.tokenizer):
        parts = list(batches(model, rows, batch_size))
        value = _start(model, chosen, seed, limit)
        adam = torch.optim.Adam([value], lr=rate)
        try:
            with bar(steps, "optimize_vector", progress) as shown:
                for _ in range(steps):
                    losses.append(_descend(model, chosen, value, parts, lengths))
                    adam.step()
                    _limit(value, limit)
                    shown.update(1)
            losses.append(_descend(model, chosen, value, parts, lengths, backward=False))
        except BaseException as error:
            if losses:
                error.partial = vector()  # type: ignore[attr-defined]
                error.add_note(f"{len(losses)} of {steps} steps are done: the vector so far is error.partial.")
            raise
    return vector()


def _continued(model: StandardizedTransformer, prompts: Any, targets: Any) -> tuple[list[Row], list[int]]:
    """Prompts with their targets, and how many tokens of each row are the target.

    Raises:
        ValueError: There is not one target for each prompt, or one has no tokens.
    """
    rows = encode(model, prompts)
    single = isinstance(targets, str) or (
        isinstance(targets, (Sequence, torch.Tensor)) and len(targets) and hasattr(targets[0], "__index__")
    )
    listed = [targets] * len(rows) if single else list(targets)
    if len(listed) != len(rows):
        raise ValueError(f"There are {len(listed)} targets for {len(rows)} prompts; give one, or one for each.")
    size = model.vocab_size
    made = [
        tuple(row.ids) + _target_ids(model, row, own, size, i)
        for i, (row, own) in enumerate(zip(rows, listed, strict=True))
    ]
    whole = encode(model, [list(ids) for ids in made])  # checks the context's length
    return whole, [len(new) - len(old) for new, old in zip(whole, rows, strict=True)]


def _target_ids(model: StandardizedTransformer, row: Row, target: Any, size: int | None, index: int) -> tuple[int, ...]:
    """Token ids of a target: as the text after the prompt, where that leaves the prompt's own tokens as they are."""
    if not isinstance(target, str):
        ids = token_ids(target, size, f"Target {index}")
    else:
        alone = tuple(model.tokenizer(target, add_special_tokens=False)["input_ids"])
        joined: tuple[int, ...] = ()
        if row.text is not None:
            bare = len(model.tokenizer(row.text, add_special_tokens=False)["input_ids"]) == len(row)
            joined = tuple(model.tokenizer(row.text + target, add_special_tokens=not bare)["input_ids"])
        ids = joined[len(row) :] if joined[: len(row)] == row.ids else alone
    if not ids:
        raise ValueError(f"Target {index} ({target!r}) has no tokens.")
    return ids


def _start(model: StandardizedTransformer, layer: int, seed: int, limit: float | None) -> torch.Tensor:
    width = model.hidden_size or model.readout.layout.width
    assert width
    noise = torch.randn(width, generator=torch.Generator().manual_seed(seed)) * 1e-2
    if limit is not None and noise.norm() > limit:
        noise = noise * (limit / noise.norm())
    device = next(model._module.get_submodule(model.layer_paths[layer]).parameters()).device
    return noise.to(device if device.type != "meta" else "cpu").requires_grad_(True)


@torch.no_grad()
def _limit(value: torch.Tensor, limit: float | None) -> None:
    if limit is not None and value.norm() > limit:
        value.mul_(limit / value.norm())


def _descend(
    model: StandardizedTransformer,
    layer: int,
    value: torch.Tensor,
    parts: list[Batch],
    lengths: list[int],
    backward: bool = True,
) -> float:
    """The loss under a vector; puts its gradient into `value.grad`, summed over batches.

    Raises:
        ValueError: The loss is not finite.
    """
    count, total = len(lengths), 0.0
    gradient = torch.zeros_like(value)
    for batch in parts:
        inputs, own = {**batch.encoding, **forward_flags(model)}, [lengths[i] for i in batch.indices]
        ids = batch.input_ids
        with torch.set_grad_enabled(backward), model.trace(inputs):
            model.steer(layer, value)
            loss = continuation_loss(model.logits, ids, own).save()
        loss = loss / count
        if not torch.isfinite(loss):
            raise ValueError("The loss is not finite: lower lr, give norm=, or load the model in float32.")
        if backward:
            gradient += torch.autograd.grad(loss, value)[0]
        total += float(loss.detach())
    if backward:
        value.grad = gradient
    return total


def continuation_loss(logits: torch.Tensor, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The negative log-probability of each row's last tokens, summed over rows.

    Args:
        logits: `[rows, seq, vocab]`.
        ids: `[rows, seq]`, padded on the left.
        lengths: How many of each row's last tokens count.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for row, length in enumerate(lengths):
        logs = logits[row, -length - 1 : -1].float().log_softmax(-1)
        own = ids[row, -length:].to(logs.device)
        total = total - logs.gather(-1, own[:, None]).sum().to(total.device)
    return total
