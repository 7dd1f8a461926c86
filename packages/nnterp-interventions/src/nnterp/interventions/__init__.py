"""Interventions on any HuggingFace causal language model: lenses, patchscopes, patching, steering and ablation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnterp.interventions._names import *  # noqa: F403
    from nnterp.interventions._names import __all__ as __all__
else:
    from nnterp.lazy import names_on_demand

    __getattr__, __dir__ = names_on_demand(__name__, "_names")
