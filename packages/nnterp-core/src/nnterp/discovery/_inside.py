"""Run the probe once per model and keep where everything inside its layers is served."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnterp.anatomy import Layer, Part
from nnterp.devices import input_device
from nnterp.values._attention import (
    PROBE_LENGTH,
    PROBE_ROWS,
    Attention,
    ends_in,
    find_attention,
    heads_of,
    split_heads,
    watched,
    without_first_head,
)
from nnterp.values._eager import eagerly, is_eager
from nnterp.values._operations import Operations, record_operations, same
from nnterp.values._places import Everywhere, Inside, Place, Site, View
from nnterp.values._routers import Routers, router_path

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer


@dataclass
class Findings:
    """Where the inside of every layer is served.

    Attributes:
        attention: Per layer, None where there is none.
        neurons: Per layer, the input of the projection that ends the feed-forward, or the reason why there is none.
        several: (layer, number) → one attention of a layer that holds several.
        shared_neurons: The same of the expert that runs on all tokens.
        routers: Per layer of experts, (router logits, chosen experts): places, or reasons.
        ends: Modules inside a part that return what the part itself returns → the part's exit.
        ticks, texts: See `Operations`.
    """

    attention: list[Attention | None] = field(default_factory=list)
    several: dict[tuple[int, int], Attention | None] = field(default_factory=dict)
    neurons: list[Place | str] = field(default_factory=list)
    shared_neurons: list[Place | str] = field(default_factory=list)
    routers: list[tuple[Place | str, Place | str]] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    ticks: dict[tuple[str, tuple[str, ...], str], int] = field(default_factory=dict)
    texts: dict[tuple[str, tuple[str, ...]], tuple[str, str, dict[str, int], int]] = field(default_factory=dict)


def find_inside(model: StandardizedTransformer) -> Findings:
    """Look into every layer of a model.

    Runs the plain module on a probe of two short rows, twice where attention is not computed eagerly. A trace that is
    running is not disturbed.
    """
    with probing(model) as device:
        return Probe(model, device).findings()


@contextlib.contextmanager
def probing(model: StandardizedTransformer) -> Iterator[torch.device]:
    """Run the plain module, without gradients, dropout or a running trace; gives the device inputs belong on."""
    interleaver = model.interleaver
    running, interleaver.interleaving = interleaver.interleaving, False
    try:
        with torch.no_grad(), _as_it_was(model._module):
            yield input_device(model._module)
    finally:
        interleaver.interleaving = running


class Probe:
    def __init__(
        self, model: StandardizedTransformer, device: torch.device, shape: tuple[int, int] = (PROBE_ROWS, PROBE_LENGTH)
    ) -> None:
        self.model = model
        self.module: nn.Module = model._module
        self.blocks = model.anatomy.blocks
        dtype = self.module.dtype
        self.tolerance = max(1e-5, 8 * torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps)
        vocab = model.vocab_size or 100
        ids = torch.randint(min(8, vocab - 1), min(vocab, 4096), shape, generator=torch.Generator().manual_seed(3))
        accepts = inspect.signature(self.module.forward).parameters
        self.inputs: dict[str, Any] = {"input_ids": ids.to(device)}
        if "use_cache" in accepts or any(p.kind is p.VAR_KEYWORD for p in accepts.values()):
            self.inputs["use_cache"] = False

    def findings(self) -> Findings:
        attention_paths = {b.index: watched(self.module, b.self_attn) for b in self.blocks if b.self_attn is not None}
        several = {
            (b.index, i): dataclasses.replace(b, self_attn=part, mixer=part)
            for b in self.blocks
            for i, part in enumerate(b.attentions)
        }
        several_paths = {at: watched(self.module, block.self_attn) for at, block in several.items() if block.self_attn}
        layer_paths = [b.path for b in self.blocks]
        inside = [*attention_paths.values(), *several_paths.values()]
        routers = [path for b in self.blocks if (path := router_path(self.module, b)) is not None]
        paths = [*dict.fromkeys([*layer_paths, *(p for ps in inside for p in ps), *routers])]
        with (edges := self.edges()):
            current = record_operations(self.module, paths, self.run)
        eager: Operations | None = current
        if not is_eager(self.module) and inside:
            try:
                with eagerly(self.module):
                    eager = record_operations(self.module, paths, self.run)
            except Exception:  # a model whose eager attention does not run has no probabilities to offer
                eager = None
        whole = eager or current
        found = Findings(ticks=whole.ticks, texts={**current.texts, **whole.texts})
        search = Routers(self, edges, whole)
        for block in self.blocks:
            found.attention.append(self.attention(block, attention_paths.get(block.index), edges, current, eager))
            found.neurons.append(self.neurons(block, edges))
            found.shared_neurons.append(self.shared_neurons(block, edges))
            found.routers.append(search.of(block))
            found.ends.update(self.ends(block, edges))
        for at, block in several.items():
            found.several[at] = self.attention(block, several_paths[at], edges, current, eager)
        if eager is not None and found.attention:
            self.prove_heads([*found.attention, *found.several.values()], [*self.blocks, *several.values()], edges)
        return found

    def edges(self, only: set[str] | None = None) -> _Edges:
        """What enters and leaves the layers' modules (or only those at some paths), while the block runs."""
        return _Edges(self.module, self.blocks, only)

    def run(self, until: str | None = None) -> None:
        """One forward pass of the plain module, as far as the end of the last layer, or of the layer at `until`."""
        path = self.blocks[-1].path if until is None else until
        last = self.module.get_submodule(path)
        once = sum(self.module.get_submodule(block.path) is last for block in self.blocks) == 1
        if not once or path in self.model.repeated:
            self.module(**self.inputs)
            return

        def stop(*_: Any) -> None:
            raise _LastLayer

        handle = last.register_forward_hook(stop)
        try:
            self.module(**self.inputs)
        except _LastLayer:
            pass
        finally:
            handle.remove()

    def attention(
        self, block: Layer, paths: list[str] | None, edges: _Edges, current: Operations, eager: Operations | None
    ) -> Attention | None:
        if paths is None or block.self_attn is None:
            return None
        result = edges.output(block.self_attn.exit)
        out = (
            None
            if result is None
            else ends_in(edges.linears(block.self_attn), result, edges.arguments(block.self_attn), self.tolerance)
        )
        return find_attention(block, paths, current, eager, out, self.model.num_heads, self.tolerance)

    def prove_heads(self, attention: list[Attention | None], blocks: list[Layer], edges: _Edges) -> None:
        """Where W_O's input is not simply probabilities times values, find its heads by what one of them moves.

        Where they are mixed before W_O, by one more projection (DeepSeek-V4's, of groups of heads), they are that one's
        input.
        """
        proven: dict[tuple, tuple[int | None, int | None]] = {}
        for inside, block in zip(attention, blocks, strict=True):
            if inside is None or inside.exact or inside.out is None or "attention_head_outputs" not in inside.places:
                continue
            operations = _operations_of(inside.places.get("attention_probabilities"))
            heads = inside.heads or 0
            if not operations or heads < 2:
                continue
            assert block.self_attn is not None
            feeding = edges.feeding(block.self_attn, inside.out, self.tolerance)
            kind = (
                *(o.labels for o in operations),
                *(_generic(o.path) for o in operations),
                _generic(inside.out),
                heads,
            )
            if kind not in proven:
                edits = {(o.path, o.labels): without_first_head for o in operations}
                paths = list(dict.fromkeys(o.path for o in operations))
                before, after = self.edges(), self.edges()
                with eagerly(self.module):
                    with before:
                        self.run()
                    with after:
                        record_operations(self.module, paths, self.run, edits=edits)
                counts = [
                    heads_of(before.given[path].flatten(2), after.given[path].flatten(2), heads, inside.value_dim)
                    if path is not None and before.given[path].dim() > 2
                    else None
                    for path in (inside.out, feeding)
                ]
                proven[kind] = counts[0], counts[1]
            direct, grouped = proven[kind]
            names = ("attention_head_outputs", "attention_head_contributions")
            inside.out_heads = direct or grouped
            if direct is None and grouped is not None and feeding is not None:
                inside.before_out = (feeding, tuple(edges.given[feeding].shape[2:]))
            for name in names:
                if inside.out_heads is None:
                    del inside.places[name]
                    inside.reasons[name] = (
                        f"the heads are mixed before the projection that ends attention ({inside.out})"
                    )
                elif direct is None:
                    assert feeding is not None
                    inside.places[name] = split_heads(Site(feeding, "input"), inside.out_heads, grouped=True)
                elif direct != heads:
                    inside.places[name] = split_heads(Site(inside.out, "input"), direct)

    def neurons(self, block: Layer, edges: _Edges) -> Place | str:
        if block.mlp is None:
            return "the layer has no MLP"
        if block.mixture_of_experts:
            return "a mixture of experts has no one set of neurons: each expert runs on the tokens routed to it"
        result = edges.output(block.mlp.exit)
        if result is None:
            return "the layer does not run on text"
        linears = edges.linears(block.mlp)
        found = ends_in(linears, result, edges.arguments(block.mlp), self.tolerance, multiples=True)
        if found is not None:
            return Site(found[0], "input")
        for path, _, made in linears:  # RWKV's is gated by another projection of its input
            for other, _, gate in linears:
                alike = other != path and made.shape == gate.shape == result.shape
                if alike and same(made * gate.sigmoid(), result, self.tolerance):
                    return Site(path, "input")
        return f"the feed-forward ({block.mlp}) does not end in one projection"

    def shared_neurons(self, block: Layer, edges: _Edges) -> Place | str:
        """The neurons of the expert that runs on all tokens, beside those that are chosen."""
        if block.mlp is None or not block.mixture_of_experts:
            return "the layer has no mixture of experts"
        result = edges.output(block.mlp.exit)
        if result is None:
            return "the layer does not run on text"
        others = [p.path or p.entry for p in (block.self_attn, block.mixer, block.mlp) if p is not None]
        mixers = tuple(f"{path}." for path in others[:-1])
        for path in edges.order:
            inner = path.removeprefix(f"{block.path}.")
            one_of_many = any(piece.isdigit() for piece in inner.split("."))
            if inner == path or one_of_many or path in others or path.startswith(mixers) or path not in edges.made:
                continue
            linears = edges.linears(Part(path, path, path))
            made = edges.made[path]
            if len(linears) < 2 or made.numel() != result.numel() or made.shape[-1] != result.shape[-1]:
                continue
            found = ends_in(linears, made, edges.all_given.get(path, []), self.tolerance, multiples=True)
            if found is not None:
                return Site(found[0], "input")
        return "no expert that runs on all tokens, and ends in one projection, was seen"

    def ends(self, block: Layer, edges: _Edges) -> Iterator[tuple[str, str]]:
        for part in (block.self_attn, block.mixer, block.mlp):
            if part is None or (result := edges.output(part.exit)) is None:
                continue
            for path, made in edges.made.items():
                if path.startswith(f"{part.exit}.") and made.shape == result.shape and torch.equal(made, result):
                    yield path, part.exit


