"""# A conditional VAE by attributes: slant, width and ink of a digit, to order

The condition is a vector a of real numbers, here three attributes that are measured on each picture. With grey
values as masses, and $C$ the covariances of the place (column, row) of the ink,

$$a_1 = -C_{cr} / C_{rr} \\;\\text{(slant)}, \\qquad a_2 = \\sqrt{C_{cc} / C_{rr}} \\;\\text{(aspect)}, \\qquad
a_3 = \\textstyle\\sum_i x_i \\;\\text{(ink)},$$

standardised. Decoder and encoder take them (Sohn, Lee & Yan 2015; Yan et al. 2016, *Attribute2Image*), the prior
does not:

$$z \\sim \\mathcal N(0, I), \\qquad
x_i \\mid z, a \\sim \\operatorname{Bernoulli}(\\operatorname{sigmoid} f_i(z, a)).$$

So z and a are independent before x is seen, and moving one attribute with z fixed asks for the same digit with
another slant. Whether it comes can be measured: the script asks for the attributes of test pictures, with z drawn
anew, and prints their correlation with the attributes of what the decoder gives, and the slope. In the figure each
row starts from a test picture, its z and its attributes, and moves one of these from -2 to 2 standard deviations.

Measured on MNIST (`--data-dir FOLDER`, 20 epochs): correlation 0.990 for slant, 0.988 for aspect, 0.989 for ink,
slopes of 0.98 to 0.99; L_500 = -87.5 ± 0.9 nats given the attributes.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ppl_vae as pv
from ppl_vae import plots

NAMES = ("slant", "aspect", "ink")


def measure(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Slant, aspect and ink of pictures (N, H * W): (N, 3)."""
    ink = x.sum(1)
    row, column = (g.flatten() for g in torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))
    share = x / ink[:, None]
    row, column = (g - (share * g).sum(1, keepdim=True) for g in (row, column))  # from the middle of the ink
    rr, cc, cr = ((share * p).sum(1) for p in (row * row, column * column, column * row))
    return torch.stack([-cr / rr, (cc / rr).sqrt(), ink], 1)


def declare(width: int, latent: int, attributes: int) -> pv.CVAE:
    """The attributes go to likelihood and posterior, and not to the prior."""
    decoder, encoder = (
        pv.MLP(latent + attributes, 200, 400, width),
        pv.MLP(width + attributes, 400, 200, 2 * latent),
    )
    return pv.CVAE(
        prior=pv.StandardNormal(latent),
        likelihood=pv.Bernoulli(pv.Concat(decoder, None, None)),
        posterior=pv.mean_field(pv.Concat(encoder, None, None)),
    )


def agreement(asked: Tensor, came: Tensor) -> None:
    """Print, for each attribute, correlation and slope of what came on what was asked for."""
    for k, name in enumerate(NAMES):
        (var, cov), (_, other) = torch.stack([asked[:, k], came[:, k]]).cov().tolist()
        rho = cov / (var * other) ** 0.5
        error = (1 - rho**2) / len(asked) ** 0.5
        print(f"  {name:<6} correlation {rho:.3f} ± {error:.3f}, slope {cov / var:.3f}")


def main() -> None:
    p = argparse.ArgumentParser(description="A conditional VAE by attributes, on MNIST or digits.")
    p.add_argument("--data-dir", help="folder with MNIST/raw; digits without it")
    p.add_argument("--epochs", type=int, default=20, help="passes over MNIST, ten times as many over the digits")
    p.add_argument("--latent", type=int, default=20)
    p.add_argument("--out", type=Path, default=Path("figures"))
    p.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    a = p.parse_args()

    images = pv.mnist(a.data_dir) if a.data_dir else pv.digits()
    epochs = 1 if a.smoke else a.epochs if a.data_dir else 10 * a.epochs
    train, valid, test = images.train, images.valid, images.test
    if a.smoke:
        train, valid, test = train[:300], valid[:100], test[:100]
    raw = measure(train.x, images.shape)
    mean, deviation = raw.mean(0), raw.std(0)

    def standardised(x: Tensor) -> Tensor:
        return (measure(x, images.shape) - mean) / deviation

    train, valid, test = (pv.Data(s.x, standardised(s.x), transform=pv.redraw) for s in (train, valid, test))
    x, asked = test.columns
    torch.manual_seed(0)
    cvae = declare(x.shape[1], a.latent, len(NAMES))
    cvae.likelihood.start_from(train.columns[0])
    pv.fit(
        cvae,
        train,
        valid,
        objective=pv.ELBO(kl="analytic"),
        epochs=epochs,
        batch_size=128,
        optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True),
    )
    print(f"given the attributes: {pv.log_likelihood(cvae, test[:1000], particles=20 if a.smoke else 500)}")
    agreement(asked, standardised(pv.sample(cvae, len(asked), asked, mean=True)))

    steps, few = torch.linspace(-2, 2, 9), 3
    z = pv.encode(cvae, x[:few].round(), asked[:few])["z"].repeat_interleave(len(NAMES) * len(steps), 0)
    wanted = asked[:few, None, None].repeat(1, len(NAMES), len(steps), 1)
    for k in range(len(NAMES)):
        wanted[:, k, :, k] = steps
    means = pv.decode(cvae, {"z": z}, wanted.flatten(0, 2))
    a.out.mkdir(parents=True, exist_ok=True)
    title = f"{few} test pictures, one attribute moved from -2 to 2"
    fig = plots.image_grid(means, images.shape, len(steps), title, NAMES * few)
    print(f"figure: {plots.save(fig, a.out / 'attributes.png')}")


if __name__ == "__main__":
    main()
