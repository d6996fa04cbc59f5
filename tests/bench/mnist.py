"""MNIST with redrawn pixels: how good a bound 50 epochs on a CPU reach, and how long they take.

The network and data of Burda et al. (2016): 784-200-200-50, tanh, and with two stochastic layers 784-200-200-100,
100-100-100-50; pixels are redrawn at every presentation, in the test set too. Each row is one choice on one axis,
trained on all 60,000 training images with Adam and a cosine schedule, for equally many epochs.

usage: python tests/bench/mnist.py [--rows VAE IWAE-5 ...] [--epochs 50] [--learning-rate 2e-3] [--images 2000]
    [--particles 5000] [--keep FOLDER] [--data-dir FOLDER]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ppl_vae as pv

LATENT = 50
mlp = partial(pv.MLP, activation=nn.Tanh)


def encoder(outputs: int) -> nn.Module:
    """784-200-200, and so many numbers for a posterior."""
    return mlp(784, 200, 200, outputs)


def vae(prior: pv.Conditional | None = None, posterior: pv.Conditional | None = None) -> pv.VAE:
    """One stochastic layer: standard normal and mean-field but for what is given."""
    likelihood = pv.Bernoulli(mlp(LATENT, 200, 200, 784))
    prior, posterior = prior or pv.StandardNormal(LATENT), posterior or pv.mean_field(encoder(2 * LATENT))
    return pv.VAE(prior, likelihood, posterior)


def vamp(x: Tensor) -> pv.VAE:
    """500 pseudo-inputs, which start at training images (Tomczak & Welling 2018)."""
    posterior = pv.mean_field(encoder(2 * LATENT))
    return vae(pv.VampPrior.from_data(posterior, x, 500, unit=True), posterior)


def flowed(x: Tensor) -> pv.VAE:
    """Two inverse autoregressive steps of 320 units that follow 100 features of the image (Kingma et al. 2016)."""
    flows = pv.inverse_autoregressive(LATENT, (320,), 2, context=100)
    return vae(posterior=pv.Flowed(pv.mean_field(encoder(2 * LATENT)), *flows, context=encoder(100)))


def two_layers(x: Tensor) -> pv.HierarchicalVAE:
    """100 latents next to the data, and 50 above them."""
    prior = pv.conditional_normal(mlp(50, 100, 100, 2 * 100))
    above = pv.mean_field(mlp(100, 100, 100, 2 * 50))
    likelihood = pv.Bernoulli(mlp(100, 200, 200, 784))
    return pv.HierarchicalVAE([prior, pv.StandardNormal(50)], likelihood, [pv.mean_field(encoder(200)), above])


class Row(NamedTuple):
    """A program, made with the training images at hand, and its objective."""

    program: Callable[[Tensor], nn.Module]
    objective: Callable[[], pv.Objective]


def plain(x: Tensor) -> pv.VAE:
    """The base case."""
    return vae()


ROWS = {
    "VAE": Row(plain, lambda: pv.ELBO(kl="analytic")),
    "IWAE-5": Row(plain, lambda: pv.IWAE(5)),
    "IWAE-50": Row(plain, lambda: pv.IWAE(50)),
    "DReG-5": Row(plain, lambda: pv.IWAE(5, estimator=pv.doubly)),
    "two layers, IWAE-5": Row(two_layers, lambda: pv.IWAE(5)),
    "VampPrior": Row(vamp, pv.ELBO),
    "IAF": Row(flowed, pv.ELBO),
    "full covariance": Row(
        lambda x: vae(posterior=pv.FullCovariance(encoder(LATENT * (LATENT + 3) // 2))),
        lambda: pv.ELBO(kl="analytic"),
    ),
    "flow prior": Row(lambda x: vae(pv.flow_prior(LATENT, *pv.masked_autoregressive(LATENT, (200,), 2))), pv.ELBO),
}


def train(
    images: pv.Images, name: str, epochs: int, learning_rate: float = 2e-3, seed: int = 0, keep: Path | None = None
) -> tuple[nn.Module, dict[str, object]]:
    """A trained program and how long it took; what the folder `keep` has of it is read and not trained again."""
    x = torch.cat([images.train.x, images.valid.x])
    torch.manual_seed(seed)
    program = ROWS[name].program(x)
    asked = {"row": name, "epochs": epochs, "learning rate": learning_rate, "seed": seed}
    stem = name.replace(", ", "-").replace(" ", "-")
    if keep is not None and (keep / f"{stem}.json").is_file():
        record = json.loads((keep / f"{stem}.json").read_text())
        if not asked.items() <= record.items():
            raise ValueError(f"--keep: {keep} holds a run of {record}, asked for {asked}; name another folder")
        pv.load_weights(program, keep / f"{stem}.safetensors")
        return program, record
    program.likelihood.start_from(x)
    start = time.perf_counter()
    run = pv.fit(
        program,
        pv.Data(x, transform=pv.redraw),
        objective=ROWS[name].objective(),
        epochs=epochs,
        batch_size=100,
        optimizer=partial(torch.optim.Adam, lr=learning_rate, fused=True),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs * len(x) // 100),
        scheduler_every="step",
        seed=seed,
    )
    seconds = round(time.perf_counter() - start, 1)
    record = {**asked, "training s": seconds, "engine": run.engine.describe()}
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        pv.save_weights(program, keep / f"{stem}.safetensors")
        (keep / f"{stem}.json").write_text(json.dumps(record))
    return program, record


def judge(
    program: nn.Module, images: pv.Images, particles: int, size: int | None = None
) -> tuple[pv.Estimate, dict[str, object]]:
    """L_K of the first `size` test images (None: all); ELBO and active units of all, a flow's of 500."""
    start = time.perf_counter()
    test = pv.Data(images.test.x, transform=pv.redraw)
    if isinstance(getattr(program, "posterior", None), pv.Flowed):  # its means are averages of many draws
        units = pv.active_units(program, test[:500], particles=2000, batch_size=20)
    else:
        units = pv.active_units(program, test)
    bound = pv.log_likelihood(program, pv.Data(images.test.x[:size], transform=pv.redraw), particles=particles)
    return bound, {
        f"-L_{particles}": round(-bound.mean, 3),
        "stderr over data": round(bound.mean_stderr, 3),
        "Monte Carlo stderr": round(bound.monte_carlo_stderr, 4),
        "-ELBO": round(-pv.elbo(program, test).mean, 3),
        "active units": units.count,
        "images": len(bound.value),
        "evaluation s": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Print one JSON line per row; rows after the first are also compared with it, image by image."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    p.add_argument("--epochs", type=int, default=50)
    p.add_argument("--learning-rate", type=float, default=2e-3)
    p.add_argument("--particles", type=int, default=5000, help="0: train only")
    p.add_argument("--images", type=int, help="judge so many test images (default: all 10,000)")
    p.add_argument("--keep", type=Path, help="folder for weights; rows it has are judged without training again")
    p.add_argument("--data-dir")
    a = p.parse_args()
    images, first = pv.mnist(a.data_dir), None
    for name in a.rows:
        program, record = train(images, name, a.epochs, a.learning_rate, keep=a.keep)
        if a.particles:
            bound, found = judge(program, images, a.particles, a.images)
            record |= found
            first = bound.value if first is None else first
            if name != a.rows[0]:
                record[f"gain over {a.rows[0]}"] = f"{pv.average(bound.value - first):.3f}"
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
