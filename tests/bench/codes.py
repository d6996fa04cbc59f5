"""MNIST in codes: a VQ-VAE of 7 x 7 codes from 128 against a Gaussian VAE, and three priors over its codes.

    python tests/bench/codes.py --keep FOLDER --out FILE.json [--data FOLDER] [--figures FOLDER] [--only speed ...]

Pixels are the 256 levels, so that bits are those of a lossless code. Both autoencoders have the same nets and the
same likelihood, a discretised logistic with a scale for each pixel; the priors have about equally many parameters
and equally many passes. Trained weights are kept, and read where there are some.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import ppl_vae as pv
from ppl_vae import plots

SHAPE, GRID, CODES, WIDTH, CHANNELS = (1, 28, 28), (7, 7), 128, 16, (32, 64)
BATCH = 128
Found = dict[str, Any]


def likelihood() -> pv.Conditional:
    """A location and a scale for each pixel, from features at 7 x 7 places."""
    decoder = pv.ConvDecoder(WIDTH, CHANNELS[::-1], SHAPE, 2, spatial=True)
    return pv.DiscretisedLogistic(decoder, pv.NetScale(), event_dim=3)


def quantised() -> pv.VAE:
    """The VQ-VAE, with the uniform prior that it is trained under."""
    book = pv.Codebook(CODES, WIDTH, ema=0.95)
    encoder = pv.ConvEncoder(SHAPE, CHANNELS, WIDTH, spatial=True)
    prior = pv.CodePrior(pv.UniformCodes(CODES, GRID), book)
    return pv.VAE(prior, likelihood(), pv.Quantised(encoder, book, event_dim=3))


def gaussian() -> pv.VAE:
    """The same nets around a normal latent of the same shape; the encoder's last layer gives scales as well."""
    encoder = pv.ConvEncoder(SHAPE, CHANNELS, 2 * WIDTH, spatial=True)
    prior = pv.Normal(pv.Constant(torch.zeros(WIDTH, *GRID)), 1.0, event_dim=3)
    return pv.VAE(prior, likelihood(), pv.Normal(encoder, pv.NetScale(), event_dim=3))


AUTOENCODERS: dict[str, tuple[Callable[[], pv.VAE], Callable[[], pv.Objective]]] = {
    "VQ-VAE": (quantised, lambda: pv.ELBO(penalties=[pv.Commitment(1.0)])),
    "Gaussian VAE": (gaussian, lambda: pv.ELBO(kl="analytic")),
}
PRIORS: dict[str, Callable[[], pv.Conditional]] = {
    "PixelCNN": lambda: pv.PixelCNN(pv.CodeGrid(CODES, GRID, width=60), 5),
    "Gated PixelCNN": lambda: pv.GatedPixelCNN(pv.CodeGrid(CODES, GRID, width=32), 5),
    "PixelCNN++": lambda: pv.PixelCNNPlusPlus(pv.CodeGrid(CODES, GRID, width=24), 2, levels=1),
}


class Line(pv.Hook):
    """A line for each epoch."""

    def on_epoch(self, run: pv.Run) -> None:
        """Print it."""
        print({name: round(value, 4) for name, value in run.history[-1].items()}, flush=True)


