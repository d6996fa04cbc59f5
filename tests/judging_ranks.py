"""Several processes that judge data together, each in a process of its own: what each of them gets."""

import os
import signal
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from exact import LinearGaussian
from small import vae
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import ppl_vae as pv
from ppl_vae.estimates import IncompleteError
from ppl_vae.ranks import RankError, alone

COUNT, SIZE = 11, 4  # data, and how many of them in a batch
SHORT = pv.Annealing(distributions=8, leapfrog=2, chains=6)


class Grey(nn.Module):
    """Nothing is latent: log p(x) of binary pixels is known."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Bernoulli(0.3).expand(x.shape[1:]).to_event(1), obs=x)

    def guide(self, x):
        pass


class Coded(nn.Module):
    """A guide that gives each number one of five codes."""

    def __init__(self):
        super().__init__()
        self.book = pv.Codebook(5, 1)
        with torch.no_grad():
            self.book.vectors.copy_(torch.arange(-2.0, 3.0).reshape(self.book.vectors.shape))
        self.prior = pv.CodePrior(pv.UniformCodes(5, (2,)), self.book)
        self.posterior = pv.Quantised(nn.Unflatten(-1, (1, 2)), self.book, event_dim=2)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z.squeeze(-2), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x))


class Failing(LinearGaussian):
    """It cannot take the last datum: refuses it, breaks down, dies, or makes NaN of it."""

    last, how = torch.zeros(0), ""

    def model(self, x):
        wrong = bool((x == self.last).all(-1).any())
        if wrong and self.how == "refused":
            raise ValueError("x: this datum is not to be had")
        if wrong and self.how == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        if wrong and self.how == "broken":
            raise ArithmeticError("no such number")
        super().model(torch.where((x == self.last).all(-1, keepdim=True), torch.nan, x) if wrong else x)


def exact(count=COUNT):
    """A pair whose guide is the posterior, and data."""
    program = LinearGaussian.random(0, latent=2, width=4, guide="exact")
    return program, program.draw(count, seed=0)


def wide(count=COUNT):
    """A pair whose guide is wider than the posterior, and data."""
    program = LinearGaussian.random(0, latent=2, width=4, widen=1.2)
    return program, program.draw(count, seed=0)


def failing(how):
    program = Failing.random(0, latent=2, width=4, widen=1.2)
    x = program.draw(COUNT, seed=0)
    program.last, program.how = x[-1].clone(), how
    return program, x


def grey():
    return Grey(), pv.Data(torch.rand(COUNT, 30, generator=torch.Generator().manual_seed(0)), transform=pv.redraw)


def with_nan():
    program, x = wide()
    x[7, 1] = torch.nan
    return program, x


def streamed():
    program, x = exact()
    return program, [x[:5], x[5:6], x[6:]]


def from_set():
    program, x = exact()
    return program, TensorDataset(x)


def of_shares(rank):
    """Each process has a part of its own, which is a mistake."""
    program, x = exact()
    return program, DataLoader(TensorDataset(x[rank::2]), batch_size=SIZE)


def of_weights(rank):
    """Each process has weights of its own, which is a mistake."""
    return LinearGaussian.random(rank, latent=2, width=4), exact()[1]


ELBO = partial(pv.elbo, particles=50, batch_size=SIZE)
BOUND = partial(pv.log_likelihood, particles=100, chunk=40, batch_size=SIZE)
ANNEALED = partial(pv.annealed, settings=SHORT, batch_size=SIZE)


def judged(how, rank=0):
    """By name, what there is to judge and how; ``how`` is whether graphs are captured."""
    eager, captured = {"compile": "off"}, {"compile": how}
    many = exact(40)[1]
    return {
        # What does not depend on draws.
        "exact elbo": lambda: ELBO(*exact(), **captured),
        "exact bound": lambda: BOUND(*exact(), **captured),
        "exact importance": lambda: pv.importance(*exact(), 30, defensive=0.0, batch_size=SIZE, **captured),
        "exact annealed": lambda: pv.annealed(
            *exact(), pv.Annealing(distributions=5, chains=3, start="guide"), batch_size=SIZE, **captured
        ),
        "stream": lambda: BOUND(*streamed(), **eager),
        "set": lambda: BOUND(*from_set(), **eager),
        "redrawn": lambda: BOUND(*grey(), **eager),
        "units": lambda: pv.active_units(*wide(), batch_size=SIZE),
        "codes": lambda: pv.code_indices(Coded().eval(), wide()[1][:, :2].float(), batch_size=SIZE),
        "length": lambda: pv.code_length(Coded().eval(), wide()[1][:, :2].float(), batch_size=SIZE, **eager),
        "decomposed": lambda: pv.decompose(*wide(), batch_size=SIZE, chunk=3),
        # What does.
        "elbo": lambda: ELBO(*wide(), **captured),
        "bound": lambda: BOUND(*wide(), **captured),
        "importance": lambda: pv.importance(*wide(), 100, defensive=0.2, batch_size=SIZE, **captured),
        "annealed": lambda: ANNEALED(*wide(), **captured),
        "gaps": lambda: pv.gaps(*wide(), steps=60, particles=50, settings=SHORT, batch_size=SIZE, **captured),
        "sandwich": lambda: pv.sandwich(
            wide()[0], COUNT, like=wide()[1:], settings=SHORT, wanted=0.5, most=32, batch_size=SIZE, **eager
        ),
        "ranked": lambda: pv.sbc(exact()[0], 40, like=(many,), draws=9, batch_size=15),
        "replicated": lambda: pv.predictive_check(*exact(), draws=20, chunk=7, batch_size=SIZE),
        # What goes wrong.
        "nan in data": lambda: ELBO(*with_nan(), **eager),
        "nan in weights": lambda: ELBO(*failing("nan"), **eager),
        "refused": lambda: ELBO(*failing("refused"), **eager),
        "broken": lambda: ELBO(*failing("broken"), **eager),
        "dead": lambda: ELBO(*failing("dead"), **eager),
        "shares": lambda: ELBO(*of_shares(rank), **eager),
        "weights": lambda: ELBO(*of_weights(rank), **eager),
        # Fewer data than processes.
        "three": lambda: ELBO(*exact(3), **eager),
        "one": lambda: pv.annealed(*exact(1), SHORT, **eager),
        "three codes": lambda: pv.code_indices(Coded().eval(), wide(3)[1][:, :2].float()),
        # One alone, amid the others.
        "alone": lambda: by_the_last(rank),
        "stream left": lambda: left(),
        "float": lambda: pv.log_likelihood(vae(), torch.rand(5, 12), 7, **eager),
    }


def by_the_last(rank):
    """What the last process finds without the others."""
    if rank == 0:
        return {}
    with alone():
        return ELBO(*wide(), compile="off")


def left():
    """Draws of the caller's before and after."""
    torch.manual_seed(5)
    first = torch.rand(3)
    ELBO(*wide(), compile="off")
    return {"around": torch.cat([first, torch.rand(3)])}


def tensors(found, of=""):
    """Every tensor and text of a result, by name."""
    if torch.is_tensor(found) or isinstance(found, str):
        return {of: found}
    if isinstance(found, (int, float)):
        return {of: torch.tensor(found)}
    if isinstance(found, tuple):
        found = dict(enumerate(found))
    parts = found if isinstance(found, dict) else vars(found) if hasattr(found, "__dict__") else {}
    return {name: t for key, part in parts.items() for name, t in tensors(part, f"{of} {key}".strip()).items()}


def outcome(judge):
    """What a judge finds, and of an error what it says and has."""
    try:
        return tensors(judge())
    except IncompleteError as error:
        return {"error": f"IncompleteError: {error}"} | tensors(error.result)
    except (ValueError, ArithmeticError, RankError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def outcomes(names, how="off", rank=0):
    """Judge by each name."""
    judges = judged(how, rank)
    return {name: outcome(judges[name]) for name in names}


if __name__ == "__main__":
    rank, ranks, meeting, out, how, *names = sys.argv[1:]
    distributed.init_process_group("gloo", init_method=meeting, rank=int(rank), world_size=int(ranks))
    torch.save(outcomes(names, how, int(rank)), out)
    distributed.destroy_process_group()
