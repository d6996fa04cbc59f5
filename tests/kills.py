"""Runs of every kind, cut off by an exception; as a script, one that is killed at random moments and resumed.

    python kills.py FOLDER KILLS

Each part is a process of its own, forked from the script's, so that what is slow the first time is so only once.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from small import LATENT, WIDTH, conditions, cvae, fit, pixels, vae
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import ppl_vae as pv
from ppl_vae.adversaries import Adversary
from ppl_vae.alternating import PIWAE, RWS
from ppl_vae.coding import WatchCodes
from ppl_vae.packing import pack
from ppl_vae.resuming import Checkpoints
from ppl_vae.rng import seeded
from ppl_vae.scores import NVIL

X, HELD_OUT = pixels(40), pixels(12, seed=1)
GREY, HELD_OUT_GREY = X.clamp(0, 1), HELD_OUT.clamp(0, 1)
EPOCHS, EPOCH = 5, 3  # epochs of a run, steps of an epoch
ADAM = partial(torch.optim.Adam, lr=1e-2, fused=True)
LONG = 40  # epochs of a run that is killed
TIMES = ("seconds", "per_second")


# ---- every kind of run: program, training data, validation data, settings
def learned(**settings):
    return vae(), X, None, settings


def scheduled(make, **settings):
    return vae(), X, HELD_OUT, {"scheduler": make, **settings}


def made(objective, program=vae, **settings):
    with seeded(1):
        return program(), X, HELD_OUT, {"objective": objective(), **settings}


def normalised():
    """Nets that draw, and that have running statistics."""
    with seeded(0):
        program = vae()
        encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2 * LATENT))
        decoder = nn.Sequential(nn.Linear(LATENT, 8), nn.Dropout(0.3), nn.Linear(8, WIDTH))
        program.posterior, program.likelihood.net = pv.mean_field(encoder), decoder
    return program, X, HELD_OUT, {}


def redrawn():
    data = (pv.Data(x, transform=pv.redraw) for x in (GREY, HELD_OUT_GREY))
    return vae("bernoulli"), *data, {"optimizer": ADAM}


def annealed():
    goal = pv.ELBO()
    return vae(), X, HELD_OUT, {"objective": goal, "hooks": [pv.Anneal(goal.beta, pv.linear(0.0, 1.0, 12))]}


def critic():
    penalty = Adversary(0.5, pv.MLP(LATENT, 8, 1), optimizer=partial(torch.optim.Adam, lr=5e-2))
    return pv.ELBO(penalties=[penalty])


def quantised():
    """Codes of a 2 x 2 grid, averaged; some are revived within the run."""
    shape = (1, 4, 4)
    with seeded(0):
        x, book = torch.randn(40, *shape), pv.Codebook(12, 3, ema=0.9, revive=2)
        program = pv.VAE(
            pv.CodePrior(pv.UniformCodes(12, (2, 2)), book),
            pv.Normal(pv.ConvDecoder(3, (4,), shape, spatial=True), 0.3, event_dim=3),
            pv.Quantised(pv.ConvEncoder(shape, (8,), 3, spatial=True), book, event_dim=3),
        )
    goal = pv.ELBO(penalties=[pv.Commitment()])
    return program, x, x[:12], {"objective": goal, "hooks": [WatchCodes(x[:12])], "optimizer": ADAM}


def batches():
    return [X[:16], X[16:32], X[32:]]


def shuffled():
    return vae(), DataLoader(TensorDataset(X), batch_size=16, shuffle=True), batches()[:1], {}


def warmed(after, optimizer):
    """A rise, then another schedule, which begins after the run is cut off."""
    rise = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [rise, after(optimizer)], [3])


def generated():
    """A loader with a stream of its own."""
    loader = DataLoader(TensorDataset(X), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5))
    return vae(), loader, None, {}


class Averaged(nn.Module):
    """Binary latents, whose score Pyro compares with a running average."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        average = {"use_decaying_avg_baseline": True}
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1), infer={"baseline": average})


def averaged():
    with seeded(0):
        return Averaged(), X[:32], None, {"objective": TraceGraph_ELBO(), "batch_size": 8}


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


def grouped(parameters):
    first, *rest = parameters
    return torch.optim.Adam([{"params": [first], "lr": torch.tensor(1e-2)}, {"params": rest}])