class Bench:
    """Images, and what is trained on them.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        images = pv.mnist(args.data)
        self.train, self.valid, self.test = (
            split.x.reshape(-1, *SHAPE) for split in (images.train, images.valid[:2000], images.test)
        )
        self.keep, self.figures, self.epochs = args.keep, args.figures or args.keep, args.epochs
        self.autoencoders: dict[str, pv.VAE] = {}
        self.priors: dict[str, pv.Conditional] = {}

    def trained(
        self, name: str, program: nn.Module, data: Sequence[Tensor], epochs: int, **settings: Any
    ) -> Found:
        """Train a program, or read what the folder has of it; how long it took, and how many numbers it has."""
        stem = self.keep / name.replace(" ", "-")
        weights, log = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
        if log.is_file():
            pv.load_weights(program, weights)
            return json.loads(log.read_text())  # type: ignore[no-any-return]
        steps = epochs * math.ceil(len(data[0]) / BATCH)
        start, worked = time.perf_counter(), time.process_time()
        run = pv.fit(
            program,
            *data,
            epochs=epochs,
            batch_size=BATCH,
            optimizer=partial(torch.optim.Adam, lr=2e-3),
            scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
            scheduler_every="step",
            progress=False,
            **settings,
        )
        found = {
            "parameters": sum(p.numel() for p in program.parameters()),
            "epochs": epochs,
            "seconds": time.perf_counter() - start,
            "processor seconds": time.process_time() - worked,
            "engine": run.engine.describe(),
            "history": run.history,
        }
        pv.save_weights(program, weights)
        log.write_text(json.dumps(found, indent=2))
        return found

    def autoencoder(self, name: str) -> tuple[pv.VAE, Found]:
        """One of the two, trained."""
        torch.manual_seed(0)
        declare, objective = AUTOENCODERS[name]
        vae = declare()
        vae.likelihood.start_from(self.train)
        uses = [pv.WatchCodes(self.valid[:500])] if name == "VQ-VAE" else []
        found = self.trained(
            name, vae, (self.train, self.valid), self.epochs[0], objective=objective(), hooks=[*uses, Line()]
        )
        return vae, found

    def codes(self, vae: pv.VAE) -> list[Tensor]:
        """Those of the three splits."""
        return [pv.code_indices(vae, x, batch_size=500)["z"] for x in (self.train, self.valid, self.test)]

    def prior(self, name: str, codes: Sequence[Tensor]) -> tuple[pv.Conditional, Found]:
        """One of the three, trained."""
        torch.manual_seed(0)
        prior = PRIORS[name]()
        prior.start_from(codes[0])
        return prior, self.trained(name, pv.Density(prior), codes[:2], self.epochs[1], hooks=[Line()])

    def both(self) -> Found:
        """Bits and squared errors of both autoencoders on test images."""
        found = {}
        for name in AUTOENCODERS:
            vae, record = self.autoencoder(name)
            means = torch.cat([pv.reconstruct(vae, x) for x in self.test.split(500)])
            errors = (means - self.test).square().flatten(1).mean(1)
            bound = pv.elbo(vae, self.test, particles=1 if name == "VQ-VAE" else 8, batch_size=500)
            bits = pv.bits_per_dimension(bound.value, self.test[0].numel())
            found[name] = {
                **described(record),
                "bits per dimension": f"{pv.average(bits):.4f}",
                "squared error": f"{pv.average(errors):.5f}",
                "bound": str(bound),
            }
            if name == "VQ-VAE":
                found[name]["code length"] = str(pv.code_length(vae, self.test, batch_size=500))
        return found

    def second(self) -> Found:
        """The three priors on test codes, each judged as the prior of the VQ-VAE, and against PixelCNN."""
        vae, _ = self.autoencoder("VQ-VAE")
        codes = self.codes(vae)
        counts = torch.bincount(codes[0].flatten(), minlength=CODES).double() + 1
        alone = -(counts / counts.sum()).log2()[codes[2]].flatten(1).mean(1)
        found: Found = {"uniform": math.log2(CODES), "frequencies of codes": f"{pv.average(alone):.4f}"}
        first: Tensor | None = None
        for name in PRIORS:
            vae.prior.prior, record = self.prior(name, codes)
            length = pv.code_length(vae, self.test, batch_size=500)
            bits = length.bound.diagnostics["rate"] / (math.log(2) * codes[2][0].numel())
            first = bits if first is None else first
            found[name] = {
                **described(record),
                "bits per code": f"{length.per_code:.4f}",
                "above PixelCNN": f"{pv.average(bits - first):.4f}",
                "bits per dimension": f"{length.per_dimension:.4f}",
                "code length": str(length),
            }
        return found

    def drawn(self) -> Found:
        """Figures: reconstructions, samples under each prior, use of codes."""
        vae, _ = self.autoencoder("VQ-VAE")
        some = self.test[:16]
        rows = [some, *(pv.reconstruct(v, some) for v in (vae, self.autoencoder("Gaussian VAE")[0]))]
        title = "Test images, and means at their codes"
        figure = plots.image_grid(torch.cat(rows), SHAPE, 16, title, ["input", *AUTOENCODERS])
        plots.save(figure, self.figures / "codes-reconstructions.png")
        codes, rows, seconds = self.codes(vae), [], {}
        for name in PRIORS:
            vae.prior.prior, _ = self.prior(name, codes)
            start = time.perf_counter()
            rows.append(pv.sample(vae, 64, mean=True))
            seconds[name] = time.perf_counter() - start
        labels = [name if not row else "" for name in PRIORS for row in range(4)]
        figure = plots.image_grid(torch.cat(rows), SHAPE, 16, "Codes drawn from each prior (means)", labels)
        plots.save(figure, self.figures / "codes-samples.png")
        plots.save(used(codes[2]), self.figures / "codes-usage.png")
        return {"seconds of 64 samples": seconds}

    def speed(self) -> Found:
        """Training steps of both stages, captured against as written; samples, cached against anew."""
        torch.manual_seed(0)
        x, codes = self.train[: 10 * BATCH], torch.randint(CODES, (10 * BATCH, *GRID))
        programs = {"VQ-VAE": (quantised, x, AUTOENCODERS["VQ-VAE"][1])}
        programs |= {name: (partial(density, name), codes, pv.ELBO) for name in PRIORS}
        found: Found = {name: ratio(*program) for name, program in programs.items()}
        small, large = (pv.GatedPixelCNN(pv.CodeGrid(CODES, (n, n), width=32), 5)() for n in (8, 16))
        found["64 samples of 8 x 8, seconds"] = seconds(lambda: small.sample((64,)))
        kept, anew = (
            min(seconds(lambda c=c: large.sample((16,), cached=c)) for _ in range(3)) for c in (True, False)
        )
        found["16 samples of 16 x 16, seconds"] = {"cached": kept, "anew": anew, "ratio": anew / kept}
        return found


def density(name: str) -> pv.Density:
    """A prior by itself."""
    return pv.Density(PRIORS[name]())


def described(record: Found) -> Found:
    """What of a run's record is printed."""
    return {name: value for name, value in record.items() if name != "history"}


