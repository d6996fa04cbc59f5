"""# A Bernoulli VAE on binary images

Pixels are binary, and the decoder gives their log-odds:

$$z \\sim \\mathcal N(0, I_{20}), \\qquad
x_i \\mid z \\sim \\operatorname{Bernoulli}(\\operatorname{sigmoid} f_i(z)).$$

MNIST's grey values are read as probabilities, and every presentation of an image draws its pixels anew. That is
how Burda et al. (2016) report log-likelihoods; a binarisation drawn once and kept gives other numbers, by about
two nats. Grey values themselves are no data for a Bernoulli likelihood, and are refused.

The net is 784-256-128-20. Run `python examples/vae_bernoulli.py --data-dir FOLDER` with MNIST's files in
`FOLDER/MNIST/raw`; without `--data-dir` the 8x8 digits that scikit-learn ships are used. Measured on MNIST, 20
epochs, first 1000 test images: L_500 = -102.4 ± 1.1 nats, and an ELBO of -106.4 ± .3 over all of them.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import ppl_vae as pv
from ppl_vae import plots


def main() -> None:
    p = argparse.ArgumentParser(description="A Bernoulli VAE with redrawn pixels, on MNIST or digits.")
    p.add_argument("--data-dir", help="folder with MNIST/raw; digits without it")
    p.add_argument("--epochs", type=int, default=20, help="passes over MNIST, ten times as many over the digits")
    p.add_argument("--out", type=Path, default=Path("figures"))
    p.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    a = p.parse_args()

    images = pv.mnist(a.data_dir) if a.data_dir else pv.digits()
    epochs = 1 if a.smoke else a.epochs if a.data_dir else 10 * a.epochs
    train, valid, test = (pv.Data(s.x, transform=pv.redraw) for s in (images.train, images.valid, images.test))
    if a.smoke:
        train, valid, test = train[:500], valid[:100], test[:100]

    width, latent = images.train.x.shape[1], 20
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.StandardNormal(latent),
        likelihood=pv.Bernoulli(pv.MLP(latent, 128, 256, width)),
        posterior=pv.mean_field(pv.MLP(width, 256, 128, 2 * latent)),
    )
    vae.likelihood.start_from(images.train.x)

    a.out.mkdir(parents=True, exist_ok=True)
    run = pv.fit(
        vae,
        train,
        valid,
        objective=pv.ELBO(kl="analytic"),
        epochs=epochs,
        batch_size=128,
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        scheduler=partial(CosineAnnealingLR, T_max=epochs),
        hooks=[pv.Film(a.out / "bernoulli_film.gif", (images.valid.x[:30].round(),), images.shape, frames=20)],
    )
    print(f"{images.name}: {run.history[-1]['per_second']:,.0f} images per second")
    print(pv.elbo(vae, test))
    print(pv.log_likelihood(vae, test[:1000], particles=20 if a.smoke else 500))
    plots.save(plots.curves(run.history), a.out / "bernoulli_curves.png")
    plots.save(plots.samples(pv.sample(vae, 64, mean=True), images.shape), a.out / "bernoulli_samples.png")
    print(f"figures in {a.out}")


if __name__ == "__main__":
    main()
