"""Pruner: pruning step by step inside any training loop."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import LossFunction, OutputTransform
from .granularity import Block, Granularity, check_granularity, weight_of
from .importance import Floor, floors_by_layer, score
from .importance.criterion import UserCriterion, name_of
from .importance.scopes import Scope
from .layers import Selection, check_model, reusable
from .masks import Masks, PieceMask, add_masks_, mask_targets, masks_back_on_error
from .pruning import check_schedule, select_at
from .regrowth import RigL, check_regrows, exchange
from .resets import check_values, overwrite, reset_pieces_, trained_tensor
from .schedules import Schedule


class Pruner:
    """Prunes a model while any loop trains it: call :meth:`step` after each step of the optimiser.

    The weakest pieces go when the schedule says so, and stay exactly zero in every forward: the masks are
    parametrizations, which no optimiser, momentum or weight decay reaches through. ``state_dict`` and
    ``load_state_dict`` let a loop that was killed go on with the same masks, bit for bit.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> schedule = fp.CubicSchedule(0.8, begin=100, end=2100, every=100)
        >>> pruner = fp.Pruner(model, schedule=schedule)
        >>> for inputs, targets in loader:
        ...     loss = loss_fn(model(inputs), targets)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     pruner.step()

    Masks are put on at once, all True, so that the keys of the model's ``state_dict`` stay the same from here
    on; parameters stay the same objects, so an optimiser may be made before or after. A schedule that begins
    at step 0 with a sparsity (:class:`OneShotSchedule`) prunes at once, too. Every process of a data-parallel
    run has gradients of its own samples: with ``regrowth`` their masks would drift apart.

    Args:
        model: trained or not; masks that it has are kept.
        schedule: :class:`OneShotSchedule`, :class:`CubicSchedule`, :class:`LinearSchedule`,
            :class:`ExponentialSchedule`, or your own.
        criterion: see :func:`score`; all but "magnitude" and "random" need ``loader``.
        granularity: what a piece is.
        loader: that scores are computed with, iterated at each update; its draws from the random generators
            are taken back.
        scope: see :meth:`ImportanceScores.select`.
        floor: see :meth:`ImportanceScores.select`.
        cost: that the schedule's sparsity is a share of: "params", "flops" or "bytes".
        removed: what becomes of a removed piece: "zero", held there by its mask; "random" or "mean":
            it is overwritten once (:func:`reset_pieces_`), has no mask, learns on, and does not go again.
        regrowth: :class:`RigL`, or None for removed pieces that stay removed.
        optimizer: what it remembers of weights that are overwritten, or grow again, is set to 0.
        include: layers, see :func:`score`.
        exclude: layers to leave out, see :func:`score`.
        loss_fn: see :func:`score`.
        output_transform: see :func:`score`.
        max_samples: how many samples of ``loader`` each scoring reads.
        seed: of random weights.

    Attributes:
        masks: what is left, False for removed pieces.
        steps: how often :meth:`step` was called.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range, or two do not go together.

    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Schedule,
        criterion: str | UserCriterion = "magnitude",
        granularity: Granularity = Block(16, 16),  # noqa: B008  frozen
        loader: Iterable[Any] | None = None,
        scope: Scope = "global",
        floor: Floor | Mapping[str, Floor] | None = None,
        cost: str = "params",
        removed: str = "zero",
        regrowth: RigL | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        include: Selection = None,
        exclude: Selection = None,
        loss_fn: LossFunction | None = None,
        output_transform: OutputTransform | None = None,
        max_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        check_model(model)
        check_schedule(schedule, cost, criterion, loader)
        check_granularity(granularity)
        check_values(removed, "removed")
        if regrowth is not None:
            if not isinstance(regrowth, RigL):
                raise TypeError(f"`regrowth` must be an fp.RigL, got {type(regrowth).__name__}")
            check_regrows(granularity)
            if removed != "zero":
                raise ValueError(f"`regrowth` needs removed='zero', got {removed!r}: nothing is held at zero")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        include, exclude = reusable(include), reusable(exclude)
        self.model = model
        self.schedule = schedule
        self.removed = removed
        self.regrowth = regrowth
        self.optimizer = optimizer
        self.seed = int(seed)
        self.steps = 0
        self._gradients: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._floor = floor
        self._select = functools.partial(select_at, cost=cost, scope=scope, floor=floor)
        self._score = functools.partial(
            score,
            model,
            loader,
            granularity=granularity,
            include=include,
            exclude=exclude,
            loss_fn=loss_fn,
            output_transform=output_transform,
            max_samples=max_samples,
            progress=False,
        )
        self._criterion = criterion
        self._settings = {
            "schedule": repr(schedule),
            "criterion": criterion if isinstance(criterion, str) else name_of(criterion),
            "granularity": repr(granularity),
            "scope": repr(scope),
            "floor": repr(floor),
            "cost": cost,
            "removed": removed,
            "regrowth": repr(regrowth),
            "seed": self.seed,
        }
        with masks_back_on_error(model):
            # No data is needed to see which pieces there are, and which are pruned already.
            scores = self._score(criterion="magnitude")
            self._select(scores, 0.0)  # finds what is wrong with its arguments before the training
            self.masks = scores.select(sparsity={})
            if removed != "zero" or regrowth is not None:
                for module, parameter, _ in mask_targets(model, self.masks):
                    trained_tensor(module, parameter)
            self._put_masks(self.masks)
            if schedule.is_update(0):
                self._prune(0)
        self._watch_gradients()

    def step(self) -> None:
        """Count one step of the optimiser, and prune or regrow where that is due.

        A step that an error ends is not counted, and can be called again.

        Raises:
            RuntimeError: pieces are to regrow, and no backward pass has reached their layers.

        """
        step = self.steps + 1
        if self.schedule.is_update(step):
            self._prune(step)
        if self.regrowth is not None and self.regrowth.is_update(step):
            self._regrow(self.regrowth.share(step))
        self.steps = step
        self._watch_gradients()

    def sparsity(self) -> float:
        """Return the removed share of the weights of the layers that are pruned."""
        return self.masks.sparsity()

    def state_dict(self) -> dict[str, Any]:
        """Return the steps, the masks and what the pruner was made with, for ``torch.save``.

        Example:
            >>> state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
            ...          "pruner": pruner.state_dict()}

        """
        return {
            "steps": self.steps,
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "settings": dict(self._settings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: masks are put on the model, before or after its own state is loaded.

        Raises:
            ValueError: the state is of a pruner of another model, or one that was made with other arguments.

        """
        if not isinstance(state, Mapping) or not {"steps", "masks", "settings"} <= set(state):
            raise ValueError("`state` must be what Pruner.state_dict gave, with steps, masks and settings")
        differing = sorted(
            key for key, value in self._settings.items() if state["settings"].get(key) != value
        )
        if differing:
            raise ValueError(f"`state` is of a pruner with other arguments: {', '.join(differing)}")
        if list(state["masks"]) != list(self.masks):
            raise ValueError(
                f"`state` is of another model: it must have masks of {list(self.masks)}, "
                f"got {list(state['masks'])}"
            )
        masks = self._masks({name: mask.cpu().clone() for name, mask in state["masks"].items()})
        self._put_masks(masks)
        self.masks, self.steps = masks, int(state["steps"])
        self._watch_gradients()

    def _masks(self, masks: dict[str, Tensor]) -> Masks:
        """The masks with the shapes, norms and granularities of those that are on."""
        like = self.masks
        granularities = {name: like.granularity_of(name) for name in like}
        return Masks(masks, like.granularity, like.weight_shapes, like.norms, granularities)

    def _put_masks(self, masks: Masks) -> None:
        if self.removed == "zero":
            add_masks_(self.model, masks)

    def _prune(self, step: int) -> None:
        sparsity = self.schedule.at(step)
        if sparsity == 0.0:
            return
        scores = self._score(criterion=self._criterion)
        # Pieces that were overwritten have no mask that would say that they went.
        scores.pruned = {name: ~mask for name, mask in self.masks.items()}
        masks = self._select(scores, sparsity)
        if self.removed != "zero":
            going = self._masks({name: mask | ~self.masks[name] for name, mask in masks.items()})
            # No piece goes twice, so one draw of random weights serves all steps.
            reset_pieces_(self.model, going, values=self.removed, optimizer=self.optimizer, seed=self.seed)
        self._put_masks(masks)
        self.masks = masks

    @torch.no_grad()
    def _regrow(self, share: float) -> None:
        if not self._gradients:
            raise RuntimeError(
                "`regrowth` needs gradients, and none has reached the masked layers since the last step: "
                "call Pruner.step() once after each backward pass and step of the optimiser"
            )
        floors = floors_by_layer(self._floor, list(self.masks))
        new = {}
        for name, keep in self.masks.items():
            new[name] = keep
            if name not in self._gradients:
                continue
            module = self.model.get_submodule(name)
            granularity, shape = self.masks.granularity_of(name), self.masks.weight_shapes[name]
            norms, gradients = (
                granularity.sum_pieces(tensor.double().square()).sqrt().cpu()
                for tensor in (weight_of(module), self._gradients[name])
            )
            protected = torch.zeros_like(keep)
            if name in floors:
                protected = floors[name].protected(norms.where(keep, -torch.inf), granularity, shape)
            new[name] = exchange(keep, norms, gradients, protected, share)
            grown = granularity.expand(new[name] & ~keep, shape).contiguous()
            tensor = trained_tensor(module, "weight")
            overwrite(tensor, grown.to(tensor.device), torch.zeros_like(tensor), self.optimizer)
        self.masks = self._masks(new)
        self._put_masks(self.masks)

    def _watch_gradients(self) -> None:
        """Record the gradients of the next step, also those of masked weights, if pieces then regrow."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._gradients = [], {}
        if self.regrowth is None or not self.regrowth.is_update(self.steps + 1):
            return
        for name in self.masks:
            chain: Any = self.model.get_submodule(name).parametrizations["weight"]  # type: ignore[index]
            # The gradient of what the mask gives is that of all weights, as if none were masked.
            mask = next(part for part in chain if isinstance(part, PieceMask))
            self._hooks.append(mask.register_forward_hook(functools.partial(self._watch, name)))

    def _watch(self, name: str, module: nn.Module, inputs: Any, weight: Tensor) -> None:
        if weight.requires_grad:
            weight.register_hook(functools.partial(self._add_gradient, name))

    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        before = self._gradients.get(name)
        self._gradients[name] = gradient.detach().clone() if before is None else before + gradient

    def __repr__(self) -> str:
        return f"Pruner({self.schedule}, steps={self.steps}, {self.sparsity():.1%} removed)"
