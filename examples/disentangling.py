"""# Disentangling: β-, capacity-, TC- and FactorVAE

A blob on 16x16 pixels has four factors, independent and known: x, y, size and brightness. One program,

$$z \\sim \\mathcal N(0, I_6), \\qquad x \\mid z \\sim \\mathcal N(f(z), 0.1^2 I),$$

is trained under five objectives. Four of them should make single latents stand for single factors:

$$\\begin{aligned}
\\text{beta} &: \\mathbb E_q \\log p(x \\mid z) - \\beta\\, \\mathrm{KL}(q(z \\mid x) \\,\\|\\, p(z)) \\\\
\\text{capacity} &: \\mathbb E_q \\log p(x \\mid z) - \\gamma\\, |\\mathrm{KL} - C|, \\quad C \\text{ rising} \\\\
\\text{TC, Factor} &: \\text{ELBO} - \\lambda\\, \\mathrm{KL}(q(z) \\,\\|\\, \\textstyle\\prod_j q(z_j))
\\end{aligned}$$

(Higgins et al. 2017; Burgess et al. 2018; Chen et al. 2018, who estimate the total correlation within a batch; Kim
& Mnih 2018, who have a critic estimate it.) The ELBO itself prefers axes only through its diagonal posteriors.

Two metrics judge: the mutual information gap of drawn codes (Chen et al. 2018, eq. 6), 1 if one latent alone tells
a factor, and the FactorVAE score of posterior means (Kim & Mnih 2018). Both want the factors, so they are for
benchmarks, and both depend on the seed as much as on the objective (Locatello et al. 2019): try `--seed`. A figure
moves one latent of the middle picture per row, and tells what share of a factor's entropy that one knows.

Measured with `python examples/disentangling.py`, one seed: MIG .166 (VAE), .238 (beta), .179 (capacity), .335
(TC), .279 (Factor); FactorVAE scores .86, .72, .63, .80, .73 ± .02. In all, size and brightness stay entangled.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ppl_vae as pv
from ppl_vae import plots
from ppl_vae.disentangling import factor_score, mutual_information, mutual_information_gap

FACTORS = {"x": 10, "y": 6, "size": 5, "brightness": 5}
SIDE, LATENT = 16, 6


def blobs() -> tuple[Tensor, Tensor]:
    """Every combination of the factors once: pictures (1500, 256) and factors (1500, 4)."""
    factors = torch.cartesian_prod(*(torch.arange(n) for n in FACTORS.values()))
    place = torch.arange(SIDE)
    x, y, size, brightness = (f[:, None] for f in factors.T)
    across, down = ((place - 7.5 - 0.8 * (v - n)).square() for v, n in ((x, 4.5), (y, 2.5)))
    distance = down[:, :, None] + across[:, None, :]
    pictures = torch.exp(-distance / (2 * (1.6 + 0.35 * size[..., None]) ** 2))
    return (0.4 + 0.15 * brightness) * pictures.flatten(1), factors


def choices(size: int, steps: int) -> dict[str, tuple[pv.BoundObjective, list[pv.Hook]]]:
    """Name -> what is maximised, and what changes on the way."""
    elbo, critic = partial(pv.ELBO, kl="analytic"), pv.MLP(LATENT, 128, 128, 1)
    adversary = pv.Adversary(5.0, critic, optimizer=partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.9)))
    capacity = pv.Capacity(weight=10.0, target=7.0)
    rising = pv.Anneal(capacity.target, pv.linear(0.0, 7.0, steps * 3 // 4))
    return {
        "VAE": (elbo(), []),
        "beta": (elbo(beta=5.0), []),
        "capacity": (elbo(beta=0.0, penalties=[capacity]), [rising]),
        "TC": (elbo(penalties=[pv.TotalCorrelation(size, weight=5.0)]), []),
        "Factor": (elbo(penalties=[adversary]), []),
    }


def judge(name: str, vae: pv.VAE, x: Tensor, factors: Tensor, out: Path, votes: int) -> None:
    """Print both metrics, and draw the traversals."""
    # Five draws of each picture: the bias of a histogram's information falls as 1 / draws.
    codes, causes = pv.encode(vae, x.repeat(5, 1), draw=True)["z"], factors.repeat(5, 1)
    gap, score = mutual_information_gap(codes, causes), factor_score(pv.encode(vae, x)["z"], factors, votes=votes)
    error = (pv.reconstruct(vae, x) - x).square().sum(1).mean()
    each = ", ".join(f"{factor} {g:.2f}" for factor, g in zip(FACTORS, gap, strict=True))
    print(f"{name:<8} MIG {gap.mean():.3f} ({each}), score {score:.3f}, error {error:.3f}; {pv.elbo(vae, x)}")

    middle = (factors == torch.tensor([n // 2 for n in FACTORS.values()])).all(1)
    z = pv.encode(vae, x[middle])["z"].repeat(LATENT, 9, 1)
    z[torch.arange(LATENT), :, torch.arange(LATENT)] = torch.linspace(-2, 2, 9)
    known = mutual_information(codes, causes) / torch.tensor(list(FACTORS.values())).double().log()
    labels = [f"{list(FACTORS)[row.argmax()]} {row.max():.2f}" for row in known]
    means = pv.decode(vae, {"z": z.flatten(0, 1)})
    fig = plots.image_grid(means, (SIDE, SIDE), 9, f"{name}: one latent at a time, from -2 to 2", labels)
    plots.save(fig, out / f"blobs_{name}.png")


def main() -> None:
    p = argparse.ArgumentParser(description="Five objectives and two metrics of disentanglement, on blobs.")
    p.add_argument("--epochs", type=int, default=250)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("figures"))
    p.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    (x, factors), (epochs, batch) = blobs(), (1, 500) if a.smoke else (a.epochs, 100)
    torch.manual_seed(a.seed)
    for name, (objective, hooks) in choices(len(x), epochs * len(x) // batch).items():
        torch.manual_seed(a.seed)
        vae = pv.VAE(
            pv.StandardNormal(LATENT),
            pv.Normal(pv.MLP(LATENT, 128, 128, SIDE * SIDE), scale=0.1),
            pv.mean_field(pv.MLP(SIDE * SIDE, 128, 128, 2 * LATENT)),
        )
        pv.fit(
            vae,
            x,
            objective=objective,
            hooks=hooks,
            epochs=epochs,
            batch_size=batch,
            optimizer=partial(torch.optim.Adam, lr=2e-3, fused=True),
            seed=a.seed,
        )
        judge(name, vae, x, factors, a.out, votes=20 if a.smoke else 800)
    print(f"figures in {a.out}")


if __name__ == "__main__":
    main()
