"""Pairs whose every quantity is known in closed form: linear-Gaussian models, that is, probabilistic PCA.

z ~ N(0, I_d), x | z ~ N(W z + mu, s2 I). Then x ~ N(mu, W W' + s2 I), and the posterior is
N(M^-1 W'(x - mu), s2 M^-1) with M = W'W + s2 I (Tipping & Bishop 1999, eq. 6 and 8).
"""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence


class LinearGaussian(nn.Module):
    """The pair, in float64, with a guide that is exact, the best mean-field one, or of another scale."""

    def __init__(
        self,
        weight: Tensor,
        mean: Tensor,
        variance: float,
        guide: Literal["exact", "mean-field"] = "mean-field",
        widen: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.double())  # (D, d)
        self.mean = nn.Parameter(mean.double())  # (D,)
        self.variance, self.kind, self.widen = variance, guide, widen

    @classmethod
    def random(cls, seed: int, latent: int = 3, width: int = 6, **options: object) -> LinearGaussian:
        """A random instance."""
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(width, latent, generator=g, dtype=torch.float64)
        mean = torch.randn(width, generator=g, dtype=torch.float64)
        return cls(weight, mean, 0.1 + float(torch.rand(1, generator=g)), **options)  # type: ignore[arg-type]

    @classmethod
    def reference(cls, **options: object) -> tuple[LinearGaussian, Tensor]:
        """The instance with published numbers, and its datum."""
        weight = torch.tensor([[1, 0.5], [0, 2], [-1, 0.3]], dtype=torch.float64)
        mean = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
        pair = cls(weight, mean, 0.25, **options)  # type: ignore[arg-type]
        return pair, torch.tensor([[0.7, -1.1, 0.4]], dtype=torch.float64)

    # ------------------------------------------------------------------ the programs
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.weight.shape[1]), 1.0).to_event(1))
            loc = z @ self.weight.T + self.mean
            pyro.sample("x", dist.Normal(loc, math.sqrt(self.variance)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, covariance = self.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            if self.kind == "exact":
                pyro.sample("z", dist.MultivariateNormal(loc, covariance * self.widen**2))
            else:
                pyro.sample("z", dist.Normal(loc, self.widen * self.mean_field_variance.sqrt()).to_event(1))

    # ------------------------------------------------------------------ the closed forms
    @property
    def precision(self) -> Tensor:
        """Posterior precision M / s2, (d, d)."""
        d = self.weight.shape[1]
        return (self.weight.T @ self.weight + self.variance * torch.eye(d, dtype=torch.float64)) / self.variance

    @property
    def mean_field_variance(self) -> Tensor:
        """Variances of the best mean-field posterior, 1 / diag(precision), (d,)."""
        return 1 / self.precision.diagonal()

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, d) and covariance (d, d) of p(z | x)."""
        covariance = torch.linalg.inv(self.precision)
        return (x - self.mean) @ self.weight @ covariance / self.variance, covariance

    def marginal(self) -> MultivariateNormal:
        """p(x)."""
        eye = torch.eye(len(self.mean), dtype=torch.float64)
        return MultivariateNormal(self.mean, self.weight @ self.weight.T + self.variance * eye)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), (B,)."""
        return self.marginal().log_prob(x)

    def guide_law(self, x: Tensor) -> MultivariateNormal:
        """q(z | x) as one multivariate normal, batch (B,)."""
        loc, covariance = self.posterior(x)
        if self.kind == "mean-field":
            covariance = torch.diag(self.mean_field_variance)
        return MultivariateNormal(loc, (covariance * self.widen**2).expand(len(x), -1, -1))

    def elbo(self, x: Tensor) -> Tensor:
        """log p(x) - KL(q || posterior), (B,)."""
        loc, covariance = self.posterior(x)
        exact = MultivariateNormal(loc, covariance.expand(len(x), -1, -1))
        return self.log_evidence(x) - kl_divergence(self.guide_law(x), exact)

    def rate(self, x: Tensor) -> Tensor:
        """KL(q || prior), (B,)."""
        d = self.weight.shape[1]
        prior = MultivariateNormal(torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64))
        return kl_divergence(self.guide_law(x), prior)

    @torch.no_grad()
    def weight_variance(self) -> float:
        """Var_q(w) / p(x)², which decides how fast L_K rises: E_q[(p(z|x) / q(z|x))²] - 1. Infinite if q is thin.

        For q and p of one mean with precisions Q and P: |P| / (sqrt|Q| sqrt|2P - Q|) - 1.
        """
        p = self.precision
        q = p if self.kind == "exact" else torch.diag(p.diagonal())
        q = q / self.widen**2
        least = float(torch.linalg.eigvalsh(2 * p - q).min())
        if least <= 0:
            return math.inf
        log = torch.logdet(p) - 0.5 * torch.logdet(q) - 0.5 * torch.logdet(2 * p - q)
        return float(log.exp()) - 1

    def draw(self, count: int, seed: int) -> Tensor:
        """Data from the model, (count, D)."""
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(count, self.weight.shape[1], generator=g, dtype=torch.float64)
        noise = torch.randn(count, len(self.mean), generator=g, dtype=torch.float64)
        return (z @ self.weight.T + self.mean + math.sqrt(self.variance) * noise).detach()
