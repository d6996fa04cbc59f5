"""Peers on torch, as a worker: a training step written by hand, eager and under torch.compile; Pyro's own SVI."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from annealing import anneal, sigmoid
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset
from torch_nets import adam, networks, stepping, torch_worker, waiting
from torchvision import transforms
from worker import Job, Skip, clocked
from workloads import Workload, binary, digits

CHUNK = 100  # particles held at once


class Hand(nn.Module):
    """A VAE with its bounds, as one writes it by hand."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.encoder, self.decoder = networks(work)
        self.rank, self.particles = len(work.event), work.particles

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Location and log-scale of q(z | x)."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        return loc, log_scale

    def log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) of (K, B, d) latents."""
        logits = self.decoder(z)
        pixels = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        return -pixels.flatten(-self.rank).sum(-1)

    def log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        """log p(x, z) less constants."""
        return self.log_likelihood(z, x) - 0.5 * z.square().sum(-1)

    def log_weight(self, loc: Tensor, log_scale: Tensor, x: Tensor, particles: int) -> Tensor:
        """log p(x, z) / q(z | x), (K, B)."""
        noise = torch.randn(particles, *loc.shape, device=loc.device)
        log_q = -(0.5 * noise.square() + log_scale).sum(-1)
        return self.log_joint(loc + log_scale.exp() * noise, x) - log_q

    def negative_elbo(self, x: Tensor) -> Tensor:
        """One draw, and the KL in closed form."""
        loc, log_scale = self.posterior(x)
        scale = log_scale.exp()
        logits = self.decoder(loc + scale * torch.randn_like(loc))
        pixels = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = 0.5 * (loc.square() + scale.square() - 1 - 2 * log_scale).sum()
        return (pixels + kl) / len(x)

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        if self.particles == 1:
            return self.negative_elbo(x)
        weight = self.log_weight(*self.posterior(x), x, self.particles)
        return math.log(self.particles) - weight.logsumexp(0).mean()


Wrap = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def hand_step(work: Workload, device: str, wrap: Wrap) -> Callable[[Tensor], Tensor]:
    """A training step."""
    net = Hand(work).to(device)
    loss, optimizer = wrap(net), adam(net.parameters())

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(x)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def hand_epoch(work: Workload, device: str, wrap: Wrap) -> Job:
    """All images once, shuffled: bytes lie on the device, and are gathered and binarised there."""
    step = hand_step(work, device, wrap)
    images = torch.from_numpy(digits(work.images)).to(device)

    def epoch() -> float:
        total = torch.zeros((), device=device)
        for rows in torch.randperm(len(images), device=device).split(work.batch):
            total += step(torch.bernoulli(images[rows] / 255.0))
        return total.item()

    return clocked(epoch, waiting(device))


def hand_evaluation(work: Workload, device: str, wrap: Wrap) -> Job:
    """Bounds on log p(x), the data in batches, particles in chunks."""
    net = Hand(work).to(device)
    images = torch.from_numpy(binary(work.images, work.event)).to(device)

    def part(loc: Tensor, log_scale: Tensor, x: Tensor) -> Tensor:
        return net.log_weight(loc, log_scale, x, CHUNK).logsumexp(0)

    part = wrap(part)

    @torch.no_grad()
    def evaluate() -> Tensor:
        bounds = []
        for x in images.split(work.batch):
            q = net.posterior(x)
            parts = torch.stack([part(*q, x) for _ in range(work.particles // CHUNK)])
            bounds.append(parts.logsumexp(0) - math.log(work.particles))
        return torch.cat(bounds).cpu()

    return clocked(evaluate, waiting(device))


def hand_gradient(work: Workload, device: str, wrap: Wrap) -> Job:
    """The gradient in z of the log joint, chains times images."""
    net = Hand(work).to(device).requires_grad_(False)
    log_joint = wrap(net.log_joint)
    x = torch.from_numpy(binary(work.batch, work.event)).to(device)
    latents = torch.randn(work.particles, work.batch, work.latent, device=device).requires_grad_()
    return clocked(lambda: torch.autograd.grad(log_joint(latents, x).sum(), latents), waiting(device))


def hand_annealing(work: Workload, device: str, wrap: Wrap) -> Job:
    """Annealed importance sampling, chains times images."""
    net = Hand(work).to(device).requires_grad_(False)
    likelihood, betas = wrap(net.log_likelihood), sigmoid(work.distributions)
    x = torch.from_numpy(binary(work.batch, work.event)).to(device)

    def once() -> Tensor:
        z = torch.randn(work.particles, work.batch, work.latent, device=device)
        return anneal(lambda z: likelihood(z, x), z, betas)

    return clocked(once, waiting(device))


def by_hand(wrap: Wrap) -> Callable[[Workload, str], Job]:
    """The peer written by hand, its tensor functions wrapped by torch.compile, or not."""

    def build(work: Workload, device: str) -> Job:
        others = {
            "epoch": hand_epoch,
            "evaluation": hand_evaluation,
            "gradient": hand_gradient,
            "annealing": hand_annealing,
        }
        if work.kind in others:
            return others[work.kind](work, device, wrap)
        return stepping(hand_step(work, device, wrap), work, device)

    return build


class Program(nn.Module):
    """The same VAE as a Pyro model and guide."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.encoder, self.decoder = networks(work)
        self.latent, self.rank = work.latent, len(work.event)

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(self.rank), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def svi_step(work: Workload, device: str) -> Callable[[Tensor], float]:
    """A step of Pyro's SVI."""
    pyro.clear_param_store()
    program = Program(work).to(device)
    if work.particles == 1:
        elbo = pyro.infer.Trace_ELBO()
    else:
        many = {"num_particles": work.particles, "vectorize_particles": True, "max_plate_nesting": 1}
        elbo = pyro.infer.RenyiELBO(alpha=0, **many)
    return pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step


class Pictures(Dataset):
    """MNIST as torchvision has it: each image a picture, made a tensor when it is asked for, then binarised."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.reshape(-1, 28, 28)
        self.transform = transforms.Compose([transforms.ToTensor(), torch.bernoulli])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        return self.transform(Image.fromarray(self.images[row].numpy(), mode="L"))


def svi_epoch(work: Workload, device: str) -> Job:
    """All images once, through a DataLoader without processes of its own: on few cores these cost more time."""
    step = svi_step(work, device)
    pictures = Pictures(torch.from_numpy(digits(work.images)))
    loader = DataLoader(pictures, batch_size=work.batch, shuffle=True, pin_memory=device == "cuda")
    return clocked(lambda: [step(x.to(device).flatten(1)) for x in loader], waiting(device))


def svi(work: Workload, device: str) -> Job:
    """Pyro's peer: it trains; it has no evaluation by importance weights in chunks."""
    if work.kind == "epoch":
        return svi_epoch(work, device)
    if work.kind != "step":
        raise Skip("not an SVI step")
    return stepping(svi_step(work, device), work, device)


if __name__ == "__main__":
    peers = {"torch eager": by_hand(lambda f: f), "torch compile": by_hand(torch.compile), "pyro svi": svi}
    torch_worker(peers, pyro=pyro.__version__)
