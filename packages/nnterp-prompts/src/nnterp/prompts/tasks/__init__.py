"""Tasks of published circuits as pairs of a clean and a corrupted prompt, for any tokenizer.

>>> from nnterp.prompts.tasks import ioi
>>> task = ioi(model.tokenizer, n=16)
>>> task.clean[0], task.corrupted[0], task.correct[0], task.wrong[0]
"""

from nnterp.prompts.tasks._capitals import capitals
from nnterp.prompts.tasks._greater_than import greater_than
from nnterp.prompts.tasks._ioi import ioi
from nnterp.prompts.tasks._task import Task

__all__ = ["Task", "capitals", "greater_than", "ioi"]
