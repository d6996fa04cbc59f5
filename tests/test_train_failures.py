"""Runs that end badly: numbers gone wrong, interrupts and errors, and what is left of them."""

import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from small import CLASSES, WIDTH, cvae, fit, pixels, same, vae, weights
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import ppl_vae as pv
from ppl_vae.batches import Data

X, HELD_OUT = pixels(64), pixels(40, seed=1)


class Record(pv.Hook):
    """The weights before each step, and at the end."""

    def __init__(self):
        self.before, self.end, self.run = [], None, None

    def on_step(self, run):
        self.before.append(weights(run.pair))

    def on_end(self, run):
        self.end, self.run = weights(run.pair), run


def failure(program, data, valid=None, **options):
    """The error that training ends with, and what a hook saw of it."""
    record = Record()
    with pytest.raises(pv.NonFiniteError) as caught:
        fit(program, data, valid, hooks=[record, *options.pop("hooks", [])], **options)
    return str(caught.value), record


def finite(state):
    return all(value.isfinite().all() for value in state.values())


def too_large_from(step, rate=1e30):
    """Plain gradient steps, much too large from some step on (counted from 0)."""
    return {
        "optimizer": partial(torch.optim.SGD, lr=1e-3),
        "scheduler": partial(LambdaLR, lr_lambda=lambda s: 1.0 if s < step else rate),
        "scheduler_every": "step",
        "batch_size": 16,
    }


# ---- an objective that is not finite


@pytest.mark.parametrize("report_every", [1, 2, 3, 50])
@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("valid", [None, HELD_OUT])
def test_too_large_a_step_is_named_and_the_last_good_weights_are_back(step, report_every, valid, tmp_path):
    program, path = vae(), tmp_path / "weights.safetensors"
    options = {"epochs": 3, "report_every": report_every, "hooks": [pv.Save(path)]}
    message, record = failure(program, X, valid, **options, **too_large_from(step))
    # Step number step + 1 makes weights of 1e30 or so, with which the next objective is not finite. The weights
    # that are put back are at most one reading older than those before it.
    assert f"at step {step + 2} (epoch {(step + 1) // 4 + 1})" in message
    assert "likely cause: too large a step (lower the learning rate, or set clip_norm)" in message
    best = 1 if valid is not None and step >= 4 else None  # 4 steps an epoch: the first went well
    held = "last good parameters" if best is None else "best parameters, of epoch 1"
    assert message.endswith(f"The pair holds its {held}.")
    kept = weights(program)
    index = [i for i, state in enumerate(record.before) if same(state, weights(record.run.pair))]
    assert len(index) == 1
    assert index == [4] if best else 0 <= step - index[0] < report_every
    assert finite(kept)
    assert math.isfinite(pv.elbo(program, X).mean)
    assert same(record.end, weights(record.run.pair))
    pv.load_weights(again := vae(seed=1), path)
    assert same(weights(again), kept)
    assert record.run.best_epoch == best
    assert record.run.reason in message


def test_adam_with_a_huge_rate_ends_the_same_way():
    program = vae()
    message, record = failure(program, X, optimizer=partial(torch.optim.Adam, lr=1e30), report_every=1)
    assert "at step 2" in message
    assert same(weights(program), weights(vae()))  # the first step was the wrong one
    assert finite(record.end)


class Spread(nn.Module):
    """Normal conditionals whose scale is the condition itself: 0 / 0 where a condition is 0."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *context):
        loc = self.net(*context)
        return dist.Normal(loc, context[-1][..., :1].expand_as(loc)).to_event(1)


def spread(part):
    """A CVAE one part of which turns NaN where the first condition is 0."""
    program = cvae("vector")
    net = getattr(program, part).net
    half = nn.Sequential(net, Half()) if part != "likelihood" else net
    if part == "posterior":
        half = pv.Concat(nn.Sequential(net.net, Half()), None, None)
    setattr(program, part, Spread(half))
    return program


class Half(nn.Module):
    def forward(self, x):
        return x.chunk(2, dim=-1)[0]


@pytest.mark.parametrize("report_every", [1, 50])
@pytest.mark.parametrize("part", ["likelihood", "prior", "posterior"])
def test_the_density_that_turned_nan_is_named_with_its_row(part, report_every):
    c = torch.ones(len(X), CLASSES)
    c[20, 0] = 0.0
    order = [rows for _, rows in Data(X, torch.arange(len(X))).epoch(16, seed=0, epoch=0)]
    step = next(i for i, rows in enumerate(order) if 20 in rows)
    program = spread(part)
    message, record = failure(program, (X, c), batch_size=16, report_every=report_every)
    assert f"at step {step + 1} (epoch 1)" in message
    site = "x" if part == "likelihood" else "z"
    assert f"likely cause: site '{site}' ({part}): the log-density of datum 20 is nan" in message
    (fault,) = record.run.faults
    assert (fault.step, fault.site, fault.datum, fault.batch) == (step + 1, site, 20, None)
    assert finite(record.end)


@pytest.mark.parametrize("valid", [None, HELD_OUT])
def test_nan_in_a_later_batch_of_a_stream_is_named_before_it_does_harm(valid):
    batches = [X[:16], X[16:32], X[32:48] * torch.nan, X[48:]]
    program, record = vae(), Record()
    with pytest.raises(ValueError, match=r"batch 2.*row 0 holds NaN or infinity"):
        fit(program, batches, valid, hooks=[record])
    assert same(record.end, weights(record.run.pair))
    assert same(record.end, weights(fitted_on(batches[:2])))


def test_nan_in_a_later_batch_of_the_held_out_stream_too():
    program = vae()
    with pytest.raises(ValueError, match=r"batch 1.*row 0 holds NaN or infinity"):
        fit(program, X, [HELD_OUT[:20], HELD_OUT[20:] * torch.nan], batch_size=16)
    assert finite(weights(program))


def fitted_on(batches):
    """The pair after one step on each batch."""
    return fit(vae(), batches, epochs=1).pair


class Fails(pv.Hook):
    def on_end(self, run):
        raise RuntimeError("a hook that fails")


@pytest.mark.parametrize("first", [True, False])
def test_a_hook_that_fails_at_the_end_keeps_none_from_ending(first):
    record = Record()
    with pytest.raises(RuntimeError, match="a hook that fails"):
        fit(vae(), X, epochs=1, hooks=[Fails(), record] if first else [record, Fails()])
    assert same(record.end, weights(record.run.pair))


def test_the_error_holds_the_run():
    with pytest.raises(pv.NonFiniteError) as caught:
        fit(vae(), X, HELD_OUT, epochs=3, **too_large_from(5))
    assert [row["epoch"] for row in caught.value.run.history] == [1]
    assert caught.value.run.reason in str(caught.value)


class RootOfZero(nn.Module):
    """A likelihood that is finite at the start, where its gradient is not: the derivative of √a at a = 0."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, z):
        return dist.Normal(self.a.sqrt() + 0 * z[..., :1], 1.0).to_event(1)