def _operations_of(place: Place | None) -> list[Inside]:
    """The operations a place consists of."""
    if isinstance(place, Everywhere):
        return [o for p in place.places for o in _operations_of(p)]
    if isinstance(place, View):
        return _operations_of(place.place)
    return [place] if isinstance(place, Inside) else []


def _generic(path: str) -> str:
    return ".".join("*" if piece.isdigit() else piece for piece in path.split("."))


class _LastLayer(Exception):
    """The probe has gone through all layers."""


class _Edges:
    """What goes into and comes out of the modules of every layer, kept while the probe runs."""

    def __init__(self, root: nn.Module, blocks: tuple[Layer, ...], only: set[str] | None = None) -> None:
        self.root, self.blocks, self.only = root, blocks, only
        self.given: dict[str, torch.Tensor] = {}
        self.made: dict[str, torch.Tensor] = {}
        self.raw: dict[str, Any] = {}
        self.all_given: dict[str, list[torch.Tensor]] = {}
        self.order: list[str] = []
        self.handles: list[Any] = []

    def __enter__(self) -> _Edges:
        for block in self.blocks:
            for name, module in self.root.get_submodule(block.path).named_modules():
                path = f"{block.path}.{name}" if name else block.path
                if self.only is not None and path not in self.only:
                    continue
                self.handles.append(module.register_forward_pre_hook(self.before(path), with_kwargs=True))
                self.handles.append(module.register_forward_hook(self.after(path)))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def before(self, path: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            streams = [
                x.detach().clone()
                for x in (*args, *kwargs.values())
                if isinstance(x, torch.Tensor) and x.is_floating_point()
            ]
            if streams and path not in self.given:
                self.given[path], self.all_given[path] = streams[0], streams

        return hook

    def after(self, path: str) -> Any:
        def hook(_: nn.Module, args: tuple, output: Any) -> None:
            if path not in self.raw:
                self.raw[path] = output
                self.order.append(path)
                first = output[0] if isinstance(output, (tuple, list)) and output else output
                if isinstance(first, torch.Tensor):
                    self.made[path] = first.detach().clone()

        return hook

    def input(self, path: str) -> torch.Tensor | None:
        return self.given.get(path)

    def output(self, path: str) -> torch.Tensor | None:
        return self.made.get(path)

    def arguments(self, part: Part) -> list[torch.Tensor]:
        """All floating tensors a part was called with."""
        return self.all_given.get(part.path or part.entry, [])

    def feeding(self, part: Part, path: str, tolerance: float) -> str | None:
        """The linear module whose output, as it is, another one of the part is given."""
        entering = self.given[path]
        for other, _, made in reversed(self.linears(part)):
            alike = other != path and made.numel() == entering.numel() and made.shape[:2] == entering.shape[:2]
            if alike and same(made.flatten(2), entering.flatten(2), tolerance):
                return other
        return None

    def linears(self, part: Part) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """(path, input, output) of the linear modules of a part, in the order in which they ended."""
        found = []
        for path in self.order:
            inside = any(path == top or path.startswith(f"{top}.") for top in (part.path or part.entry, part.exit))
            if inside and path in self.given and path in self.made and is_linear(self.root.get_submodule(path)):
                found.append((path, self.given[path], self.made[path]))
        return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one matrix: torch's Linear, GPT-2's Conv1D, or a quantised or adapted one."""
    if isinstance(module, (nn.Embedding, nn.ModuleList)) or "norm" in type(module).__name__.lower():
        return False
    weight = getattr(module, "weight", None)
    matrix = isinstance(weight, torch.Tensor) and weight.dim() == 2
    return matrix or ("Linear" in type(module).__name__ and not list(module.children()))


@contextlib.contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """In eval mode, with the global random state and the states that modules keep (RecurrentGemma's) unchanged."""
    kept = [(m, dict(vars(m))) for m in module.modules()]
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for m in training:
            m.training = True
        for m, before in kept:
            for name in held(m):
                if name in before:
                    m.__dict__[name] = before[name]
                else:
                    del m.__dict__[name]


def held(module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that a module holds and that are neither parameters nor buffers."""
    return {name: x for name, x in vars(module).items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
