"""This project, as a worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch_nets import adam, networks, stepping, torch_worker, waiting
from worker import Job, clocked
from workloads import LEAPFROG, STEP, Workload, batches, binary, digits

import ppl_vae as pv
from ppl_vae.annealing import _walk
from ppl_vae.batches import prepare
from ppl_vae.capture import Engine
from ppl_vae.densities import LogJoint
from ppl_vae.layout import inspect
from ppl_vae.paths import Path
from ppl_vae.schedules import schedule
from ppl_vae.steps import Stepper


def program(work: Workload, device: str) -> pv.VAE:
    """The declared model."""
    encoder, decoder = networks(work)
    likelihood = pv.Bernoulli(decoder, event_dim=len(work.event))
    return pv.VAE(pv.StandardNormal(work.latent), likelihood, pv.mean_field(encoder)).to(device)


def objective(work: Workload) -> pv.BoundObjective:
    """The KL in closed form for one particle, as by hand; the importance-weighted bound for more."""
    if work.particles == 1:
        return pv.ELBO(kl="analytic")
    return pv.IWAE(work.particles, estimator=getattr(pv, work.estimator))


def step(work: Workload, device: str) -> Job:
    """A training step."""
    pair, goal = pv.as_pair(program(work, device)), objective(work).to(device)
    prepare(pair, torch.from_numpy(batches(work)[0]), work.batch, device)
    stepper = Stepper(pv.Update("objective", pair, goal, adam(pair.parameters())))

    def once(x: Tensor) -> Tensor:
        return stepper((x,))

    return stepping(once, work, device)


class Clock(pv.Hook):
    """When each epoch ended."""

    def __init__(self, wait: Callable[[], object]) -> None:
        self.wait, self.times = wait, list[float]()

    def on_epoch(self, run: pv.Run) -> None:
        self.wait()
        self.times.append(time.perf_counter())


def epoch(work: Workload, device: str) -> Job:
    """Epochs of ``fit`` after the first, which captures anew at every call."""
    vae = program(work, device)
    data = pv.Data(torch.from_numpy(digits(work.images)), transform=pv.redraw)
    settings = {"objective": objective(work), "batch_size": work.batch, "optimizer": adam, "device": device}

    def job(count: int) -> float:
        clock = Clock(waiting(device))
        pv.fit(vae, data, epochs=1 + count, hooks=[clock], compile="require", progress=False, **settings)
        return clock.times[-1] - clock.times[0]

    return job


def evaluation(work: Workload, device: str) -> Job:
    """Bounds on log p(x), particles in chunks."""
    vae, images = program(work, device), torch.from_numpy(binary(work.images, work.event))
    bound = partial(pv.log_likelihood, vae, images, batch_size=work.batch, compile="require")
    return clocked(lambda: bound(particles=work.particles), waiting(device))


def gradient(work: Workload, device: str) -> Job:
    """The gradient in z of the log joint, chains times images."""
    log_joint = LogJoint(program(work, device), compile="require")
    x = torch.from_numpy(binary(work.batch, work.event)).to(device)
    latents = {"z": torch.randn(work.particles, work.batch, work.latent, device=device)}
    return clocked(lambda: log_joint(latents, x), waiting(device))


def annealing(work: Workload, device: str) -> Job:
    """Annealed importance sampling, without the pilot that finds step sizes."""
    pair = pv.as_pair(program(work, device)).eval()
    batch = (torch.from_numpy(binary(work.batch, work.event)).to(device),)
    inspect(pair, batch)
    path = Path(pair, batch, "prior", Engine("require"), work.precision)
    betas = schedule("sigmoid", work.distributions).tolist()
    steps = torch.full((len(betas), work.batch, 1), STEP, device=device)
    return clocked(
        lambda: _walk(path, path.draw(batch, work.particles), betas, steps, LEAPFROG, batch), waiting(device)
    )


def ours(work: Workload, device: str) -> Job:
    """Any workload."""
    builds = {
        "step": step,
        "epoch": epoch,
        "evaluation": evaluation,
        "gradient": gradient,
        "annealing": annealing,
    }
    return builds[work.kind](work, device)


def pathwise(work: Workload, device: str) -> Job:
    """The workload with the pathwise estimator in place of its own."""
    return ours(Workload.of({**vars(work), "estimator": "pathwise"}), device)


if __name__ == "__main__":
    torch_worker({"ours": ours, "ours, pathwise": pathwise}, ppl_vae=pv.__version__)
