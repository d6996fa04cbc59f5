"""Likelihoods of counts, such as molecules per gene in a cell.

Data are whole numbers 0, 1, 2, ... in floating point. (A first column of bytes would be taken for pixels and
divided by 255: give counts as floats.) Rates are those of each datum alone, or shares of its size:

    rate_g = exp(net_g)                              of any size,
    rate_g = size * softmax(net)_g                   with ``sized=True`` (Lopez et al. 2018).
"""

from __future__ import annotations

from abc import abstractmethod

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Entrywise, Scale, as_scale, bounded, unbounded
from ppl_vae.nets import output_bias, pooled

__all__ = ["NegativeBinomial", "Poisson"]

LIMIT = 12.0  # log-rates stay within ±12: 1/160,000 to 160,000 events
SELDOM = -4.0  # log-odds of an extra zero before training


class _Counts(Entrywise):
    """Independent counts, with log-rates from a net; see `Poisson` for the arguments."""

    numbers = 1  # per count, extra zeros apart

    def __init__(self, net: nn.Module, sized: bool, inflated: bool, event_dim: int) -> None:
        super().__init__(net, event_dim)
        self.sized, self.inflated = sized, inflated

    @abstractmethod
    def counts(self, raw: Tensor, size: Tensor | None, gate: Tensor | None) -> TorchDistribution:
        """Return the distribution of single counts, with extra zeros at log-odds ``gate`` unless None."""

    def law(self, *context: Tensor) -> TorchDistribution:
        """Return the distribution of single counts."""
        if self.sized and (not context or context[-1].shape[-1:] != (1,)):
            raise ValueError(
                f"{type(self).__name__}: sized=True takes the size of each datum, (..., 1), as the last tensor of "
                f"its context; got shapes {[tuple(c.shape) for c in context]}"
            )
        *inputs, size = context if self.sized else (*context, None)
        raw, gate = self.net(*inputs), None
        if self.inflated:
            raw, gate = self.parts(raw, self.numbers, 1)
        return self.counts(raw, size, gate)

    def log_rate(self, raw: Tensor, size: Tensor | None) -> Tensor:
        """Log-rates of the net's numbers and, where rates are shares of a size, of that."""
        raw = bounded(raw, LIMIT)
        if size is None:
            return raw
        total = raw.logsumexp([*range(-self.event_dim, 0)], keepdim=True)
        # An empty datum has a size of nearly 0, since a rate of 0 has no gradient. A negative size gives NaN.
        return raw - total + size.log().clamp(min=-LIMIT).reshape(*size.shape[:-1], *[1] * self.event_dim)

    def start_from(self, x: Tensor) -> None:
        """Start the rates, or shares, at the mean of ``x`` (N, d), and extra zeros at log-odds of -4.

        An entry that is always 0 starts as if half an event had been seen.
        """
        mean, parts = x.mean(0).flatten(), self.numbers + self.inflated
        bias = output_bias(self.net, parts * mean.numel())
        mean = pooled(mean, len(bias) // parts).clamp(min=0.5 / len(x)).log()
        with torch.no_grad():
            bias[: mean.numel()] = unbounded(mean - mean.mean() if self.sized else mean, LIMIT).to(bias)
            if self.inflated:
                bias[-mean.numel() :] = SELDOM


class Poisson(_Counts):
    """Independent Poisson counts, log-rates from a net. Data: 0, 1, 2, ... in floating point.

    Args:
        net: module of the context, giving the log-rates, of the event's shape; with ``inflated`` the log-odds of
            extra zeros after them, along the first event dimension.
        sized: rates are shares of a datum's size, softmax of the net times the size. The context's last tensor is
            then that size, (..., 1), positive, and does not go into the net: the condition c of a `CVAE`, say.
            With c the sum of the counts it is the library size of sequencing.
        inflated: with some probability a count is 0 whatever its rate (zero inflation).
        event_dim: how many rightmost dimensions make one event.

    Raises:
        ValueError: ``event_dim`` below one; with ``sized``, a context without sizes (when it is used).

    >>> Poisson(nn.Identity(), sized=True)(torch.zeros(1, 4), torch.tensor([[100.0]])).mean.round()
    tensor([[25., 25., 25., 25.]])
    """

    def __init__(self, net: nn.Module, *, sized: bool = False, inflated: bool = False, event_dim: int = 1) -> None:
        super().__init__(net, sized, inflated, event_dim)

    def counts(self, raw: Tensor, size: Tensor | None, gate: Tensor | None) -> TorchDistribution:
        """Return the Poisson, or the zero-inflated one."""
        rate = self.log_rate(raw, size).exp()
        return dist.Poisson(rate) if gate is None else dist.ZeroInflatedPoisson(rate, gate_logits=gate)


class NegativeBinomial(_Counts):
    """Independent negative binomial counts: Poisson with rates that vary. Data: 0, 1, 2, ... in floating point.

    The mean is the rate μ, the variance μ + μ² / θ.

    Args:
        net: module of the context. Its output holds, along the first event dimension, log-rates, then log θ if
            ``concentration`` is `NetScale`, then log-odds of extra zeros if ``inflated``.
        concentration: θ, the inverse dispersion: a positive number (fixed), `LearnedScale`, which with
            ``shape=(genes,)`` has one for each gene, or `NetScale`.
        sized: as for `Poisson`.
        inflated: as for `Poisson`; the zero-inflated negative binomial of Lopez et al. (2018).
        event_dim: how many rightmost dimensions make one event.

    Raises:
        ValueError: θ not positive, or an `OptimalScale`; ``event_dim`` below one; with ``sized``, a context
            without sizes (when it is used).

    >>> from ppl_vae.conditionals import LearnedScale
    >>> NegativeBinomial(nn.Identity(), LearnedScale(1.0, shape=(4,)))(torch.zeros(2, 4)).variance
    tensor([[2., 2., 2., 2.],
            [2., 2., 2., 2.]], grad_fn=...)
    """

    def __init__(
        self,
        net: nn.Module,
        concentration: float | Scale,
        *,
        sized: bool = False,
        inflated: bool = False,
        event_dim: int = 1,
    ) -> None:
        super().__init__(net, sized, inflated, event_dim)
        self.concentration = as_scale(concentration, "concentration")
        self.numbers = self.concentration.channels

    def counts(self, raw: Tensor, size: Tensor | None, gate: Tensor | None) -> TorchDistribution:
        """Return the negative binomial, or the zero-inflated one."""
        raw, theta = self.concentration(raw, -self.event_dim)
        logits = self.log_rate(raw, size) - theta.log()
        if gate is None:
            return dist.NegativeBinomial(theta, logits=logits)
        # Pyro would check the probability of logits, which rounding may put at 1.
        return dist.ZeroInflatedNegativeBinomial(theta, logits=logits, gate_logits=gate, validate_args=False)
