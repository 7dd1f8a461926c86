"""The logger of 1.x, whose level programs set. nnterp itself writes to loguru, which is silent by default."""

from __future__ import annotations

import logging

__all__ = ["logger"]

logger: logging.Logger = logging.getLogger("nnterp")
