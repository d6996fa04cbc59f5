"""One optimizer step on one objective: gradients as a pure function, then the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from ppl_vae.objectives import Objective
from ppl_vae.pairs import Batch, Pair, evaluating
from ppl_vae.products import Precision, products_in
from ppl_vae.rng import seeded
from ppl_vae.sites import statements
from ppl_vae.traces import check_table, log_density, run_guide, run_model, with_values

__all__ = ["UntakenError", "Update", "all_finite", "clipped", "gradients", "trained_by"]


class UntakenError(FloatingPointError):
    """A step was not taken, because its value or a gradient is NaN or infinite.

    Attributes:
        update: the step.
        value: the mean objective.
        found: the gradients, one for each of the update's parameters, None where there is none.
    """

    def __init__(self, update: Update, value: Tensor, found: Sequence[Tensor | None]) -> None:
        super().__init__(f"{update.name}: its value or a gradient is not finite")
        self.update, self.value, self.found = update, value, found


class Update:
    """One optimizer step on one objective: a function of parameters, optimizer state, batch and random draws.

    Nothing in it reads a number back from the device, so that it can be captured.

    Args:
        name: what its value is called in errors, such as "objective".
        pair: the pair.
        objective: what to maximise.
        optimizer: torch optimizer over parameters of the pair.
        clip_norm: largest norm of the gradient, or None.
        precision: "float32", or "bf16" for matrix products and convolutions in bfloat16.

    Raises:
        ValueError: an unknown precision.
    """

    def __init__(
        self,
        name: str,
        pair: Pair,
        objective: Objective,
        optimizer: Optimizer,
        clip_norm: float | None = None,
        precision: Precision = "float32",
    ) -> None:
        products_in(precision)  # refused before anything is trained
        self.name, self.pair, self.objective = name, pair, objective
        self.optimizer, self.clip_norm, self.precision = optimizer, clip_norm, precision
        self._adam = _FusedAdam(optimizer)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The optimizer's parameters, in its order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def value(self, *batch: Tensor) -> Tensor:
        """The mean objective over a batch, a scalar with gradients."""
        value: Tensor = self.objective(self.pair, *batch).mean()
        return value

    def products(self) -> AbstractContextManager[object]:
        """The precision, as a context in which to compute values and gradients."""
        return products_in(self.precision)

    def apply(self, found: Sequence[Tensor | None]) -> None:
        """Take the optimizer's step along given gradients, one for each of ``parameters``."""
        # Only here is their memory order known: a compiled graph may have another than what it was traced from.
        found = [g if g is None else _laid_out(g, p) for g, p in zip(found, self.parameters, strict=True)]
        if self._adam.ready(found):
            self._adam.step(found)
            return
        for parameter, gradient in zip(self.parameters, found, strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def __call__(self, batch: Batch) -> Tensor:
        """Take the step; return the mean objective over the batch, a scalar on the device."""
        with self.products():
            value, found = gradients(self.value(*batch), [self.parameters], self.clip_norm)
        self.apply(found)
        return value


def gradients(
    value: Tensor, places: Sequence[Sequence[Tensor]], clip_norm: float | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """A value, detached, and the gradients of its negative, None where there is none.

    A parameter has none that the value does not depend on, or that is frozen (``requires_grad`` unset).

    Args:
        value: scalar to be maximised.
        places: lists of parameters; where there are several, what stands at the same position is one parameter.
        clip_norm: largest norm of all gradients together, or None.
    """
    wanted = [p for place in places for p in place if p.requires_grad]
    parts = iter(torch.autograd.grad(-value, wanted, allow_unused=True) if value.requires_grad else ())
    by_place = [[next(parts, None) if p.requires_grad else None for p in place] for place in places]
    found = [_sum([g for g in same if g is not None]) for same in zip(*by_place, strict=True)]
    return value.detach(), clipped(found, clip_norm)


def clipped(found: list[Tensor | None], clip_norm: float | None) -> list[Tensor | None]:
    """Gradients, together no longer than ``clip_norm``, as `torch.nn.utils.clip_grad_norm_` has it."""
    if clip_norm is None:
        return found
    norm = nn.utils.get_total_norm([g for g in found if g is not None], foreach=True)
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    return [None if g is None else g * factor for g in found]


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all entries of all tensors are finite; waits for the device once."""
    total = torch.stack([t.sum().double() for t in tensors]).sum()
    # Sums are the cheapest to look at, but those of finite numbers may be too large for their type.
    return bool(total.isfinite()) or all(bool(t.isfinite().all()) for t in tensors)


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in the memory order of its parameter: fused optimizers walk through both as one."""
    same = gradient.stride() == parameter.stride() or (gradient.is_contiguous() and parameter.is_contiguous())
    return gradient if same else torch.empty_like(parameter).copy_(gradient)


def _sum(parts: list[Tensor]) -> Tensor | None:
    return sum(parts[1:], parts[0]) if parts else None


class _FusedAdam:
    """The kernel of a fused Adam on the CPU without the Python around it, a twentieth of a small step's time.

    The optimizer takes its first step itself, which makes its state; then the same kernel is called on the same
    state, so that the optimizer can be saved, or go on by itself, at any time.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.plain = False
        self.columns: list[tuple[list[Tensor], ...]] = []
        self.state: Any = None
        self.pointers: list[int] = []

    def ready(self, found: Sequence[Tensor | None]) -> bool:
        """Whether the kernel can take this step."""
        optimizer = self.optimizer
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        state = optimizer.state.get(optimizer.param_groups[0]["params"][0])
        if not state or hooks or any(g is None for g in found):
            return False
        pointers = [p.data_ptr() for g in optimizer.param_groups for p in g["params"]]
        # At first; after load_state_dict, p.data = ... or add_param_group.
        if state is not self.state or pointers != self.pointers:
            if not all(optimizer.state.get(p) for g in optimizer.param_groups for p in g["params"]):
                return False  # one had no gradient yet
            self.plain = type(optimizer) in (Adam, AdamW) and all(_plain(g) for g in optimizer.param_groups)
            self.columns = [self._column(g) for g in optimizer.param_groups] if self.plain else []
            self.state, self.pointers = state, pointers
            if self.plain:
                optimizer.zero_grad(set_to_none=True)  # gradients are not left there any more
        return self.plain

    def _column(self, group: dict[str, Any]) -> tuple[list[Tensor], ...]:
        states = [self.optimizer.state[p] for p in group["params"]]
        counts = torch.stack([s["step"] for s in states])  # counted up together, at once
        for state, count in zip(states, counts.unbind(), strict=True):
            state["step"] = count
        columns = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        return ([p.detach() for p in group["params"]], *columns, [counts])

    @torch.no_grad()
    def step(self, found: Sequence[Tensor | None]) -> None:
        """Take one step."""
        self.optimizer.__dict__["_opt_called"] = True  # schedulers ask whether it has stepped
        rest = [g for g in found if g is not None]
        for group, (parameters, first, second, steps, counts) in zip(
            self.optimizer.param_groups, self.columns, strict=True
        ):
            mine, rest = rest[: len(parameters)], rest[len(parameters) :]
            kernel = torch._fused_adamw_ if group.get("decoupled_weight_decay") else torch._fused_adam_
            counts[0] += 1
            kernel(
                parameters,
                mine,
                first,
                second,
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def _plain(group: dict[str, Any]) -> bool:
    """Whether a parameter group asks for nothing but the fused kernel, on the CPU."""
    special = any(group.get(key) for key in ("amsgrad", "maximize", "differentiable", "capturable"))
    parameters = group["params"]
    return bool(
        group.get("fused")
        and not special
        and len({p.dtype for p in parameters}) == 1
        and all(p.device.type == "cpu" for p in parameters)
    )


def trained_by(pair: Pair, batch: Batch) -> dict[str, list[nn.Parameter]]:
    """The parameters that "model" and "guide" depend on; some, as those of a VampPrior's posterior, on both."""
    wanted = [p for p in pair.parameters() if p.requires_grad]
    with evaluating(pair), seeded(None, batch[0].device), torch.enable_grad():
        check_table(pair, batch, 1)
        drawn = run_guide(pair, batch, 1)
        model = statements(run_model(pair, batch, 1, with_values(drawn, Tensor.detach)))
        guide = statements(drawn)
        draws = [s["value"].sum() for s in guide.values() if s["value"].requires_grad]
        values = {
            "model": log_density(model.values(), batch, 1).sum(),
            "guide": log_density(guide.values(), batch, 1).sum() + sum(draws),
        }
        found = {
            name: torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else ()
            for name, value in values.items()
        }
    return {n: [p for p, g in zip(wanted, gs, strict=False) if g is not None] for n, gs in found.items()}
