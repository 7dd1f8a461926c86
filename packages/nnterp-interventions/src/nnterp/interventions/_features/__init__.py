"""Dictionaries and a model: whether they belong together, and what their features stand for."""

from nnterp.interventions._features._fit import DictionaryFit, dictionary_fit
from nnterp.interventions._features._report import FeatureReport, feature_report
from nnterp.interventions._features._site import DictionaryMismatch

__all__ = ["DictionaryFit", "DictionaryMismatch", "FeatureReport", "dictionary_fit", "feature_report"]
