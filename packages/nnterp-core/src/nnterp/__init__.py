"""nnterp: one interface to the inside of any HuggingFace causal language model."""

from pkgutil import extend_path
from typing import TYPE_CHECKING

__path__ = extend_path(__path__, __name__)

from loguru import logger as _logger

_logger.disable("nnterp")

from nnterp import _siblings  # noqa: E402

_siblings.explain_missing()

if TYPE_CHECKING:
    from nnterp._names import *  # noqa: F403
    from nnterp._names import __all__ as __all__
else:
    from nnterp.lazy import names_on_demand

    __getattr__, __dir__ = names_on_demand(__name__, "_names")
