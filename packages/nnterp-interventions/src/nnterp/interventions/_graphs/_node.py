"""One node of an attribution graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["feature", "error", "embedding", "logit"]


@dataclass(frozen=True)
class GraphNode:
    """A node of an attribution graph.

    Attributes:
        kind: "feature" (of a transcoder), "error" (what a transcoder misses of its feed-forward), "embedding" (the
            stream entering the first layer) or "logit".
        layer: The layer of a feature or error; None of others.
        position: Its position in the prompt; that of the last token for a logit.
        feature: A feature's id in its transcoder; the token id of an embedding, and of a logit its first token's.
        activation: A feature's activation; None of others.
        probability: A logit's probability; None of others, and of logits that are differences.
        label: A token's text, or what a logit is of; bytes that are part of a character as "⟨F0⟩".

    Example:
        transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in range(8)}
        graph = attribution_graph(model, transcoders, "The capital of Japan is", max_features=50)
        print(graph.nodes[-1].kind)  # → logit
    """

    kind: Kind
    layer: int | None
    position: int
    feature: int | None = None
    activation: float | None = None
    probability: float | None = None
    label: str = ""

    def __str__(self) -> str:
        if self.kind == "feature":
            return f"L{self.layer} F{self.feature} @{self.position}"
        if self.kind == "error":
            return f"L{self.layer} error @{self.position}"
        return f"{self.kind} {self.label!r}" + (f" @{self.position}" if self.kind == "embedding" else "")
