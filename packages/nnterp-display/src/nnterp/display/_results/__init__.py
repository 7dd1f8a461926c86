"""Readers of results, one for each figure: they take the arrays, labels and title to draw out of a result object.

Figures import their reader from here; nothing here imports a figure.
"""
