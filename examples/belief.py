"""# A sigmoid belief network: 200 binary units, and gradients without a path

Units and pixels are binary, and each layer's log-odds are linear in the one above (Neal 1992; Mnih & Gregor 2014,
*Neural Variational Inference and Learning in Belief Networks*):

$$h_j \\sim \\operatorname{Bernoulli}(\\operatorname{sigmoid} b_j), \\qquad
x_i \\mid h \\sim \\operatorname{Bernoulli}(\\operatorname{sigmoid}(W h + c)_i), \\qquad
q(h_j \\mid x) = \\operatorname{Bernoulli}(\\operatorname{sigmoid}(V x + d)_j).$$

A draw of 0 or 1 carries no gradient, so that the guide learns from scores, ∇ log q(h | x) times how well a draw
did. Compared on the same network are

- VIMCO, the bound of K draws, each judged against the others (Mnih & Rezende 2016);
- NVIL, K bounds of one draw, judged against a learned baseline (Mnih & Gregor 2014);
- reweighted wake-sleep: the same bound for the model, and a guide that maximises Σ w log q with the draws' own
  weights w (Bornschein & Bengio 2015).

For VIMCO with 1, 5 and 50 draws on this network, Maddison et al. (2017) report 104.4, 101.9 and 98.8 nats, after
far longer runs.

Measured by `python examples/belief.py --data-dir FOLDER`, first 1000 test images, after 30 passes: -L_1000 of
106.8 (VIMCO), 114.2 (NVIL) and 106.3 (RWS), each ± .9 nats. NVIL maximises the ELBO, the others L_5.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import ppl_vae as pv
from ppl_vae import plots
from ppl_vae.bounds import elbo, iwae

NAMES = ["VIMCO", "NVIL", "RWS"]


def main() -> None:
    p = argparse.ArgumentParser(description="A sigmoid belief network under VIMCO, NVIL, reweighted wake-sleep.")
    p.add_argument("--data-dir", help="folder with MNIST/raw; digits without it")
    p.add_argument("--units", type=int, default=200)
    p.add_argument("--particles", type=int, default=5)
    p.add_argument("--epochs", type=int, default=30, help="passes over MNIST, ten times as many over the digits")
    p.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, help="which of the three to train")
    p.add_argument("--out", type=Path, default=Path("figures"))
    p.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    a = p.parse_args()
    if a.particles < (1 if a.only == ["NVIL"] else 2):
        p.error(f"--particles must be at least 2, 1 with --only NVIL, got {a.particles}")
    images = pv.mnist(a.data_dir) if a.data_dir else pv.digits()
    epochs = 1 if a.smoke else a.epochs if a.data_dir else 10 * a.epochs
    train, test = (
        pv.Data(s.x, transform=pv.redraw)[: 100 if a.smoke else len(s)] for s in (images.train, images.test)
    )

    width, k = images.train.x.shape[1], a.particles
    objectives = {
        "VIMCO": lambda: pv.BoundObjective(iwae, pv.vimco, particles=k),
        "NVIL": lambda: pv.BoundObjective(elbo, pv.NVIL(pv.MLP(width, 100, 1)), particles=k),
        "RWS": lambda: pv.RWS(k),
    }
    a.out.mkdir(parents=True, exist_ok=True)
    for name in a.only:
        torch.manual_seed(0)
        objective = objectives[name]()  # NVIL's has a net of its own
        torch.manual_seed(0)
        network = pv.sigmoid_belief_network(width, a.units)
        network.likelihood.start_from(images.train.x)
        pv.fit(
            network,
            train,
            objective=objective,
            epochs=epochs,
            batch_size=50,
            optimizer=partial(torch.optim.Adam, lr=3e-3),
            scheduler=partial(CosineAnnealingLR, T_max=epochs),
        )
        bound = pv.log_likelihood(network, test[:1000], particles=5 if a.smoke else 1000)
        print(f"{name:<5} {bound}; effective draws {bound.diagnostics['ess'].median():.1f}", flush=True)
        fields = network.likelihood.net[-1].weight.detach().T[:40].sigmoid()
        rows = torch.cat([pv.sample(network, 20, mean=True), fields])
        title = f"Belief network by {name}: samples (means), sigmoid(weights) of {len(fields)} units"
        labels = ["samples"] * 2 + ["units"] * -(-len(fields) // 10)
        plots.save(plots.image_grid(rows, images.shape, 10, title, labels), a.out / f"belief_{name.lower()}.png")
    print(f"figures in {a.out}")


if __name__ == "__main__":
    main()
