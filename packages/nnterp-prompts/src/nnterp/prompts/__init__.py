"""Prompts and targets: the probabilities of chosen tokens or answers over thousands of prompts."""

from nnterp.prompts._errors import CollisionError, MissingScoresWarning, SharedTokenWarning, TokenizationError
from nnterp.prompts._from_tables import pairs_from_table, prompts_from_table
from nnterp.prompts._next_token import next_token_probs, next_token_probs_unsqueeze
from nnterp.prompts._prompt import Prompt, PromptPair
from nnterp.prompts._report import TokenizationReport, tokenization_report
from nnterp.prompts._results import IncompleteRunError, PromptResults
from nnterp.prompts._run import run_prompts
from nnterp.prompts._tables import read_table
from nnterp.prompts._tokens import get_first_tokens, shared_first_tokens

__all__ = [
    "CollisionError",
    "IncompleteRunError",
    "MissingScoresWarning",
    "Prompt",
    "PromptPair",
    "PromptResults",
    "SharedTokenWarning",
    "TokenizationError",
    "TokenizationReport",
    "get_first_tokens",
    "next_token_probs",
    "next_token_probs_unsqueeze",
    "pairs_from_table",
    "prompts_from_table",
    "read_table",
    "run_prompts",
    "shared_first_tokens",
    "tokenization_report",
]
