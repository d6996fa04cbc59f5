"""# Importance-weighted autoencoders: the same program, another objective

The model and the guide of a VAE stay as they are. With K draws the bound

$$\\mathcal L_K = \\mathbb E\\, \\log \\frac1K \\sum_{k=1}^K \\frac{p(x, z_k)}{q(z_k \\mid x)}, \\qquad
\\mathcal L_1 \\le \\mathcal L_K \\le \\log p(x),$$

is tighter, and a pair trained by it uses more of its latents (Burda, Grosse & Salakhutdinov 2016, *Importance
Weighted Autoencoders*). Averaging K single-sample bounds (`ELBO(K)`) is shown beside it: it costs as much and
tightens nothing. But the better the bound, the worse the signal of the guide's gradient, which the others mend:

- the doubly reparameterised gradient, same bound, less noise (Tucker, Lawson, Gu & Maddison 2019, *Doubly
  Reparameterized Gradient Estimators*);
- MIWAE, the mean of M bounds of K / M draws; CIWAE, s ELBO + (1 - s) IWAE; PIWAE, IWAE for the model and MIWAE for
  the guide (Rainforth et al. 2018, *Tighter Variational Bounds are Not Necessarily Better*).

Each row is one run of the same net on the same data; only `objective` differs. All are judged by the same bound.

The net is the paper's, 784-200-200-50 with tanh, on MNIST with redrawn pixels where `--data-dir` has it, with
fewer units on 8x8 digits otherwise. `tests/bench/mnist.py` runs 50 passes (the paper: 3280) of the ELBO, of IWAE
with 5 and 50 draws, and of the doubly reparameterised gradient with 5.

Measured by `python examples/iwae.py --data-dir FOLDER` (10 passes, K = 8, first 1000 test images), -L_1000: 97.16
ELBO, 96.08 IWAE, 95.35 doubly, 95.73 MIWAE, 95.92 CIWAE, 95.36 PIWAE, each ± .9 over the same images; 17, 46, 46,
30, 42 and 49 of 50 units active.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import ppl_vae as pv
from ppl_vae import plots
from ppl_vae.bounds import iwae


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


def choices(particles: int) -> dict[str, pv.Objective]:
    """Objectives of so many draws."""
    k = particles
    return {
        f"ELBO({k})": pv.ELBO(k),
        f"IWAE({k})": pv.IWAE(k),
        f"IWAE({k}), doubly": pv.IWAE(k, estimator=pv.doubly),
        f"MIWAE(2, {k // 2})": pv.BoundObjective(pv.Grouped(iwae, 2), particles=k),
        f"CIWAE({k}), s = .05": pv.BoundObjective(pv.Mixed(0.05), particles=k),
        f"PIWAE(2, {k // 2})": pv.PIWAE(2, k // 2),
    }


def compared(rows: dict[str, tuple[pv.Estimate, int]]) -> Figure:
    """Bounds with their errors from the draws, and active units beside them."""
    figure = Figure(figsize=(6.6, 3.2), layout="constrained")
    axes = figure.subplots()
    bounds = [bound for bound, _ in rows.values()]
    gaps = [pv.average(b.value - bounds[0].value).stderr for b in bounds]
    axes.errorbar([b.mean for b in bounds], range(len(rows)), xerr=gaps, fmt="o", capsize=3)
    axes.set_yticks(range(len(rows)), [f"{name} ({units} active)" for name, (_, units) in rows.items()])
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(f"{bounds[0].name}, nats per test image")
    axes.set_title("Bars: standard error of the difference from the first row", size=9)
    return figure


def main() -> None:
    p = argparse.ArgumentParser(description="VAE, IWAE and its kin: the same program under several objectives.")
    p.add_argument("--data-dir", help="folder with MNIST/raw; digits without it")
    p.add_argument("--particles", type=int, default=8, help="an even number")
    p.add_argument("--epochs", type=int, default=10, help="passes over MNIST, ten times as many over the digits")
    p.add_argument("--out", type=Path, default=Path("figures"))
    p.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    a = p.parse_args()
    if a.particles < 2 or a.particles % 2:
        p.error(f"--particles must be an even number, at least 2, got {a.particles}")
    images = pv.mnist(a.data_dir) if a.data_dir else pv.digits()
    hidden, latent = (200, 50) if a.data_dir else (100, 20)
    epochs = 1 if a.smoke else a.epochs if a.data_dir else 10 * a.epochs
    train, test = (
        pv.Data(s.x, transform=pv.redraw)[: 100 if a.smoke else len(s)] for s in (images.train, images.test)
    )

    rows = {}
    for name, objective in choices(a.particles).items():
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
        bound = pv.log_likelihood(vae, test[:1000], particles=5 if a.smoke else 1000)
        rows[name] = bound, pv.active_units(vae, test).count["z"]
        print(f"{name:<17} {bound}; {rows[name][1]} of {latent} units active", flush=True)
    a.out.mkdir(parents=True, exist_ok=True)
    plots.save(compared(rows), a.out / "iwae_bounds.png")
    print(f"figure in {a.out}")


if __name__ == "__main__":
    main()
