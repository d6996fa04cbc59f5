"""MNIST with redrawn pixels: how good a bound 50 epochs on a CPU reach, and how long they take.

The network and data of Burda et al. (2016), one stochastic layer: 784-200-200-50, tanh; pixels are redrawn at
every presentation, in the test set too. Trained on all 60,000 training images with Adam and a cosine schedule.

usage: python tests/bench/mnist.py [--particles 1 5] [--epochs 50] [--learning-rate 3e-3] [--data-dir FOLDER]
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial

import torch
from torch import nn

import ppl_vae as pv


def network(mean: torch.Tensor) -> pv.VAE:
    """784-200-200-50, tanh, Bernoulli; output biases at the logits of the mean image."""
    mlp = partial(pv.MLP, activation=nn.Tanh)
    vae = pv.VAE(
        prior=pv.StandardNormal(50),
        likelihood=pv.Bernoulli(mlp(50, 200, 200, 784)),
        posterior=pv.mean_field(mlp(784, 200, 200, 2 * 50)),
    )
    vae.likelihood.start_from(mean)
    return vae


def measure(
    images: pv.Images, particles: int, epochs: int, test_particles: int, learning_rate: float = 3e-3, seed: int = 0
) -> dict[str, object]:
    """Train, evaluate, and return one row of results."""
    x = torch.cat([images.train.x, images.valid.x])
    torch.manual_seed(seed)
    vae = network(x)
    start = time.perf_counter()
    pv.fit(
        vae,
        pv.Data(x, transform=pv.redraw),
        objective=pv.IWAE(particles) if particles > 1 else pv.ELBO(kl="analytic"),
        epochs=epochs,
        batch_size=100,
        optimizer=partial(torch.optim.Adam, lr=learning_rate, fused=True),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs * len(x) // 100),
        scheduler_every="step",
        seed=seed,
    )
    trained = time.perf_counter()
    test = pv.Data(images.test.x, transform=pv.redraw)
    bound = pv.log_likelihood(vae, test, particles=test_particles)
    judged = time.perf_counter()
    return {
        "objective": f"IWAE {particles}" if particles > 1 else "ELBO",
        "epochs": epochs,
        f"-L_{test_particles}": round(-bound.mean, 3),
        "stderr over data": round(bound.mean_stderr, 3),
        "Monte Carlo stderr": round(bound.monte_carlo_stderr, 4),
        "-ELBO": round(-pv.elbo(vae, test).mean, 3),
        "active units": pv.active_units(vae, test).count["z"],
        "training s": round(trained - start, 1),
        "evaluation s": round(judged - trained, 1),
    }


def main() -> None:
    """Print one JSON line per objective."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--particles", type=int, nargs="+", default=[1, 5])
    p.add_argument("--epochs", type=int, default=50)
    p.add_argument("--learning-rate", type=float, default=3e-3)
    p.add_argument("--test-particles", type=int, default=5000)
    p.add_argument("--data-dir")
    a = p.parse_args()
    images = pv.mnist(a.data_dir)
    for k in a.particles:
        print(json.dumps(measure(images, k, a.epochs, a.test_particles, a.learning_rate)), flush=True)


if __name__ == "__main__":
    main()
