"""`nnterp.logging` of 1.x: the logger that programs set the level of. nnterp itself writes to loguru, silent by default."""

from __future__ import annotations

import logging

__all__ = ["logger"]

logger: logging.Logger = logging.getLogger("nnterp")
