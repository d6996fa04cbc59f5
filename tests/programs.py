"""Pyro programs of every shape that users write, with Pyro's own value and gradient to hold ours against."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from ppl_vae.layout import inspect
from ppl_vae.pairs import Pair, as_pair

ROWS, WIDTH, LATENT = 6, 4, 2


def gaussian(raw):
    """A diagonal normal from a net's output."""
    loc, log_scale = raw.chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


class OneLevel(nn.Module):
    """z -> x; subclasses edit the plate, the handlers around the latent, and the latent's laws."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(WIDTH, 2 * LATENT)
        self.decoder = nn.Linear(LATENT, 2 * WIDTH)

    def plate(self, x):
        return pyro.plate("data", len(x), dim=-1)

    def around(self, x):
        return nullcontext()

    def law(self, fn, x):
        return fn

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with self.plate(x) as rows:
            x = x[rows]
            with self.around(x):
                z = pyro.sample("z", self.law(dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1), x))
            pyro.sample("x", gaussian(self.decoder(z)), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with self.plate(x) as rows:
            x = x[rows]
            with self.around(x):
                pyro.sample("z", self.law(gaussian(self.encoder(x)), x))


class GivenRows(OneLevel):
    """The batch is some rows of a larger data set, named by ``subsample=``."""

    def plate(self, x):
        return pyro.plate("data", 50, subsample=torch.arange(len(x)), dim=-1)


class DrawnRows(OneLevel):
    """Pyro draws rows of the batch itself, by ``subsample_size=``."""

    def plate(self, x):
        return pyro.plate("data", len(x), subsample_size=3, dim=-1)


class HandlerMask(OneLevel):
    """Some rows have no latent, by ``poutine.mask``."""

    def around(self, x):
        return poutine.mask(mask=x[:, 0] > 0)


class LawMask(OneLevel):
    """Some rows have no latent, by ``.mask`` of the distribution."""

    def law(self, fn, x):
        return fn.mask(x[:, 0] > 0)


class Scaled(OneLevel):
    """The KL is weighed by ``poutine.scale`` in both programs, as Pyro's users do."""

    def around(self, x):
        return poutine.scale(scale=0.3)


class TwoLevel(nn.Module):
    """h -> z -> x, with a guide from the top down, or from the bottom up."""

    def __init__(self, bottom_up=False):
        super().__init__()
        self.bottom_up = bottom_up
        self.low, self.out = nn.Linear(LATENT, 2 * LATENT), nn.Linear(LATENT, 2 * WIDTH)
        self.first = nn.Linear(WIDTH, 2 * LATENT)
        self.second = nn.Linear(WIDTH + LATENT, 2 * LATENT)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            h = pyro.sample("h", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            z = pyro.sample("z", gaussian(self.low(h)))
            pyro.sample("x", gaussian(self.out(z)), obs=x)

    def guide(self, x):
        first, second = ("z", "h") if self.bottom_up else ("h", "z")
        with pyro.plate("data", len(x), dim=-1):
            value = pyro.sample(first, gaussian(self.first(x)))
            joined = torch.cat([x.expand(*value.shape[:-1], -1), value], -1)
            pyro.sample(second, gaussian(self.second(joined)))


class Nested(nn.Module):
    """z per datum, and u and x per entry in a plate of the entries at dim -2."""

    def __init__(self, subsample_size=None):
        super().__init__()
        self.size = subsample_size
        self.encoder, self.decoder = nn.Linear(WIDTH, 2), nn.Linear(2, 1)
        self.entry = nn.Parameter(torch.tensor([0.4, -0.3]))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("entries", x.shape[1], dim=-2, subsample_size=self.size) as i:
                u = pyro.sample("u", dist.Normal(0.5 * z, 1.0))
                loc = self.decoder(torch.stack([z.expand(u.shape), u], -1))[..., 0]
                pyro.sample("x", dist.Normal(loc, 0.7), obs=x.T[i])

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).unbind(-1)
            pyro.sample("z", dist.Normal(loc, raw.exp()))
            with pyro.plate("entries", x.shape[1], dim=-2, subsample_size=self.size) as i:
                pyro.sample("u", dist.Normal(self.entry[0] * x.T[i], self.entry[1].exp()))


