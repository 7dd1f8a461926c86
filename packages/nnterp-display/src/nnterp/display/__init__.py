"""Figures and tables of nnterp's results.

Every figure is a `plotly.graph_objects.Figure`. Functions take plain tensors with labels, or the results of
`nnterp.interventions`, whose `.plot()` calls them. Tokens are shown exactly, and never interpreted as HTML or LaTeX.
"""

from nnterp.display._activations import plot_activations
from nnterp.display._attention import plot_attention
from nnterp.display._attention_text import plot_attention_text
from nnterp.display._beside import side_by_side
from nnterp.display._certificate import plot_certificate
from nnterp.display._circuit import plot_circuit, plot_faithfulness
from nnterp.display._components import plot_components
from nnterp.display._direct import plot_direct_attribution
from nnterp.display._features import plot_features
from nnterp.display._frames import anatomy_to_df, certificate_to_df, prompts_to_df, top_tokens_to_df
from nnterp.display._generation import plot_generation
from nnterp.display._graph import plot_attribution_graph
from nnterp.display._heads import plot_heads
from nnterp.display._lens import plot_lens
from nnterp.display._patching import plot_patching
from nnterp.display._patchscope import plot_patchscope
from nnterp.display._probe import plot_probe
from nnterp.display._save import ImageWriterMissing, save
from nnterp.display._steering import plot_steering
from nnterp.display._surprise import plot_surprise
from nnterp.display._targets import plot_targets
from nnterp.display._text import escape
from nnterp.display._theme import with_theme
from nnterp.display._tokens import plot_tokens
from nnterp.display._topk import plot_topk_tokens
from nnterp.display._view import View
from nnterp.token_text import TokenNames, visible

__all__ = [
    "ImageWriterMissing",
    "TokenNames",
    "View",
    "anatomy_to_df",
    "certificate_to_df",
    "escape",
    "plot_activations",
    "plot_attention",
    "plot_attention_text",
    "plot_attribution_graph",
    "plot_certificate",
    "plot_circuit",
    "plot_components",
    "plot_direct_attribution",
    "plot_faithfulness",
    "plot_features",
    "plot_generation",
    "plot_heads",
    "plot_lens",
    "plot_patching",
    "plot_patchscope",
    "plot_probe",
    "plot_steering",
    "plot_surprise",
    "plot_targets",
    "plot_tokens",
    "plot_topk_tokens",
    "prompts_to_df",
    "save",
    "side_by_side",
    "top_tokens_to_df",
    "visible",
    "with_theme",
]