@pytest.mark.parametrize("batch_size", [64, 32])
def test_a_gradient_that_is_not_finite_is_found_though_the_objective_is(batch_size):
    program = pv.VAE(pv.StandardNormal(2), RootOfZero(), pv.mean_field(pv.MLP(WIDTH, 4)))
    before = weights(program)
    message, _ = failure(program, X, epochs=1, batch_size=batch_size)
    expected = {64: "step 1 made a parameter NaN or infinite (epoch 1)", 32: "the objective became nan at step 2"}
    assert message.startswith(expected[batch_size])
    assert same(weights(program), before)


def test_clipping_does_not_hide_a_gradient_that_is_not_finite():
    program = pv.VAE(pv.StandardNormal(2), RootOfZero(), pv.mean_field(pv.MLP(WIDTH, 4)))
    failure(program, X, epochs=1, batch_size=64, clip_norm=1.0)
    assert finite(weights(program))


# ---- interrupts and errors


class At(pv.Hook):
    """Raise at one moment, at its n-th call."""

    def __init__(self, moment, error, call=1):
        self.error, self.left = error, call
        setattr(self, moment, self.count)

    def count(self, run, *args):
        self.left -= 1
        if not self.left:
            raise self.error


@pytest.mark.parametrize(
    ("moment", "call", "epochs"), [("on_step", 6, 1), ("on_report", 3, 1), ("on_epoch", 2, 2)]
)
@pytest.mark.parametrize("valid", [None, HELD_OUT])
def test_an_interrupt_saves_and_returns_what_there_is(moment, call, epochs, valid, tmp_path):
    path, record = tmp_path / "weights.safetensors", Record()
    hooks = [pv.Save(path), record, At(moment, KeyboardInterrupt(), call)]
    run = fit(program := vae(), X, valid, epochs=9, batch_size=16, hooks=hooks, report_every=2)
    assert run.interrupted
    assert run.reason == "interrupted"
    assert len(run.history) == epochs
    assert run.best_epoch == (None if valid is None else epochs)
    if valid is not None and epochs == 1:  # the best epoch is kept, not the steps after it
        assert same(record.end, record.before[4])
    pv.load_weights(again := vae(seed=1), path)
    assert same(weights(again), weights(program))
    assert not same(weights(program), weights(vae()))
    assert not run.pair.training


def test_an_interrupt_before_the_first_step_writes_nothing(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"kept")
    run = fit(vae(), X, hooks=[pv.Save(path), At("on_start", KeyboardInterrupt())])
    assert run.interrupted
    assert run.history == []
    assert path.read_bytes() == b"kept"


def test_an_interrupt_after_numbers_went_wrong_keeps_the_last_good_ones():
    program = vae()
    record, stop = Record(), At("on_step", KeyboardInterrupt(), call=4)
    run = fit(program, X, hooks=[record, stop], report_every=50, **too_large_from(1))
    assert run.interrupted
    assert not finite(record.before[3])
    assert finite(weights(program))


def test_an_error_in_a_hook_ends_the_run_after_the_other_hooks_were_told():
    record = Record()
    with pytest.raises(KeyError, match="mine"):
        fit(vae(), X, hooks=[At("on_epoch", KeyError("mine")), record], epochs=3)
    assert record.run.epoch == 1
    assert record.end is not None


def test_settings_refused_at_the_start_leave_earlier_weights_alone(tmp_path):
    path = tmp_path / "weights.safetensors"
    fit(vae(), X, epochs=1, hooks=[pv.Save(path)])
    kept = path.read_bytes()
    with pytest.raises(ValueError, match="needs valid data"):
        fit(vae(seed=1), X, hooks=[pv.Save(path), pv.EarlyStop()])
    assert path.read_bytes() == kept
