"""Programs, objectives and data on which numbers go wrong, and runs on them."""

import json
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from kills import ADAM, TIMES, comparable
from small import LATENT, WIDTH, fit, pixels, vae, weights
from torch import nn

import ppl_vae as pv
from ppl_vae.faults import Faults
from ppl_vae.objectives import Objective

BAD = 20  # the datum on which numbers go wrong
X, HELD_OUT = pixels(40), pixels(12, seed=1)
MARKED = X.clone()
MARKED[BAD, 0] = 1000.0
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)


def state(run):
    """All that a run ends with, but for times and files."""
    return {
        "pair": dict(run.pair.state_dict()),
        "objective": dict(run.objective.state_dict()),
        "optimizers": [update.optimizer.state_dict() for update in run.updates],
        "schedules": [comparable(schedule.state_dict()) for schedule in run.schedules],
        "history": [{name: value for name, value in row.items() if name not in TIMES} for row in run.history],
        "about": [run.epoch, run.step, run.best_epoch, run.reason],
        "faults": [str(replace(fault, file=None)) for fault in run.faults],
    }


def fitted(policy, program, data, valid=None, *, folder=None, most=10, **settings):
    settings = {"epochs": 3, "batch_size": 16, "seed": 3, "compile": "off", "optimizer": ADAM} | settings
    return fit(program, data, valid, faults=Faults(policy, most=most, folder=folder), **settings)


def step_of(row, epoch=0, seed=3):
    """The step of an epoch that meets a row, from 1."""
    batches = pv.Data(X).rows(16, seed, epoch)
    return next(i for i, rows in enumerate(batches, 1) if row in rows)


class Plain(Objective):
    """How well the decoder at z = 0 meets x: no draws, so that a batch left out leaves no trace.

    On a marked datum the value, or the gradient, is not finite.
    """

    def __init__(self, wrong="value"):
        super().__init__()
        self.wrong = wrong

    def forward(self, pair, x):
        found = pair.program.likelihood.net(x.new_zeros(len(x), LATENT))
        fit = -((found - x.clamp(max=1)) ** 2).sum(1)
        marked = x[:, 0] > 100
        if self.wrong == "value":
            return fit + (-marked.float()).sqrt() * found[:, 0]
        root = (found[:, 0] * (~marked).float()).abs().sqrt()  # 0 on a marked datum, with a slope of 0 / 0
        return fit + 0.1 * root


class Marked(nn.Module):
    """A conditional whose scale is NaN where the first entry of its context is large."""

    def __init__(self, inner, at):
        super().__init__()
        self.inner, self.at = inner, at

    def forward(self, *context):
        found = self.inner(*context)
        wrong = context[self.at][..., :1] > 100
        scale = found.base_dist.scale.masked_fill(wrong, torch.nan)
        return dist.Normal(found.base_dist.loc, scale).to_event(1)


def marked_vae():
    """A VAE whose posterior is not defined at a marked datum."""
    program = vae()
    program.posterior = Marked(program.posterior, 0)
    return program


class Line(nn.Module):
    """A point that is drawn to the data; beyond 10 it is no number any more."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((WIDTH,), 3.0))

    def model(self, x):
        pyro.module("line", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.w + 0 * z.unsqueeze(-1) + 0 * (10.0 - self.w.abs()).sqrt()
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))


def line(rate, policy="back", schedule=None, **more):
    """Steepest descent on a curvature of 1: beyond a rate of 2 it runs away; plain within."""
    settings = {"optimizer": partial(torch.optim.SGD, lr=rate), "epochs": 6, "report_every": 2} | more
    schedule = None if schedule is None else partial(schedule, rate)
    return fitted(policy, Line(), X, settings.pop("valid", None), scheduler=schedule, **settings)


class Watch(pv.Hook):
    """Everything that a step may change, before each of them."""

    def __init__(self):
        self.seen = []

    def on_step(self, run):
        optimizers = [update.optimizer.state_dict()["state"] for update in run.updates]
        self.seen.append((weights(run.pair), json.dumps(optimizers, default=lambda t: t.tolist())))
