"""ImportanceScores: what a criterion found, and the selection of masks from it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..coupling import Coupled
from ..granularity import Granularity
from ..latency import LatencyTable
from ..masks import Budget, Masks, check_scope, check_sparsity
from .criterion import Merging, finish
from .floors import Floor
from .plotting import plot_scores
from .ranking import Correlation, correlate
from .rounding import check_round_to, is_rounded, rounded_up
from .scopes import Scope, groups_of
from .scores_file import read_scores, write_scores
from .selection import Pieces, keep_above, keep_shares, keep_within_latency
from .thresholds import Threshold, check_threshold
from .union import joined_facts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ImportanceScores(Mapping[str, Tensor]):
    """Layer name to a float64 tensor of scores in the granularity's shape; larger matters more.

    Example:
        >>> scores = fp.score(model, loader, granularity=fp.Block(16, 16))
        >>> scores["encoder.0"].shape
        torch.Size([64, 64])
        >>> masks = scores.select(sparsity=0.75)

    Attributes:
        granularity: what a piece is.
        granularities: layer name to the granularity with what that layer adds, such as a number of heads.
        criterion: the name of the criterion.
        loss: the mean loss of the unmasked model, None where the criterion needs none.
        num_samples: samples that were read.
        pruned: layer name to bool tensor, True for pieces that were masked already when scored. They
            are selected before all others, so that a pruned piece stays pruned in later rounds.
        coupled: groups of layers whose units are kept or pruned together, and have the same scores.
        merging: how scores of two shards of the data become those of both, see :class:`Criterion`.
        means: layer name to the means that the scores are made of, None where they are means themselves.
        weights: layer name to what its means are over: samples, targets or activations.
        digest: a hash of the model's state, None where it is not known.

    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        *,
        granularity: Granularity,
        criterion: str,
        weight_shapes: Mapping[str, torch.Size],
        pruned: Mapping[str, Tensor],
        norms: Mapping[str, str],
        weight_uses: Mapping[str, float] | None,
        element_sizes: Mapping[str, int],
        loss: float | None,
        num_samples: int,
        granularities: Mapping[str, Granularity] | None = None,
        coupled: Coupled = (),
        merging: Merging = "never",
        means: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, float] | None = None,
        digest: str | None = None,
    ) -> None:
        for name, layer in scores.items():
            if not bool(layer.isfinite().all()):
                raise ValueError(
                    f"criterion '{criterion}' gave NaN or inf for layer '{name}': check the model's weights "
                    "and the data for NaN, inf or very large values"
                )
        self._scores = dict(scores)
        self.granularity = granularity
        self.granularities = dict.fromkeys(scores, granularity) | dict(granularities or {})
        self.criterion = criterion
        self.weight_shapes = dict(weight_shapes)
        self.pruned = dict(pruned)
        self.norms = dict(norms)
        self.weight_uses = None if weight_uses is None else dict(weight_uses)
        self.element_sizes = dict(element_sizes)
        self.coupled = tuple(tuple(group) for group in coupled)
        self.merging = merging
        self.means = None if means is None else dict(means)
        self.weights = dict(weights or {})
        self.digest = digest
        self.loss = loss
        self.num_samples = num_samples

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def _costs(self, cost: str) -> dict[str, Tensor]:
        """Return the cost of each piece: its weights times what one weight costs in its layer."""
        costs = {}
        for name in self:
            sizes = self.granularities[name].sizes(self.weight_shapes[name]).double()
            if cost == "flops":
                if self.weight_uses is None:
                    raise ValueError("Budget(flops=...) needs scores that were made with a loader")
                sizes *= self.weight_uses[name]
            elif cost == "bytes":
                sizes *= self.element_sizes[name]
            costs[name] = sizes
        return costs

    def total_cost(self, cost: str) -> float:
        """Return what all pieces cost together: "params", "flops" (of one sample) or "bytes".

        Example:
            >>> scores.total_cost("params")
            1126400.0

        """
        return sum(float(layer.sum()) for layer in self._costs(cost).values())

    def select(
        self,
        *,
        sparsity: float | Mapping[str, float] | None = None,
        threshold: float | Threshold | None = None,
        budget: Budget | None = None,
        scope: Scope = "global",
        floor: Floor | Mapping[str, Floor] | None = None,
        round_to: int = 1,
    ) -> Masks:
        """Return masks that drop the lowest scores; exactly one of the first three is given.

        Warns where nothing is left of a layer, and where floors, or layers that gain nothing from sparsity,
        keep the selection from what is asked for.

        Example:
            >>> masks = scores.select(sparsity=0.75, scope="global")
            >>> masks.sparsity()
            0.75
            >>> scores.select(sparsity={"encoder.*": 0.9, "head": 0.5}, floor=fp.Floor(max_sparsity=0.98))
            >>> scores.select(threshold=fp.Threshold(mean_minus_std=1.0), scope="layer")

        Args:
            sparsity: share of the real weights to prune, in [0, 1); never exceeded. A dict gives the share
                of each layer, or of each group of layers, by name globs, of which the first that matches
                counts; layers that none matches keep what they have.
            threshold: scores below it are pruned; a number, or a rule that computes one
                (:class:`Threshold`).
            budget: what may remain of a cost.
            scope: "global" ranks all layers together, "layer" prunes the same share of each, a list of
                groups (each a name glob or a list of them) the same share of each group. For a threshold
                that is computed, it says from which scores. Layers that are coupled go by the first of them.
            floor: what stays of each layer (:class:`Floor`), for all layers or by name globs, of which the
                first that matches counts.
            round_to: the number of units or input units that remain of a layer is a multiple of it, or all
                there are; heads are not rounded. Units are ranked in lots that leave one, by their mean
                score; where the selection ends within a lot the rest of it stays: never more goes than asked.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: not exactly one is given, one is out of range, a glob matches no layer, or pieces that
                are no single units are to be rounded.

        """
        options = {"sparsity": sparsity, "threshold": threshold, "budget": budget}
        given = [name for name, value in options.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"select needs exactly one of `sparsity`, `threshold`, `budget`, got {given}")
        if isinstance(scope, str):
            check_scope(scope)
        check_round_to(round_to, self.granularities)
        pieces = Pieces.of(
            self._scores, self.pruned, self.coupled, self.granularities, self.weight_shapes, floor, round_to
        )
        names = list(pieces.scores)
        notes = []
        if threshold is not None:
            keep = keep_above(pieces, check_threshold(threshold), groups_of(names, scope, None))
        elif budget is not None and not isinstance(budget, Budget):
            raise TypeError(f"`budget` must be a fastprune Budget, got {type(budget).__name__}")
        elif budget is not None and budget.latency is not None:
            self._check_costs(budget.costs, scope)
            keep, remaining = keep_within_latency(pieces, budget)
            if remaining is not None:
                notes.append(
                    f"a latency of {remaining:.1%} remains where {budget.fraction:.1%} was asked for: "
                    "nothing else that may go makes a layer faster"
                )
        else:
            if budget is not None:
                removable: float | Mapping[str, float] = 1.0 - budget.fraction
            else:
                removable = sparsity if isinstance(sparsity, Mapping) else check_sparsity(sparsity)  # type: ignore[arg-type]
            costs = self._costs("params" if budget is None else budget.cost)
            keep, short = keep_shares(pieces, pieces.joined(costs), groups_of(names, scope, removable))
            notes += [f"floors keep {', '.join(layers)} above what was asked for" for layers in short]
        if round_to > 1:
            for name in keep:
                if is_rounded(self.granularities[name]):
                    keep[name] = rounded_up(keep[name], pieces.scores[name], round_to)
        masks = pieces.spread(keep)
        masks = {name: masks[name] for name in self}
        emptied = [name for name, mask in masks.items() if mask.numel() and not bool(mask.any())]
        if emptied:
            notes.append(
                f"nothing is left of {', '.join(emptied)}: the model no longer depends on what "
                "goes through there; a floor, scope='layer' or less sparsity keeps every layer"
            )
        for note in notes:
            warnings.warn(f"fastprune: {note}", stacklevel=2)
        return Masks(masks, self.granularity, self.weight_shapes, self.norms, self.granularities)

    def _check_costs(self, costs: LatencyTable | None, scope: Scope) -> None:
        """Raise ValueError for a latency budget that these scores cannot meet as it is asked for."""
        if costs is None:
            raise ValueError(
                "Budget `latency` needs `costs` here, which fp.measure_latency(model, ...) gives, got None"
            )
        if scope != "global":
            raise ValueError(
                "`scope` must be 'global' for a latency budget, which is what divides it among the layers, "
                f"got {scope!r}"
            )
        if costs.granularity is not None and costs.granularity != self.granularity:
            raise ValueError(
                f"Budget `costs` must be those of {self.granularity}, the pieces of these scores, "
                f"got those of {costs.granularity}"
            )

    def absolute(self) -> ImportanceScores:
        """Return the scores without their signs: how much a piece changes the loss, either way.

        Loss deltas below zero say that the loss falls when one piece goes. Many such pieces taken out
        together rarely add up to a gain, so pruning at once, without training, does better by the size of
        the change (``python examples/compare_criteria.py`` shows both).

        Example:
            >>> masks = scores.absolute().select(sparsity=0.5)

        """
        facts = self._facts()
        if self.merging == "mean":
            facts |= {"merging": "absolute mean", "means": self._scores}
        return ImportanceScores({name: layer.abs() for name, layer in self._scores.items()}, **facts)

    def _facts(self) -> dict[str, Any]:
        """The keyword arguments that scores like these are made with."""
        return {
            key: getattr(self, key)
            for key in (
                "granularity", "granularities", "criterion", "weight_shapes", "pruned", "norms",
                "weight_uses", "element_sizes", "loss", "num_samples", "coupled", "merging",
                "means", "weights", "digest",
            )
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores to one safetensors file, atomically.

        Example:
            >>> scores.save("scores.safetensors")
            >>> scores = fp.ImportanceScores.load("scores.safetensors")

        Raises:
            ValueError: the granularity is not one of fastprune's own.

        """
        write_scores(path, self._scores, self._facts())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImportanceScores:
        """Read scores that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, tampered with, or holds no scores.

        """
        scores, facts = read_scores(path)
        return cls(scores, **facts)

    def merge(self, other: ImportanceScores) -> ImportanceScores:
        """Return the scores of both data sets together, as if they had been scored in one call.

        Means are weighted by what they are over, largest values are compared, and criteria that read no data
        must agree.

        Example:
            >>> first, second = (fp.score(model, shard, criterion="fisher") for shard in shards)
            >>> first.merge(second)

        Args:
            other: scores of the same model, criterion and pieces on other data.

        Raises:
            TypeError: ``other`` are no scores.
            ValueError: they are of something else, or the criterion cannot be merged ("gradient",
                "gradient_change", "wanda" of more than single weights, a callable of your own).

        """
        if not isinstance(other, ImportanceScores):
            raise TypeError(f"`other` must be ImportanceScores, got {type(other).__name__}")
        if self.merging == "never":
            raise ValueError(
                f"scores of criterion '{self.criterion}' cannot be merged: those of all the data are "
                "not made of those of its parts"
            )
        for fact in ("criterion", "merging", "granularities", "weight_shapes", "norms", "coupled"):
            if getattr(self, fact) != getattr(other, fact):
                raise ValueError(
                    f"`other` must have the same {fact}, {getattr(self, fact)}, got {getattr(other, fact)}"
                )
        if None not in (self.digest, other.digest) and self.digest != other.digest:
            raise ValueError("`other` must be scores of the same model, got those of one with other weights")
        first, second = self.means or self._scores, other.means or other._scores
        means = {name: self._merged(name, layer, second[name], other) for name, layer in first.items()}
        facts = self._facts()
        facts["num_samples"] += other.num_samples
        facts["weights"] = {name: self.weights[name] + other.weights.get(name, 0.0) for name in self.weights}
        facts["means"] = None if self.means is None else means
        if self.loss is not None and other.loss is not None:
            name = next(iter(self))
            share = other.weights[name] / facts["weights"][name]
            facts["loss"] = self.loss + share * (other.loss - self.loss)
        facts["weight_uses"] = other.weight_uses if self.weight_uses is None else self.weight_uses
        return ImportanceScores({name: finish(self.merging, layer) for name, layer in means.items()}, **facts)

    def __or__(self, other: ImportanceScores) -> ImportanceScores:
        """Return the scores of both, which are of different layers of the same model, by the same criterion.

        Example:
            >>> units = fp.score(model, loader, granularity=fp.Unit(), include="*.intermediate.dense")
            >>> masks = (units | fp.score(model, loader, granularity=fp.Head())).select(sparsity=0.5)

        Raises:
            TypeError: ``other`` are no scores.
            ValueError: they have a layer in common, or are of another criterion.

        """
        if not isinstance(other, ImportanceScores):
            raise TypeError(f"`other` must be ImportanceScores, got {type(other).__name__}")
        facts = joined_facts(self.criterion, self._facts(), other._facts(), (set(self), set(other)))
        return ImportanceScores({**self._scores, **other._scores}, **facts)

    def _merged(self, name: str, first: Tensor, second: Tensor, other: ImportanceScores) -> Tensor:
        if self.merging == "max":
            return torch.maximum(first, second)
        if self.merging == "same":
            if not torch.equal(first, second):
                raise ValueError(
                    f"`other` must have the same scores for layer '{name}': no data plays a part"
                )
            return first
        weights = self.weights[name], other.weights[name]
        return (first * weights[0] + second * weights[1]) / (weights[0] + weights[1])

    def correlation(self, other: Mapping[str, Tensor], k: float = 0.25) -> Correlation:
        """Return how far other scores rank the same pieces alike: for each layer, and over all.

        Example:
            >>> print(fp.score(model, loader, criterion="taylor").correlation(scores))

        Args:
            other: scores of the same layers and pieces, by another criterion or on other data.
            k: the share of pieces, the lowest, whose overlap is counted.

        Returns:
            Spearman's rank correlation, ties with their average rank, and the overlap.

        Raises:
            ValueError: layers or shapes differ, or ``k`` is not in (0, 1].

        Source: Spearman 1904, "The proof and measurement of association between two things".

        """
        return correlate(self._scores, other, k)

    def plot(self) -> Figure:
        """Return a matplotlib figure: the distribution of each layer's scores, and heat maps of blocks.

        Example:
            >>> scores.plot().savefig("scores.png")

        Raises:
            ImportError: matplotlib is not installed; the extra ``fastprune[plot]`` brings it.

        """
        return plot_scores(self._scores, self.pruned, f"{self.criterion}, {self.granularity}")

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss={self.loss:.6g}"
        lines = [
            f"ImportanceScores(criterion='{self.criterion}', granularity={self.granularity}, "
            f"samples={self.num_samples}{loss})",
            f"  {'layer':<32} {'pieces':>9} {'lowest':>11} {'median':>11} {'highest':>11}",
        ]
        for name, layer in self._scores.items():
            low, middle, high = (float(value) for value in (layer.min(), layer.median(), layer.max()))
            lines.append(f"  {name:<32} {layer.numel():>9} {low:>11.3e} {middle:>11.3e} {high:>11.3e}")
        return "\n".join(lines)
