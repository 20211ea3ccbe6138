"""What a layer costs in time at each density: the tables that latency budgets are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from .granularity import Granularity
from .timing import WORTHWHILE


def non_decreasing(values: Sequence[float]) -> list[float]:
    """Return the non-decreasing sequence with the least sum of squared differences from the values.

    Neighbours in the wrong order are pooled into their mean until none is left.

    Example:
        >>> non_decreasing([1.0, 3.0, 2.0, 4.0])
        [1.0, 2.5, 2.5, 4.0]

    Source: Ayer et al. 1955, "An empirical distribution function for sampling with incomplete information"
    (pool adjacent violators).

    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            previous, size = pools.pop()
            mean = (previous * size + mean * count) / (size + count)
            count += size
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class LayerLatency:
    """Seconds of one layer, dense, and block-sparse at several densities.

    Example:
        >>> fp.LayerLatency(1e-3, densities=(0.0, 0.5, 1.0), sparse_seconds=(1e-4, 6e-4, 1.1e-3))

    Args:
        dense_seconds: of the layer as it is, at least 0.
        densities: kept shares of the pieces, ascending, in [0, 1]; empty for a layer that has to stay dense.
        sparse_seconds: one for each density, at least 0.

    Raises:
        ValueError: a number is out of range, or the two sequences do not fit together.

    """

    dense_seconds: float
    densities: tuple[float, ...] = ()
    sparse_seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for field in ("densities", "sparse_seconds"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for name, values in (
            ("dense_seconds", (self.dense_seconds,)),
            ("sparse_seconds", self.sparse_seconds),
            ("densities", self.densities),
        ):
            for value in values:
                wrong = isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)
                if wrong or value < 0:
                    raise ValueError(f"`{name}` must be finite and at least 0, got {value!r}")
        if len(self.densities) != len(self.sparse_seconds):
            raise ValueError(
                f"`sparse_seconds` must have one entry for each of {len(self.densities)} densities, "
                f"got {len(self.sparse_seconds)}"
            )
        ascending = all(low < high for low, high in zip(self.densities, self.densities[1:], strict=False))
        if self.densities and (not ascending or self.densities[-1] > 1.0):
            raise ValueError(f"`densities` must ascend within [0, 1], got {self.densities}")

    def seconds(self, density: ArrayLike) -> np.ndarray:
        """Return the seconds at any densities: float64, non-decreasing, never above the dense layer's.

        Sparse times are made monotone (:func:`non_decreasing`) and interpolated linearly; beyond the first
        and the last density they are those. A sparse layer that gains less than 3 % counts as dense, as in
        :func:`sparsify_`.
        """
        density = np.asarray(density, dtype=np.float64)
        if not self.densities:
            return np.full(density.shape, float(self.dense_seconds))
        sparse = np.interp(density, self.densities, non_decreasing(self.sparse_seconds))
        return np.where(sparse <= self.dense_seconds * WORTHWHILE, sparse, float(self.dense_seconds))


class LatencyTable(Mapping[str, LayerLatency]):
    """Layer name to what the layer costs at each density; :func:`measure_latency` makes one.

    Example:
        >>> costs = fp.measure_latency(model, example_inputs=x, granularity=fp.Block(16, 16))
        >>> masks = scores.select(budget=fp.Budget(latency=0.5, costs=costs))

    Args:
        layers: layer name to its latency.
        granularity: the pieces that the densities count; scores of others are refused. None for any.

    Raises:
        TypeError: an entry is no :class:`LayerLatency`.

    """

    def __init__(self, layers: Mapping[str, LayerLatency], granularity: Granularity | None = None) -> None:
        self._layers = dict(layers)
        self.granularity = granularity
        for name, layer in self._layers.items():
            if not isinstance(layer, LayerLatency):
                raise TypeError(f"`layers` must hold fp.LayerLatency, got {layer!r} for layer '{name}'")

    def __getitem__(self, name: str) -> LayerLatency:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def seconds(self, masks: Mapping[str, Tensor]) -> float:
        """Return what the layers of some masks take together, as the table says: a sum, and no measurement.

        Example:
            >>> costs.seconds(masks) / costs.dense_seconds(masks)
            0.497

        Raises:
            KeyError: the table lacks a layer.

        """
        shares = {name: int(mask.sum()) / max(mask.numel(), 1) for name, mask in masks.items()}
        return float(sum(self[name].seconds(share) for name, share in shares.items()))

    def dense_seconds(self, layers: Iterable[str]) -> float:
        """Return what layers take together while they are dense."""
        return float(sum(self[name].dense_seconds for name in layers))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain numbers, as JSON takes them.

        Measured times differ from run to run, and with them what is selected: a run that is to be repeated
        keeps its table.

        Example:
            >>> Path("costs.json").write_text(json.dumps(costs.to_dict()))
            >>> costs = fp.LatencyTable.from_dict(json.loads(Path("costs.json").read_text()))

        """
        return {name: dataclasses.asdict(layer) for name, layer in self._layers.items()}

    @classmethod
    def from_dict(
        cls, layers: Mapping[str, Mapping[str, Any]], granularity: Granularity | None = None
    ) -> LatencyTable:
        """Return the table that :meth:`to_dict` wrote down.

        Raises:
            ValueError: an entry has other fields than a :class:`LayerLatency`, or a number is out of range.

        """
        table = {}
        for name, entry in layers.items():
            try:
                table[name] = LayerLatency(**entry)
            except TypeError as error:
                raise ValueError(
                    f"`layers` must hold dense_seconds, densities and sparse_seconds for layer '{name}', "
                    f"got {entry!r}"
                ) from error
        return cls(table, granularity)

    def __repr__(self) -> str:
        lines = [
            f"LatencyTable({'any granularity' if self.granularity is None else self.granularity})",
            f"  {'layer':<32} {'dense us':>10}  sparse us at each density",
        ]
        for name, layer in self._layers.items():
            entries = zip(layer.densities, layer.sparse_seconds, strict=True)
            sparse = "  ".join(f"{density:g}: {seconds * 1e6:.1f}" for density, seconds in entries)
            lines.append(f"  {name:<32} {layer.dense_seconds * 1e6:>10.1f}  {sparse or 'stays dense'}")
        return "\n".join(lines)
