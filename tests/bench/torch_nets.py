"""The networks of the workloads as torch modules, and what all workers that use torch share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import cycle, pairwise
from math import prod

import torch
from torch import Tensor, nn
from worker import Build, Job, clocked, resident_peak, serve
from workloads import Workload, batches

__all__ = ["adam", "networks", "stepping", "torch_worker", "waiting"]

ACTIVATIONS = {"softplus": nn.Softplus, "tanh": nn.Tanh}
CHANNELS = (32, 64)

adam = partial(torch.optim.Adam, lr=1e-3, fused=True)


class Rows(nn.Module):
    """A net of (N, *event) applied to (..., *event): convolutions take one leading dimension only."""

    def __init__(self, net: nn.Module, rank: int) -> None:
        super().__init__()
        self.net, self.rank = net, rank

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[: x.dim() - self.rank]
        out = self.net(x.reshape(prod(lead), *x.shape[len(lead) :]))
        return out.reshape(*lead, *out.shape[1:])


def mlp(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def convolutional(latent: int) -> tuple[nn.Module, nn.Module]:
    """Two convolutions of stride 2 down from 3x32x32, a linear layer, and the same way back."""
    few, many = CHANNELS
    conv, back = partial(nn.Conv2d, kernel_size=4, stride=2), partial(nn.ConvTranspose2d, kernel_size=4, stride=2)
    flat = many * 8 * 8
    encoder = [conv(3, few, padding=1), nn.ReLU(), conv(few, many, padding=1), nn.ReLU(), nn.Flatten()]
    decoder = [nn.Linear(latent, flat), nn.ReLU(), nn.Unflatten(1, (many, 8, 8))]
    decoder += [back(many, few, padding=1), nn.ReLU(), back(few, 3, padding=1)]
    return Rows(nn.Sequential(*encoder, nn.Linear(flat, 2 * latent)), 3), Rows(nn.Sequential(*decoder), 1)


def networks(work: Workload) -> tuple[nn.Module, nn.Module]:
    """Encoder (..., *event) -> (..., 2d), location and log-scale; decoder (..., d) -> logits (..., *event).

    The same weights at every call.
    """
    torch.manual_seed(0)
    if not work.hidden:
        return convolutional(work.latent)
    activation = ACTIVATIONS[work.activation]
    encoder = mlp([*work.event, *work.hidden, 2 * work.latent], activation)
    return encoder, mlp([work.latent, *reversed(work.hidden), *work.event], activation)


def waiting(device: str) -> Callable[[], object]:
    """What blocks until the device has finished."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def stepping(step: Callable[[Tensor], object], work: Workload, device: str) -> Job:
    """Time a step that goes round the workload's batches, which lie on the device."""
    supply = cycle(torch.from_numpy(batches(work)).to(device).unbind())
    return clocked(lambda: step(next(supply)), waiting(device))


def device_peak() -> float:
    """The most memory that tensors have held on the GPU, in MiB."""
    return torch.cuda.max_memory_allocated() / 2**20


def torch_worker(builds: dict[str, Callable[[Workload, str], Job]], **versions: str) -> None:
    """Parse a worker's command line, and serve the peer it names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=builds, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    build: Build = partial(builds[chosen.peer], device=chosen.device)
    about = {"torch": torch.__version__, **versions}
    if chosen.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    serve(build, about, device_peak if chosen.device == "cuda" else resident_peak)
