"""`session`, `scan` and `edit` of a model: nnsight's, with tracers that refuse what would silently do nothing."""

from __future__ import annotations

from typing import Any

from nnsight import TransformersModel

from nnterp.named_transformer import NamedTransformer
from nnterp.traced_block._cells import know_cell
from nnterp.traced_block._tracer import EditTracer, ScanTracer, SessionTracer


class OpeningTransformer(NamedTransformer):
    """A model whose blocks are opened by nnterp's tracers."""

    def session(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's `session`: several traces in one block, with `remote=True` one request; returns its tracer.

        Raises:
            ValueError: Something, such as a steering, follows the session in its `with`.
        """
        know_cell()
        if kwargs.get("remote") or kwargs.get("backend") is not None:
            self._prepare_request()
        kwargs.setdefault("tracer_cls", SessionTracer)
        return TransformersModel.session(self, *args, **kwargs)

    def scan(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's `scan`: shapes without weights; returns its tracer.

        Raises:
            ValueError: Something, such as a steering, follows the scan in its `with`.
        """
        fn = kwargs.pop("fn", None)
        return ScanTracer(self, self._call if fn is None else fn, *args, **kwargs)

    def edit(self, *, inplace: bool = False, backend: Any = None) -> Any:
        """nnsight's `edit`: a block that runs in every later trace, of a copy or of this model; returns its tracer.

        Raises:
            ValueError: A steering stands, which the copy would keep for good; or something follows the edit in its
                `with`.
        """
        if self.standing and not inplace:
            raise ValueError(
                "edit() makes a copy of the model, which would keep the steering that stands now for good. Leave the "
                "`with model.steering(...)` first, and steer the copy: `with edited.steering(...)`."
            )
        return EditTracer(self, inplace=inplace, backend=backend)
