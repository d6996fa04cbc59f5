"""How to anneal: settings, the schedule of β, and the pilot run that finds step sizes before they are frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ppl_vae.conditionals import at_least_one
from ppl_vae.pairs import Batch
from ppl_vae.paths import Path, Start
from ppl_vae.products import Precision, products_in

__all__ = ["Annealing", "Plan", "pilot", "schedule", "spaced"]

Schedule = Literal["linear", "sigmoid", "adaptive"]
STARTS, SCHEDULES = get_args(Start), get_args(Schedule)
RADIUS = 4.0  # of the sigmoid schedule, as Wu et al. have it
RATE = 1.0  # how fast a pilot's log step sizes follow the acceptance
PILOTS = 4  # chains of a pilot
SETTLING = 20  # moves of a pilot before it leaves β = 0


@dataclass(frozen=True)
class Annealing:
    """How to anneal.

    Args:
        chains: particles per datum.
        distributions: T, steps of β; each but the last is followed by a move.
        leapfrog: steps of one move.
        start: f_0: "prior", or "guide", which is nearer and may be too narrow.
        schedule: of β: "sigmoid" (Wu et al. 2017), "linear", or "adaptive", which spaces β such that each step
            adds about the same spread of log weights, as found by the pilot.
        step_size: of the pilot's first move.
        acceptance: what step sizes are tuned to.
        precision: "float32", or "bf16" for slopes by matrix products in bfloat16: up to 1.9 times as fast where
            the processor has them. The weights are as unbiased: energies, which decide what is accepted and what
            a particle weighs, stay whole.
        chunk: chains of a batch held at once.

    Raises:
        ValueError: a setting out of its range.
    """

    chains: int = 16
    distributions: int = 1000
    leapfrog: int = 10
    start: Start = "prior"
    schedule: Schedule = "sigmoid"
    step_size: float = 0.1
    acceptance: float = 0.65
    precision: Precision = "float32"
    chunk: int = 64

    def __post_init__(self) -> None:
        at_least_one(chains=self.chains, leapfrog=self.leapfrog, chunk=self.chunk)
        at_least_one(distributions=self.distributions)
        if self.distributions < 2:
            raise ValueError(
                f"distributions must be at least 2, got {self.distributions}; one is importance sampling: use "
                "`log_likelihood`"
            )
        for name, choices in (("start", STARTS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        products_in(self.precision)
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size must be positive and finite, got {self.step_size}")
        if not 0 < self.acceptance < 1:
            raise ValueError(f"acceptance must lie between 0 and 1, got {self.acceptance}")


def schedule(kind: Literal["linear", "sigmoid"], steps: int) -> Tensor:
    """β_0 = 0 to β_T = 1, float64 (T + 1,): evenly, or closer together at both ends, as a sigmoid is flat there.

    >>> schedule("linear", 4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if kind == "linear":
        return even
    curve = torch.sigmoid(RADIUS * (2 * even - 1))
    return ((curve - curve[0]) / (curve[-1] - curve[0])).clamp(0, 1)


@dataclass(frozen=True)
class Plan:
    """What a run goes by, frozen before it begins: β (T + 1,), and step sizes (T + 1, B, 1)."""

    betas: Tensor
    steps: Tensor


@torch.no_grad()
def pilot(path: Path, settings: Annealing, batch: Batch) -> Plan:
    """Walk the path with a few chains, and find step sizes for each datum; also β, if the schedule is adaptive."""
    knots = schedule("sigmoid", max(100, settings.distributions // 3))
    here = path.at(path.draw(batch, min(settings.chains, settings.chunk, PILOTS)), batch)
    log_step = here.first.new_full((here.first.shape[1],), math.log(settings.step_size))
    found, spreads = [], []
    for number, knot in enumerate(knots):
        beta = here.first.new_tensor(float(knot))
        for _ in range(1 if number else SETTLING):
            here, probability = path.move(here, beta, log_step.exp().unsqueeze(-1), settings.leapfrog, batch)
            log_step = log_step + RATE * (probability.mean(0) - settings.acceptance)
        found.append(log_step)
        spreads.append(_spread(here.ratio))
    if settings.schedule == "adaptive":
        betas = spaced(knots, torch.stack(spreads).double().cpu(), settings.distributions)
    else:
        betas = schedule(settings.schedule, settings.distributions)
    # Between knots, which are close together where β changes much for its size, by their numbers and not by β.
    numbers = torch.arange(len(knots)).double()
    steps = _between(numbers, torch.stack(found), _between(knots, numbers, betas))
    return Plan(betas, steps.exp().unsqueeze(-1))


def _spread(ratio: Tensor) -> Tensor:
    """How far apart log weights of one datum drift, over the data whose chains all are where they can be."""
    each = ratio.var(0, correction=0)
    each = each[each.isfinite()]
    return each.mean().sqrt() if len(each) else ratio.new_zeros(())


def spaced(knots: Tensor, spreads: Tensor, steps: int) -> Tensor:
    """β such that the integral of the spread grows evenly, none of it so fast that β stands still."""
    spreads = spreads + 1e-3 * spreads.mean() + 1e-12
    length = torch.cat([knots.new_zeros(1), torch.cumulative_trapezoid(spreads, knots)])
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    betas = _between(length / length[-1], knots, even)
    betas[0], betas[-1] = 0.0, 1.0  # else the weights would estimate something else
    return betas


def _between(known: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """Values given at known points (n,), increasing, (n, ...), as they are between them, at wanted points."""
    above = torch.searchsorted(known, wanted.contiguous(), right=True).clamp(1, len(known) - 1)
    low, high = known[above - 1], known[above]
    share = ((wanted - low) / (high - low).clamp(min=1e-300)).clamp(0, 1).to(values)
    share = share.reshape(-1, *[1] * (values.dim() - 1))
    above = above.to(values.device)
    return values[above - 1] + share * (values[above] - values[above - 1])
