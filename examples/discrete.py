"""# A VAE with bits for latents: relaxed, or by scores

$$b_j \\sim \\operatorname{Bernoulli}(1/2), \\quad j = 1, \\dots, 40, \\qquad
x_i \\mid b \\sim \\operatorname{Bernoulli}(\\operatorname{sigmoid} f_i(b)), \\qquad
q(b_j \\mid x) = \\operatorname{Bernoulli}(\\operatorname{sigmoid} g_j(x)).$$

A draw of 0 or 1 carries no gradient. Either bits are relaxed to numbers between 0 and 1, by logits
$y = (g(x) + \\text{logistic noise}) / T$ of a temperature T that is annealed (Maddison, Mnih & Teh 2017, *The
Concrete Distribution*; Jang, Gu & Poole 2017, *Categorical Reparameterization with Gumbel-Softmax*). Or the guide
learns from scores (VIMCO, Mnih & Rezende 2016).

A relaxed model is another model, and its bound says nothing of bits. "Straight through" has the decoder see hard
ones, 1[y > 0], with the gradient of relaxed ones (Bengio et al. 2013). Under the relaxed prior these are
Bernoulli(1/2), so that its bound is one on log p(x) of the bits, only looser, since it weighs y and not b. So the
nets of both are put into the program of bits and judged there, like with like.

Measured by `python examples/discrete.py --data-dir FOLDER --epochs 12`, first 1000 test images, -L_1000 of the
bits: 122.0 (relaxed), 122.9 (straight through) and 116.9 (VIMCO), each ± 1.2 over the same images.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import ppl_vae as pv
from ppl_vae import plots


def binary(encoder: nn.Module, decoder: nn.Module, bits: int) -> pv.VAE:
    """The program of bits, of any two nets."""
    return pv.VAE(pv.Bernoulli(pv.Constant(torch.zeros(bits))), pv.Bernoulli(decoder), pv.Bernoulli(encoder))


def relaxed(encoder: nn.Module, decoder: nn.Module, bits: int, hard: bool = False) -> pv.VAE:
    """The same nets with relaxed bits in between."""
    prior = pv.RelaxedBernoulli(pv.Constant(torch.zeros(bits)), 0.5)
    likelihood = pv.Bernoulli(nn.Sequential(pv.Bits(hard), decoder))
    return pv.VAE(prior, likelihood, pv.RelaxedBernoulli(encoder, 1.0))


def main() -> None:
    p = argparse.ArgumentParser(description="Bits as latents: relaxed, straight through, and by scores.")
    p.add_argument("--data-dir", help="folder with MNIST/raw; digits without it")
    p.add_argument("--bits", type=int, default=40)
    p.add_argument("--particles", type=int, default=5)
    p.add_argument("--epochs", type=int, default=15, help="passes over MNIST, ten times as many over the digits")
    p.add_argument("--out", type=Path, default=Path("figures"))
    p.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    a = p.parse_args()
    if a.particles < 2:  # each draw of VIMCO is judged against the others
        p.error(f"--particles must be at least 2, got {a.particles}")
    images = pv.mnist(a.data_dir) if a.data_dir else pv.digits()
    hidden = 200 if a.data_dir else 64
    epochs = 1 if a.smoke else a.epochs if a.data_dir else 10 * a.epochs
    train, test = (
        pv.Data(s.x, transform=pv.redraw)[: 100 if a.smoke else len(s)] for s in (images.train, images.test)
    )

    programs = {"relaxed": relaxed, "straight through": partial(relaxed, hard=True), "VIMCO": binary}
    width, judged = images.train.x.shape[1], []
    for name, program in programs.items():
        torch.manual_seed(0)
        nets = pv.MLP(width, hidden, hidden, a.bits), pv.MLP(a.bits, hidden, hidden, width)
        vae = program(*nets, a.bits)
        vae.likelihood.start_from(images.train.x)
        half, hooks = max(1, epochs * train.steps(100) // 2), []
        if program is not binary:  # temperatures of posterior and prior fall together
            temperatures = (vae.posterior.temperature, 1.0, 0.5), (vae.prior.temperature, 0.75, 0.4)
            hooks = [pv.Anneal(t, pv.linear(start, end, steps=half)) for t, start, end in temperatures]
        pv.fit(
            vae,
            train,
            objective=pv.IWAE(a.particles, estimator=pv.vimco if program is binary else pv.pathwise),
            epochs=epochs,
            batch_size=100,
            optimizer=partial(torch.optim.Adam, lr=1e-3),
            scheduler=partial(CosineAnnealingLR, T_max=epochs),
            hooks=hooks,
        )
        bits = binary(*nets, a.bits)
        bounds = [pv.log_likelihood(m, test[:1000], particles=5 if a.smoke else 1000) for m in (vae, bits)]
        own = "the same" if program is binary else f"{pv.average(bounds[0].value):.2f}"
        print(f"{name:<16} as trained {own}; as bits {bounds[1]}", flush=True)
        judged.append(pv.sample(bits, 10, mean=True))
    a.out.mkdir(parents=True, exist_ok=True)
    title = "Samples of the program of bits (means), its nets trained in three ways"
    figure = plots.image_grid(torch.cat(judged), images.shape, 10, title, [*programs])
    plots.save(figure, a.out / "discrete_samples.png")
    print(f"figure in {a.out}")


if __name__ == "__main__":
    main()
