"""The axes by name: what the strings of a configuration make. One row of a table is one choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ppl_vae.adversaries import Adversary
from ppl_vae.alternating import PIWAE, RWS
from ppl_vae.bounds import Grouped, Mixed, Renyi, Thermodynamic, iwae
from ppl_vae.estimators import doubly, pathwise, sticking
from ppl_vae.nets import MLP
from ppl_vae.objectives import ELBO, BoundObjective, Objective
from ppl_vae.penalties import MMD, Capacity, DecoderL2, FreeBits, GradientPenalty, TotalCorrelation
from ppl_vae.plan import LIKELIHOODS, MODELS, POSTERIORS, PRIORS, Choice, Plan
from ppl_vae.scores import NVIL, leave_one_out, score, vimco

if TYPE_CHECKING:
    from ppl_vae.config import Config

__all__ = ["AXES"]

ESTIMATORS: dict[str, Choice] = {
    "pathwise": Choice(lambda p: pathwise, "through the draws"),
    "sticking": Choice(lambda p: sticking, "sticking the landing: without the guide's score"),
    "doubly": Choice(lambda p: doubly, "doubly reparameterised"),
    "score": Choice(lambda p: score, "by scores, without a baseline"),
    "leave-one-out": Choice(lambda p: leave_one_out, "by scores, the other particles as baseline"),
    "vimco": Choice(lambda p: vimco, "by scores, with VIMCO's baseline"),
    "nvil": Choice(lambda p: NVIL(p.encoder(1)), "by scores, with a learned baseline"),
}

PENALTIES: dict[str, Choice] = {
    "none": Choice(lambda p: None, "nothing"),
    "free-bits": Choice(
        lambda p: FreeBits(p.config.penalty_target, weight=p.config.penalty), "each latent may cost so many nats"
    ),
    "capacity": Choice(
        lambda p: Capacity(p.config.penalty, p.config.penalty_target), "the KL held at so many nats"
    ),
    "total-correlation": Choice(lambda p: TotalCorrelation(p.size, p.config.penalty), "β-TCVAE, by minibatches"),
    "mmd": Choice(lambda p: MMD(p.config.penalty), "InfoVAE, Wasserstein autoencoder"),
    "decoder-l2": Choice(lambda p: DecoderL2(p.config.penalty, p.likelihood), "squares of the decoder's weights"),
    "gradient": Choice(
        lambda p: GradientPenalty(p.config.penalty, p.likelihood), "squares of the decoder's derivatives"
    ),
    "factor": Choice(
        lambda p: Adversary(p.config.penalty, _critic(p), "product"), "FactorVAE: total correlation by a critic"
    ),
    "adversarial": Choice(
        lambda p: Adversary(p.config.penalty, _critic(p), "prior"), "adversarial autoencoder: KL by a critic"
    ),
}


def _critic(plan: Plan) -> nn.Module:
    return MLP(plan.latent, 256, 256, 1, activation=partial(nn.LeakyReLU, 0.2))


def _bound(make: Callable[[Config], Any], groups: bool = False) -> Callable[[Plan], Objective]:
    """The objective of a bound; K particles, or K in each of M groups."""

    def objective(plan: Plan) -> Objective:
        c = plan.config
        estimator = ESTIMATORS[c.estimator].make(plan)
        return BoundObjective(make(c), estimator, particles=c.particles * (c.groups if groups else 1))

    return objective


def _elbo(plan: Plan) -> Objective:
    c, penalty = plan.config, PENALTIES[plan.config.penalise].make(plan)
    estimator = ESTIMATORS[c.estimator].make(plan)
    penalties = () if penalty is None else (penalty,)
    return ELBO(c.particles, kl=c.kl, beta=c.beta, estimator=estimator, penalties=penalties)  # type: ignore[arg-type]


OBJECTIVES: dict[str, Choice] = {
    "elbo": Choice(_elbo, "the ELBO, with --kl, --beta and penalties"),
    "iwae": Choice(_bound(lambda c: iwae), "importance-weighted, K particles"),
    "renyi": Choice(_bound(lambda c: Renyi(c.alpha)), "Rényi's, with --alpha"),
    "miwae": Choice(_bound(lambda c: Grouped(iwae, c.groups), groups=True), "the mean of --groups bounds of K"),
    "ciwae": Choice(_bound(lambda c: Mixed(c.alpha)), "--alpha of the ELBO, the rest importance-weighted"),
    "thermodynamic": Choice(
        _bound(lambda c: Thermodynamic([0.0, *(t / 100 for t in (1, 3, 10, 30))])), "thermodynamic, a left sum"
    ),
    "piwae": Choice(
        lambda p: PIWAE(p.config.groups, p.config.particles, estimator=ESTIMATORS[p.config.estimator].make(p)),
        "importance-weighted for the model, miwae for the guide: two steps",
    ),
    "rws": Choice(lambda p: RWS(p.config.particles), "reweighted wake-sleep: two steps"),
}

AXES: Mapping[str, Mapping[str, Choice]] = {
    "model": MODELS,
    "prior": PRIORS,
    "likelihood": LIKELIHOODS,
    "posterior": POSTERIORS,
    "objective": OBJECTIVES,
    "estimator": ESTIMATORS,
    "penalise": PENALTIES,
}
