"""How much gradients of the guide scatter under each estimator; prints the table of docs/results.md.

usage: python tests/bench/variances.py

Two cases: a linear-Gaussian model of 5 latents and 20 pixels, with a guide at the posterior's mean and a tenth too
wide; and a belief network of 8 binary units over 16 pixels. For each bound and estimator, the total variance of
the gradient of one datum in the guide's parameters, over independent draws, divided by the first estimator's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import ppl_vae as pv
from ppl_vae.bounds import elbo, iwae
from ppl_vae.rng import seeded

sys.path.insert(0, str(Path(__file__).parents[1]))
from exact import LinearGaussian

COPIES, REPEATS = 50, 40
BOUNDS = {"ELBO, K = 8": (elbo, 8), "IWAE, K = 8": (iwae, 8), "IWAE, K = 64": (iwae, 64)}
CONTINUOUS = {"pathwise": pv.pathwise, "sticking": pv.sticking, "doubly": pv.doubly}
SCORES = {"score": pv.score, "leave_one_out": pv.leave_one_out, "vimco": pv.vimco}


class Amortised(nn.Module):
    """The guide as a net would have it: a mean linear in x, and log-scales."""

    def __init__(self, program: LinearGaussian, x: Tensor) -> None:
        super().__init__()
        mean, _ = program.posterior(x)
        self.program = program
        self.loc = nn.Parameter(mean[0].detach().clone())
        self.log_scale = nn.Parameter(program.mean_field_variance.detach().sqrt().mul(1.1).log())

    def model(self, x: Tensor) -> None:
        self.program.model(x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x), -1), self.log_scale.exp()).to_event(1))


def variance(estimator, bound, particles: int, pair: pv.Pair, x: Tensor, parameters: list[Tensor]) -> float:
    """Total variance of the gradient of one datum."""
    rows = []
    for seed in range(REPEATS):
        with seeded(seed):
            values = estimator(bound, pair, x.expand(COPIES, -1), particles=particles)
            parts = torch.autograd.grad(values.mean(), parameters)
        rows.append(torch.cat([p.flatten() for p in parts]))
    return float(torch.stack(rows).var(0).sum()) * COPIES


def continuous() -> tuple[pv.Pair, Tensor, list[Tensor]]:
    program = LinearGaussian.random(0, latent=5, width=20)
    x = program.draw(1, seed=0).detach()
    made = Amortised(program, x)
    return pv.as_pair(made), x, [made.loc, made.log_scale]


def discrete() -> tuple[pv.Pair, Tensor, list[Tensor]]:
    with seeded(0):
        program = pv.sigmoid_belief_network(16, 8)
        x = torch.rand(1, 16).round()
    return pv.as_pair(program), x, list(program.posteriors.parameters())


def main() -> None:
    print("| bound |", " | ".join([*CONTINUOUS, *SCORES, *SCORES]), "|")
    for name, (bound, particles) in BOUNDS.items():
        cells = []
        for case, estimators in ((continuous, {**CONTINUOUS, **SCORES}), (discrete, SCORES)):
            pair, x, parameters = case()
            found = [variance(e, bound, particles, pair, x, parameters) for e in estimators.values()]
            cells += [f"{v / found[0]:.3g}" for v in found]
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
