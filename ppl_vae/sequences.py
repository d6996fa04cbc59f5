"""Sequences: the deep Markov model, its gated transition, and a guide that reads the sequence backwards.

References: Krishnan, Shalit & Sontag 2017, "Structured inference networks for nonlinear state space models".
"""

from __future__ import annotations

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae.conditionals import Conditional, NetScale, Normal, at_least_one
from ppl_vae.nets import MLP
from ppl_vae.posteriors import mean_field

__all__ = ["BackwardGRU", "DeepMarkovModel", "combiner", "gated_transition"]


class DeepMarkovModel(nn.Module):
    """A Markov chain of latents, observed step by step: z_1 ~ p(z_1), z_t ~ p(z_t | z_{t-1}), x_t ~ p(x_t | z_t).

    The guide is q(z_t | z_{t-1}, x_t, ..., x_T), as the posterior is: h = features(x) summarises the rest of the
    sequence, once for all particles, and z_t ~ q(z_t | z_{t-1}, h_t), with zeros for z_0. It draws in the model's
    order, so ``kl="analytic"`` holds.

    Sequences of different lengths are padded to one length T, with a mask (B, T) that is True, or 1, where there
    are data. Steps past the end count neither as latents nor as data, so bounds are those of the sequence without
    its padding; what is drawn or predicted there means nothing. Padding must be numbers that the likelihood
    takes. The estimator `doubly` has no rule for such masks. Steps are unrolled: there is one
    graph per T, and compiling it takes time in proportion to T.

    Args:
        initial: p(z_1), for instance ``StandardNormal(20)``.
        transition: p(z_t | z_{t-1}), for instance ``gated_transition(20, 64)``.
        likelihood: p(x_t | z_t).
        features: module (x, mask or None) -> (B, T, features), for instance ``BackwardGRU(88, 64)``.
        posterior: q(z_t | z_{t-1}, h_t), for instance ``combiner(20, 64)``; two inputs, (K, B, d) and (B, F).
        steps: how long sequences are that are drawn without a mask; by default a mask is needed.

    Shapes: x is (B, T, *event); sites "z1" to "zT" are (K, B, d) under K particles; site "x" holds all steps.

    >>> from ppl_vae.likelihoods import Bernoulli
    >>> from ppl_vae.priors import StandardNormal
    >>> dmm = DeepMarkovModel(
    ...     StandardNormal(3), gated_transition(3, 8), Bernoulli(MLP(3, 8, 6)), BackwardGRU(6, 8), combiner(3, 8)
    ... )
    >>> dmm.blank(2, torch.ones(2, 5, dtype=torch.bool))[0].shape
    torch.Size([2, 5, 6])
    """

    def __init__(
        self,
        initial: Conditional,
        transition: Conditional,
        likelihood: Conditional,
        features: nn.Module,
        posterior: Conditional,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        if steps is not None:
            at_least_one(steps=steps)
        self.steps = steps
        self.initial, self.transition, self.likelihood = initial, transition, likelihood
        self.features, self.posterior = features, posterior

    def model(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Declare the chain and its data ``x`` (B, T, *event), of which ``mask`` (B, T) tells the lengths."""
        for name in ("initial", "transition", "likelihood"):
            pyro.module(name, getattr(self, name))
        mask = None if mask is None else mask > 0
        states: list[Tensor] = []
        with pyro.plate("data", len(x), dim=-1):
            for step in range(x.shape[1]):
                law = self.transition(states[-1]) if states else self.initial()
                states.append(pyro.sample(f"z{step + 1}", _within(law, mask, step)))
            law = self.likelihood(torch.stack(states, dim=-2))  # of all steps at once: (K, B, T)
            law = law if mask is None else law.mask(mask)
            pyro.sample("x", law.to_event(1), obs=x)

    def guide(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Declare z_t ~ q(z_t | z_{t-1}, h_t), with h the features of the whole sequence."""
        for name in ("features", "posterior"):
            pyro.module(name, getattr(self, name))
        mask = None if mask is None else mask > 0
        summary = self.features(x, mask)  # (B, T, F)
        z = summary.new_zeros(self.initial().event_shape)
        with pyro.plate("data", len(x), dim=-1):
            for step in range(x.shape[1]):
                law = self.posterior(z, summary[:, step])
                z = pyro.sample(f"z{step + 1}", _within(law, mask, step))

    @torch.no_grad()
    def blank(self, size: int, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """A batch of the right shapes, for sampling sequences of the lengths that ``mask`` (size, T) tells."""
        if mask is None and self.steps is not None:
            mask = torch.ones(size, self.steps, dtype=torch.bool, device=next(self.parameters()).device)
        if mask is None:
            raise ValueError("mask: give one, (size, T), or declare the program with its `steps`")
        if mask.dim() != 2 or len(mask) != size:
            raise ValueError(f"mask: expected shape ({size}, steps), one row per sample, got {tuple(mask.shape)}")
        z = self.initial().sample()  # only its shape is used
        return z.new_zeros(*mask.shape, *self.likelihood(z).event_shape), mask

    def check(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Raise ValueError unless ``x`` has steps, and ``mask`` is True, or 1, up to each end, and False after."""
        if x.dim() < 3:
            raise ValueError(f"x: expected sequences (B, T, *event), got shape {tuple(x.shape)}")
        if mask is None:
            return
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"mask: expected shape {tuple(x.shape[:2])}, (B, T), as the data, got {tuple(mask.shape)}"
            )
        on = mask > 0
        wrong = ~on[:, 0] | (on[:, 1:] & ~on[:, :-1]).any(1) | (mask != on).any(1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"mask: row {row} must be True from the first step to the last of its sequence, and False after "
                "it; a step within it cannot be left out, since the next one depends on it"
            )


def _within(law: TorchDistribution, mask: Tensor | None, step: int) -> TorchDistribution:
    """A step's distribution, counted only for the sequences that last so long."""
    return law if mask is None else law.mask(mask[:, step])


class BackwardGRU(nn.Module):
    """h_t = GRU(h_{t+1}, x_t): what the rest of a sequence says, ``(B, T, inputs) -> (B, T, features)``.

    Under a mask each sequence is read from its own end, so padding has no part in it.

    Args:
        inputs: width of one step of the data.
        features: width of the state.

    Raises:
        ValueError: a width below one.

    >>> BackwardGRU(6, 8)(torch.zeros(2, 5, 6)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        if min(inputs, features) < 1:
            raise ValueError(f"BackwardGRU: inputs and features must be at least 1, got {inputs} and {features}")
        self.gru = nn.GRU(inputs, features, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the states, at step t of all data from t on; past a sequence's end they mean nothing."""
        states: Tensor = _reversed(self.gru(_reversed(x, mask))[0], mask)
        return states


def _reversed(x: Tensor, mask: Tensor | None) -> Tensor:
    """Each sequence of ``x`` (B, T, D) in the opposite order, its padding left where it is."""
    if mask is None:
        return x.flip(1)
    step = torch.arange(x.shape[1], device=x.device)
    order = torch.where(mask, mask.sum(1, keepdim=True) - 1 - step, step)
    return x.gather(1, order[:, :, None].expand_as(x))


class _Gated(nn.Module):
    """Location and raw log-scale of the gated transition."""

    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.proposal = MLP(latent, hidden, latent), MLP(latent, hidden, latent)
        self.linear, self.log_scale = nn.Linear(latent, latent), nn.Linear(latent, latent)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(latent))
            self.linear.bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        gate, proposal = self.gate(z).sigmoid(), self.proposal(z)
        loc = torch.lerp(self.linear(z), proposal, gate)
        return torch.cat([loc, self.log_scale(proposal.relu())], dim=-1)


def gated_transition(latent: int, hidden: int) -> Normal:
    """p(z_t | z_{t-1}) that a gate mixes from a linear map and a net, dimension by dimension.

    μ = (1 - g) ⊙ (W z + b) + g ⊙ h and log σ = V relu(h) + c, with g = sigmoid(MLP(z)) and h = MLP(z) (Krishnan
    et al. 2017, "Gated Transition Function"). W starts at the identity and b at zero. The paper has a softplus
    for the scale; here the log-scale is bounded, as in every `NetScale`.

    Args:
        latent: width of z.
        hidden: width of the hidden layers of the two nets.

    Raises:
        ValueError: a width below one.

    >>> gated_transition(3, 8)(torch.zeros(7, 2, 3)).batch_shape
    torch.Size([7, 2])
    """
    return Normal(_Gated(latent, hidden), NetScale())


class _Combined(nn.Module):
    """Location and raw log-scale of the combiner."""

    def __init__(self, latent: int, features: int) -> None:
        super().__init__()
        self.lift, self.out = MLP(latent, features), MLP(features, 2 * latent)

    def forward(self, z: Tensor, summary: Tensor) -> Tensor:
        joined: Tensor = self.out((self.lift(z).tanh() + summary) / 2)
        return joined


def combiner(latent: int, features: int) -> Normal:
    """q(z_t | z_{t-1}, h_t): a normal, linear in (tanh(W z_{t-1} + b) + h_t) / 2 (Krishnan et al. 2017, "DKS").

    Args:
        latent: width of z.
        features: width of h_t.

    Raises:
        ValueError: a width below one.

    >>> combiner(3, 8)(torch.zeros(7, 2, 3), torch.zeros(2, 8)).batch_shape
    torch.Size([7, 2])
    """
    return mean_field(_Combined(latent, features))
