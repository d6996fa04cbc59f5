"""The axes together: what the rules allow trains, captured and as written, and is judged; the rest says why.

Every row of every table of `ppl_vae.axes` is taken, so that a new one is covered by being there.
"""

import math
from itertools import combinations as subsets
from itertools import product

import pytest
import torch
from small import fit, weights

import ppl_vae as pv
from ppl_vae.axes import AXES
from ppl_vae.config import Config, build, objective_of
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded

SHAPE, ROWS = (4, 4), 24
SCORED = ("score", "leave-one-out", "vimco", "nvil")
LEVELS = {"categorical", "logistic", "logistic-mixture", "coupled-logistics"}
COUNTS = {"poisson", "negative-binomial", "zero-inflated"}
SMALL = {"latent": 3, "hidden": (8,), "components": 3, "depth": 2, "particles": 2, "groups": 2}


def shape_of(likelihood):
    """Pictures, in colour where a likelihood wants it."""
    return (3, 2, 2) if likelihood == "coupled-logistics" else SHAPE


KEYS = ("posterior", "likelihood", "prior", "objective", "estimator")
POSSIBLE = (AXES["posterior"], AXES["likelihood"])


def data(likelihood):
    """Pixels on the scale of a likelihood."""
    with seeded(1):
        x = torch.rand(ROWS, math.prod(shape_of(likelihood)))
        if likelihood in COUNTS:
            return torch.poisson(4 * x)
        if likelihood == "bernoulli":
            return x.round()
        return (255 * x).round() / 255 if likelihood in LEVELS else x.clamp(0.01, 0.99)


def bounds_of(estimators):
    """Pairs of an objective and an estimator of its gradient."""
    estimators = [*estimators]
    pairs = [(o, e) for e in estimators for o in AXES["objective"] if o != "rws"]
    return [*pairs, *([("rws", "pathwise")] if set(SCORED) <= set(estimators) else [])]


ANY = bounds_of(name for name in AXES["estimator"] if name != "enumerated")
BY_POSTERIOR = {  # what does not go with each: see the refusals below
    "point": [("elbo", estimator) for estimator in ("pathwise", "doubly", "sticking")],
    "hamiltonian": [pair for pair in bounds_of(["pathwise"]) if pair[0] != "piwae"],
    "bernoulli": bounds_of(SCORED),
    "one-hot": bounds_of((*SCORED, "enumerated")),
}


def candidates(posterior, likelihood):
    """All that goes with a posterior and a likelihood: priors, objectives, estimators."""
    own, density = AXES["posterior"][posterior].prior is not None, AXES["posterior"][posterior].density
    free = [name for name, choice in AXES["prior"].items() if name != "conditional" and not choice.codes]
    priors = [None] if own else free
    if not density or posterior == "hamiltonian":
        priors.remove("vamp")  # the mixture of their posteriors has no density, or needs the prior itself
    for prior, (objective, estimator) in product(priors, BY_POSTERIOR.get(posterior, ANY)):
        yield dict(zip(KEYS, (posterior, likelihood, prior, objective, estimator), strict=True))


def pairs_of(chosen):
    """The pairs of choices in a combination."""
    return {*subsets(chosen.items(), 2)}


def combinations():
    """Every posterior with every likelihood; the other axes so that all pairs of choices that may meet do."""
    cells = [*product(AXES["posterior"], AXES["likelihood"])]
    missing = {pair for cell in cells for chosen in candidates(*cell) for pair in pairs_of(chosen)}
    found = []
    while cells or missing:
        among = (
            candidates(*cells.pop(0)) if cells else (c for cell in product(*POSSIBLE) for c in candidates(*cell))
        )
        found.append(max(among, key=lambda chosen: len(pairs_of(chosen) & missing)))
        missing -= pairs_of(found[-1])
    return found


def config(**settings):
    chosen = SMALL | settings
    if chosen.get("estimator") in ("doubly", "sticking") and chosen.get("objective", "elbo") == "elbo":
        chosen["kl"] = "sampled"
    return Config(**chosen)


