"""Shipped programs: pairs of a Pyro model and a Pyro guide, declared from conditionals.

They are plain Pyro. `ppl_vae.fit` trains them, and so does ``pyro.infer.SVI`` with ``pyro.optim``: the programs
register their modules. A program of your own needs no base class, only ``model`` and ``guide``.
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor, nn

from ppl_vae.conditionals import Conditional
from ppl_vae.nets import Concat, OneHot

__all__ = ["CVAE", "VAE", "Density"]


class _OneLevel(nn.Module):
    """One latent z per datum: z ~ p(z | c), x ~ p(x | z, c), guide q(z | x, c), with c possibly empty."""

    def __init__(self, prior: Conditional, likelihood: Conditional, posterior: Conditional) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior

    def _generate(self, x: Tensor, *context: Tensor) -> None:
        pyro.module("prior", self.prior)
        pyro.module("likelihood", self.likelihood)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior(*context))
            pyro.sample("x", self.likelihood(z, *context), obs=x)

    def _infer(self, x: Tensor, *context: Tensor) -> None:
        pyro.module("posterior", self.posterior)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x, *context))

    @torch.no_grad()
    def _blank(self, size: int, *context: Tensor) -> Tensor:
        z = self.prior(*context).sample()  # only its shape is used
        event = self.likelihood(z, *context).event_shape
        blank: Tensor = z.new_zeros(size, *event)
        return blank


class VAE(_OneLevel):
    """The variational autoencoder: z ~ p(z), x ~ p(x | z), guide q(z | x) (Kingma & Welling 2014).

    Args:
        prior: p(z), for instance ``StandardNormal(20)``.
        likelihood: p(x | z), for instance ``Bernoulli(net)`` or ``Normal(net, scale=LearnedScale())``.
        posterior: q(z | x), for instance ``mean_field(net)``.

    Shapes: x is (B, *event), z is (K, B, d) under K particles.
    """

    def model(self, x: Tensor) -> None:
        """Declare z ~ p(z), x ~ p(x | z) for a batch ``x`` (B, *event)."""
        self._generate(x)

    def guide(self, x: Tensor) -> None:
        """Declare z ~ q(z | x) for a batch ``x`` (B, *event)."""
        self._infer(x)

    def blank(self, size: int) -> tuple[Tensor, ...]:
        """A batch of the right shape, for sampling from the model: x is zeros (size, *event)."""
        return (self._blank(size),)


class CVAE(_OneLevel):
    """The conditional variational autoencoder p(x | c) = ∫ p(x | z, c) p(z | c) dz (Sohn et al. 2015).

    Args:
        prior: p(z | c), for instance ``conditional_normal(net)``, or ``StandardNormal(20)`` to ignore c.
        likelihood: p(x | z, c), given as two inputs: use ``Concat`` around a net.
        posterior: q(z | x, c), likewise.

    Shapes: x is (B, *event); c is (B,) of integer labels behind a `OneHot`, or (B, features).
    """

    def model(self, x: Tensor, c: Tensor) -> None:
        """Declare z ~ p(z | c), x ~ p(x | z, c) for a batch ``x`` (B, *event) with conditions ``c``."""
        self._generate(x, c)

    def guide(self, x: Tensor, c: Tensor) -> None:
        """Declare z ~ q(z | x, c)."""
        self._infer(x, c)

    def blank(self, size: int, c: Tensor) -> tuple[Tensor, ...]:
        """A batch of the right shape, for sampling given the conditions ``c`` (size, ...)."""
        _check_conditions(size, c)
        return self._blank(size, c), c

    def check(self, x: Tensor, c: Tensor) -> None:
        """Raise ValueError where ``c`` holds a label that the program does not know."""
        _check_labels(self, c)


class Density(nn.Module):
    """p(x | c) by itself: no latents, and an empty guide, so that every bound is log p(x | c) itself.

    What a latent model is to be held against, or a density that later serves as part of one.

    Args:
        likelihood: p(x | c), given the columns of the data after x; of none of them where there are none, as with
            ``Bernoulli(Constant(torch.zeros(784), learned=True))``.

    Shapes: x is (B, *event), c as for `CVAE`, or absent.

    >>> from ppl_vae.likelihoods import Bernoulli
    >>> from ppl_vae.nets import MLP
    >>> Density(Bernoulli(MLP(10, 8, 4))).blank(3, torch.zeros(3, 10))[0].shape
    torch.Size([3, 4])
    """

    def __init__(self, likelihood: Conditional) -> None:
        super().__init__()
        self.likelihood = likelihood

    def model(self, x: Tensor, *context: Tensor) -> None:
        """Declare x ~ p(x | c) for a batch ``x`` (B, *event) with conditions."""
        pyro.module("likelihood", self.likelihood)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", self.likelihood(*context), obs=x)

    def guide(self, x: Tensor, *context: Tensor) -> None:
        """Nothing is latent."""

    @torch.no_grad()
    def blank(self, size: int, *context: Tensor) -> tuple[Tensor, ...]:
        """A batch of the right shape, for sampling given the conditions (size, ...)."""
        _check_conditions(size, *context)
        law = self.likelihood(*context)
        return (law.sample().new_zeros(size, *law.event_shape), *context)

    def check(self, x: Tensor, *context: Tensor) -> None:
        """Raise ValueError where a condition holds a label that the program does not know."""
        _check_labels(self, *context)


def _check_conditions(size: int, *context: Tensor) -> None:
    for c in context:
        if len(c) != size:
            raise ValueError(f"c: expected {size} conditions, one per sample, got {len(c)}")


def _check_labels(program: nn.Module, *context: Tensor) -> None:
    for module in program.modules():
        if isinstance(module, OneHot) and len(context) == 1:
            module.check(context[0])
        elif isinstance(module, Concat):  # which tells what goes where
            for embedding, c in zip(reversed(module.embeddings), reversed(context), strict=False):
                if isinstance(embedding, OneHot):
                    embedding.check(c)
