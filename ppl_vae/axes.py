"""Programs and objectives by name, all the axes, and what goes together. One row of a table is one choice."""

from __future__ import annotations

import math
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
from ppl_vae.codebooks import Codebook
from ppl_vae.codes import CodePrior, Quantised
from ppl_vae.conditionals import Conditional
from ppl_vae.enumeration import enumerated
from ppl_vae.estimators import doubly, pathwise, sticking
from ppl_vae.hierarchies import HierarchicalVAE, LadderVAE
from ppl_vae.models import CVAE, VAE
from ppl_vae.nets import MLP, Concat
from ppl_vae.objectives import ELBO, BoundObjective, Objective
from ppl_vae.penalties import MMD, Capacity, DecoderL2, FreeBits, GradientPenalty, TotalCorrelation
from ppl_vae.plan import LIKELIHOODS, POSTERIORS, PRIORS, SCALES, Choice, Plan
from ppl_vae.posteriors import mean_field
from ppl_vae.priors import StandardNormal, conditional_normal
from ppl_vae.quantising import Commitment
from ppl_vae.scores import NVIL, leave_one_out, score, vimco
from ppl_vae.semisupervised import SemiSupervisedVAE
from ppl_vae.sequences import BackwardGRU, DeepMarkovModel, combiner, gated_transition

if TYPE_CHECKING:
    from ppl_vae.config import Config

__all__ = ["AXES", "check_objective", "check_parts"]


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