def trained(made, how, columns, classes=0):
    """Two steps of a config's program and objective."""
    shape = shape_of(made.likelihood)
    program = build(made, shape, classes)
    goal = objective_of(made, program, shape, ROWS, classes)
    run = fit(program, columns, objective=goal, epochs=1, batch_size=ROWS // 2, compile=how, clip_norm=10.0)
    return program, run


def holds(made, *columns, classes=0):
    """Assert that a config trains, captured as written, and is judged, or why it is not."""
    (plain, first), (ours, second) = (trained(made, how, columns, classes) for how in ("off", "require"))
    assert second.history[0]["train"] == pytest.approx(first.history[0]["train"], rel=1e-3, abs=1e-3)
    before = build(made, shape_of(made.likelihood), classes).state_dict()
    ends = weights(plain)
    assert any(not torch.equal(ends[name], before[name]) for name in ends)
    for name, theirs in ends.items():
        torch.testing.assert_close(weights(ours)[name], theirs, rtol=1e-2, atol=2e-3)
    if not AXES["posterior"][made.posterior].density:
        with pytest.raises(ValueError, match="site 'z': the guide draws a point"):
            pv.log_likelihood(ours, columns, particles=3, compile="off")
        return ours
    bound = pv.log_likelihood(ours, columns, particles=3, compile="off")
    assert bound.value.shape == (ROWS,)
    assert bool(bound.value.isfinite().all())
    return ours


@pytest.mark.parametrize("settings", combinations(), ids=lambda s: "-".join(map(str, s.values())))
def test_parts_go_together(interpreted, settings):
    holds(config(**settings), data(settings["likelihood"]))


@pytest.mark.parametrize("penalise", [*AXES["penalise"]])
@pytest.mark.parametrize("posterior", ["mean-field", "iaf"])
def test_penalties(interpreted, posterior, penalise):
    if (posterior, penalise) in (("iaf", "free-bits"), ("iaf", "total-correlation")):
        pytest.skip("which ask for independent entries")
    made = config(posterior=posterior, penalise=penalise, penalty=1.0 if penalise == "free-bits" else 0.3)
    holds(made, data("normal"))


def context(model, x):
    """What a program takes besides the data."""
    given = AXES["model"][model].given
    labels = torch.arange(ROWS) % 3
    return {
        "": (),
        "label": (labels,),
        "known label": (torch.where(torch.arange(ROWS) % 4 == 0, labels, -1),),
        "sum": (x.sum(1, keepdim=True),),
    }[given]


KINDS = {"belief": "bernoulli", "sized": "poisson"}


CODES = {"model": "vqvae", "channels": (4,), "codebook": 5, "code_width": 3, "components": 3, "prior_width": 4}


@pytest.mark.parametrize("likelihood", sorted(AXES["likelihood"].keys() - COUNTS))
def test_codes_go_with_every_likelihood_of_pictures(interpreted, likelihood):
    holds(Config(**CODES, likelihood=likelihood), data(likelihood))


@pytest.mark.parametrize("prior", [name for name, choice in AXES["prior"].items() if choice.codes])
def test_every_prior_over_codes_is_learned_with_them(interpreted, prior):
    program = holds(Config(**CODES, prior=prior, depth=1, code_updates="learned"), data("normal"))
    assert pv.sample(program, 3).shape == (3, 16)


@pytest.mark.parametrize("model", [name for name, choice in AXES["model"].items() if not choice.codes])
@pytest.mark.parametrize("nets", ["mlp", "conv"])
def test_programs(interpreted, model, nets):
    if nets == "conv" and model in ("belief", "deep-markov"):
        pytest.skip("which has nets of its own")
    likelihood = KINDS.get(model, "normal")
    goal = {"estimator": "vimco", "objective": "iwae"} if model == "belief" else {}
    made = config(model=model, nets=nets, channels=(4, 4), likelihood=likelihood, **goal)
    x = data(likelihood)
    given = context(model, x)
    program = holds(made, x.reshape(ROWS, *SHAPE) if model == "deep-markov" else x, *given, classes=3)
    assert pv.sample(program, 5, *(column[:5] for column in given)).numel() == 5 * 16


@pytest.mark.parametrize(("objective", "estimator"), ANY, ids=str)
def test_a_condition_goes_with_every_bound_and_estimator(interpreted, objective, estimator):
    x = data("bernoulli")
    made = config(model="cvae", likelihood="bernoulli", objective=objective, estimator=estimator)
    holds(made, x, *context("cvae", x), classes=3)


@pytest.mark.parametrize("labels", ["relaxed", "enumerated"])
@pytest.mark.parametrize(("objective", "estimator"), bounds_of(AXES["estimator"]), ids=str)
def test_labels_go_with_every_bound_and_estimator(interpreted, objective, estimator, labels):
    pathwise = estimator in ("pathwise", "sticking", "doubly")
    if (labels == "enumerated") == (pathwise and objective != "rws"):
        pytest.skip("drawn by scores or summed over, or else relaxed")
    x = data("normal")
    made = config(
        model="semi-supervised", objective=objective, estimator=estimator, labels=labels, label_weight=1.0
    )
    holds(made, x, *context("semi-supervised", x), classes=3)


@pytest.mark.parametrize("style", [{"norm": "batch"}, {"norm": "layer"}, {"gated": True}, {"residual": True}])
@pytest.mark.parametrize("nets", ["mlp", "conv"])
def test_styles_of_nets(interpreted, nets, style):
    holds(config(nets=nets, channels=(4, 4), hidden=(8, 8), **style), data("normal"))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"posterior": "bernoulli"}, "site 'z': its distribution has no reparameterised sampler"),
        ({"posterior": "one-hot", "estimator": "doubly"}, "no reparameterised sampler"),
        ({"posterior": "point", "estimator": "vimco"}, "site 'z': the guide draws a point, which has no score"),
        ({"posterior": "hamiltonian", "estimator": "doubly"}, "Hamiltonian"),
        ({"posterior": "hamiltonian", "objective": "rws"}, "Hamiltonian"),
        ({"posterior": "hamiltonian", "objective": "piwae"}, "is made of the model"),
        ({"posterior": "hamiltonian", "norm": "batch"}, "norm 'batch' mixes data"),
        ({"penalise": "free-bits", "penalty": 2.0}, "'free-bits' offsets the KL"),
        ({"posterior": "mixture", "kl": "analytic"}, "site 'z': no closed form between"),
        ({"estimator": "vimco", "particles": 1}, "particles must be at least 2 for a baseline"),
        ({"prior": "mixture", "posterior": "relaxed-bernoulli"}, "comes with its own"),
        ({"posterior": "planar", "model": "ladder"}, "has a prior and a posterior of its own"),
        ({"prior": "conditional"}, "only 'cvae' and 'semi-supervised' take"),
        ({"estimator": "enumerated"}, "site 'z'|no discrete latent"),
        ({"posterior": "bernoulli", "estimator": "enumerated"}, "site 'z'"),
        ({"prior": "vamp", "posterior": "hamiltonian"}, "prior 'vamp' needs"),
        ({"model": "belief"}, "likelihood must be 'bernoulli'"),
        ({"penalise": "mmd", "objective": "iwae"}, "penalties belong to the elbo"),
        ({"objective": "rws", "estimator": "vimco"}, "has gradients of its own"),
        ({"objective": "renyi", "alpha": 1.0}, "alpha must be finite and other than 1"),
        ({"nets": "conv", "channels": (4, 4, 4)}, "ConvEncoder|ConvDecoder"),
        ({"likelihood": "student-t", "scale": "optimal"}, "OptimalScale|optimal"),
        ({"posterior": "iaf", "latent": 1}, "latent must be at least 2"),
    ],
    ids=str,
)
def test_what_does_not_go_together_says_why(interpreted, settings, why):
    for how in ("off", "require"):
        with pytest.raises(ValueError, match=why):
            trained(config(**settings), how, (data(settings.get("likelihood", "normal")),))


def test_shipped_programs_are_captured_once_for_each_shape(interpreted):
    made = config()
    trained(made, "require", (data("normal"),))
    assert len(interpreted) == 1
    assert as_pair(build(made, SHAPE)).layout is None
