"""# Missing pixels: pseudo-Gibbs sampling and importance weights

A VAE trained on whole pictures says what a hidden part may look like, given the part $x_o$ that is seen:

$$p(x_m \\mid x_o) = \\int p(x_m \\mid z)\\, p(z \\mid x_o)\\, dz.$$

The guide knows q(z | x) of whole pictures alone. Pseudo-Gibbs sampling fills the hole with anything and goes round
(Rezende, Mohamed & Wierstra 2014, appendix F):

$$z \\sim q(z \\mid x_o, x_m), \\qquad x_m \\sim p(x_m \\mid z).$$

With q in the exact posterior's place its limit is not p(x_m | x_o), but nearby. The last round's draws of K chains
are then weighted, by self-normalised importance sampling (Mattei & Frellsen 2019, section 3.2), which needs only
the three densities of the declared pair:

$$w_k \\propto \\frac{p(x_o \\mid z_k)\\, p(z_k)}{q(z_k \\mid x_o, x_m^{(k)})}, \\qquad
\\mathbb E[x_m \\mid x_o] \\approx \\textstyle\\sum_k w_k\\, \\mathbb E[x_m \\mid z_k].$$

Hidden are the lower half of test pictures, or seven pixels in ten at random. The number is the mean squared error
in the hidden pixels, rounded to 0 and 1, beside that of the training data's mean picture.

Measured on MNIST (`--data-dir FOLDER`): lower half, 0.090 (mean picture), 0.081 (pseudo-Gibbs) and 0.069 ± 0.003
(weighted); seven pixels in ten, 0.085, 0.040 and 0.037 ± 0.001.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ppl_vae as pv
from ppl_vae import plots


def declare(x: Tensor, latent: int) -> pv.VAE:
    """A Bernoulli VAE."""
    vae = pv.VAE(
        prior=pv.StandardNormal(latent),
        likelihood=pv.Bernoulli(pv.MLP(latent, 200, 400, x.shape[1])),
        posterior=pv.mean_field(pv.MLP(x.shape[1], 400, 200, 2 * latent)),
    )
    vae.likelihood.start_from(x)
    return vae


@torch.no_grad()
def impute(vae: pv.VAE, x: Tensor, seen: Tensor, chains: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the pixels without and with weights, (B, D) each, and one completion of each picture.

    Args:
        vae: the trained pair.
        x: (B, D); what is not seen of it is not used.
        seen: (B, D), True where a pixel is.
        chains: K, all run at once.
        rounds: of pseudo-Gibbs.
    """
    filled = torch.where(seen, x, torch.bernoulli(torch.full((chains, *x.shape), 0.5)))  # (K, B, D)
    for _ in range(rounds):
        q = vae.posterior(filled)
        z = q.sample()
        law = vae.likelihood.law(z)
        filled = torch.where(seen, x, law.sample())
    log_weight = (law.log_prob(filled) * seen).sum(-1)
    log_weight = log_weight + vae.prior().log_prob(z) - q.log_prob(z)  # (K, B)
    weights = log_weight.softmax(0)[..., None]
    return law.mean.mean(0), (weights * law.mean).sum(0), torch.where(seen, x, law.mean[0])


def report(name: str, guess: Tensor, x: Tensor, seen: Tensor) -> None:
    """Print the mean squared error of what was hidden, and its standard error over pictures."""
    each = ((guess - x).square() * ~seen).sum(1) / (~seen).sum(1)
    print(f"  {name:<13} {pv.average(each):.4f}")


def main() -> None:
    p = argparse.ArgumentParser(description="Impute missing pixels with a trained VAE, on MNIST or digits.")
    p.add_argument("--data-dir", help="folder with MNIST/raw; digits without it")
    p.add_argument("--epochs", type=int, default=8, help="passes over MNIST, ten times as many over the digits")
    p.add_argument("--out", type=Path, default=Path("figures"))
    p.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    a = p.parse_args()
    images = pv.mnist(a.data_dir) if a.data_dir else pv.digits()
    epochs = 1 if a.smoke else a.epochs if a.data_dir else 10 * a.epochs
    train = images.train.x[:300] if a.smoke else images.train.x
    x = images.test.x[:: len(images.test) // 200][:200].round()  # from all over the test data
    torch.manual_seed(0)
    vae = declare(train, latent=20 if a.data_dir else 8)
    pv.fit(
        vae,
        pv.Data(train, transform=pv.redraw),
        objective=pv.ELBO(kl="analytic"),
        epochs=epochs,
        batch_size=128,
        optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True),
    )
    a.out.mkdir(parents=True, exist_ok=True)
    upper = torch.arange(x.shape[1]).expand_as(x) < x.shape[1] // 2
    for name, seen in {"lower half": upper, "seven in ten": torch.rand_like(x) > 0.7}.items():
        plain, weighted, one = impute(vae, x, seen, chains=20 if a.smoke else 100, rounds=5 if a.smoke else 30)
        print(f"hidden: {name}; mean squared error")
        report("mean picture", train.mean(0), x, seen)
        report("pseudo-Gibbs", plain, x, seen)
        report("weighted", torch.where(seen, x, weighted), x, seen)
        rows = [x, torch.where(seen, x, 0.5), one, torch.where(seen, x, weighted)]
        labels = ["picture", "seen", "one completion", "weighted mean"]
        fig = plots.image_grid(torch.cat([r[:12] for r in rows]), images.shape, 12, f"Hidden: {name}", labels)
        plots.save(fig, a.out / f"imputation_{name.replace(' ', '_')}.png")
    print(f"figures in {a.out}")


if __name__ == "__main__":
    main()
