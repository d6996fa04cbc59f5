"""# After training: better samplers, interpolations and traversals of one VAE

A VAE's prior is N(0, I); its codes follow the aggregate posterior $q(z) = \\frac1N \\sum_n q(z \\mid x_n)$. These
are not the same, and some draws from the prior fall where no code lies. Two remedies keep the decoder, and put
another density, fitted to codes, in the prior's place:

$$z \\sim \\textstyle\\sum_m \\pi_m \\mathcal N(\\mu_m, \\Sigma_m) \\qquad\\text{or}\\qquad
u \\sim \\mathcal N(0, I),\\; z \\mid u \\sim \\mathcal N(g(u), \\gamma^2 I).$$

The mixture is scikit-learn's, fitted after training (Ghosh et al. 2020, section 4). The other is a second VAE,
whose data are codes (Dai & Wipf 2019). Codes are drawn from the posterior, one for each training picture.

Samples and test pictures, both of binary pixels, are compared in two ways. MMD², without bias and with a standard
error over blocks: 0 is perfect. And how often a nearest-neighbour classifier tells a sample from a test picture,
leaving one out (Lopez-Paz & Oquab 2017): 0.5 is perfect. `training data` is what a perfect sampler would get.

Interpolations go along the straight line between the codes of two test pictures. Traversals move, one per row, the
six latents whose posterior means vary most.

Measured on MNIST (`--data-dir FOLDER`): MMD² in thousandths 9.3 ± 0.8 (prior), 3.1 ± 0.4 (mixture), 4.3 ± 0.6
(second stage), 0.0 ± 0.3 (training data); told apart 0.691, 0.603, 0.649 and 0.519, each ± 0.008.
"""

import argparse
from pathlib import Path

import torch
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import ppl_vae as pv
from ppl_vae import plots


def first_stage(x: Tensor, latent: int, epochs: int) -> pv.VAE:
    """The VAE of the pictures."""
    likelihood = pv.Bernoulli(pv.MLP(latent, 200, 400, x.shape[1]))
    vae = pv.VAE(pv.StandardNormal(latent), likelihood, pv.mean_field(pv.MLP(x.shape[1], 400, 200, 2 * latent)))
    vae.likelihood.start_from(x)
    pv.fit(vae, pv.Data(x, transform=pv.redraw), objective=pv.ELBO(kl="analytic"), epochs=epochs)
    return vae


def second_stage(z: Tensor, epochs: int) -> pv.VAE:
    """A VAE of codes, as wide as they are."""
    d = z.shape[1]
    likelihood = pv.Normal(pv.MLP(d, 256, 256, d), pv.LearnedScale(0.5))
    vae = pv.VAE(pv.StandardNormal(d), likelihood, pv.mean_field(pv.MLP(d, 256, 256, 2 * d)))
    pv.fit(vae, z, objective=pv.ELBO(kl="analytic"), epochs=epochs, batch_size=250)
    return vae


def compare(name: str, drawn: Tensor, test: Tensor, block: int) -> None:
    """Print what tells two samples of equal size apart."""
    parts = zip(drawn.split(block), test.split(block), strict=True)
    mmd = torch.stack([pv.squared_mmd(a, b, "imq", (0.05, 0.1, 0.2, 0.5)) for a, b in parts])
    both, n = torch.cat([drawn, test]), len(drawn)
    nearest = torch.from_numpy(NearestNeighbors(n_neighbors=1).fit(both).kneighbors()[1][:, 0])
    right = (nearest < n) == (torch.arange(2 * n) < n)
    print(f"{name:<14} MMD² {pv.average(1e3 * mmd):.2f} in thousandths, told apart {pv.average(right):.3f}")


def main() -> None:
    p = argparse.ArgumentParser(description="Samplers, interpolations and traversals of a trained VAE.")
    p.add_argument("--data-dir", help="folder with MNIST/raw; digits without it")
    p.add_argument("--epochs", type=int, default=8, help="passes over MNIST, ten times as many over the digits")
    p.add_argument("--out", type=Path, default=Path("figures"))
    p.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    a = p.parse_args()

    images = pv.mnist(a.data_dir) if a.data_dir else pv.digits()
    epochs = 1 if a.smoke else a.epochs if a.data_dir else 10 * a.epochs
    x, test = (s.x[:300] if a.smoke else s.x for s in (images.train, images.test))
    size, latent = min(2000, len(test)), 16 if a.data_dir else 8
    block = size // 4
    torch.manual_seed(0)
    vae = first_stage(x, latent, epochs)
    codes = pv.encode(vae, pv.redraw(x), draw=True)["z"]
    mixture = GaussianMixture(2 if a.smoke else 50, random_state=0, max_iter=50, reg_covar=1e-4).fit(codes[:10000])
    stage = second_stage(codes, epochs)
    drawn = {
        "prior": torch.randn(size, latent),
        "mixture": torch.from_numpy(mixture.sample(size)[0]).float(),
        "second stage": pv.sample(stage, size),
    }
    means = {name: pv.decode(vae, {"z": z[torch.randperm(size)]}) for name, z in drawn.items()}
    truth = pv.redraw(test[torch.randperm(len(test))[:size]])
    for name, mean in means.items():
        compare(name, pv.redraw(mean), truth, block)
    compare("training data", pv.redraw(x[torch.randperm(len(x))[:size]]), truth, block)

    a.out.mkdir(parents=True, exist_ok=True)
    rows, names = torch.cat([m[:24] for m in means.values()]), [n for name in means for n in (name, "")]
    fig = plots.image_grid(rows, images.shape, 12, "Three samplers, one decoder", names)
    plots.save(fig, a.out / "samplers.png")
    z = pv.encode(vae, test[:8].round())["z"]
    path = torch.lerp(z[:4, None], z[4:, None], torch.linspace(0, 1, 12)[:, None])
    fig = plots.image_grid(
        pv.decode(vae, {"z": path.flatten(0, 1)}), images.shape, 12, "From one picture to another"
    )
    plots.save(fig, a.out / "interpolations.png")
    order = pv.active_units(vae, test[:1000].round()).variance["z"].argsort(descending=True)[:6]
    moved = z[0].repeat(6, 12, 1)
    moved[torch.arange(6), :, order] = torch.linspace(-2.5, 2.5, 12)
    means, names = pv.decode(vae, {"z": moved.flatten(0, 1)}), [f"$z_{{{j + 1}}}$" for j in order]
    fig = plots.image_grid(means, images.shape, 12, "One latent at a time, from -2.5 to 2.5", names)
    plots.save(fig, a.out / "traversals.png")
    print(f"figures in {a.out}")


if __name__ == "__main__":
    main()
