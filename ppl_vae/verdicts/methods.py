"""Methods that judge a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ppl_vae import plots
from ppl_vae.amortisation import gaps
from ppl_vae.annealing import annealed, sandwich
from ppl_vae.axes import AXES
from ppl_vae.batches import Data
from ppl_vae.calibration import sbc
from ppl_vae.capture import Compile
from ppl_vae.coding import code_length
from ppl_vae.estimates import Estimate, IncompleteError, average
from ppl_vae.evaluate import elbo, log_likelihood
from ppl_vae.folders import RunFolder
from ppl_vae.pairs import Batch
from ppl_vae.pixels import bits_per_dimension
from ppl_vae.rng import seeded
from ppl_vae.schedules import Annealing
from ppl_vae.tails import FEWEST, khat_threshold
from ppl_vae.verdicts.table import BITS, Verdict, as_row, difference
from ppl_vae.weighing import importance

__all__ = ["METHODS", "Asked", "judge"]

CALIBRATED = 500  # data simulated to see whether the guide is calibrated


@dataclass(frozen=True)
class Asked:
    """How to judge.

    Attributes:
        particles: K of importance sampling.
        chunk: of them held at once.
        seed: fixes the draws, and redrawn pixels.
        compile: as in `ppl_vae.fit`.
        annealing: how to anneal.
        defensive: share of particles drawn from the prior.
        wanted: the gap of the sandwich to get below, by doubling distributions.
        most: how many data are annealed, simulated or refined, which takes thousands of gradients for each.
    """

    particles: int = 1000
    chunk: int = 100
    seed: int = 0
    compile: Compile = "auto"
    annealing: Annealing = Annealing()
    defensive: float = 0.0
    wanted: float | None = None
    most: int = 100

    @property
    def shared(self) -> dict[str, Any]:
        """What all methods take."""
        return {"seed": self.seed, "compile": self.compile}


Method = Callable[[Verdict, RunFolder, Data, Asked], None]


def judge(run: RunFolder, data: Data, method: str, asked: Asked) -> Verdict:
    """Judge a run by one method, or by all that can be had for its program.

    Args:
        run: the run, its program on the device to compute on.
        data: as its program takes them.
        method: one of `METHODS`.
        asked: how.

    Raises:
        ValueError: the program cannot be judged so, or data do not suit it.
    """
    found = Verdict()
    methods = CODED if AXES["model"][run.config.model].codes else ALL
    if method != "all":
        methods[method](found, run, data, asked)
        return found
    for name, one in methods.items():
        try:
            one(found, run, data, asked)
        except ValueError as error:  # told, and the others are worth having
            found.lines.append(f"{name}: not to be had, {error}")
    return found


def _timed(found: Verdict, compute: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the seconds it took; where data failed, that of the others, and a line that says so."""
    start = time.perf_counter()
    try:
        result = compute()
    except IncompleteError as error:
        result = error.result
        if isinstance(result, Estimate) and bool(result.failed.all()):
            raise
        if (text := f"warning: {error}") not in found.lines:
            found.lines.append(text)
    return result, time.perf_counter() - start


def _ladder(most: int, least: int = 1) -> list[int]:
    """Powers of ten from ``least`` up to below ``most``, and ``most``."""
    return [n for k in range(9) if least <= (n := 10**k) < most] + [most]


