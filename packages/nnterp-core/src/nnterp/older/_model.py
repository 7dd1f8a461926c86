"""What 1.x's model could do under names that new code does not need."""

from __future__ import annotations

from typing import Any

from nnsight import LanguageModel
from torch import nn

from nnterp.facts import Facts
from nnterp.loading import prefix_free
from nnterp.named_transformer import NamedTransformer
from nnterp.older._accessors import OlderLayerAccessor, OlderModuleListAccessor
from nnterp.older._backbone import bind_backbone
from nnterp.table import LABELS, Label


class OlderModel(NamedTransformer, LanguageModel):
    """`NamedTransformer` with the spellings of 1.x, an `nnsight.LanguageModel` as it was there.

    `model.model` is the module that holds the layers, `model._model` the HuggingFace module, and accessors of layers
    have `get_module` and `returns_tuple`.
    """

    def adopt(self, facts: Facts) -> None:
        """Take over what was learnt of this model, and bind the names of its anatomy and backbone."""
        NamedTransformer.adopt(self, facts)
        bind_backbone(self, facts.anatomy)

    @property
    def _model(self) -> nn.Module:
        return self._module

    @property
    def attentions(self) -> OlderModuleListAccessor:
        """The attention module of each layer that has one: `model.attentions[i]`."""
        return OlderModuleListAccessor(self, "self_attn", "attentions")

    @property
    def mixers(self) -> OlderModuleListAccessor:
        """The sequence mixer of each layer, of any kind: `model.mixers[i]`."""
        return OlderModuleListAccessor(self, "mixer", "mixers")

    @property
    def mlps(self) -> OlderModuleListAccessor:
        """The feed-forward module of each layer that has one: `model.mlps[i]`."""
        return OlderModuleListAccessor(self, "mlp", "mlps")

    @property
    def add_prefix_false_tokenizer(self) -> Any:
        """A copy of the tokenizer that does not put a space before the first word."""
        made = self.__dict__.setdefault("_prefix_free", [])  # made once, when it is first asked for
        if not made:
            made.append(prefix_free(self.tokenizer))
        return made[0]

    def detect_layer_output_type(self) -> None:
        """Learn whether layers return tuples: `validate()`, unless the model was proven before."""
        if not self.readout.returns:
            self.validate()  # type: ignore[operator]  # of `StandardizedTransformer`


def _accessor(label: Label) -> property:
    def read(self: OlderModel) -> OlderLayerAccessor:
        return OlderLayerAccessor(self, label)

    return property(read, doc=f"{label.description} {label.shape}")


for _label in LABELS.values():
    if _label.per_layer:
        setattr(OlderModel, _label.name, _accessor(_label))