def used(codes: Tensor) -> Figure:
    """The share of each code, the most frequent first."""
    shares = torch.bincount(codes.flatten(), minlength=CODES).double() / codes.numel()
    figure = Figure(figsize=(5.6, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(CODES), shares.sort(descending=True).values.tolist(), width=1.0)
    axes.axhline(1 / CODES, color="black", linewidth=0.8, label=f"all alike, 1/{CODES}")
    axes.set_xlabel("code, the most frequent first")
    axes.set_ylabel("share of the places")
    axes.set_title(f"{pv.usage(codes, CODES):.0%} in use, perplexity {pv.perplexity(codes, CODES):.1f}", size=9)
    axes.legend(frameon=False)
    return figure


class Steps(pv.Hook):
    """Seconds per step of each epoch, by the clock and by the processor."""

    def on_start(self, run: pv.Run) -> None:
        """Begin."""
        self.taken: list[tuple[float, float]] = []
        self.last = (time.perf_counter(), time.process_time(), 0)

    def on_epoch(self, run: pv.Run) -> None:
        """Note how long it took."""
        now = (time.perf_counter(), time.process_time(), run.step)
        clock, processor, steps = (b - a for a, b in zip(self.last, now, strict=True))
        self.taken.append((clock / steps, processor / steps))
        self.last = now


def ratio(declare: Callable[[], nn.Module], x: Tensor, objective: Callable[[], pv.Objective]) -> Found:
    """Milliseconds of a training step, captured and as written, by the clock and by the processor.

    The least of two runs each, in alternation, of three epochs after the first, which compiles.
    """
    taken: dict[pv.Compile, list[tuple[float, float]]] = {"require": [], "off": []}
    for _ in range(2):
        for compile, rows in taken.items():
            steps = Steps()
            torch.manual_seed(0)
            program, settings = declare(), {"objective": objective(), "batch_size": BATCH, "hooks": [steps]}
            pv.fit(program, x, epochs=4, compile=compile, progress=False, **settings)
            rows += steps.taken[1:]
    found: Found = {}
    for column, by in enumerate(("clock", "processor")):
        captured, written = (1e3 * min(row[column] for row in rows) for rows in taken.values())
        found[by] = {"captured": captured, "as written": written, "ratio": written / captured}
    return found


def seconds(act: Callable[[], object]) -> float:
    """How long it takes by the processor."""
    start = time.process_time()
    act()
    return time.process_time() - start


PARTS = {"autoencoders": Bench.both, "priors": Bench.second, "figures": Bench.drawn, "speed": Bench.speed}


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data", help="folder with MNIST/raw")
    parser.add_argument("--keep", type=Path, required=True, help="where trained weights are, or will be kept")
    parser.add_argument("--out", type=Path, required=True, help="JSON of all figures, added to where it is there")
    parser.add_argument("--figures", type=Path, help="where to write pictures; default: with the weights")
    parser.add_argument("--epochs", type=int, nargs=2, default=(8, 8), help="of an autoencoder and of a prior")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only:
        found[name] = PARTS[name](bench)
        args.out.write_text(json.dumps(found, indent=2, ensure_ascii=False))
        print(name, json.dumps(found[name], indent=2, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
