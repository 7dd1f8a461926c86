"""One file per engine: how its documentation says to do each thing that is compared.

Each runs in an environment of its own, which has torch, transformers and the engine; so an adapter imports nothing of
nnterp's workspace, except nnterp's own.
"""
