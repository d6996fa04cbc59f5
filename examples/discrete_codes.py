"""# Codes by three guides: quantised, relaxed, or by scores

$$z_j \\sim \\operatorname{Uniform}\\{1, \\dots, 16\\}, \\quad j = 1, \\dots, 4, \\qquad
x_i \\mid z \\sim \\operatorname{Bernoulli}(\\operatorname{sigmoid} f_i(e_{z_1}, \\dots, e_{z_4})).$$

A picture is four codes, 16 bits, whose vectors e a decoder f takes. A draw of them has no gradient:

- quantised: the code nearest to the encoder's features, for certain, with the gradient straight through to these
  (van den Oord, Vinyals & Kavukcuoglu 2017, *Neural Discrete Representation Learning*);
- relaxed: drawn codes with the gradient of softmax((g(x) + Gumbel noise) / T) (Jang, Gu & Poole 2017, *Categorical
  Reparameterization with Gumbel-Softmax*), and the KL of categories, of a weight rising from 0 to 1;
- by scores: drawn codes, made likelier by what came of each (VIMCO of five, Mnih & Rezende 2016).

Nets and binary pixels are the same. Here log p(x) is a sum of 65,536 terms that can be done: the bound's distance
from it is the guide's, the rest the model's. More particles do nothing for a guide of a single code.

Measured by `python examples/discrete_codes.py`, 500 test images, nats, each ± .2: ELBO -26.4, log p(x) -23.3
(quantised); -24.2, -23.6 (relaxed); -24.0, -23.1 (by scores), at about twice the time of the others.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import ppl_vae as pv
from ppl_vae import plots

GRID, CODES, WIDTH, SHAPE = (2, 2), 16, 16, (1, 8, 8)


class Moved(nn.Module):  # to another place goes a dimension: channels come first, and categories last
    def __init__(self, net: nn.Module, source: int, target: int) -> None:
        super().__init__()
        self.net, self.source, self.target = net, source, target

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).movedim(self.source, self.target)


class GumbelOneHot(dist.OneHotCategorical):  # exact draws, with the gradient of relaxed ones
    has_rsample, temperature = True, 0.5

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        logits = self.logits.expand(self._extended_shape(sample_shape))
        return nn.functional.gumbel_softmax(logits, self.temperature, hard=True)


class Relaxed(pv.OneHotCategorical):
    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        return GumbelOneHot(logits=self.net(*context)).to_event(self.event_dim - 1)


def quantised(encoder: nn.Module, decoder: nn.Module) -> pv.VAE:
    book = pv.Codebook(CODES, WIDTH)
    prior = pv.CodePrior(pv.UniformCodes(CODES, GRID), book)
    return pv.VAE(prior, pv.Bernoulli(decoder), pv.Quantised(encoder, book, event_dim=3))


def drawn(encoder: nn.Module, decoder: nn.Module, guide: type[pv.Conditional] = pv.OneHotCategorical) -> pv.VAE:
    book = Moved(nn.Linear(CODES, WIDTH, bias=False), -1, -3)
    prior = pv.OneHotCategorical(pv.Constant(torch.zeros(*GRID, CODES)), event_dim=3)
    posterior = guide(Moved(encoder, -3, -1), event_dim=3)
    return pv.VAE(prior, pv.Bernoulli(nn.Sequential(book, decoder)), posterior)


@torch.no_grad()
def evidence(vae: pv.VAE, x: Tensor) -> Tensor:
    """log p(x), (N,), by the sum over all codes."""
    every = torch.cartesian_prod(*[torch.arange(CODES)] * 4).reshape(-1, *GRID)
    book = getattr(vae.posterior, "codebook", None)
    z = book.embed(every).movedim(-1, -3) if book else nn.functional.one_hot(every, CODES).float()
    logits = torch.cat([vae.likelihood.net(part) for part in z.split(4096)])
    return (x @ logits.T - nn.functional.softplus(logits).sum(1) + vae.prior().log_prob(z)).logsumexp(1)


def main() -> None:
    p = argparse.ArgumentParser(description="Codes as latents: quantised, relaxed, and by scores.")
    p.add_argument("--epochs", type=int, default=120)
    p.add_argument("--out", type=Path, default=Path("figures"))
    p.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    a = p.parse_args()
    images, epochs = pv.digits(), 1 if a.smoke else a.epochs
    train = pv.Data(images.train.x, transform=pv.redraw)
    torch.manual_seed(0)
    x = pv.redraw(torch.cat([images.valid.x, images.test.x]))[: 20 if a.smoke else None]
    rising = pv.ELBO(beta=0.0, kl="analytic")
    warm_up = pv.Anneal(rising.beta, pv.linear(0.0, 1.0, steps=max(1, epochs * train.steps(100) // 2)))
    choices = {
        "quantised": (quantised, pv.ELBO(penalties=[pv.Commitment()]), []),
        "relaxed": (partial(drawn, guide=Relaxed), rising, [warm_up]),
        "by scores": (drawn, pv.IWAE(5, estimator=pv.vimco), []),
    }
    rows, adam = {"data": x[:10]}, partial(torch.optim.Adam, lr=2e-3)
    for name, (program, objective, hooks) in choices.items():
        torch.manual_seed(0)
        encoder = pv.ConvEncoder(SHAPE, (32, 64), WIDTH, flat=True, spatial=True)
        vae = program(encoder, pv.ConvDecoder(WIDTH, (64, 32), SHAPE, flat=True, spatial=True))
        vae.likelihood.start_from(images.train.x)
        start, cosine = time.process_time(), partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
        options = {"optimizer": adam, "scheduler": cosine, "hooks": hooks, "batch_size": 100}
        pv.fit(vae, train, objective=objective, epochs=epochs, **options)
        seconds = time.process_time() - start
        bound = pv.elbo(vae, x, 50)
        z = pv.code_indices(vae, x)["z"] if program is quantised else pv.encode(vae, x, draw=True)["z"].argmax(-1)
        parts = [f"{pv.average(v):.2f}" for v in (bound.value, bound.diagnostics["rate"], evidence(vae, x))]
        line = f"{name}: ELBO, rate, log p(x) {', '.join(parts)}; perplexity {pv.perplexity(z, CODES):.1f}"
        print(f"{line}; {seconds:.0f} s of one processor", flush=True)
        rows |= {name: pv.reconstruct(vae, x[:10]), f"{name}, samples": pv.sample(vae, 10, mean=True)}
    a.out.mkdir(parents=True, exist_ok=True)
    figure = plots.image_grid(torch.cat([*rows.values()]), images.shape, 10, "16 bits a picture (means)", [*rows])
    plots.save(figure, a.out / "discrete_codes.png")


if __name__ == "__main__":
    main()
