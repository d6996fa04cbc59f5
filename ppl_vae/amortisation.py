"""What separates the ELBO from log p(x): the family of posteriors, and the net that picks one for each datum.

log p(x) - ELBO(x) = [log p(x) - ELBO*(x)] + [ELBO*(x) - ELBO(x)], where ELBO* is the best that the family reaches
for that datum: the approximation gap and the amortisation gap (Cremer, Li & Duvenaud 2018, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppl_vae.annealing import annealed
from ppl_vae.capture import Compile
from ppl_vae.estimates import Average, Estimate, average, kept, share_warning, whole
from ppl_vae.pairs import Pair, Program
from ppl_vae.refining import LocalFamily, Refined, local_mean_field, refine
from ppl_vae.schedules import Annealing
from ppl_vae.sparing import sparing

__all__ = ["Gaps", "gaps"]

SURE = 3  # standard errors beyond which a negative gap is no chance


@dataclass(frozen=True)
class Gaps:
    """What separates the ELBO from log p(x), in nats per datum.

    ELBO* is approached from below: what the optimisation has left counts in the approximation gap, not in the
    amortisation gap, which is a lower bound so far. Of ``evidence`` that is a lower bound on log p(x), the total
    and, once ELBO* is reached, the approximation gap are lower bounds, too.

    Attributes:
        evidence: log p(x), or a bound on it.
        refined: the local posteriors and the guide, on the same data.
    """

    evidence: Estimate
    refined: Refined

    @property
    def each(self) -> dict[str, Tensor]:
        """The gaps "approximation" and "amortisation" of each datum, (N,)."""
        best = self.refined.elbo.value
        return {"approximation": self.evidence.value - best, "amortisation": best - self.refined.before.value}

    @property
    def approximation(self) -> Average:
        """Mean of log p(x) - ELBO*(x), with the standard error of the paired difference over data."""
        return average(self.each["approximation"])

    @property
    def amortisation(self) -> Average:
        """Mean of ELBO*(x) - ELBO(x), with the standard error of the paired difference over data."""
        return average(self.each["amortisation"])

    @property
    def total(self) -> Average:
        """Mean of both together, log p(x) - ELBO(x), with its own standard error."""
        return average(self.each["approximation"] + self.each["amortisation"])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why not to believe it, if so."""
        error = (self.evidence.stderr.square() + self.refined.elbo.stderr.square()).sqrt()
        below = self.each["approximation"] < -SURE * error.nan_to_num()
        doubts = share_warning(below, "the evidence lies below the refined ELBO", "anneal by more distributions")
        return (*self.evidence.warnings, *self.refined.elbo.warnings, *doubts)

    def __str__(self) -> str:
        kind = {"lower": "lower bounds", "upper": "upper bounds", "unbiased": "unbiased"}[self.evidence.direction]
        lines = [
            f"log p(x) - ELBO   {self.total} nats per datum ({len(self.evidence.value)} data)",
            f"  approximation   {self.approximation}",
            f"  amortisation    {self.amortisation}",
            f"log p(x) by {self.evidence.name}: total and approximation gap are {kind}",
        ]
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


@sparing
def gaps(
    program: Program | Pair,
    data: Any,
    *,
    family: LocalFamily = local_mean_field,
    evidence: Estimate | None = None,
    settings: Annealing = Annealing(),
    steps: int = 1000,
    particles: int = 1000,
    batch_size: int = 100,
    seed: int = 0,
    compile: Compile = "auto",
) -> Gaps:
    """Split log p(x) - ELBO into what the family of posteriors loses and what its net loses.

    Args:
        program: the pair.
        data: data in any form that ``fit`` takes.
        family: of posteriors, as in `ppl_vae.refine`; the guide's own, so that what its net loses is what
            the refined ones gain. Under a richer one the approximation gap is that of the richer family.
        evidence: log p(x) of the same data, known or estimated otherwise, on the same redrawn pixels (of the
            same seed and batch size); by default `ppl_vae.annealed`, a lower bound.
        settings: how to anneal.
        steps: of the refinement.
        particles: draws per datum by which both ELBOs are judged.
        batch_size: data annealed or refined at once.
        seed: fixes all draws, and redrawn pixels.
        compile: as in `ppl_vae.fit`.

    Returns:
        Both gaps of each datum and in the mean.

    Raises:
        ValueError: as for `ppl_vae.refine` and `ppl_vae.annealed`; evidence of another number of data.
        IncompleteError: data or bounds that are NaN or infinite; it has the gaps of the other data.
    """
    shared: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "compile": compile}
    refined = kept(lambda: refine(program, data, family, steps=steps, particles=particles, **shared))
    if evidence is None:
        evidence = kept(lambda: annealed(program, data, settings, **shared))
    if len(evidence.value) != len(refined.elbo.value):
        raise ValueError(
            f"evidence: expected an estimate of the same {len(refined.elbo.value)} data, got one of "
            f"{len(evidence.value)}"
        )
    return whole(Gaps(evidence, refined), refined.before, refined.elbo, evidence)
