"""What evaluation gives back: numbers per datum with their errors and their direction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    from ppl_vae.schedules import Annealing

__all__ = ["ActiveUnits", "Average", "Direction", "Estimate", "Sandwich", "average", "share_warning"]

Direction = Literal["lower", "upper", "unbiased"]
LOOSE = 1.0  # a gap, in nats, beyond which differences between models are lost in it


def share_warning(wrong: Tensor, what: str, advice: str) -> tuple[str, ...]:
    """A warning that something holds for a share of the data; none where it holds for none.

    >>> import torch
    >>> share_warning(torch.tensor([True, False]), "the effective sample size is below 5", "take more particles")
    ('the effective sample size is below 5 for 50.0% of the data; take more particles',)
    """
    share = 100 * float(wrong.double().mean())
    return (f"{what} for {share:.1f}% of the data; {advice}",) if share else ()


@dataclass(frozen=True)
class Estimate:
    """An estimate for each of N data, with its direction and its errors.

    Attributes:
        value: nats per datum, float64 (N,).
        stderr: Monte Carlo standard error of each value, (N,); NaN where one particle says nothing of it.
        direction: whether the expected value lies below log p(x), above it, or at it.
        diagnostics: further numbers per datum, name -> (N,), such as the effective sample size.
        name: what was estimated, for printing.
        engine: how it was computed, for the record: "eager", or how it was captured.
        warnings: why not to believe it, and what to do; printed with it.
    """

    value: Tensor
    stderr: Tensor
    direction: Direction
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    name: str = "log p(x)"
    engine: str = "eager"
    warnings: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """The mean over data."""
        return float(self.value.mean())

    @property
    def mean_stderr(self) -> float:
        """Standard error of the mean over data drawn from the population; it includes the Monte Carlo error."""
        return _stderr(self.value)

    @property
    def monte_carlo_stderr(self) -> float:
        """Standard error of the mean from the draws alone, these data held fixed."""
        return float(self.stderr.square().sum().sqrt()) / len(self.stderr)

    def __str__(self) -> str:
        kind = {"lower": "lower bound", "upper": "upper bound", "unbiased": "unbiased"}[self.direction]
        draws = self.monte_carlo_stderr
        error = "" if math.isnan(draws) else f"; Monte Carlo s.e. {draws:.3f}"
        found = (
            f"{self.name} = {self.mean:.3f} ± {self.mean_stderr:.3f} nats per datum "
            f"({kind}; {len(self.value)} data{error})"
        )
        return "\n".join([found, *(f"  warning: {text}" for text in self.warnings)])


@dataclass(frozen=True)
class Average:
    """A mean with its standard error; it prints as "0.645 ± 0.044", and takes the format of a number.

    Attributes:
        mean: the mean.
        stderr: its standard error, sd / √n; NaN of one value.

    >>> print(f"{Average(0.64512, 0.04378):.2f}")
    0.65 ± 0.04
    """

    mean: float
    stderr: float

    def __str__(self) -> str:
        return f"{self:.3f}"

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.stderr:{spec}}" if spec else str(self)


def average(values: Tensor) -> Average:
    """The mean of independent values, with its standard error.

    Args:
        values: n numbers, or True and False, of which it is the share that holds.

    Raises:
        ValueError: no values.

    >>> import torch
    >>> print(average(torch.tensor([1.0, 2.0, 3.0])))
    2.000 ± 0.577
    """
    values = values.double().flatten()
    if not len(values):
        raise ValueError("values: there are none to take the mean of")
    return Average(float(values.mean()), _stderr(values))


@dataclass(frozen=True)
class Sandwich:
    """A lower and an upper bound for the same N data, simulated from the model.

    Attributes:
        lower: of annealing towards the posterior.
        upper: of annealing away from it.
        settings: how both were annealed.
    """

    lower: Estimate
    upper: Estimate
    settings: Annealing

    @property
    def gap(self) -> Average:
        """Mean distance of the two, nats per datum, with its error over data drawn from the model."""
        return average(self.upper.value - self.lower.value)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why not to believe it, if so."""
        gap = self.gap
        if not gap.mean + 2 * gap.stderr > LOOSE:
            return ()
        return (
            f"the gap may be above {LOOSE:g} nat: the lower bound is as loose on real data, or looser; take more "
            "distributions, or say wanted=",
        )

    def __str__(self) -> str:
        lines = [str(self.lower), str(self.upper), f"gap {self.gap} nats per datum"]
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


@dataclass(frozen=True)
class ActiveUnits:
    """Which latent dimensions a guide uses: those whose posterior mean varies over the data.

    Attributes:
        variance: latent site -> Var_x(E_q[z | x]), one number per dimension.
        threshold: a unit with more than this is active.
    """

    variance: dict[str, Tensor]
    threshold: float

    @property
    def count(self) -> dict[str, int]:
        """Latent site -> number of active units."""
        return {name: int((v > self.threshold).sum()) for name, v in self.variance.items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {self.count[name]} of {v.numel()}" for name, v in self.variance.items())


def _stderr(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
