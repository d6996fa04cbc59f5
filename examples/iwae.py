"""# Importance-weighted autoencoders: the same program, another objective

The model and the guide of a VAE stay as they are. With K draws the bound

$$\\mathcal L_K = \\mathbb E\\, \\log \\frac1K \\sum_{k=1}^K \\frac{p(x, z_k)}{q(z_k \\mid x)}, \\qquad
\\mathcal L_1 \\le \\mathcal L_K \\le \\log p(x),$$

is tighter, and a pair trained by it uses more of its latents (Burda, Grosse & Salakhutdinov 2016, *Importance
Weighted Autoencoders*). Each row below is one run; only `objective` differs. All are judged by the same
bound. Averaging K single-sample bounds (`ELBO(K)`) is shown beside it: it costs as much and tightens nothing.

The network is the paper's, 784-200-200-50 with tanh, on MNIST with redrawn pixels where `--data-dir` has it,
with fewer units on 8x8 digits otherwise. `tests/bench/mnist.py` runs the full-length version.
"""

import argparse
from functools import partial

import torch
from torch import nn

import ppl_vae as pv


def declare(x: torch.Tensor, hidden: int, latent: int) -> pv.VAE:
    """One stochastic layer; output biases start at the logits of the mean image."""
    mlp, width = partial(pv.MLP, activation=nn.Tanh), x.shape[1]
    vae = pv.VAE(
        prior=pv.StandardNormal(latent),
        likelihood=pv.Bernoulli(mlp(latent, hidden, hidden, width)),
        posterior=pv.mean_field(mlp(width, hidden, hidden, 2 * latent)),
    )
    vae.likelihood.start_from(x)
    return vae


def main() -> None:
    p = argparse.ArgumentParser(description="VAE against IWAE, the same program under two objectives.")
    p.add_argument("--data-dir", help="folder with MNIST/raw; digits without it")
    p.add_argument("--particles", type=int, default=5)
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    a = p.parse_args()

    images = pv.mnist(a.data_dir) if a.data_dir else pv.digits()
    hidden, latent = (200, 50) if a.data_dir else (100, 20)
    epochs = 1 if a.smoke else a.epochs if a.data_dir else 10 * a.epochs
    train, test = (pv.Data(s.x, transform=pv.redraw) for s in (images.train, images.test))
    if a.smoke:
        train, test = train[:500], test[:50]

    objectives = {"ELBO": pv.ELBO(), f"ELBO({a.particles})": pv.ELBO(a.particles), "IWAE": pv.IWAE(a.particles)}
    for name, objective in objectives.items():
        torch.manual_seed(0)
        vae = declare(images.train.x, hidden, latent)
        pv.fit(
            vae,
            train,
            objective=objective,
            epochs=epochs,
            batch_size=100,
            optimizer=partial(torch.optim.Adam, lr=2e-3),
            scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
        )
        bound = pv.log_likelihood(vae, test[:1000], particles=20 if a.smoke else 1000)
        units = pv.active_units(vae, test).count["z"]
        print(f"{name:<8} {bound}; {units} of {latent} units active")


if __name__ == "__main__":
    main()
