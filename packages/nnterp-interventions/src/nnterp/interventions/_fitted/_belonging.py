"""Which model a lens was fitted on, and whether another is the same: by its config, and by what it computes."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nnterp.identity import config_digest, settings_of_model
from nnterp.interventions._fitted._streams import require_one_stream
from nnterp.interventions._results import versions

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_PROBE = 12  # tokens
_CLOSE = 0.03  # relative distance of two computations of the probe, which half precision does not exceed


@dataclass(frozen=True, eq=False)
class Origin:
    """The model that a lens was fitted on.

    Attributes:
        model, revision: Name, and the revision that was asked for.
        num_layers: Layers of its stream.
        settings: Class, dtype, config and weights, as digests.
        versions: Of the packages.
        certified: Whether the certificate was complete and without a failure.
        probe: `[hidden]`, the last stream of a fixed row of tokens; None if unknown.
    """

    model: str | None
    revision: str | None
    num_layers: int
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    certified: bool | None = None
    probe: torch.Tensor | None = None

    @classmethod
    def of(cls, model: StandardizedTransformer) -> Origin:
        """The origin of a lens that is being fitted on this model."""
        certificate = model.certificate
        return cls(
            str(model.repo_id or model.model_class),
            model.revision,
            model.num_layers,
            {name: value for name, value in settings_of_model(model).items() if name not in ("model", "revision")},
            versions(),
            bool(certificate is not None and certificate.ok and certificate.complete),
            probe_of(model),
        )

    def record(self) -> dict[str, Any]:
        """Everything but the probe, as JSON can hold it."""
        return {name: value for name, value in asdict(self).items() if name != "probe"}

    @classmethod
    def read(cls, record: dict[str, Any], probe: torch.Tensor | None) -> Origin:
        """What `record` wrote."""
        return cls(**record, probe=probe)


@torch.no_grad()
def probe_of(model: StandardizedTransformer) -> torch.Tensor | None:
    """The last stream of a fixed row of tokens, `[hidden]`, float32 on the CPU; None while the model is steered."""
    if model.standing:
        return None
    size = model.vocab_size or 2
    ids = torch.tensor([[(37 * i + 11) % size for i in range(_PROBE)]])
    with model.trace({"input_ids": ids, "attention_mask": torch.ones_like(ids)}) as tracer:
        last = model.layers_output[model.num_layers - 1][0, -1].save()
        tracer.stop()
    return last.detach().float().cpu()


class Belonging:
    """Checks whether models are the one a lens was fitted on; one that was found to be is not run again."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._known: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def check(self, model: StandardizedTransformer, last: int, width: int, strict: bool) -> None:
        """See `Lens.check`; `last` is the highest layer of the lens, `width` that of its maps."""
        origin, name = self.origin, str(model.repo_id or model.model_class)
        of = f"The lens was fitted on {origin.model or 'an unknown model'}"
        own = require_one_stream(model, "A lens")
        if width != own:
            raise ValueError(f"{of}, whose stream has width {width}; that of {name} has width {own}.")
        if origin.num_layers != model.num_layers:
            raise ValueError(f"{of}, which has {origin.num_layers} layers; {name} has {model.num_layers}.")
        if model._module in self._known or model.standing:
            return
        differs = self._difference(model)
        if not differs:
            if model.dispatched:
                self._known.add(model._module)
            return
        text = f"{of} (revision {origin.revision or 'main'}), and {name} is not the same: {differs}"
        if strict:
            raise ValueError(f"{text}. Fit a lens on this model, or load this one with strict=False to be warned only.")
        self._known.add(model._module)
        warnings.warn(f"{text}.", stacklevel=4)

    def _difference(self, model: StandardizedTransformer) -> str:
        """What is another than it was, in words; "" if nothing is known to be."""
        origin = self.origin
        config = model.anatomy.model_class, config_digest(model._module.config)
        known = origin.settings.get("model_class"), origin.settings.get("config")
        if None not in known and known != config:
            return f"its class or config is another ({known[0]} then, {config[0]} now)"
        if origin.probe is None or not model.dispatched:
            return ""
        now = probe_of(model)
        if now is None:
            return ""
        off = float((now - origin.probe).norm() / origin.probe.norm().clamp(min=1e-30))
        if off > _CLOSE or off != off:
            made = origin.versions.get("transformers", "unknown")
            return (
                f"its stream after the last layer differs by {off:.2g} (relative) on a fixed row of tokens: other "
                f"weights, an edit, or another forward pass (the lens was made with transformers {made})"
            )
        return ""
