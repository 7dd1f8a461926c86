"""`Anatomy`, the paths of a model's parts layer by layer and why others are absent, and how it prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nnterp.anatomy._sizes import Sizes
from nnterp.errors import Unavailable
from nnterp.indices import read_index
from nnterp.rendering import FittedTable, html_table
from nnterp.wording import generic_path, ranges

if TYPE_CHECKING:
    from rich.console import RenderableType

KINDS = ("attention", "cross_attention", "linear_attention", "state_space", "convolution", "recurrent", "none")


@dataclass(frozen=True)
class Part:
    """One part of a layer (attention, another mixer, feed-forward): its module, and where its input and output are.

    In nearly every model the three paths are the same. OPT's feed-forward has no module of its own: `entry` is `fc1`,
    `exit` is `fc2`, and `path` is None. BERT's attention module also adds the residual stream and applies a norm, so
    the output of the attention itself is that of `attention.output.dense`.

    Attributes:
        path: The part's own module, which may also add the stream and apply a norm (BERT); None if there is none.
        entry: The module whose input is the part's input.
        exit: The module whose output is the part's output. With `leaves`, the operation is inside this module.
        closing: The norm at the end of a module that adds the residual stream by itself (XLNet's attention). The part's
            output is then an operation inside the module, and not the output of any module.
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
        """Where the part's output is: the path of `exit`, or of the operation inside it."""
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
        index: Position in the residual stream, from 0; in a looped model, counted over all passes.
        path: Native path of the layer's module.
        kind: Kind of `mixer`, one of `KINDS`; "none" for a layer without one.
        mixer: The part that moves information between positions, whatever its kind; None if there is none.
        self_attn: The softmax attention over the layer's own stream, if the layer has one. It is `mixer` itself
            except in layers that run an attention and another mixer side by side (Falcon-H1), where `mixer` is the
            other.
        mlp: The feed-forward, if the layer has one.
        mixture_of_experts: Whether `mlp` routes tokens to experts.
        attentions: The softmax attentions of a layer that runs several one after the other (LongCat-Flash), in order;
            empty for any other layer.
        cross_attn: In the decoder of an encoder-decoder model, the attention to what the encoder returns.
        number: Which of the model's layer modules it is, from 0: `index`, unless layers run several times.
        turn: Which run of its module it is, from 0.
        turns: How often its module runs in a forward pass.
    """

    index: int
    path: str
    kind: str
    mixer: Part | None
    self_attn: Part | None
    mlp: Part | None
    mixture_of_experts: bool = False
    attentions: tuple[Part, ...] = ()
    cross_attn: Part | None = None
    number: int = 0
    turn: int = 0
    turns: int = 1

    @property
    def description(self) -> str:
        """The layer's kind in words, with the kind of its feed-forward."""
        feed_forward = "no MLP" if self.mlp is None else ("mixture of experts" if self.mixture_of_experts else "MLP")
        side = " + attention" if self.self_attn is not None and self.self_attn != self.mixer else ""
        cross = ", cross-attention" if self.cross_attn is not None else ""
        return f"{self.kind.replace('_', ' ')}{side}{cross}, {feed_forward}"


@dataclass(frozen=True)
class Anatomy:
    """Which module of a model plays which role. Paths are native, as in `model.named_modules()`.

    Attributes:
        model_class: Name of the HuggingFace class.
        model_type: `config.model_type`.
        embed_tokens, ln_final, lm_head: Path of the module; None if the model has none (see `absent`).
        layers: Path of the module list that holds the layers.
        blocks: One `Layer` per layer, in the order of the residual stream.
        sizes: The model's dimensions.
        absent: Role -> reason, for the roles that no module plays, or that some layers lack.
        other_stacks: Paths of further lists of layers (BLT's byte encoder and its transformer over patches). They run
            before the layers named here, have residual streams of their own, and keep their native names.
        between: Paths of modules that add to the stream between one layer and the next (BLT's cross-attention to the
            patches). The certificate finds them.
        encoder: In an encoder-decoder model, the parts of its encoder; the parts named here are then the decoder's.
        in_turn: Paths of further lists of layers that take turns with `layers` (HRM's high-level module).
        seams: In a looped model, indices of the layers that read something else than what the layer before them wrote:
            where a pass begins or ends, its code may normalise, add the prompt again or restart. The certificate finds
            them.

    Example:
        print(model.anatomy.ln_final, len(model.anatomy.blocks))  # → model.norm 8
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
    encoder: Anatomy | None = None
    in_turn: tuple[str, ...] = ()
    seams: tuple[int, ...] = ()

    def __deepcopy__(self, memo: object) -> Anatomy:
        return self  # nothing in it can change

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "absent": dict(self.absent)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, absent=MappingProxyType(state["absent"]))

    @property
    def num_layers(self) -> int:
        """Number of layers of the residual stream; in a looped model, each counts as often as it runs."""
        return len(self.blocks)

    @property
    def runs(self) -> tuple[tuple[int, ...], ...]:
        """In a looped model, for each of its layer modules the indices of its runs, in order; else empty.

        `layers_output[layer, pass]` is `layers_output[anatomy.runs[layer][pass]]`.
        """
        if all(layer.turns == 1 for layer in self.blocks):
            return ()
        found: dict[int, list[int]] = {}
        for layer in self.blocks:
            found.setdefault(layer.number, []).append(layer.index)
        return tuple(tuple(found[number]) for number in sorted(found))

    @property
    def passes(self) -> tuple[int, ...]:
        """How often each layer module runs in a forward pass; of a model that is not looped, once each."""
        return tuple(map(len, self.runs)) or (1,) * self.num_layers

    def rolled(self) -> Anatomy:
        """The anatomy with each layer module once, as it is before a run has shown how often each runs."""
        if not self.runs:
            return self
        once = sorted((layer for layer in self.blocks if layer.turn == 0), key=lambda layer: layer.number)
        blocks = tuple(replace(layer, index=layer.number, turns=1) for layer in once)
        return replace(self, blocks=blocks, seams=())

    def indices(self, role: str) -> tuple[int, ...]:
        """Find the layers that have `role`: "self_attn", "mixer" or "mlp".

        Returns:
            Their indices, from 0, in order.
        """
        return tuple(layer.index for layer in self.blocks if getattr(layer, role) is not None)

    def part(self, role: str, index: int) -> Part:
        """Look up what plays `role` ("self_attn", "mixer" or "mlp") in the layer with this index.

        Returns:
            The part, with its native paths.

        Raises:
            IndexError: There is no such layer.
            ValueError: There is no such role.
            Unavailable: The layer has no such part. The message names the layer, its kind and the layers that have it.
        """
        if role not in ("self_attn", "mixer", "mlp"):
            raise ValueError(f"There is no role {role!r}; there are self_attn, mixer and mlp.")
        index = read_index(index, self.num_layers, f"The layer of {role}", "layers")
        layer = self.blocks[index]
        part = getattr(layer, role)
        if part is not None:
            return part
        have = self.indices(role)
        where = f"layers {ranges(have)} have it" if have else "no layer of this model has it"
        why = f" ({self.absent[role]})" if role in self.absent else ""
        raise Unavailable(
            f"Layer {index} of {self.model_class} ({layer.path}: {layer.description}) has no {role}; {where}{why}."
        )

    def names(self) -> Iterator[tuple[str, str]]:
        """Pair standard names with the model's own.

        Returns:
            Pairs of (standard path, native path): the model's own parts first, then those of each layer.
        """
        for role in _ROLES:
            native = getattr(self, role)
            if native is not None and not (role == "layers" and self.in_turn):
                yield role, native
        for layer in self.blocks:
            if layer.turn:
                continue
            yield f"layers.{layer.index}", layer.path
            for role, part in _named_parts(layer):
                if part.path is not None:
                    yield f"layers.{layer.index}.{role}", part.path

    def rows(self) -> list[tuple[str, str]]:
        """Make the table that is printed.

        Returns:
            (standard name, native path) of each part, one entry for layers that are alike.
        """
        rows = [(role, getattr(self, role) or f"– {self.absent.get(role, 'absent')}") for role in _ROLES]
        at = 1 + _ROLES.index("layers")
        rows[at:at] = [("", f"{path}  (in turn with these)") for path in self.in_turn]
        for indices, layer in _alike(self.blocks):
            rows.append((f"layers[{ranges(indices, at_most=4)}]", f"{generic_path(layer.path)}  ({layer.description})"))
            rows += [(f"  .{role}", generic_path(str(part))) for role, part in _named_parts(layer)]
        rows += self._loop_rows()
        if self.between:
            adding = ", ".join(dict.fromkeys(map(generic_path, self.between)))
            rows.append(("between layers", f"{adding}  (added to the stream)"))
        if self.encoder is not None:
            rows += [(f"encoder {name.strip()}", path) for name, path in self.encoder.rows() if path[0] != "–"]
        if self.other_stacks:
            rows.append(("other stacks", f"{', '.join(self.other_stacks)}  (before these layers, by native names)"))
        return rows

    def _loop_rows(self) -> Iterator[tuple[str, str]]:
        """What is printed of loops: the order in which layers run, and where a pass reads something else."""
        if self.runs:
            order = ", ".join(f"{a} to {b}" if a != b else str(a) for a, b in _stretches(self.blocks))
            yield "passes", f"{len(self.runs)} layer modules run {self.num_layers} times, in the order {order}"
        if self.seams:
            yield "seams", f"layers {ranges(self.seams)} read something else than what the layer before them wrote"

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

    def __rich__(self) -> RenderableType:
        return FittedTable(self.heading, ("name", "in this model"), self.rows())


def cross_layers(anatomy: Anatomy) -> tuple[Layer, ...]:
    """Take the cross-attention of a decoder's layers as their only part.

    Returns:
        The layers with that part alone; empty if they have none.
    """
    if not any(layer.cross_attn for layer in anatomy.blocks):
        return ()
    return tuple(
        replace(layer, kind="cross_attention", mixer=None, self_attn=layer.cross_attn, mlp=None, attentions=())
        for layer in anatomy.blocks
    )


_ROLES = ("embed_tokens", "layers", "ln_final", "lm_head")


def _named_parts(layer: Layer) -> Iterator[tuple[str, Part]]:
    """The parts a layer has, with their roles. A mixer that is the attention is only listed as the attention."""
    for role, part in _parts_of(layer):
        if part is not None and (role != "mixer" or part != layer.self_attn):
            yield role, part


def _parts_of(layer: Layer) -> tuple[tuple[str, Part | None], ...]:
    own = (("self_attn", layer.self_attn), ("mixer", layer.mixer), ("mlp", layer.mlp))
    return own if layer.cross_attn is None else (own[0], ("cross_attn", layer.cross_attn), *own[1:])


def _stretches(layers: tuple[Layer, ...]) -> list[tuple[int, int]]:
    """(first, last) numbers of the modules of consecutive layers that run one after the other."""
    found: list[tuple[int, int]] = []
    for layer in layers:
        if found and layer.number == found[-1][1] + 1:
            found[-1] = found[-1][0], layer.number
        else:
            found.append((layer.number, layer.number))
    return found


def _alike(layers: tuple[Layer, ...]) -> Iterator[tuple[tuple[int, ...], Layer]]:
    """Groups of layers that print alike, as (their indices, one of them), in order of first appearance."""
    groups: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        parts = (layer.mixer, layer.self_attn, layer.mlp)
        printed = (generic_path(layer.path), layer.description, *(generic_path(str(part)) for part in parts))
        groups.setdefault(printed, []).append(layer)
    for group in groups.values():
        yield tuple(layer.index for layer in group), group[0]