def _quantised(plan: Plan) -> VAE:
    c = plan.config
    plan = replace(plan, spatial=True, code=c.code_width)
    learned: dict[str, Any] = {"ema": None} if c.code_updates == "learned" else {}
    book = Codebook(c.codebook, c.code_width, **learned)
    posterior = Quantised(plan.encoder(c.code_width), book, event_dim=3)
    return VAE(CodePrior(plan.prior, book), plan.likelihood, posterior)


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
    "vqvae": Choice(
        _quantised, "a grid of codes of a --codebook; then a prior learned on the --codes", plane=False, codes=True
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
    penalties = [] if penalty is None else [penalty]
    if MODELS[c.model].codes:
        penalties.append(Commitment(c.commitment))
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

SITED = ("mmd", "total-correlation", "factor", "adversarial")  # penalties of one latent
OF_CODES = ("codebook", "code_width", "code_updates", "commitment", "codes", "prior_width")
UNCODED = ("latent", "hidden", "levels", "rank", "temperature", "posterior")  # what programs of codes have not
UNDRAWN = ("objective", "estimator", "particles", "kl", "beta", "warm_up", "cycle", "penalise")


def check_parts(c: Config) -> None:
    """Raise ValueError where settings of the model do not go together."""
    _check_codes(c)
    model, posterior = AXES["model"][c.model], AXES["posterior"][c.posterior]
    if c.scale != "learned" and c.likelihood not in ("normal", "student-t"):
        raise ValueError(f"scale is that of the normal and student-t likelihoods; {c.likelihood} has none")
    if c.scale not in SCALES and not _positive(c.scale):
        raise ValueError(f"scale must be {', '.join(SCALES)} or a positive number, got {c.scale!r}")
    if posterior.prior is not None and c.prior is not None:
        raise ValueError(f"prior: posterior {c.posterior!r} comes with its own; leave prior out")
    if c.prior == "conditional" and c.given not in ("label", "known label"):
        raise ValueError("prior 'conditional' is given the label, which only 'cvae' and 'semi-supervised' take")
    if c.prior == "vamp" and (c.model != "vae" or c.posterior == "hamiltonian" or not posterior.density):
        raise ValueError("prior 'vamp' needs model 'vae' and a posterior with a density, other than hamiltonian")
    if c.norm == "batch" and (c.prior == "vamp" or c.posterior == "hamiltonian" or c.penalise == "gradient"):
        raise ValueError(
            "norm 'batch' mixes data, which prior 'vamp', posterior 'hamiltonian' and penalise 'gradient' forbid"
        )
    if model.own and (c.prior is not None or c.posterior != "mean-field"):
        raise ValueError(f"model {c.model!r} has a prior and a posterior of its own; leave both out")
    if c.model == "belief" and (c.likelihood != "bernoulli" or c.nets != "mlp" or c.path):
        raise ValueError(
            "model 'belief' is linear, over bits: likelihood must be 'bernoulli', nets 'mlp', no path"
        )
    if AXES["likelihood"][c.likelihood].data == "levels" and c.binarise != "none":
        raise ValueError(
            f"likelihood {c.likelihood!r} is of 256 levels; binarise must be 'none', got {c.binarise!r}"
        )
    if c.given == "sum" and not (c.counts and c.binarise == "none"):
        raise ValueError(
            f"model {c.model!r} is one of counts; likelihood must be one of counts, and binarise 'none'"
        )
    for name in ("labelled", "labels", "label_weight"):
        if c.given != "known label" and c.chosen(name):
            raise ValueError(f"{name}: model {c.model!r} has no labels to hide; it is for 'semi-supervised'")
    if c.chosen("conditioning") and not c.given:
        raise ValueError(f"conditioning: model {c.model!r} is given no condition")
    if c.path and c.model not in ("hierarchical", "ladder"):
        raise ValueError(f"path: model {c.model!r} has no levels to go along; 'hierarchical' and 'ladder' have")


def check_objective(c: Config) -> None:
    """Raise ValueError where settings of the objective do not go together."""
    if (c.beta != 1 or c.warm_up) and c.objective != "elbo":
        raise ValueError("beta and warm_up weigh the KL of the elbo; the other bounds have none to weigh")
    if c.chosen("kl") and c.objective != "elbo":
        raise ValueError(f"kl is the elbo's; objective {c.objective!r} takes weights of draws; leave kl out")
    if c.chosen("points") and c.objective != "thermodynamic":
        raise ValueError(f"points are those of objective 'thermodynamic'; got {c.objective!r}")
    if c.chosen("alpha") and c.objective not in ("renyi", "ciwae"):
        raise ValueError(f"alpha is that of objectives 'renyi' and 'ciwae'; got {c.objective!r}")
    if not AXES["posterior"][c.posterior].density and c.objective != "elbo":
        raise ValueError(f"posterior {c.posterior!r} has no weights for a bound; objective must be 'elbo'")
    if c.cycle and not 0 < c.warm_up <= c.cycle:
        raise ValueError(f"cycle is what warm_up is a part of: give warm_up from 1 to {c.cycle}, got {c.warm_up}")
    if c.estimator in ("doubly", "sticking") and c.objective == "elbo" and c.kl != "sampled":
        raise ValueError(
            f"estimator {c.estimator!r} needs the elbo's KL by draws; kl must be 'sampled', got {c.kl!r}"
        )
    if c.penalise != "none" and (c.objective != "elbo" or c.estimator != "pathwise"):
        raise ValueError("penalise: penalties belong to the elbo, with estimator 'pathwise'")
    if c.penalise == "free-bits" and (c.kl == "sampled" or c.penalty != c.beta or c.warm_up):
        raise ValueError(
            "penalise 'free-bits' offsets the KL: kl must not be 'sampled', penalty as beta, warm_up 0"
        )
    if c.penalise == "gradient" and (AXES["model"][c.model].own or c.given == "known label"):
        raise ValueError(f"penalise 'gradient' is for decoders of one latent; model {c.model!r} has another kind")
    if c.penalty_site is not None and c.penalise not in SITED:
        raise ValueError(f"penalty_site is for penalise {', '.join(SITED)}; penalise is {c.penalise!r}")
    if c.penalty_rise and c.penalise != "capacity":
        raise ValueError(f"penalty_rise raises the nats of penalise 'capacity'; penalise is {c.penalise!r}")
    if c.objective == "piwae" and c.posterior == "hamiltonian":
        raise ValueError(
            "objective 'piwae' trains model and guide apart; posterior 'hamiltonian' is made of the model"
        )
    if c.estimator != "pathwise" and c.objective == "rws":
        raise ValueError("objective 'rws' has gradients of its own; leave estimator out")


def _check_codes(c: Config) -> None:
    """Raise ValueError where settings do not go with codes, or are of codes alone."""
    codes, about = AXES["model"][c.model].codes, f"model {c.model!r}"
    if c.prior is not None and AXES["prior"][c.prior].codes is not codes:
        known = [name for name, choice in AXES["prior"].items() if choice.codes is codes]
        mend = "" if codes else f"; {c.prior!r} is over codes, of model 'vqvae' or of a run given as codes"
        raise ValueError(f"prior: that of {about} must be one of {', '.join(known)}{mend}")
    if not codes:
        for name in OF_CODES:
            if c.chosen(name):
                raise ValueError(f"{name} is of codes and the prior over them, and {about} has none; 'vqvae' has")
        return
    for name in UNCODED:
        if c.chosen(name):
            raise ValueError(f"{name}: {about} has convolutions and a codebook instead; leave {name} out")
    for name in UNDRAWN:
        if c.chosen(name):
            raise ValueError(
                f"{name}: {about} is trained by the pathwise elbo, its codes being certain; leave {name} out"
            )
    if c.counts:
        raise ValueError(f"likelihood: {about} is of pictures, and {c.likelihood!r} of counts")


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
