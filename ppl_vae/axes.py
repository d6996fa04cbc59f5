"""Programs and objectives by name, and all the axes. One row of a table is one choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

from ppl_vae.adversaries import Adversary
from ppl_vae.alternating import PIWAE, RWS
from ppl_vae.belief import sigmoid_belief_network
from ppl_vae.bounds import Grouped, Mixed, Renyi, Thermodynamic, iwae
from ppl_vae.conditionals import Conditional
from ppl_vae.enumeration import enumerated
from ppl_vae.estimators import doubly, pathwise, sticking
from ppl_vae.hierarchies import HierarchicalVAE, LadderVAE
from ppl_vae.models import CVAE, VAE
from ppl_vae.nets import MLP, Concat
from ppl_vae.objectives import ELBO, BoundObjective, Objective
from ppl_vae.penalties import MMD, Capacity, DecoderL2, FreeBits, GradientPenalty, TotalCorrelation
from ppl_vae.plan import LIKELIHOODS, POSTERIORS, PRIORS, Choice, Plan
from ppl_vae.posteriors import mean_field
from ppl_vae.priors import StandardNormal, conditional_normal
from ppl_vae.scores import NVIL, leave_one_out, score, vimco
from ppl_vae.semisupervised import SemiSupervisedVAE
from ppl_vae.sequences import BackwardGRU, DeepMarkovModel, combiner, gated_transition

if TYPE_CHECKING:
    from ppl_vae.config import Config

__all__ = ["AXES"]


def _labelled(plan: Plan) -> CVAE:
    if plan.classes < 1:
        raise ValueError(f"model: {plan.config.model} needs labelled data; these have no labels")
    return CVAE(plan.prior, plan.likelihood, plan.posterior)


def _semisupervised(plan: Plan) -> SemiSupervisedVAE:
    c = plan.config
    if plan.classes < 2:
        raise ValueError(f"model: {c.model} needs data with two labels or more; these have {plan.classes}")
    return SemiSupervisedVAE(
        plan.classes,
        plan.encoder(plan.classes, given=False),
        plan.prior,
        plan.likelihood,
        plan.posterior,
        labels=c.labels,  # type: ignore[arg-type]
        alpha=c.label_weight,
        temperature=c.temperature,
    )


def _widths(plan: Plan) -> list[int]:
    """Of the latents of each level, from the data up: each has half as many as the one below."""
    return [max(1, plan.latent >> level) for level in range(plan.config.levels)]


def _generator(plan: Plan) -> tuple[list[Conditional], Conditional, list[nn.Module] | None]:
    """What a program of levels is given: priors, the likelihood, and a deterministic path if there is one."""
    widths, last, path = _widths(plan), plan.config.hidden[-1], plan.config.path
    above = [last if path else width for width in widths[1:]]
    within = [conditional_normal(plan.mlp(a, last, 2 * w)) for a, w in zip(above, widths[:-1], strict=True)]
    priors = [*within, StandardNormal(widths[-1])]
    if not path:
        return priors, plan.likelihood, None
    joins: list[nn.Module] = [Concat(plan.mlp(w + last, last, last), None, None) for w in widths[:-1]]
    return priors, replace(plan, code=last).likelihood, [*joins, plan.mlp(widths[-1], last, last)]


def _hierarchical(plan: Plan) -> HierarchicalVAE:
    widths, last = _widths(plan), plan.config.hidden[-1]
    nets = [plan.encoder(2 * plan.latent), *(plan.mlp(b, last, 2 * w) for b, w in pairwise(widths))]
    priors, likelihood, path = _generator(plan)
    return HierarchicalVAE(priors, likelihood, [mean_field(net) for net in nets], path)


def _ladder(plan: Plan) -> LadderVAE:
    widths, last = _widths(plan), plan.config.hidden[-1]
    features = [plan.encoder(last), *(plan.mlp(last, last, last) for _ in widths[1:])]
    priors, likelihood, path = _generator(plan)
    return LadderVAE(priors, likelihood, features, [mean_field(nn.Linear(last, 2 * w)) for w in widths], path)


def _deep_markov(plan: Plan) -> DeepMarkovModel:
    """Of the rows of pictures, from the first to the last."""
    if len(plan.shape) != 2 or plan.config.nets == "conv":
        raise ValueError(
            f"model: {plan.config.model} reads grey pictures (H, W) row by row, by nets 'mlp'; got data of shape "
            f"{plan.shape} and nets {plan.config.nets!r}"
        )
    steps, width = plan.shape
    last = plan.config.hidden[-1]
    return DeepMarkovModel(
        plan.prior,
        gated_transition(plan.latent, last),
        replace(plan, shape=(1, width)).likelihood,
        BackwardGRU(width, last),
        combiner(plan.latent, last),
        steps=steps,
    )


MODELS: dict[str, Choice] = {
    "vae": Choice(lambda p: VAE(p.prior, p.likelihood, p.posterior), "one latent vector per datum"),
    "cvae": Choice(_labelled, "the same, given the label", given="label"),
    "sized": Choice(
        lambda p: CVAE(p.prior, p.likelihood, p.posterior),
        "the same for counts, given their sum: a library size",
        given="sum",
    ),
    "semi-supervised": Choice(
        _semisupervised, "M2: the label a latent, where it is not known", given="known label"
    ),
    "hierarchical": Choice(_hierarchical, "--levels of normals, a guide from the bottom up", own=True),
    "ladder": Choice(_ladder, "--levels of normals, a guide from the top down", own=True),
    "belief": Choice(
        lambda p: sigmoid_belief_network(p.width, *_widths(p)),
        "--levels of binary units over binary data",
        own=True,
        plane=False,
    ),
    "deep-markov": Choice(
        _deep_markov, "a Markov chain of latents, the rows of a picture its steps", own=True, plane=False
    ),
}


def _baseline(plan: Plan) -> nn.Module:
    """A number for each datum, of all that the program takes; a label that is not known is no label."""
    if plan.given:
        return replace(plan, given=plan.given.removeprefix("known ")).encoder(1)
    return nn.Sequential(nn.Flatten(), plan.encoder(1))


ESTIMATORS: dict[str, Choice] = {
    "pathwise": Choice(lambda p: pathwise, "through the draws"),
    "sticking": Choice(lambda p: sticking, "sticking the landing: without the guide's score"),
    "doubly": Choice(lambda p: doubly, "doubly reparameterised"),
    "score": Choice(lambda p: score, "by scores, without a baseline"),
    "leave-one-out": Choice(lambda p: leave_one_out, "by scores, the other particles as baseline"),
    "vimco": Choice(lambda p: vimco, "by scores, with VIMCO's baseline"),
    "enumerated": Choice(lambda p: enumerated, "discrete latents summed over, the others through their draws"),
    "nvil": Choice(lambda p: NVIL(_baseline(p)), "by scores, with a learned baseline"),
}

PENALTIES: dict[str, Choice] = {
    "none": Choice(lambda p: None, "nothing"),
    "free-bits": Choice(
        lambda p: FreeBits(p.config.penalty_target, weight=p.config.penalty), "each latent may cost so many nats"
    ),
    "capacity": Choice(
        lambda p: Capacity(p.config.penalty, p.config.penalty_target), "the KL held at so many nats"
    ),
    "total-correlation": Choice(
        lambda p: TotalCorrelation(p.size, p.config.penalty, p.config.penalty_site), "β-TCVAE, by minibatches"
    ),
    "mmd": Choice(lambda p: MMD(p.config.penalty, site=p.config.penalty_site), "InfoVAE, Wasserstein autoencoder"),
    "decoder-l2": Choice(lambda p: DecoderL2(p.config.penalty, p.likelihood), "squares of the decoder's weights"),
    "gradient": Choice(
        lambda p: GradientPenalty(p.config.penalty, p.likelihood, p.config.penalty_site),
        "squares of the decoder's derivatives",
    ),
    "factor": Choice(
        lambda p: Adversary(p.config.penalty, _critic(p), "product", p.config.penalty_site),
        "FactorVAE: total correlation by a critic",
    ),
    "adversarial": Choice(
        lambda p: Adversary(p.config.penalty, _critic(p), "prior", p.config.penalty_site),
        "adversarial autoencoder: KL by a critic",
    ),
}


def _critic(plan: Plan) -> nn.Module:
    """A critic of the penalised latent, which in a program of levels is as wide as its level."""
    site = plan.config.penalty_site or "z"
    widths = {"z": plan.latent} | {f"z{level}": width for level, width in enumerate(_widths(plan), 1)}
    if plan.config.model == "deep-markov":
        widths = {f"z{step + 1}": plan.latent for step in range(plan.shape[0])}
    if site not in widths:
        raise ValueError(f"penalty_site: no critic for site {site!r}; there is {', '.join(widths)}")
    return MLP(widths[site], 256, 256, 1, activation=partial(nn.LeakyReLU, 0.2))


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
    "thermodynamic": Choice(_bound(lambda c: Thermodynamic(c.points)), "thermodynamic, a left sum over --points"),
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
