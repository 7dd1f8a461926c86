"""Find attention's inside: heads, probabilities, scores, queries, keys and values, each recognised by its numbers.

A probe is run with every operation of the attention modules watched, once as the model computes attention and once
eagerly. The probabilities are what leaves the softmax and still holds its numbers when it meets the values; the values
are what the probabilities are multiplied with to give what is observed after them; queries and keys are the two tensors
whose product is observed among the scores. No name of a module, variable or operation decides anything, so a model
written next year is found like GPT-2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from nnterp.anatomy import Part
from nnterp.discovery._probe import LENGTH as PROBE_LENGTH
from nnterp.discovery._probe import ROWS as PROBE_ROWS
from nnterp.discovery._recording import Operation, Recording
from nnterp.tensors import same
from nnterp.traced import PARTS, Everywhere, Inside, Layout, Place, Site, over


@dataclass
class Attention:
    """One layer's attention: where each of its values is served, and why those that are not are not.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads, where they were found.
        value_dim: Width of one head's values, where they were found.
        out: Path of the projection that ends attention (W_O), if one does.
        before_out: (path, shape of one position's input) of a projection that stands between the heads and W_O.
        out_heads: Heads in what W_O (or what stands before it) is given.
        exact: Whether the input of W_O is the probabilities times the values, which proves its heads.
        places: Value name → place.
        reasons: Value name → why it has none.
    """

    heads: int | None = None
    kv_heads: int | None = None
    value_dim: int | None = None
    out: str | None = None
    before_out: tuple[str, tuple[int, ...]] | None = None
    out_heads: int | None = None
    exact: bool = False
    places: dict[str, Place] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def with_code(root: nn.Module, part: Part) -> list[str]:
    """The modules of an attention that have code of their own: neither torch's nor a norm."""
    top = part.path or part.entry
    paths = []
    for name, module in root.get_submodule(top).named_modules():
        leaf_norm = "norm" in type(module).__name__.lower() and not list(module.children())
        if not leaf_norm and not type(module).__module__.startswith("torch."):
            paths.append(f"{top}.{name}" if name else top)
    return paths


def find_attention(
    paths: list[str],
    current: Recording,
    eager: Recording,
    out: tuple[str, torch.Tensor] | None,
    heads: int | None,
    tolerance: float,
) -> Attention:
    """Find one layer's attention in what was recorded.

    Args:
        paths: The modules of its attention that have code of their own.
        current: Their operations as the model computes attention.
        eager: The same computed eagerly, or `current` again for a model that cannot.
        out: Path of the projection that ends attention and what it was given, if one does.
        heads: The config's number of heads.
        tolerance: The largest relative error that counts as equal.
    """
    return _Search(paths, current, eager, out, heads, tolerance).attention()


def split_heads(place: Place, heads: int, grouped: bool = False) -> Place:
    """`[batch, seq, heads × dim]` shown as `[batch, seq, heads, dim]`; `grouped` if the last axis is cut in groups."""
    return over(place, Layout("[batch, seq, groups, ...]" if grouped else "[batch, seq, heads × dim]", heads))


@dataclass(frozen=True)
class _Candidate:
    """A tensor that was seen, and the place it was seen at."""

    place: Inside
    tensor: torch.Tensor
    when: int
    both: bool  # whether it is there however attention is computed


class _Search:
    def __init__(self, paths, current, eager, out, heads, tolerance) -> None:
        self.current: Recording = current
        self.eager: Recording = eager
        self.out: tuple[str, torch.Tensor] | None = out
        self.tolerance: float = tolerance
        self.found = Attention(heads=heads, out=out[0] if out else None)
        self.product: torch.Tensor | None = None  # probabilities times values, [batch, query, heads, dim]
        self.operations = [o for p in paths for o in eager.operations_of(p)]
        self.operations.sort(key=lambda o: o.began)
        self.known = {(o.path, o.labels): o for p in paths for o in current.operations_of(p)}

    def attention(self) -> Attention:
        softmaxes = self.softmaxes()
        if not softmaxes:
            for name in (
                "attention_probabilities",
                "attention_scores",
                "attention_queries",
                "attention_keys",
                "attention_values",
            ):
                self.found.reasons[name] = "no softmax over key positions runs in its attention"
        else:
            self.inside(softmaxes)
        self.head_outputs()
        return self.found

    # -- the softmax ------------------------------------------------------------------------------------------------

    def softmaxes(self) -> list[Operation]:
        """The softmax over keys, and its twins where the same one is computed several times (DiffLlama)."""
        found: list[Operation] = []
        for operation in self.operations:
            output = operation.output
            if operation.function is None or operation.times > 1 or not isinstance(output, torch.Tensor):
                continue
            if "softmax" not in operation.called.lower() and "softmax" not in operation.labels[-1].lower():
                source = getattr(operation.function, "__class__", None)
                if source is None or "softmax" not in source.__name__.lower():
                    continue
            if not self.is_pattern(output):
                continue
            if any(operation.labels[: len(f.labels)] == f.labels and operation.path == f.path for f in found):
                continue  # the softmax inside the softmax
            if found and not same(output, found[0].output, self.tolerance):
                continue
            found.append(operation)
        return found

    def is_pattern(self, tensor: torch.Tensor) -> bool:
        if not tensor.is_floating_point() or tensor.dim() not in (3, 4) or tensor.shape[-1] < tensor.shape[-2]:
            return False
        if tensor.dim() == 4:
            return tensor.shape[0] == PROBE_ROWS and tensor.shape[2] >= PROBE_LENGTH
        return tensor.shape[0] % PROBE_ROWS == 0 and tensor.shape[0] > PROBE_ROWS and tensor.shape[1] >= PROBE_LENGTH

    def inside(self, softmaxes: list[Operation]) -> None:
        softmax = softmaxes[0]
        pattern = self.by_head(softmax.output)
        self.found.heads = heads = pattern.shape[1]
        places, last = [], softmax
        probs = pattern
        for one in softmaxes:
            chosen = self.probabilities(one)
            layout = (
                Layout("[batch × heads, query, key]", heads)
                if chosen.output.dim() == 3
                else Layout("[batch, seq, heads, ...]")
            )
            places.append(over(Inside(chosen.path, chosen.labels, "output"), layout))
            if one is softmax:
                last, probs = chosen, self.by_head(chosen.output)
        self.found.places["attention_probabilities"] = places[0] if len(places) == 1 else Everywhere(tuple(places))
        scores = [p for p in (self.scores(one, probs.shape[-1]) for one in softmaxes) if p is not None]
        if len(scores) == len(softmaxes):
            self.found.places["attention_scores"] = scores[0] if len(scores) == 1 else Everywhere(tuple(scores))
        else:
            self.found.reasons["attention_scores"] = (
                "no operation holds what the softmax is given, as one tensor over the keys"
            )
        keys = self.queries_and_keys(softmaxes, probs)
        values = self.values(softmax, last, probs, keys)
        if len(softmaxes) > 1 and "attention_values" in self.found.places:
            self.values_in_parts(softmaxes, values)

    def by_head(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dim() == 4 else tensor.reshape(PROBE_ROWS, -1, *tensor.shape[1:])

    def frame(self, softmax: Operation) -> list[Operation]:
        """The operations of the function in which the softmax runs."""
        return [
            o
            for o in self.operations
            if o.path == softmax.path and o.labels[:-1] == softmax.labels[:-1] and o.times == 1
        ]

    def probabilities(self, softmax: Operation) -> Operation:
        """The last operation that still holds the softmax's numbers (without the column of a sink).

        One that runs after a product was already given them (ProphetNet reshapes its for the output) holds a copy.
        """
        chosen = softmax
        whole = self.by_head(softmax.output)
        options = [whole, whole[..., :-1]]

        def holds(tensor: torch.Tensor) -> bool:
            return self.is_pattern(tensor) and any(same(self.by_head(tensor), o, self.tolerance) for o in options)

        used = min(
            (
                o.began
                for o in self.frame(softmax)
                if o.began > softmax.ended and o.called in _PRODUCTS and any(holds(t) for _, t in o.tensors_in())
            ),
            default=math.inf,
        )
        for operation in self.frame(softmax):
            output = operation.output
            if not softmax.began < operation.began < used:
                continue
            if not isinstance(output, torch.Tensor) or not self.is_pattern(output):
                continue
            if output.shape[0] * (output.shape[1] if output.dim() == 4 else 1) != whole.shape[0] * whole.shape[1]:
                continue
            if holds(output):
                chosen = operation
        return chosen

    def scores(self, softmax: Operation, keys: int) -> Place | None:
        """What the softmax is given, without the column of a sink."""
        given = next(((k, t) for k, t in softmax.tensors_in() if self.is_pattern(t)), None)
        pattern = None if given is None else self.by_head(given[1])
        heads = self.found.heads or 1
        if given is not None and pattern is not None and pattern.shape[-1] == keys:
            layout = (
                Layout("[batch × heads, query, key]", heads)
                if given[1].dim() == 3
                else Layout("[batch, seq, heads, ...]")
            )
            return over(Inside(softmax.path, softmax.labels, "input", given[0]), layout)
        for operation in reversed(self.frame(softmax)):
            output = operation.output
            if operation.ended >= softmax.began or not isinstance(output, torch.Tensor) or not self.is_pattern(output):
                continue
            mine = self.by_head(output)
            if (
                mine.shape[-1] == keys
                and mine.shape[1] == heads
                and self.softmax_of(mine, self.by_head(softmax.output)[..., :keys])
            ):
                layout = (
                    Layout("[batch × heads, query, key]", heads)
                    if output.dim() == 3
                    else Layout("[batch, seq, heads, ...]")
                )
                return over(Inside(operation.path, operation.labels, "output"), layout)
        return None

    def softmax_of(self, scores: torch.Tensor, probs: torch.Tensor) -> bool:
        """Whether normalising `scores` gives `probs` up to one factor per row (a sink takes a share of every row)."""
        made = scores.double().softmax(-1)
        share = probs.double().sum(-1, keepdim=True)
        return same(made * share, probs.double(), max(self.tolerance, 1e-5))

    # -- what enters ------------------------------------------------------------------------------------------------

    def entering(self, softmax: Operation) -> Iterator[_Candidate]:
        """Tensors seen before the softmax or just after it, best place first.

        First what is handed to the function in which the softmax runs, which is the same function call however
        attention is computed; then what matrix products are given; then what operations return, latest first.
        """
        for depth in range(1, len(softmax.labels)):
            labels = softmax.labels[:depth]
            for operation in self.operations:
                if operation.path == softmax.path and operation.labels == labels:
                    yield from self.arguments(operation)
        frames = {softmax.labels[:depth] for depth in range(len(softmax.labels))}
        near = [o for o in self.operations if o.path == softmax.path and o.labels[:-1] in frames and o.times == 1]
        for operation in near:
            if operation.function is not None and operation.called in _PRODUCTS:
                yield from self.arguments(operation)
        for operation in sorted(near, key=lambda o: -o.ended):
            for key, tensor in operation.tensors_out():
                if tensor.is_floating_point() and tensor.dim() >= 3:
                    yield _Candidate(
                        Inside(operation.path, operation.labels, "output", key),
                        tensor,
                        operation.ended,
                        self.returned_in_both(operation, key, tensor),
                    )

    def arguments(self, operation: Operation) -> Iterator[_Candidate]:
        twin = self.known.get((operation.path, operation.labels))
        theirs = dict(twin.tensors_in()) if twin is not None else {}
        for key, tensor in operation.tensors_in():
            if tensor.is_floating_point() and tensor.dim() >= 3:
                place = Inside(operation.path, operation.labels, "input", key)
                yield _Candidate(place, tensor, operation.began, self.alike(tensor, theirs.get(key)))

    def returned_in_both(self, operation: Operation, key: int | None, tensor: torch.Tensor) -> bool:
        twin = self.known.get((operation.path, operation.labels))
        return twin is not None and self.alike(tensor, dict(twin.tensors_out()).get(key))

    def alike(self, mine: torch.Tensor, theirs: torch.Tensor | None) -> bool:
        return theirs is not None and same(mine, theirs, max(self.tolerance * 100, 1e-3))

    def layouts(self, tensor: torch.Tensor, keys: int) -> Iterator[tuple[Layout, torch.Tensor]]:
        """The ways in which a tensor can hold one vector per position and head."""
        heads = self.found.heads or 1
        if tensor.dim() == 4 and tensor.shape[0] == PROBE_ROWS:
            for name, seq in (
                ("[batch, heads, seq, dim]", 2),
                ("[batch, seq, heads, dim]", 1),
                ("[batch, heads, dim, seq]", 3),
            ):
                if tensor.shape[seq] == keys:
                    layout = Layout(name)
                    shown = layout.show(tensor)
                    if heads % shown.shape[2] == 0:
                        yield layout, shown
        if tensor.dim() == 4 and tuple(tensor.shape[:2]) == (keys, PROBE_ROWS) and heads % tensor.shape[2] == 0:
            layout = Layout("[seq, batch, heads, dim]")
            yield layout, layout.show(tensor)
        if tensor.dim() == 3 and tensor.shape[0] == PROBE_ROWS * heads:
            for name, seq in (("[batch × heads, seq, dim]", 1), ("[batch × heads, dim, seq]", 2)):
                if tensor.shape[seq] == keys:
                    layout = Layout(name, heads)
                    yield layout, layout.show(tensor)

    def values(
        self, softmax: Operation, last: Operation, probs: torch.Tensor, of_keys: Inside | None
    ) -> tuple[_Candidate, Layout, torch.Tensor] | None:
        name, keys, heads = "attention_values", probs.shape[-1], probs.shape[1]
        after = [o.output for o in self.operations if o.began > last.began and isinstance(o.output, torch.Tensor)]
        if self.out is not None:
            after.append(self.out[1])
        best: tuple[_Candidate, Layout, torch.Tensor] | None = None
        for candidate in self.entering(softmax):
            if best is not None and (best[0].both or not candidate.both):
                continue
            if candidate.place == of_keys:  # where keys serve as values, they are handed on as both
                continue
            for layout, shown in self.layouts(candidate.tensor, keys):
                made = torch.einsum("bhqk,bkhd->bqhd", probs.double(), self.repeated(shown, heads).double())
                if any(self.is_product(made, observed) for observed in after):
                    best = (candidate, layout, shown)
                    break
        if best is None:
            self.found.reasons[name] = (
                "no tensor was seen whose average under the probabilities is what attention goes on with"
            )
            return None
        candidate, layout, shown = best
        self.product = torch.einsum("bhqk,bkhd->bqhd", probs.double(), self.repeated(shown, heads).double())
        self.found.exact = self.out is not None and same(
            self.product.flatten(2), self.out[1].double(), max(self.tolerance * 10, 1e-4)
        )
        self.found.kv_heads, self.found.value_dim = shown.shape[2], shown.shape[3]
        self.found.places[name] = over(candidate.place, layout)
        return best

    def values_in_parts(
        self, softmaxes: list[Operation], first: tuple[_Candidate, Layout, torch.Tensor] | None
    ) -> None:
        """Values that several calls average a part of each: where the parts are still one tensor.

        DiffLlama's heads are as wide as two (Ye et al. 2024, "Differential Transformer", section 2.1): its calls are
        given one half of the value heads each, and what they return is put side by side.
        """
        name, count = "attention_values", len(softmaxes)
        del self.found.places[name]
        if first is None:
            self.found.reasons[name] = "how its parts belong together can only be told with the weights"
            return
        self.found.exact, self.found.kv_heads, self.product = False, None, None
        self.found.value_dim = first[2].shape[-1] * count
        candidate, layout, _ = first
        parts = [
            layout.show(tensor)
            for place in self.in_every_call(candidate.place, softmaxes)
            for operation in self.operations
            if (operation.path, operation.labels) == (place.path, place.labels)
            for key, tensor in operation.tensors_in()
            if key == place.key
        ]
        for operation in sorted(self.operations, key=lambda o: -o.began):
            if operation.began > softmaxes[0].began or operation.times > 1 or len(parts) != count:
                continue
            for whole in self.arguments(operation):
                if whole.both and whole.tensor.dim() == 4 and self.is_whole(whole.tensor, parts):
                    self.found.kv_heads = whole.tensor.shape[1] // count
                    self.found.places[name] = over(whole.place, Layout(PARTS, count))
                    return
        self.found.reasons[name] = f"the values are averaged in {count} parts, by as many calls"

    def is_whole(self, tensor: torch.Tensor, parts: list[torch.Tensor]) -> bool:
        """Whether the parts are a tensor cut along its heads, each repeated."""
        heads, count = tensor.shape[1], len(parts)
        if heads % count or tensor.shape[0] != PROBE_ROWS or tensor.shape[2] != parts[0].shape[1]:
            return False
        return all(
            part.shape[2] % mine.shape[2] == 0
            and same(mine.repeat(1, 1, part.shape[2] // mine.shape[2], 1), part, self.tolerance)
            for mine, part in zip(tensor.transpose(1, 2).chunk(count, dim=2), parts, strict=True)
        )

    def is_product(self, made: torch.Tensor, observed: torch.Tensor) -> bool:
        if observed.numel() != made.numel():
            return False
        tolerance = max(self.tolerance * 10, 1e-4)
        shapes = (made, made.transpose(1, 2), made.transpose(0, 1))
        return any(observed.shape == m.shape and same(m, observed.double(), tolerance) for m in shapes) or (
            observed.dim() == 3
            and any(
                same(m, observed.double().reshape(m.shape), tolerance)
                for m in (made.flatten(2)[:, :, :], made.transpose(1, 2).flatten(0, 1))
                if m.shape == observed.shape
            )
        )

    @staticmethod
    def repeated(shown: torch.Tensor, heads: int) -> torch.Tensor:
        return shown.repeat_interleave(heads // shown.shape[2], dim=2)

    def queries_and_keys(self, softmaxes: list[Operation], probs: torch.Tensor) -> Inside | None:
        """Find both; returns where the keys are."""
        softmax = softmaxes[0]
        heads, keys = probs.shape[1], probs.shape[-1]
        queries = probs.shape[2]
        scores = [
            self.by_head(o.output).double()
            for o in self.operations
            if o.path == softmax.path
            and o.ended < softmax.began
            and isinstance(o.output, torch.Tensor)
            and self.is_pattern(o.output)
            and self.by_head(o.output).shape[1:] in ((heads, queries, keys), (heads, queries, keys + 1))
        ]
        scores = [s[..., :keys] for s in scores]
        scores += [self.by_head(t).double()[..., :keys] for _, t in softmax.tensors_in() if self.is_pattern(t)]
        options = list(self.entering(softmax))
        best: tuple | None = None
        for q in options:
            for q_layout, q_shown in self.layouts(q.tensor, queries):
                if q_shown.shape[2] != heads or q.when > softmax.began:
                    continue
                for k in options:
                    if best is not None and (best[4] or not (q.both and k.both)):
                        continue
                    if k.when > softmax.began or k.place == q.place:
                        continue
                    for k_layout, k_shown in self.layouts(k.tensor, keys):
                        if k_shown.shape[-1] != q_shown.shape[-1]:
                            continue
                        made = torch.einsum("bqhd,bkhd->bhqk", q_shown.double(), self.repeated(k_shown, heads).double())
                        if any(self.explains(made, s) for s in scores):
                            best = (q.place, q_layout, k.place, k_layout, q.both and k.both)
                            break
                if best is not None and best[4]:
                    break
            if best is not None and best[4]:
                break
        if best is None:
            why = "no two tensors were seen whose product gives the scores, alone or with a bias by distance"
            self.found.reasons["attention_queries"] = self.found.reasons["attention_keys"] = why
            return None
        for name, place, layout in (("attention_queries", best[0], best[1]), ("attention_keys", best[2], best[3])):
            places = self.in_every_call(place, softmaxes)
            shown = [over(p, layout) for p in places]
            self.found.places[name] = shown[0] if len(shown) == 1 else Everywhere(tuple(shown))
        return best[2]

    @staticmethod
    def in_every_call(place: Inside, softmaxes: list[Operation]) -> list[Inside]:
        """The same argument of every call in which the softmax runs, where there are several."""
        depth = len(place.labels)
        if len(softmaxes) == 1 or place.side == "output" or softmaxes[0].labels[:depth] != place.labels:
            return [place]
        return [Inside(s.path, s.labels[:depth], place.side, place.key) for s in softmaxes]

    def explains(self, product: torch.Tensor, scores: torch.Tensor) -> bool:
        """Whether scores are the products times one factor per head, and a bias linear in the distance (ALiBi)."""
        if product.shape != scores.shape:
            return False
        _, heads, queries, keys = product.shape
        i = torch.arange(queries, device=product.device, dtype=product.dtype)[:, None].expand(queries, keys)
        j = torch.arange(keys, device=product.device, dtype=product.dtype)[None, :].expand(queries, keys)
        for head in range(heads):
            y, x = scores[:, head], product[:, head]
            seen = torch.isfinite(y) & (y > -1e4) & (j <= i + keys - queries)[None]
            if seen.sum() < 8:
                return False
            columns = torch.stack(
                [x[seen], torch.ones_like(x[seen]), i.expand_as(y)[seen], j.expand_as(y)[seen]], dim=1
            )
            fit = torch.linalg.lstsq(columns, y[seen][:, None]).solution
            off = (columns @ fit - y[seen][:, None]).abs().max()
            if fit[0].abs() * x[seen].std() < 1e-6 or off > max(self.tolerance * 10, 1e-4) * y[seen].abs().max().clamp(
                min=1e-6
            ):
                return False
        return True

    # -- the heads ---------------------------------------------------------------------------------------------------

    def head_outputs(self) -> None:
        name, heads = "attention_head_outputs", self.found.heads
        if self.out is None:
            reason = "attention does not end in one projection (W_O) whose input holds the heads side by side"
            place = self.averaged()
            if place is not None:
                self.found.places[name] = place
                self.found.reasons["attention_head_contributions"] = reason
                return
        elif not heads or self.out[1].shape[-1] % heads:
            reason = (
                f"the input of {self.out[0]} has width {self.out[1].shape[-1]}, which is no multiple of {heads} heads"
            )
        else:
            self.found.out_heads = heads
            self.found.places[name] = split_heads(Site(self.out[0], "input"), heads)
            self.found.places["attention_head_contributions"] = self.found.places[name]
            return
        self.found.reasons[name] = self.found.reasons["attention_head_contributions"] = reason

    def averaged(self) -> Place | None:
        """Where the probabilities times the values are returned, however attention is computed."""
        if self.product is None:
            return None
        tolerance = max(self.tolerance * 10, 1e-4)
        for operation in sorted(self.operations, key=lambda o: -o.ended):
            for key, tensor in operation.tensors_out() if operation.times == 1 else ():
                if not tensor.is_floating_point() or not self.returned_in_both(operation, key, tensor):
                    continue
                for layout, shown in self.layouts(tensor, self.product.shape[1]):
                    if shown.shape == self.product.shape and same(shown.double(), self.product, tolerance):
                        return over(Inside(operation.path, operation.labels, "output", key), layout)
        return None


_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")