def _by_importance(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
    """ELBO and L_K, with k-hat where there are particles enough to tell."""
    if not AXES["posterior"][run.config.posterior].density:
        found.lines.append("a guide of points, which has no bound; --method annealed needs none")
        return
    options = asked.shared | {"chunk": asked.chunk}
    lower, seconds = _timed(found, partial(elbo, run.program, data, min(asked.particles, asked.chunk), **options))
    _add_elbo(found, lower, "-(rate + distortion)", seconds, RATES)
    enough = asked.particles >= FEWEST
    how = partial(importance, defensive=asked.defensive) if enough else log_likelihood
    tight, seconds = _timed(found, partial(how, run.program, data, asked.particles, **options))
    found.rows.append(as_row(tight, "tighter", seconds))
    found.rows.append(as_row(tight, "negative log-likelihood, at most", sign=-1))
    _add_bits(found, run, tight)
    known = tight.rest
    ess = known.diagnostics["ess"]
    found.lines.append(
        f"effective sample size: median {ess.median():.1f}, least {ess.min():.1f} of {asked.particles}"
    )
    found.details["effective_sample_size"] = {"median": float(ess.median()), "least": float(ess.min())}
    found.engine, found.tight = tight.engine, tight
    found.add(lower.name, lower)
    found.add(tight.name, tight)
    if enough:
        limit, khat = khat_threshold(asked.particles), known.diagnostics["khat"]
        share = float((khat > limit).double().mean())
        found.details["khat"] = {"threshold": limit, "share_above": share}
        found.lines.append(f"k-hat above {limit:.2f} for {share:.1%} of the data")
        found.figures["khat.png"] = plots.khat_histogram(khat, limit)
    few = _ladder(asked.particles)[:-1]
    curve = [(k, _timed(found, partial(log_likelihood, run.program, data, k, **options))[0].rest) for k in few]
    found.figures["bounds.png"] = plots.bounds({"L_K": [*curve, (asked.particles, known)]})


RATES = {"rate": "KL(q || p)", "distortion": "-E_q log p(x | z)"}


def _add_elbo(found: Verdict, lower: Estimate, about: str, seconds: float, rates: Mapping[str, str]) -> None:
    """The ELBO, and the two parts of it."""
    found.rows.append(as_row(lower, about, seconds))
    for name, text in rates.items():
        part = replace(lower, value=lower.diagnostics[name], stderr=lower.stderr * math.nan, direction="unbiased")
        found.rows.append(as_row(part, text, name=name))


def _add_bits(found: Verdict, run: RunFolder, tight: Estimate) -> None:
    """Bits per dimension, for 8-bit data."""
    eight_bit, noisy = run.config.bits
    if not eight_bit:
        return
    dims = math.prod(run.shape)
    value = -bits_per_dimension(tight.value, dims, dequantised=noisy)
    bits = replace(tight, value=value, stderr=tight.stderr / (dims * math.log(2)), warnings=())
    found.rows = [row for row in found.rows if row.name != BITS]
    found.rows.append(as_row(bits, f"of 8-bit data, at most, by {tight.name}", name=BITS, sign=-1))


def _by_annealing(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
    """Annealing on the first data."""
    some = data[: asked.most]
    curve = []
    for count in _ladder(asked.annealing.distributions, least=10):
        settings = replace(asked.annealing, distributions=count)
        value, seconds = _timed(found, partial(annealed, run.program, some, settings, **asked.shared))
        curve.append((count, value.rest))
    found.rows.append(as_row(value, f"of the first {len(some)}", seconds))
    _add_bits(found, run, value)
    found.add("AIS", value)
    if found.tight is not None:
        gain = (value.value - found.tight.value[: len(some)])[~(value.failed | found.tight.failed[: len(some)])]
        name = f"AIS - {found.tight.name}"
        found.rows.append(difference(name, average(gain), "what importance sampling misses", "lower"))
    found.annealed, found.engine = value, value.engine
    found.details["annealing"] = asdict(asked.annealing) | {"size": len(some)}
    found.figures["annealing.png"] = plots.bounds({"AIS": curve}, "distributions")


def _by_sandwich(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
    """Both bounds, on data drawn from the model."""
    some = _columns(data[: asked.most], asked)
    curve, ladder = [], _ladder(asked.annealing.distributions, least=10)
    for count in ladder:
        settings = replace(asked.annealing, distributions=count)
        options = asked.shared | {"settings": settings, "wanted": asked.wanted if count == ladder[-1] else None}
        value, seconds = _timed(found, partial(sandwich, run.program, len(some[0]), *some[1:], **options))
        curve.append((value.settings.distributions, value))
    about = f"of {len(some[0])} data drawn from the model"
    found.rows.append(as_row(value.lower, about, seconds, name=f"simulated: {value.lower.name}"))
    found.rows.append(as_row(value.upper, about, name=f"simulated: {value.upper.name}"))
    about = "between both; log p(x) lies in it"
    found.rows.append(difference("simulated: gap", value.gap, about, "upper", doubts=value.warnings))
    found.engine = value.lower.engine
    found.details["sandwich"] = asdict(value.settings) | {"size": len(some[0])}
    found.figures["sandwich.png"] = plots.bounds(
        {"forwards": [(n, v.lower.rest) for n, v in curve], "backwards": [(n, v.upper.rest) for n, v in curve]},
        "distributions",
        "Bounds on log p(x), data of the model's own",
    )


def _columns(data: Data, asked: Asked) -> Batch:
    """Data as the program takes them, on the CPU; what is redrawn leaves the caller's stream alone."""
    with seeded(asked.seed):
        return data.present(slice(None))


def _by_gaps(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
    """What the family of posteriors and its net lose, on the first data."""
    posterior = AXES["posterior"][run.config.posterior]
    if not posterior.density:
        raise ValueError("the guide draws points, which have no ELBO")
    some = data[: asked.most]
    options = asked.shared | {"family": posterior.local, "evidence": found.annealed, "settings": asked.annealing}
    split, seconds = _timed(found, partial(gaps, run.program, some, **options))
    about = "log p - best ELBO"
    found.rows.append(
        difference("approximation gap", split.approximation, about, "lower", seconds, split.warnings)
    )
    found.rows.append(difference("amortisation gap", split.amortisation, "best ELBO - ELBO", "lower"))
    found.rows.append(as_row(split.refined.bound, f"posteriors refined for each of the first {len(some)}"))
    found.add("refined", split.refined.bound)
    parts = {"approximation": split.approximation, "amortisation": split.amortisation}
    found.figures["gaps.png"] = plots.gap_bars({run.config.posterior: parts})


def _by_calibration(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
    """Whether the guide is calibrated on data drawn from the model."""
    given = _columns(data[:CALIBRATED], asked)[1:]  # under conditions there are no more data than these have
    size = len(given[0]) if given else CALIBRATED
    ranks, seconds = _timed(found, lambda: sbc(run.program, size, *given, seed=asked.seed))
    found.lines += str(ranks).splitlines()
    outside = {name: int(o.sum()) for name, o in ranks.outside.items()}
    found.details["calibration"] = {"size": size, "dimensions_outside": outside, "seconds": seconds}
    name = max(ranks.ranks, key=lambda n: int(ranks.outside[n].sum()))
    found.figures["calibration.png"] = plots.calibration(
        ranks.difference[name],
        ranks.points,
        ranks.band(),
        ranks.outside[name],
        f"Calibration of the guide, {name}",
    )


METHODS: Mapping[str, Method] = {
    "importance": _by_importance,
    "annealed": _by_annealing,
    "sandwich": _by_sandwich,
}
ALL: Mapping[str, Method] = {**METHODS, "gaps": _by_gaps, "calibration": _by_calibration}


def _by_code_length(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
    """The ELBO of a program of codes, exact since these are certain, and the bits that it makes."""
    start = time.perf_counter()
    length = code_length(run.program, data, **asked.shared)
    _add_elbo(found, length.bound, "log p(x | z) + log p(z), exact", time.perf_counter() - start, CODE_RATES)
    _add_bits(found, run, length.bound)
    density = AXES["likelihood"][run.config.likelihood].data in ("real", "unit")
    relative = "; pixels have a density, so theirs are relative" if density else ""
    found.lines.append(
        f"bits per datum: {length.codes:.1f} for codes, {length.pixels:.1f} for pixels given these{relative}"
    )
    (use,) = length.use.values()
    found.lines.append(
        f"bits per code: {length.per_code:.3f}, of {math.log2(use.codes):.3f} for any of {use.codes}"
    )
    found.lines.append(str(use))
    averages = {"codes": length.codes, "pixels": length.pixels, "per_code": length.per_code}
    found.details["bits"] = {name: asdict(value) for name, value in averages.items()}
    found.details["codes"] = asdict(use)
    found.details["particles"] = 1
    found.engine, found.tight = length.bound.engine, length.bound
    found.add(length.bound.name, length.bound)


CODE_RATES = {"rate": "-log p(z)", "distortion": "-log p(x | z)"}


def _not_of_codes(why: str) -> Method:
    def refuse(found: Verdict, run: RunFolder, data: Data, asked: Asked) -> None:
        raise ValueError(f"method: {why}; importance is exact for them")

    return refuse


CODED: Mapping[str, Method] = {
    "importance": _by_code_length,
    "annealed": _not_of_codes("annealing moves latents along slopes, and codes have none"),
    "sandwich": _not_of_codes("annealing moves latents along slopes, and codes have none"),
    "gaps": _not_of_codes("codes are certain, so there is no posterior to refine"),
    "calibration": _not_of_codes("codes are certain, so they have no ranks among draws"),
}
