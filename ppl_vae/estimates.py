"""What evaluation gives back: numbers per datum with their errors and their direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from ppl_vae.schedules import Annealing

__all__ = [
    "ActiveUnits",
    "Average",
    "Direction",
    "Estimate",
    "IncompleteError",
    "Sandwich",
    "average",
    "kept",
    "share_warning",
    "whole",
]

Direction = Literal["lower", "upper", "unbiased"]
T = TypeVar("T")
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
    def failed(self) -> Tensor:
        """Which data have none, (N,): NaN, or infinite on the side where no bound is."""
        wrong = -math.inf if self.direction == "upper" else math.inf
        return self.value.isnan() | (self.value == wrong)

    @property
    def rest(self) -> Estimate:
        """The estimate of the data that have not failed."""
        kept = ~self.failed
        found = {name: v[kept] if len(v) == len(kept) else v for name, v in self.diagnostics.items()}
        return replace(self, value=self.value[kept], stderr=self.stderr[kept], diagnostics=found)

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


class IncompleteError(ValueError):
    """Some data have no estimate.

    Attributes:
        result: what there is for all data, in the form asked for; those that failed are NaN or infinite.
    """

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


def whole(result: T, *estimates: Estimate) -> T:
    """A result itself, if no estimate in it is of nothing.

    -inf is a lower bound, of a datum that the model cannot make; inf is none, and NaN is no number.

    Raises:
        IncompleteError: an estimate is NaN for some datum, or infinite on the wrong side; it has the result.
    """
    for estimate in estimates:
        wrong = estimate.failed
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise IncompleteError(
                f"data: {estimate.name} of row {row} is {float(estimate.value[row])}; look for parameters that "
                "are NaN, for scales that overflow or vanish there, for a guide that draws what the model cannot; "
                "the other rows are in this error's `result`",
                result,
            )
    return result


def kept(judge: Callable[[], T]) -> T:
    """What a judge returns, or, where some data fail, what its error has of all; the caller tells of it."""
    try:
        return judge()
    except IncompleteError as error:
        result: T = error.result
        return result


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
        wanted: the gap that was asked for, if one was.
    """

    lower: Estimate
    upper: Estimate
    settings: Annealing
    wanted: float | None = None

    @property
    def gap(self) -> Average:
        """Mean distance of the two, nats per datum, with its error over data drawn from the model."""
        kept = ~(self.lower.failed | self.upper.failed)
        return average((self.upper.value - self.lower.value)[kept])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why not to believe it, if so."""
        gap, limit = self.gap, LOOSE if self.wanted is None else self.wanted
        error = 0.0 if math.isnan(gap.stderr) else gap.stderr
        if gap.mean < -3 * error - 1e-3:
            return ("the lower bound lies above the upper one: the model does not make the data that it observes",)
        if gap.mean + 2 * error <= limit:
            return ()
        return (
            f"the gap may be above {limit:g} nat, and the lower bound as loose on real data, or looser; take more "
            "distributions",
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
