"""What every shipped program must do: train in every way, every parameter of it, and answer every question."""

import copy
import math

import pyro
import torch
from pyro.infer import SVI
from small import fit, weights
from test_steps import agree, update_of

import ppl_vae as pv
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded


def moved(program, before):
    """Names of the parameters that are not what they were."""
    return {name for name, p in program.named_parameters() if not torch.equal(p.detach(), before[name])}


def parameters(program):
    return {name for name, _ in program.named_parameters()}


def trains_under_svi(program, loss, *batch):
    """Two steps of Pyro's own SVI move every parameter: all of them are registered."""
    program = copy.deepcopy(program)
    before = weights(program)
    pyro.clear_param_store()
    try:
        with seeded(0):
            svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-2}), loss)
            losses = [svi.step(*batch) for _ in range(2)]
    finally:
        pyro.clear_param_store()
    assert all(map(math.isfinite, losses))
    assert moved(program, before) == parameters(program)


def trains_under_fit(program, objective, *batch, compile="off"):
    """Two steps of ``fit`` move every parameter; the trained copy."""
    program = copy.deepcopy(program)
    before = weights(program)
    run = fit(
        program, batch, objective=objective, epochs=1, batch_size=math.ceil(len(batch[0]) / 2), compile=compile
    )
    assert math.isfinite(run.history[-1]["train"])
    assert moved(program, before) == parameters(program)
    return program


def captured_as_written(program, objective, *batch):
    """A graph of the objective has the value and the gradients of the programs as written."""
    pair = as_pair(program)
    inspect(pair, batch)
    agree(update_of(pair, objective), *batch)


def answers(program, *batch, context=(), site=None):
    """Evaluation, sampling and prediction work on it, with the shapes of the data."""
    x = batch[0]
    assert bool(torch.isfinite(pv.log_likelihood(program, batch, particles=5, compile="off").value).all())
    assert bool(torch.isfinite(pv.elbo(program, batch, particles=2, compile="off").value).all())
    assert pv.sample(program, len(x), *context, site=site).shape == x.shape
    assert pv.sample(program, len(x), *context, site=site, mean=True).shape == x.shape
    assert pv.reconstruct(program, *batch, site=site).shape == x.shape
    codes = pv.encode(program, *batch)
    assert all(len(z) == len(x) for z in codes.values())
    assert pv.decode(program, codes, like=batch, site=site).shape == x.shape


def unbiased(weight, log_evidence):
    """E[w] = p(x), within five standard errors, which must be small; ELBO <= log p(x) within them."""
    ratio = (weight - log_evidence).exp()
    error = ratio.std(0) / len(ratio) ** 0.5
    assert bool((error < 0.1).all()), error
    assert bool(((ratio.mean(0) - 1).abs() < 5 * error + 1e-9).all()), (ratio.mean(0) - 1) / error
    below = weight.mean(0) - log_evidence
    assert bool((below < 5 * weight.std(0) / len(weight) ** 0.5).all()), below
