"""A VQ-VAE of CIFAR-10-format images, three priors over its codes, and a density of pixels against a VAE.

    python tests/bench/code_images.py --data cifar10_train_first4000.npz --out FOLDER [--only codes priors pixels]

Of 4,000 images the last 1,000 are held out, and 200 of the others choose the epoch. The folder gets weights,
histories, figures and code_images.json; what it has of weights is read and not trained again. Seconds are the
processor's, since others may use it as well: set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ppl_vae as pv
from ppl_vae import plots
from ppl_vae.plots import save

SHAPE, GRID, CODES = (3, 32, 32), (16, 16), 256
Found = dict[str, Any]
Splits = Sequence[Tensor]


def vqvae(width: int = 64, depth: int = 32, components: int = 3) -> pv.VAE:
    """One halving, so 16 x 16 codes; channels of a pixel are coupled."""
    book = pv.Codebook(CODES, depth)
    encoder = pv.ConvEncoder(SHAPE, (width,), depth, blocks=1, spatial=True)
    decoder = pv.ConvDecoder(depth, (width,), SHAPE, 10 * components, blocks=1, spatial=True)
    return pv.VAE(
        prior=pv.CodePrior(pv.UniformCodes(CODES, GRID), book),
        likelihood=pv.LogisticMixture(decoder, components, coupled=True, event_dim=3),
        posterior=pv.Quantised(encoder, book, event_dim=3),
    )


def sigma_vae(width: int = 64, latent: int = 128) -> pv.VAE:
    """A normal likelihood with a σ for each entry, of dequantised pixels."""
    encoder = pv.ConvEncoder(SHAPE, (width // 2, width), 2 * latent, blocks=1)
    decoder = pv.ConvDecoder(latent, (width, width // 2), SHAPE, 6, blocks=1)
    return pv.VAE(
        prior=pv.StandardNormal(latent),
        likelihood=pv.Normal(decoder, pv.NetScale(), event_dim=3),
        posterior=pv.mean_field(encoder),
    )


def pixelcnn(width: int = 24, components: int = 5) -> pv.Density:
    """A PixelCNN++ of the pictures themselves."""
    grid = pv.LogisticGrid(SHAPE, width, components)
    return pv.Density(pv.PixelCNNPlusPlus(grid, 1, levels=2))


PRIORS: dict[str, Callable[[], pv.Conditional]] = {
    "PixelCNN": lambda: pv.PixelCNN(pv.CodeGrid(CODES, GRID, width=56), 4),
    "Gated PixelCNN": lambda: pv.GatedPixelCNN(pv.CodeGrid(CODES, GRID, width=32), 4),
    "PixelCNN++": lambda: pv.PixelCNNPlusPlus(pv.CodeGrid(CODES, GRID, width=22), 1, levels=2, dropout=0.1),
}
EPOCHS = {"VQ-VAE": 16, "PixelCNN": 10, "Gated PixelCNN": 10, "PixelCNN++": 10, "density": 5, "VAE": 30}


def trained(
    program: nn.Module, name: str, train: pv.Data, valid: pv.Data, out: Path, size: int = 16, **more: Any
) -> Found:
    """Train, ending with the weights of the best epoch on the validation images; how long it took."""
    stem, start = out / name.replace(" ", "-"), time.process_time()
    weights, record = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    if record.exists():
        pv.load_weights(program, weights)
        return dict(json.loads(record.read_text()))
    run = pv.fit(
        program,
        train,
        valid,
        epochs=EPOCHS[name],
        batch_size=size,
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=EPOCHS[name] * train.steps(size)),
        scheduler_every="step",
        hooks=[pv.LogCSV(stem.with_suffix(".csv"))],
        compile="off",
        progress=False,
        **more,
    )
    found = {
        "parameters": sum(p.numel() for p in program.parameters()),
        "epochs": EPOCHS[name],
        "best epoch": max(run.history, key=lambda row: row["valid"])["epoch"],
        "CPU s": round(time.process_time() - start),
    }
    pv.save_weights(program, weights)
    record.write_text(json.dumps(found))
    return found


def codes(splits: Splits, out: Path) -> Found:
    """The VQ-VAE: bits, squared error, use of the codebook, and pictures beside their reconstructions."""
    vae, found = first_stage(splits, out)
    x = splits[2] / 255
    seen = torch.cat([pv.reconstruct(vae, part) for part in x.split(100)])
    rows = torch.stack([part[:20].unflatten(0, (2, 10)) for part in (x, seen)], 1)
    title = "Held-out images, and what 16 x 16 codes keep of them"
    figure = plots.image_grid(rows.flatten(0, 2), SHAPE, 10, title, ["image", "decoded"] * 2)
    save(figure, out / "code-images-reconstructions.png")
    length = pv.code_length(vae, pv.Data(splits[2]), compile="off")
    errors = (((x - guess) ** 2).flatten(1).mean(1) for guess in (seen, (splits[0] / 255).mean(0)))
    error, baseline = (f"{pv.average(e):.5f}" for e in errors)
    return found | {
        "squared error": error,
        "that of the mean image": baseline,
        "use": str(length.use["z"]),
        "bits per dimension": f"{length.per_dimension:.4f}",
        "bits per image": f"{length.codes:.1f} for codes, {length.pixels:.1f} for pixels",
    }


def first_stage(splits: Splits, out: Path) -> tuple[pv.VAE, Found]:
    """The VQ-VAE under its uniform prior, trained."""
    torch.manual_seed(0)
    vae = vqvae()
    vae.likelihood.start_from(splits[0] / 255)
    train, valid = (pv.Data(x) for x in splits[:2])
    objective = pv.ELBO(penalties=[pv.Commitment()])
    return vae, trained(vae, "VQ-VAE", train, valid, out, 32, objective=objective)


def priors(splits: Splits, out: Path) -> Found:
    """Three priors over the codes, in bits per code of held-out pictures, and what they make of pictures."""
    vae, _ = first_stage(splits, out)
    train, valid, test = (pv.code_indices(vae, pv.Data(x))["z"] for x in splits)
    places, drawn = math.prod(GRID), {}
    seen = torch.bincount(train.flatten(), minlength=CODES) + 1
    chances = (seen / seen.sum()).log2()
    bits = {"frequencies": -chances[test].flatten(1).mean(1)}
    found: Found = {
        "uniform": math.log2(CODES),
        "entropy of held-out codes": math.log2(pv.perplexity(test, CODES)),
    }
    for name, make in PRIORS.items():
        torch.manual_seed(0)
        prior = make()
        prior.start_from(train)
        density = pv.Density(prior)
        found[name] = trained(density, name, pv.Data(train), pv.Data(valid), out)
        bits[name] = -pv.elbo(density, test, compile="off").value / (places * math.log(2))
        vae.prior.prior = prior
        length = pv.code_length(vae, pv.Data(splits[2]), compile="off")
        found[name]["bits per dimension"] = f"{length.per_dimension:.4f}"
        start = time.process_time()
        drawn[name] = pv.sample(vae, 10, mean=True)
        found[name]["s for 10 samples"] = round(time.process_time() - start, 1)
    figure = plots.image_grid(torch.cat([*drawn.values()]), SHAPE, 10, "Codes from each prior, decoded", [*drawn])
    save(figure, out / "code-images-samples.png")
    gains = {f"{a} over {b}": f"{pv.average(bits[b] - bits[a]):.4f}" for b, a in pairwise(bits)}
    return found | {
        "bits per code": {name: f"{pv.average(each):.4f}" for name, each in bits.items()},
        "gains": gains,
    }


def pixels(splits: Splits, out: Path) -> Found:
    """A PixelCNN++ by itself against a VAE with a σ for each entry: bits per dimension of held-out pictures."""
    known, dims = splits[0] / 255, math.prod(SHAPE)
    torch.manual_seed(0)
    density, vae = pixelcnn(), sigma_vae()
    density.likelihood.start_from(known)
    vae.likelihood.start_from(known)
    exact = [pv.Data(x) for x in splits]
    spread = [pv.Data(x, transform=pv.dequantise) for x in splits]
    found: Found = {
        "PixelCNN++": trained(density, "density", *exact[:2], out),
        "VAE": trained(vae, "VAE", *spread[:2], out, 32),
    }
    bounds = {
        "PixelCNN++": pv.bits_per_dimension(pv.elbo(density, exact[2], compile="off").value, dims),
        "VAE": pv.bits_per_dimension(
            pv.log_likelihood(vae, spread[2], 50, compile="off").value, dims, dequantised=True
        ),
    }
    for name, value in bounds.items():
        found[name]["bits per dimension"] = f"{pv.average(value):.4f}"
    drawn = {"PixelCNN++": pv.sample(density, 10), "VAE": pv.sample(vae, 10, mean=True)}
    title = "Samples of densities of pixels (of the VAE, means)"
    figure = plots.image_grid(torch.cat([*drawn.values()]), SHAPE, 10, title, [*drawn])
    save(figure, out / "code-images-pixels.png")
    return found | {"gain": f"{pv.average(bounds['VAE'] - bounds['PixelCNN++']):.4f}"}


PARTS: dict[str, Callable[[Splits, Path], Found]] = {"codes": codes, "priors": priors, "pixels": pixels}


def main() -> None:
    """Train and judge, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="x (4000, 32, 32, 3) of bytes, in an npz file")
    parser.add_argument(
        "--out", type=Path, required=True, help="where weights, figures and code_images.json are, or will be kept"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    args = parser.parse_args()
    x = torch.as_tensor(np.load(args.data)["x"]).movedim(-1, 1).contiguous()
    splits = x[:2800], x[2800:3000], x[3000:4000]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "code_images.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in args.only:
        found[name] = PARTS[name](splits, args.out)
        path.write_text(json.dumps(found, indent=2, ensure_ascii=False))
        print(json.dumps({name: found[name]}, indent=2, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