def bare_params(dtype=torch.float32):
    """Two functions with nothing but ``pyro.param``, some constrained."""

    def model(x):
        scale = pyro.param("scale", torch.tensor(0.8, dtype=dtype), constraint=constraints.positive)
        mix = pyro.param("mix", lambda: torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=dtype), constraints.simplex)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * mix, scale).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope.of.q", torch.full((WIDTH,), 0.3, dtype=dtype))
        scale = pyro.param("scale_q", torch.tensor(0.5, dtype=dtype), constraint=constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x @ slope, scale))

    return Pair(model, guide)


def closed_over(dtype=torch.float32):
    """Two plain functions around nets that they register by ``pyro.module``."""
    program = OneLevel().to(dtype)
    return Pair(lambda x: program.model(x), lambda x: program.guide(x))


class PyroProgram(PyroModule):
    """A PyroModule with constrained parameters and a net."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.8), constraint=constraints.positive)
        self.net = PyroModule[nn.Linear](WIDTH, 2 * WIDTH)
        self.slope = nn.Parameter(torch.tensor(0.5))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(WIDTH), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.slope * z, self.scale).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", gaussian(self.net(x)))


class PyroGuide(PyroModule):
    """A guide that is called, as Pyro's tutorials write them."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.8), constraint=constraints.positive)
        self.net = nn.Linear(WIDTH, LATENT)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.net(x), self.scale).to_event(1))


def automatic(guide, dtype=torch.float32):
    """A guide that Pyro writes: parameters for each datum, or one vector for all."""
    model = OneLevel().to(dtype).model
    return Pair(model, guide(model).to(dtype))


class Constrained(nn.Module):
    """Latents of every kind of continuous support, some in a plate of their own."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
            share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            with pyro.plate("entries", 2, dim=-2):
                odds = pyro.sample("odds", dist.Beta(2.0, 3.0))
                pyro.sample("x", dist.Normal(rate * share[..., 0] + odds, 0.5), obs=x.T)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("rate", dist.Gamma(3.0, 2.0))
            pyro.sample("share", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("entries", 2, dim=-2):
                pyro.sample("odds", dist.Beta(1.5, 1.5))


class Discrete(nn.Module):
    """z is Bernoulli (or a category), which has no reparameterised sampler."""

    def __init__(self, category=False, baseline=False):
        super().__init__()
        self.category, self.infer = category, {"baseline": {"use_decaying_avg_baseline": True}} if baseline else {}
        self.logits = nn.Parameter(torch.tensor([0.3, -0.4]))
        self.table = nn.Parameter(torch.tensor([[0.5, -1.0, 0.2, 0.7], [-0.6, 0.3, 1.0, -0.2]]))
        self.encoder = nn.Linear(WIDTH, 2)

    def law(self, logits):
        return dist.Categorical(logits=logits) if self.category else dist.Bernoulli(logits=logits).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.law(self.logits))
            loc = self.table[z] if self.category else z @ self.table
            pyro.sample("x", dist.Normal(loc, 0.9).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.law(self.encoder(x)), infer=self.infer)

    def log_evidence(self, x):
        """log p(x) by enumeration, (B,)."""
        states = torch.arange(2) if self.category else torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)
        loc = self.table[states] if self.category else states @ self.table
        joint = (
            dist.Normal(loc[:, None], 0.9).to_event(1).log_prob(x)
            + self.law(self.logits).log_prob(states)[:, None]
        )
        return joint.logsumexp(0)


class SharedLatent(nn.Module):
    """One latent for all data, outside their plate."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(-1.0))

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(w, 1.0).expand([WIDTH]).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(self.loc, self.log_scale.exp()))


