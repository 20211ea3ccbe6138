"""Which trace of a model serves a batch: torch.fx's, torch.export's, or none.

Every trace is compared with the model on real samples before anything is computed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .batches import Batch
from .exported import MOST_EXPORTS, ExportedModel, shapes_of
from .graph import TracedModel
from .layers import is_plain


class Traces:
    """The traces of one model, made when a batch needs them.

    Args:
        model: in eval mode.
        layers: those that are to be found in a trace; torch.export, which sees into torch's own modules,
            is tried where torch.fx does not find them all.
        pick: takes the logits out of the model's output; only they are compared.

    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        pick: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        self.model = model
        self.pick = pick
        self.layers = [layer for layer in layers if is_plain(layer)]
        self.problem: str | None = None
        self._signature: tuple | None = None
        self._traced: TracedModel | None = None
        self._exported: dict[tuple, ExportedModel | None] = {}
        self._exports = False

    def of(self, batch: Batch) -> TracedModel | None:
        """Return the trace for a batch, or None; ``problem`` then says why there is none."""
        if self._signature is None:
            self._signature = batch.signature()
            self._choose(batch)
        if self._exports:
            return self._exported_for(batch)
        # torch.fx's trace is that of the first batch: one with other arguments may take another way.
        return self._traced if batch.signature() == self._signature else None

    @property
    def needs_equal_shapes(self) -> bool:
        """Whether a trace serves only batches of the shapes that it was made with."""
        return self._exports

    def _choose(self, batch: Batch) -> None:
        self._traced = self._verified_fx(batch)
        if self._traced is not None and self._finds(self._traced) == len(self.layers):
            return
        exported = self._exported_for(batch)
        if exported is not None and (
            self._traced is None or self._finds(exported) > self._finds(self._traced)
        ):
            self._traced, self._exports = None, True

    def _finds(self, traced: TracedModel) -> int:
        return sum(traced.single_call(layer) is not None for layer in self.layers)

    def _verified_fx(self, batch: Batch) -> TracedModel | None:
        for _ in range(2):  # the trace may be one of an earlier call, and stale
            traced = TracedModel.trace(self.model)
            if traced is None:
                self.problem = "torch.fx cannot trace it"
                return None
            self.problem = self._difference(traced, batch)
            if self.problem is None:
                return traced
            TracedModel.forget(self.model)
        return None

    def _exported_for(self, batch: Batch) -> ExportedModel | None:
        shapes = shapes_of(batch)
        if shapes not in self._exported:
            # A loader with more shapes is served by masked forwards.
            few = len(self._exported) < MOST_EXPORTS
            self._exported[shapes] = self._verified_export(batch) if few else None
        return self._exported[shapes]

    def _verified_export(self, batch: Batch) -> ExportedModel | None:
        stale = ExportedModel.is_kept(self.model, batch)  # perhaps
        exported = ExportedModel.export(self.model, batch)
        if exported is None or self._difference(exported, batch) is None:
            return exported
        ExportedModel.forget(self.model)
        return self._verified_export(batch) if stale else None

    def _difference(self, traced: TracedModel, batch: Batch) -> str | None:
        """What tells a trace from its model on a batch, or None."""
        expected = self.pick(batch.fresh().call(self.model))
        try:
            output = self.pick(traced.run(batch)[traced.output_node])
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        except Exception as error:  # whatever differs, masked forwards are right
            return f"its trace does not give the same output ({type(error).__name__})"
        return None

    def splits(self, batch: Batch) -> bool:
        """Tell whether the model gives for parts of a batch the parts of what it gives for the whole."""
        if batch.size < 2:
            return True
        try:
            whole = self.pick(batch.fresh().call(self.model))
            parts = [self.pick(part.fresh().call(self.model)) for part in batch.split(-(-batch.size // 2))]
            joined = tree_map(lambda *tensors: torch.cat(tensors), *parts)
            torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-5, equal_nan=True)
        except Exception:  # a model that mixes its samples may fail in any way
            return False
        return True