CASES = {
    "fused Adam": learned,
    "AdamW": partial(learned, optimizer=partial(torch.optim.AdamW, amsgrad=True)),
    "momentum": partial(learned, optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9)),
    "RMSprop": partial(learned, optimizer=torch.optim.RMSprop),
    "clipped": partial(learned, clip_norm=1.0),
    "bfloat16": partial(learned, precision="bf16"),
    "refined": partial(learned, refine=2),
    "validated": lambda: (vae(), X, HELD_OUT, {}),
    "double": lambda: (vae().double(), X, HELD_OUT, {}),
    "condition": lambda: (cvae(), (X, conditions(X)), None, {}),
    "cosine": partial(scheduled, partial(lr_scheduler.CosineAnnealingLR, T_max=EPOCHS)),
    "one cycle": partial(
        scheduled,
        partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=EPOCHS * EPOCH),
        scheduler_every="step",
    ),
    "plateau": partial(
        scheduled,
        partial(
            lr_scheduler.ReduceLROnPlateau, mode="max", factor=0.5, patience=1, threshold=1e9, threshold_mode="abs"
        ),
    ),
    "function of the epoch": partial(
        scheduled, partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 1 / (1 + epoch))
    ),
    "warm-up": partial(scheduled, partial(warmed, partial(lr_scheduler.ExponentialLR, gamma=0.9))),
    "milestones": partial(
        scheduled,
        partial(warmed, partial(lr_scheduler.MultiStepLR, milestones=[1, 2])),
        optimizer=partial(torch.optim.SGD, lr=1e-3),
    ),
    "several schedules": partial(scheduled, chained),
    "groups": partial(learned, optimizer=grouped),
    "redrawn pixels": redrawn,
    "dropout and batch norm": normalised,
    "IWAE": partial(made, partial(pv.IWAE, 3)),
    "NVIL": partial(made, lambda: pv.ELBO(2, estimator=NVIL(pv.MLP(WIDTH, 8, 1)))),
    "PIWAE": partial(made, partial(PIWAE, 2, 2)),
    "RWS": partial(made, partial(RWS, 3), scheduler=partial(lr_scheduler.StepLR, step_size=1)),
    "critic": partial(made, critic),
    "Pyro's ELBO": partial(made, Trace_ELBO),
    "annealed": annealed,
    "codes": quantised,
    "Pyro's baseline": averaged,
    "own generator": generated,
    "batches": lambda: (vae(), batches(), None, {}),
    "loader": shuffled,
    "dataset": lambda: (vae(), TensorDataset(X), TensorDataset(HELD_OUT), {}),
}


class Cut(Exception):  # noqa: N818 - it is no error
    """Stands for whatever ends a process."""


class CutAt(pv.Hook):
    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            raise Cut


def go(case, folder=None, resume="off", *, at=None, every=1, keep=2, **more):
    """Run a case, with checkpoints where there is a folder; until a step, where one is given."""
    program, x, valid, settings = case() if callable(case) else CASES[case]()
    settings = {"epochs": EPOCHS, "batch_size": 16, "seed": 3, "compile": "off"} | settings | more
    hooks = [*settings.pop("hooks", ()), *([] if at is None else [CutAt(at)])]
    kept = None if folder is None else Checkpoints(folder, resume, every=every, keep=keep)
    return fit(program, x, valid, hooks=hooks, checkpoints=kept, **settings)


def cut(case, folder, at, resume="off", **more):
    with pytest.raises(Cut):
        go(case, folder, resume, at=at, **more)


def end(run):
    """All that a run ends with, but for times."""
    return {
        "pair": dict(run.pair.state_dict()),
        "objective": dict(run.objective.state_dict()),
        "optimizers": [update.optimizer.state_dict() for update in run.updates],
        "schedules": [comparable(schedule.state_dict()) for schedule in run.schedules],
        "history": [{name: value for name, value in row.items() if name not in TIMES} for row in run.history],
        "about": [run.epoch, run.step, run.best_epoch, run.reason, run.stopping, run.interrupted],
    }


def comparable(state):
    """A scheduler's state, a Counter or an inner scheduler's included, as plain values."""
    if isinstance(state, dict):
        return {key: comparable(value) for key, value in state.items()}
    return [comparable(value) for value in state] if isinstance(state, list) else state


# ---- killed
def logged(folder):
    """Long enough to be killed several times."""
    program, x, valid, settings = redrawn()
    hooks = [pv.EarlyStop(patience=LONG), pv.LogCSV(folder / "metrics.csv")]
    schedule = partial(lr_scheduler.CosineAnnealingLR, T_max=LONG)
    return program, x, valid, settings | {"epochs": LONG, "scheduler": schedule, "hooks": hooks}


def train(folder):
    """One part of the run, from its newest checkpoint to the end if nothing comes between."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # a checkpoint that is damaged would be passed over with a warning
    kept = folder / "kept"
    run = go(partial(logged, folder), kept, "last" if Checkpoints(kept).found() else "auto")
    pack(folder / "end.safetensors", "end", end(run))


def part(folder, seconds=None):
    """A process that trains, killed after so many seconds; whether it was killed.

    Raises:
        RuntimeError: it failed by itself.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(folder)
            code = 0
        except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on as the other one
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # of one that has ended and is not waited for yet, nothing
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"training in {folder} failed")
    return False


def main(folder, kills):
    """Train a run whole, then others with so many kills in all; print what came about."""
    choose = random.Random(0)
    (folder / "whole").mkdir()
    (folder / "first").mkdir()
    train(folder / "first")
    start = time.monotonic()
    part(folder / "whole")
    most = 0.7 * (time.monotonic() - start)
    told = {"kills": 0, "runs": 0, "resumed": 0}
    while told["kills"] < kills:
        own = folder / f"run-{told['runs']:03d}"
        own.mkdir()
        ended = False
        while not ended:
            killing = told["kills"] < kills
            told["resumed"] += bool(Checkpoints(own / "kept").found())
            killed = part(own, choose.uniform(0, most) if killing else None)
            told["kills"] += killed
            ended = not killed
        told["runs"] += 1
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
