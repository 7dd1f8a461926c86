"""Which model a lens was fitted on, and whether another is the same: by its weights, and by what it computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from nnterp.identity import config_digest, settings_of_model
from nnterp.interventions._fitted._streams import require_one_stream
from nnterp.interventions._results import versions
from nnterp.interventions._vectors._belonging import identity_of, short_name
from nnterp.standing import unsteered
from nnterp.warn import warn

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_PROBE = 12  # tokens
_COMPARED = {"model_class", "config", "edits", "dtype", "weights"}  # of the settings of a model
_CLOSE = 0.03  # relative distance of two computations of the probe, which half precision does not exceed


@dataclass(frozen=True, eq=False)
class Origin:
    """The model that a lens was fitted on.

    Attributes:
        model, revision: Name, and the revision that was asked for; None if unknown.
        num_layers: Layers of its stream.
        settings: Class, dtype, config, edits and weights, as digests; empty if unknown.
        versions: Of the packages.
        certified: Whether the certificate was complete and without a failure.
        probe: `[vocab]`, the logits after a fixed row of tokens, float32, on the CPU; None if unknown.
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
        """The origin of a lens that is being fitted on this model, whose weights are loaded."""
        certificate = model.certificate
        return cls(
            identity_of(model)["model"],
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
        """What `record` wrote.

        Raises:
            ValueError: It is something else.
        """
        if not isinstance(record, dict) or set(record) != {own.name for own in fields(cls)} - {"probe"}:
            raise ValueError("It does not say which model it was fitted on.")
        origin = cls(**record, probe=probe)
        texts = all(value is None or isinstance(value, str) for value in (origin.model, origin.revision))
        number = isinstance(origin.num_layers, int) and not isinstance(origin.num_layers, bool)
        tables = isinstance(origin.settings, dict) and isinstance(origin.versions, dict)
        known = tables and (not origin.settings or origin.settings.keys() >= _COMPARED)
        if not (texts and number and known and origin.certified in (None, True, False)):
            raise ValueError(f"What it says of the model it was fitted on has another form: {record!r:.200}.")
        if probe is not None and (probe.dim() != 1 or not probe.is_floating_point()):
            raise ValueError(f"The logits of its model are {probe.dtype} {list(probe.shape)}, not one row of numbers.")
        return origin


@torch.no_grad()
def probe_of(model: StandardizedTransformer) -> torch.Tensor:
    """The logits after a fixed row of tokens, `[vocab]`, float32, on the CPU, of the model without steerings."""
    size = model.vocab_size or 2
    ids = torch.tensor([[(37 * i + 11) % size for i in range(_PROBE)]])
    with unsteered(model), model.trace({"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        last = model.logits[0, -1].save()
    return last.detach().float().cpu()


class Belonging:
    """Checks whether models are the one a lens was fitted on. A model that has not changed since is not run again."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._known: WeakKeyDictionary[torch.nn.Module, set[tuple]] = WeakKeyDictionary()

    def check(self, model: StandardizedTransformer, width: int, strict: bool) -> None:
        """See `Lens.check`; `width` is that of the maps."""
        origin, name = self.origin, identity_of(model)["model"]
        of = f"The lens was fitted on {origin.model or 'an unknown model'}"
        own = require_one_stream(model, "A lens")
        if width != own:
            raise ValueError(f"{of}, whose stream has width {width}; that of {name} has width {own}.")
        if origin.num_layers != model.num_layers:
            raise ValueError(f"{of}, which has {origin.num_layers} layers; {name} has {model.num_layers}.")
        known, state = self._known.setdefault(model._module, set()), _state(model)
        if state in known:
            return
        differs = self._difference(model, name)
        if differs and strict:
            raise ValueError(
                f"{of} (revision {origin.revision or 'main'}), and {name} is not the same: {differs}. Fit a lens on "
                "this model, or load this one with strict=False to be warned only."
            )
        if model.dispatched:
            known.add(state)
        if differs:
            warn(f"{of}, and {name} is not the same: {differs}.")

    def _difference(self, model: StandardizedTransformer, name: str) -> str:
        """What differs between the model and the lens's own, in words; "" if nothing is known to."""
        origin, then = self.origin, self.origin.settings
        if not then:
            foreign = origin.model is not None and short_name(origin.model) != short_name(name)
            return "its name is another" if foreign else ""
        if then["model_class"] != model.anatomy.model_class:
            return f"it is a {model.anatomy.model_class}, and was a {then['model_class']}"
        if origin.probe is None or not model.dispatched:
            return "its config is another" if then["config"] != config_digest(model._module.config) else ""
        if origin.probe.shape[-1] != model.vocab_size:
            return f"its vocabulary has {model.vocab_size} tokens, and had {origin.probe.shape[-1]}"
        now = probe_of(model)
        off = float((now - origin.probe).norm() / origin.probe.norm().clamp(min=1e-30))
        if not off <= _CLOSE:
            return (
                f"its logits after a fixed row of tokens differ by {off:.2g} (relative): other weights, an edit, or "
                f"another forward pass (the lens was made with transformers {origin.versions.get('transformers')})"
            )
        with unsteered(model):
            here = settings_of_model(model)
        if then["edits"] != here["edits"]:
            return "it has other edits (model.edit)"
        if then["dtype"] == here["dtype"] and then["weights"] != here["weights"]:
            return f"its weights are others, though its logits differ by {off:.2g} only"
        return ""


def _state(model: StandardizedTransformer) -> tuple:
    """What changes when a model's weights are edited or replaced."""
    weights = [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in model._module.parameters()]
    return hash(tuple(weights)), len(getattr(model, "_edits", ()))
