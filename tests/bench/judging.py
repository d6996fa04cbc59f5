"""Judge a VAE of MNIST by everything there is: what docs/bounds.md shows, and docs/results.md reports.

    python tests/bench/judging.py --keep FOLDER --out FOLDER [--images 100] [--only importance annealing ...]

Pixels are redrawn. The network and its training are those of `mnist.py`, from which it takes trained weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mnist
import torch

import ppl_vae as pv
from ppl_vae import plots
from ppl_vae.plots import save

SETTINGS = pv.Annealing()  # 16 chains, 1000 distributions, 10 leapfrog steps
Found = dict[str, Any]


def importance(vae: pv.VAE, images: Any, out: Path, size: int) -> Found:
    """L_K for more and more particles, and what other proposals give."""
    test = redrawn(images.test.x[:size])
    curve = [(k, pv.log_likelihood(vae, test, k)) for k in (1, 5, 50, 500)]
    proposals = {
        "guide": pv.importance(vae, test, 5000),
        "widened 1.2": pv.importance(pv.widened(vae, 1.2), test, 5000),
        "widened 1.5": pv.importance(pv.widened(vae, 1.5), test, 5000),
        "defensive 0.1": pv.importance(vae, test, 5000, defensive=0.1),
    }
    plain = proposals["guide"]
    khat = plain.diagnostics["khat"]
    save(plots.khat_histogram(khat, pv.khat_threshold(5000)), out / "bounds-khat.png")
    save(plots.bounds({"L_K": [*curve, (5000, plain)]}), out / "bounds-particles.png")
    return {
        name: {
            "bound": str(estimate),
            "above the guide's": str(pv.average(estimate.value - plain.value)),
            "smoothed": str(pv.average(estimate.diagnostics["smoothed"])),
            "k-hat above": float((estimate.diagnostics["khat"] > pv.khat_threshold(5000)).double().mean()),
            "ess": float(estimate.diagnostics["ess"].median()),
        }
        for name, estimate in proposals.items()
    }


def annealing(vae: pv.VAE, images: Any, out: Path, size: int) -> Found:
    """The annealed bound over the number of distributions, against L_5000."""
    test, found, curve = redrawn(images.test.x[:size]), {}, []
    plain = pv.log_likelihood(vae, test, 5000)
    for count in (10, 100, 1000):
        start = time.perf_counter()
        estimate = pv.annealed(vae, test, replace(SETTINGS, distributions=count))
        curve.append((count, estimate))
        above = str(pv.average(estimate.value - plain.value))
        found[str(count)] = {
            "bound": str(estimate), "above L_5000": above, "seconds": time.perf_counter() - start
        }  # fmt: skip
    save(plots.bounds({"AIS": curve}, "distributions"), out / "bounds-annealing.png")
    return found


def sandwich(vae: pv.VAE, images: Any, out: Path, size: int) -> Found:
    """Both bounds on data of the model's own."""
    found, curve = {}, []
    for count in (10, 100, 1000):
        start = time.perf_counter()
        both = pv.sandwich(vae, size, settings=replace(SETTINGS, distributions=count))
        curve.append((count, both))
        found[str(count)] = {"both": str(both), "seconds": time.perf_counter() - start}
    lower, upper = [(n, b.lower) for n, b in curve], [(n, b.upper) for n, b in curve]
    figure = plots.bounds({"forwards": lower, "backwards": upper}, "distributions", "On data drawn from the model")
    save(figure, out / "bounds-sandwich.png")
    return found


def gaps(vae: pv.VAE, images: Any, out: Path, size: int) -> Found:
    """What the family of posteriors and its net lose, with local posteriors of two families."""
    test = redrawn(images.test.x[:size])
    evidence = pv.annealed(vae, test, SETTINGS)
    rows, found = {}, {}
    for name, family in (("mean field", pv.local_mean_field), ("full covariance", pv.local_full_covariance)):
        start = time.perf_counter()
        split = pv.gaps(vae, test, family=family, evidence=evidence)
        rows[name] = {"approximation": split.approximation, "amortisation": split.amortisation}
        found[name] = {"gaps": str(split), "refined": str(split.refined), "seconds": time.perf_counter() - start}
    save(plots.gap_bars(rows), out / "bounds-gaps.png")
    return found


def criticism(vae: pv.VAE, images: Any, out: Path, size: int) -> Found:
    """Calibration, the parts of the ELBO, units, and training against held-out data."""
    ranks = pv.sbc(vae, 1000)
    figure = plots.calibration(ranks.difference["z"], ranks.points, ranks.band(), ranks.outside["z"])
    save(figure, out / "bounds-calibration.png")
    units = pv.active_units(vae, redrawn(images.test.x[:1000]))
    save(plots.spectrum(units.variance), out / "bounds-units.png")
    some = {name: redrawn(split.x[:size]) for name, split in (("train", images.train), ("test", images.test))}
    return {
        "calibration": str(ranks),
        "parts": str(pv.decompose(vae, redrawn(images.test.x[:2000]))),
        "checks": str(pv.predictive_check(vae, some["test"])),
        "overfitting": str(pv.generalisation(vae, some["train"], some["test"])),
    }


def redrawn(x: torch.Tensor) -> pv.Data:
    """Pictures, binarised anew at every presentation."""
    return pv.Data(x, transform=pv.redraw)


PARTS: dict[str, Callable[..., Found]] = {
    "importance": importance,
    "annealing": annealing,
    "sandwich": sandwich,
    "gaps": gaps,
    "criticism": criticism,
}


def main() -> None:
    """Judge, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data", help="folder with MNIST/raw")
    parser.add_argument("--keep", type=Path, required=True, help="where trained weights are, or will be kept")
    parser.add_argument("--out", type=Path, required=True, help="where to write figures and judging.json")
    parser.add_argument("--images", type=int, default=100, help="how many images are annealed and refined")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    args = parser.parse_args()
    images = pv.mnist(args.data)
    vae, _ = mnist.train(images, "VAE", 50, keep=args.keep)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "judging.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in args.only:
        found[name] = PARTS[name](vae, images, args.out, args.images)
        path.write_text(json.dumps(found, indent=2, ensure_ascii=False))
        print(name, json.dumps(found[name], indent=2, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
