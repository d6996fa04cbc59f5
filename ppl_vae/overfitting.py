"""Training data against held-out data: whether it is the decoder or the encoder that overfits.

ELBO = log p(x) - approximation gap - amortisation gap. A decoder that overfits gives training data a higher
log p(x) than held-out ones. An encoder that overfits infers training data well and others badly: its amortisation
gap, what a posterior of the datum's own would gain, is wider on held-out data (Cremer, Li & Duvenaud 2018, section
5; Wu, Burda, Salakhutdinov & Grosse 2017, section 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppl_vae.capture import Compile
from ppl_vae.estimates import Average, average
from ppl_vae.pairs import Pair, Program
from ppl_vae.refining import LocalFamily, Refined, local_mean_field, refine

__all__ = ["Generalisation", "generalisation"]

CLEAR = 2.0  # standard errors from which a difference is told


@dataclass(frozen=True)
class Generalisation:
    """What training data have over held-out ones, in nats per datum, and where it comes from.

    The ELBO's difference is the sum of the three others, exactly. Standard errors are those of two independent
    samples, and include the Monte Carlo error.

    Attributes:
        train: bounds on training data, of the guide and of posteriors refined for each datum.
        test: bounds on held-out data.
    """

    train: Refined
    test: Refined

    @property
    def elbo(self) -> Average:
        """ELBO on training data, less that on held-out data."""
        return _difference(self.train.before.value, self.test.before.value)

    @property
    def decoder(self) -> Average:
        """Bound on log p(x) with refined proposals on training data, less that on held-out data."""
        return _difference(self.train.bound.value, self.test.bound.value)

    @property
    def encoder(self) -> Average:
        """Amortisation gap on held-out data, less that on training data."""
        return _difference(*(r.elbo.value - r.before.value for r in (self.test, self.train)))

    @property
    def approximation(self) -> Average:
        """Approximation gap on held-out data, less that on training data."""
        return _difference(*(r.bound.value - r.elbo.value for r in (self.test, self.train)))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why not to believe it, if so."""
        kinds = (("training", self.train), ("held-out", self.test))
        found = ((kind, (*r.elbo.warnings, *r.bound.warnings)) for kind, r in kinds)
        return tuple(f"{kind} data: {text}" for kind, texts in found for text in texts)

    def __str__(self) -> str:
        verdicts = [
            f"{name} {'overfits' if _clear(part) else 'does not overfit by more than the errors'}"
            for name, part in (("the decoder", self.decoder), ("the encoder", self.encoder))
        ]
        sizes = (len(r.before.value) for r in (self.train, self.test))
        return "\n".join(
            [
                "training data over held-out ones, nats per datum ({} and {} data)".format(*sizes),
                f"  ELBO           {self.elbo}",
                f"  = log p(x)     {self.decoder}: {verdicts[0]}",
                f"  + amortisation {self.encoder}: {verdicts[1]}",
                f"  + family       {self.approximation}",
                *(f"  warning: {text}" for text in self.warnings),
            ]
        )


def generalisation(
    program: Program | Pair,
    train: Any,
    test: Any,
    family: LocalFamily = local_mean_field,
    *,
    steps: int = 1000,
    particles: int = 1000,
    batch_size: int = 100,
    chunk: int = 100,
    seed: int = 0,
    compile: Compile = "auto",
) -> Generalisation:
    """Tell an encoder that overfits from a decoder that does, by refining the posterior of each datum.

    All bounds are lower bounds, and what is left of their gaps to log p(x) may differ between the two sets: more
    steps, more particles and a wider family narrow it.

    Args:
        program: the pair, trained.
        train: data that it was trained on, or some of them drawn at random.
        test: data that it has not seen.
        family: of the refined posteriors, as in `ppl_vae.refine`; the guide's own, so that what they gain is the
            amortisation gap.
        steps: of the refinement.
        particles: K, draws per datum by which bounds are judged.
        batch_size: data refined at once.
        chunk: particles per batch held at once while judging.
        seed: fixes the draws, and redrawn pixels.
        compile: as in `ppl_vae.fit`.

    Returns:
        Bounds on both sets, and their differences.

    Raises:
        ValueError: as for `ppl_vae.refine`.
    """
    options: dict[str, Any] = {"steps": steps, "particles": particles, "batch_size": batch_size, "chunk": chunk}
    options |= {"seed": seed, "compile": compile}
    return Generalisation(refine(program, train, family, **options), refine(program, test, family, **options))


def _difference(first: Tensor, second: Tensor) -> Average:
    """The difference of two means of independent samples."""
    one, other = average(first), average(second)
    return Average(one.mean - other.mean, math.hypot(one.stderr, other.stderr))


def _clear(difference: Average) -> bool:
    return difference.mean > CLEAR * difference.stderr