@dataclass
class Case:
    """A pair, a batch for it, and how Pyro scales its loss."""

    pair: Pair
    batch: tuple[torch.Tensor, ...]
    population: int = ROWS
    nesting: int = 1

    def reference(self, loss, seed=0):
        """Pyro's own value per datum and gradient, from the programs as written and Pyro's own store."""
        for p in self.pair.parameters():
            p.grad = None
        with pyro.get_param_store().scope(), torch.random.fork_rng():
            torch.manual_seed(seed)
            value = loss.loss_and_grads(self.registered, self.pair.callables[1], *self.batch)
            value = -(value[0] if isinstance(value, tuple) else value) / self.population
            bare = {name: pyro.param(name).unconstrained().grad for name in self.pair.constraints}
        gradient = {name: p.grad for name, p in self.pair.named_parameters()}
        gradient |= {f"params.{name.replace('.', '/')}": g for name, g in bare.items()}
        for p in self.pair.parameters():
            p.grad = None
        return value, {name: None if g is None else -g / self.population for name, g in gradient.items()}

    def registered(self, *batch):
        """The model as written; Pyro takes no gradient unless parameters are registered."""
        pyro.module("programs", self.pair.programs)
        return self.pair.callables[0](*batch)

    def ours(self, objective, seed=0):
        """The mean of an objective of ours, and its gradient."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            value = objective(self.pair, *self.batch).mean()
        named = dict(self.pair.named_parameters())
        gradient = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        return float(value.detach()), dict(zip(named, gradient, strict=True))


def agree(first, second, relative=1e-5):
    """Assert that two (value, gradient) pairs are the same; no gradient is a gradient of zero."""
    assert abs(first[0] - second[0]) <= relative * abs(second[0])
    assert first[1].keys() == second[1].keys()
    moved = 0.0
    for name, theirs in second[1].items():
        ours = first[1][name]
        zero = torch.zeros(())
        a, b = (zero if g is None else g for g in (ours, theirs))
        scale = float(b.abs().max())
        assert float((a - b).abs().max()) <= relative * max(scale, 1e-3), name
        moved += scale
    assert moved > 0, "no gradient at all"


PROGRAMS = {
    "one level": OneLevel,
    "given rows": GivenRows,
    "drawn rows": DrawnRows,
    "handler mask": HandlerMask,
    "law mask": LawMask,
    "scaled": Scaled,
    "two levels": TwoLevel,
    "bottom up": partial(TwoLevel, bottom_up=True),
    "nested": Nested,
    "nested, subsampled": partial(Nested, subsample_size=2),
    "bare params": bare_params,
    "closed over": closed_over,
    "pyro module": PyroProgram,
    "pyro guide": lambda dtype: Pair(OneLevel().to(dtype).model, PyroGuide().to(dtype)),
    "auto normal": lambda dtype: automatic(AutoNormal, dtype),
    "auto diagonal": lambda dtype: automatic(AutoDiagonalNormal, dtype),
    "bernoulli": Discrete,
    "category": partial(Discrete, category=True),
    "baseline": partial(Discrete, baseline=True),
    "shared latent": SharedLatent,
}
LEFT = {"given rows": {"population": 50}, "nested": {"nesting": 2}, "nested, subsampled": {"nesting": 2}}


def case(name, dtype=torch.float32):
    """One of the programs, always the same, inspected once so that all of its parameters exist."""
    make = PROGRAMS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = isinstance(make, type | partial)
        pair = as_pair(make().to(dtype)) if module else make(dtype)
        batch = (torch.randn(ROWS, WIDTH, dtype=dtype),)
        torch.manual_seed(2)
        inspect(pair, batch)
    return Case(pair, batch, **LEFT.get(name, {}))


def vectorised(loss=Trace_ELBO, nesting=1, particles=3, **options):
    """One of Pyro's ELBOs with all particles at once."""
    return loss(num_particles=particles, vectorize_particles=True, max_plate_nesting=nesting, **options)
