"""The immutable result of looking at a model: paths of its parts, per layer, and what is absent and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from nnterp.anatomy._sizes import Sizes
from nnterp.errors import Unavailable
from nnterp.rendering import html_table, rich_table
from nnterp.wording import generic_path, ranges

if TYPE_CHECKING:
    from rich.console import Group

KINDS = ("attention", "cross_attention", "linear_attention", "state_space", "convolution", "recurrent", "none")


@dataclass(frozen=True)
class Part:
    """One part of a layer: the module that carries it, and where its value enters and leaves.

    For nearly every model the three are one module. OPT's feed-forward has no module of its own: it enters at `fc1`
    and leaves at `fc2`, and `path` is None. BERT's attention module also holds the residual addition and its norm, so
    the sublayer proper leaves at `attention.output.dense`.

    Attributes:
        closing: Norm with which the module closes after it has added the stream by itself (XLNet's attention). The
            sublayer proper then leaves at no module's edge, but at an operation in between.
        leaves: nnsight's labels of that operation, from the forward of `exit` down. The certificate finds it.
    """

    path: str | None
    entry: str
    exit: str
    closing: str | None = None
    leaves: tuple[str, ...] = ()

    @classmethod
    def module(cls, path: str) -> Part:
        """A part that is one module."""
        return cls(path, path, path)

    @property
    def end(self) -> str:
        """Where the sublayer proper leaves: the exit's path, or the operation's in it."""
        return self.exit if not self.leaves else f"{self.exit}.source.{'.source.'.join(self.leaves)}"

    def __str__(self) -> str:
        if self.path == self.entry == self.end:
            return self.path
        span = f"{self.entry} → {self.end}"
        return span if self.path is None else f"{self.path} ({span})"


@dataclass(frozen=True)
class Layer:
    """One layer: its module path, the kind of its sequence mixer, and the paths of its parts.

    Attributes:
        index: Position in the residual stream, from 0.
        path: Native path of the layer's module.
        kind: Kind of `mixer`, one of `KINDS`; "none" for a layer that mixes no positions.
        mixer: The part that moves information between positions, of whatever kind.
        self_attn: The softmax attention over the layer's own stream, if the layer has one. It is `mixer` itself
            except in layers that run an attention and another mixer side by side (Falcon-H1), where `mixer` is the
            other.
        mlp: The position-wise part, if there is one.
        mixture_of_experts: Whether `mlp` routes tokens to experts.
        attentions: The softmax attentions of a layer that holds several, one after the other (LongCat-Flash), in their
            order; empty for a layer with one at most.
    """

    index: int
    path: str
    kind: str
    mixer: Part | None
    self_attn: Part | None
    mlp: Part | None
    mixture_of_experts: bool = False
    attentions: tuple[Part, ...] = ()

    @property
    def description(self) -> str:
        """The layer's kind in words, with the kind of its feed-forward."""
        feed_forward = "no MLP" if self.mlp is None else ("mixture of experts" if self.mixture_of_experts else "MLP")
        side = " + attention" if self.self_attn is not None and self.self_attn != self.mixer else ""
        return f"{self.kind.replace('_', ' ')}{side}, {feed_forward}"


@dataclass(frozen=True)
class Anatomy:
    """Which module path of one model plays which role; paths are native, as in `model.named_modules()`.

    Attributes:
        model_class: Name of the HuggingFace class.
        model_type: `config.model_type`.
        embed_tokens, layers, ln_final, lm_head: Paths; None where the model has no such module (see `absent`).
        blocks: One `Layer` per layer, in the order of the residual stream.
        sizes: The model's dimensions.
        absent: For each role the model does not have, why.
        other_stacks: Further stacks of layers (BLT's byte encoder and its transformer over patches). They run before
            the layers named here, on streams of their own, and keep their native names.
        between: Modules that add to the stream between one layer and the next (BLT's cross-attention to the patches).
            The certificate finds them.
    """

    model_class: str
    model_type: str
    embed_tokens: str | None
    layers: str
    ln_final: str | None
    lm_head: str | None
    blocks: tuple[Layer, ...]
    sizes: Sizes
    absent: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    other_stacks: tuple[str, ...] = ()
    between: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of layers of the residual stream."""
        return len(self.blocks)

    def indices(self, role: str) -> tuple[int, ...]:
        """Indices of the layers that have `role`: "self_attn", "mixer" or "mlp"."""
        return tuple(block.index for block in self.blocks if getattr(block, role) is not None)

    def part(self, role: str, index: int) -> Part:
        """The part playing `role` in one layer.

        Raises:
            Unavailable: The layer has no such part; names the layer, its kind and the layers that have it.
        """
        block = self.blocks[index]
        part = getattr(block, role)
        if part is not None:
            return part
        have = self.indices(role)
        where = f"layers {ranges(have)} have it" if have else "no layer of this model has it"
        why = f" ({self.absent[role]})" if role in self.absent else ""
        raise Unavailable(
            f"Layer {index} of {self.model_class} ({block.path}: {block.description}) has no {role}; {where}{why}."
        )

    def names(self) -> Iterator[tuple[str, str]]:
        """Pairs of (standard path, native path): what is called what, the model's own parts first."""
        for role in ("embed_tokens", "layers", "ln_final", "lm_head"):
            native = getattr(self, role)
            if native is not None:
                yield role, native
        for block in self.blocks:
            yield f"layers.{block.index}", block.path
            for role, part in (("self_attn", block.self_attn), ("mixer", block.mixer), ("mlp", block.mlp)):
                if part is not None and part.path is not None and (role != "mixer" or part != block.self_attn):
                    yield f"layers.{block.index}.{role}", part.path

    def rows(self) -> list[tuple[str, str]]:
        """(standard name, native path) of the model's parts, like layers together, as printed."""
        rows = [(role, getattr(self, role) or f"– {self.absent.get(role, 'absent')}") for role in _ROLES]
        for indices, block in _alike(self.blocks):
            rows.append((f"layers[{ranges(indices, at_most=4)}]", f"{generic_path(block.path)}  ({block.description})"))
            for role, part in (("self_attn", block.self_attn), ("mixer", block.mixer), ("mlp", block.mlp)):
                if part is not None and not (role == "mixer" and part == block.self_attn):
                    rows.append((f"  .{role}", generic_path(str(part))))
        if self.between:
            adding = ", ".join(dict.fromkeys(map(generic_path, self.between)))
            rows.append(("between layers", f"{adding}  (added to the stream)"))
        if self.other_stacks:
            rows.append(("other stacks", f"{', '.join(self.other_stacks)}  (before these layers, by native names)"))
        return rows

    @property
    def heading(self) -> str:
        """The model's class, type and sizes, in one line."""
        return f"{self.model_class} ({self.model_type}): {self.sizes}"

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(left) for left, _ in rows)
        return "\n".join([self.heading, *(f"  {left:<{width}}  {right}" for left, right in rows)])

    def _repr_html_(self) -> str:
        return html_table(self.heading, ("name", "in this model"), self.rows())

    def __rich__(self) -> Group:
        return rich_table(self.heading, ("name", "in this model"), self.rows())


_ROLES = ("embed_tokens", "layers", "ln_final", "lm_head")


def _signature(block: Layer) -> tuple:
    return (
        generic_path(block.path),
        block.description,
        *(generic_path(str(p)) for p in (block.mixer, block.self_attn, block.mlp)),
    )


def _alike(blocks: tuple[Layer, ...]) -> Iterator[tuple[tuple[int, ...], Layer]]:
    """Groups of like layers, as (their indices, one of them), in order of first appearance."""
    groups: dict[tuple, list[Layer]] = {}
    for block in blocks:
        groups.setdefault(_signature(block), []).append(block)
    for group in groups.values():
        yield tuple(block.index for block in group), group[0]
