"""# What a fixed σ = 1 does: four choices of the noise on pixels

$$z \\sim \\mathcal N(0, I_{20}), \\quad x \\mid z \\sim \\mathcal N(f(z), \\sigma^2 I_D), \\qquad
-\\mathrm{ELBO} = \\tfrac{1}{2 \\sigma^2}\\, \\mathbb E_q |x - f(z)|^2 + \\tfrac D2 \\log 2 \\pi \\sigma^2
+ \\mathrm{KL}(q(z \\mid x) \\,\\|\\, p(z)).$$

½ |x - f|² + KL, as many programs have it, is this with σ = 1: an assertion that pixels in [0, 1] carry noise of
±1. (The whole square plus KL is σ = .71; the mean over D pixels of the square, plus KL, is σ = √(D/2), 20 on
MNIST.) Times 2σ² it reads |x - f|² + 2σ² KL: σ is the weight of the KL, a β that nobody chose. Against the
likeliest σ*, the root mean squared error, the KL counts 1/σ*² times too much, and a latent must explain much to be
worth its rate. For a linear decoder this is exact: a principal component of the data is used where its variance is
above σ², and is dropped otherwise (Tipping & Bishop 1999; Lucas et al. 2019, *Don't Blame the ELBO!*). The script
counts those, beside the units found active. A latent dropped has q(z|x) = p(z), which is called posterior
collapse. It shows as blurred means, and as draws from p(x|z), which is what the model says data look like, that
are snow.

The remedies are values on one axis, the scale of the likelihood: `LearnedScale`, one σ that is a parameter;
`OptimalScale`, the σ* of each batch in closed form (Rybkin, Daniilidis & Levine 2021, *Simple and Effective VAE
Training with Calibrated Decoders*); `NetScale`, a standard deviation for each pixel of each image, $f_v(z)$.

Pixels are dequantised, y = (255 x + u) / 256, so that densities are those of 8-bit levels and their bits per
dimension mean something; without it, per-pixel σ would shrink without end on the black margin. The 17 grey levels
of the 8x8 digits are put among these 256, so that the unit there is bits per 8-bit level, too, to be held against
the 8 bits of a uniform. The net is 784-256-128-20. Rows "3 σ" of the figure show three times the standard
deviation of each pixel given the code; where that is above 1, it is clipped to white.

Measured (`--data-dir FOLDER`, MNIST): 12 principal components have variance above 1; with σ = 1, 7 of 20 units are
active, at a rate of 5.8 nats and 9.36 bits per dimension. Learned, σ = .107: 20 units, 54.8, 6.89; optimal, .107:
20, 55.1, 6.90; per pixel: 20, 50.6, 3.81, and blurred means beside it, since pixels that are given a great σ need
not be explained.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import ppl_vae as pv
from ppl_vae import plots

SCALES = {
    "σ = 1": lambda: pv.FixedScale(1.0),
    "learned": pv.LearnedScale,
    "optimal": pv.OptimalScale,
    "per pixel": pv.NetScale,
}


def declare(width: int, latent: int, scale: pv.Scale) -> pv.VAE:
    """The pair; only the likelihood's scale differs."""
    mlp = partial(pv.MLP, activation=nn.SiLU)  # ReLUs may die under a great σ, and then latents with them
    return pv.VAE(
        prior=pv.StandardNormal(latent),
        likelihood=pv.Normal(mlp(latent, 128, 256, scale.channels * width), scale),
        posterior=pv.mean_field(mlp(width, 256, 128, 2 * latent)),
    )


def main() -> None:
    p = argparse.ArgumentParser(description="Fixed, learned, optimal and per-pixel σ on grey pixels.")
    p.add_argument("--data-dir", help="folder with MNIST/raw; digits without it")
    p.add_argument("--epochs", type=int, default=15, help="passes over MNIST, ten times as many over the digits")
    p.add_argument("--out", type=Path, default=Path("figures"))
    p.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    a = p.parse_args()

    images = pv.mnist(a.data_dir) if a.data_dir else pv.digits()
    latent, width = 20, images.train.x.shape[1]
    epochs = 1 if a.smoke else a.epochs if a.data_dir else 10 * a.epochs
    known, unseen = (s.x[:128] if a.smoke else s.x for s in (images.train, images.test))
    train, test = (pv.Data((255 * x).round().byte(), transform=pv.dequantise) for x in (known, unseen))
    torch.manual_seed(0)
    seen = test[:10].present(slice(None))[0]
    shown = {"Inputs and their reconstructions": {"input": seen}, "Draws from the prior": {}}
    variances = torch.linalg.eigvalsh(torch.cov(known.T))
    print(f"{images.name}: {int((variances > 1).sum())} principal components have variance above 1", flush=True)
    print(f"{'':11}{'σ':>7}{'rate':>8}{'distortion':>12}{'units':>7}{'bits/dim':>10}  bound on log p(x)")

    for name, scale in SCALES.items():
        torch.manual_seed(0)
        vae = declare(width, latent, scale())
        vae.likelihood.start_from(known)
        pv.fit(
            vae,
            train,
            objective=pv.ELBO(kl="analytic"),
            epochs=epochs,
            optimizer=partial(torch.optim.Adam, lr=1e-3),
            scheduler=partial(CosineAnnealingLR, T_max=epochs),
        )
        lower = pv.elbo(vae, test)
        rate, distortion = (float(lower.diagnostics[k].mean()) for k in ("rate", "distortion"))
        bound = pv.log_likelihood(vae, test[:1000], particles=20 if a.smoke else 500)
        bits = pv.bits_per_dimension(bound.mean, width, dequantised=True)
        units = pv.active_units(vae, test).count["z"]
        with torch.no_grad():
            x = vae.likelihood(pv.encode(vae, seen)["z"])
        sigma = float(x.stddev.square().mean().sqrt())  # of a pixel, over images and pixels
        print(f"{name:11}{sigma:7.4f}{rate:8.2f}{distortion:12.2f}{units:7}{bits:10.3f}  {bound}", flush=True)
        rows = (
            {"mean": x.mean, "draw": x.sample(), "3 σ": 3 * x.stddev},
            {"mean": pv.sample(vae, 10, mean=True), "draw": pv.sample(vae, 10)},
        )
        for part, found in zip(shown.values(), rows, strict=True):
            part |= {f"{name}: {what}": pictures for what, pictures in found.items()}

    a.out.mkdir(parents=True, exist_ok=True)
    for (title, part), file in zip(shown.items(), ("reconstructions", "samples"), strict=True):
        grid = plots.image_grid(torch.cat([*part.values()]), images.shape, 10, title, list(part))
        plots.save(grid, a.out / f"sigma_{file}.png")
    print(f"figures in {a.out}")


if __name__ == "__main__":
    main()
