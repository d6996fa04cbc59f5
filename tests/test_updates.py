"""One optimizer step: clipping, gradients that are not there, and Adam's kernel called without its Python."""

import copy
from functools import partial

import pytest
import torch
from small import WIDTH, fit, pixels, vae, weights
from torch import nn
from torch.nn.utils import clip_grad_norm_

import ppl_vae as pv
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.updates import Update, gradients

X = pixels(16)
FUSED = partial(torch.optim.Adam, lr=1e-2, fused=True)


def some(seed=0):
    """Parameters of several shapes."""
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 4), (5,), (), (2, 1, 6))]


def update(parameters, optimizer, clip_norm=None):
    return Update("objective", nn.Module(), nn.Module(), optimizer, clip_norm)


# ---- gradients
@pytest.mark.parametrize("limit", [0.1, 5.0, 1e6])
def test_clipping_is_torchs(limit):
    parameters = some()
    value = sum((p**3).sum() for p in parameters)
    found = gradients(-value, [parameters], limit)[1]
    value = sum((p**3).sum() for p in parameters)
    value.backward()
    clip_grad_norm_(parameters, limit, foreach=True)
    for p, g in zip(parameters, found, strict=True):
        assert torch.equal(p.grad, g)


def test_what_the_value_does_not_depend_on_has_no_gradient_and_no_part_in_the_norm():
    used, unused = some()[:2]
    value, found = gradients(-(used**2).sum(), [[used, unused]], 1e-3)
    assert not value.requires_grad
    assert found[1] is None
    torch.testing.assert_close(found[0].norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_places_of_one_parameter_add_up():
    first, second, third = (torch.ones(2, requires_grad=True) for _ in range(3))
    found = gradients(-(2 * first + 3 * third).sum(), [[first, second], [third, second.clone()]])[1]
    assert found[0].tolist() == [5.0, 5.0]
    assert found[1] is None


def turned(p):
    """A value whose gradient in p has the memory order of its transpose."""
    return (p.t() * torch.arange(float(p.numel())).reshape(p.t().shape)).sum()


@pytest.mark.parametrize("make", [turned, torch.sum, lambda p: (p.sum(0) * p[0].detach()).sum()])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_gradient_has_the_memory_order_of_its_parameter(make, clip):
    """Torch's own backward sees to that; fused kernels walk through both as through one row of numbers."""
    optimizers, parameters = [], []
    for fused in (False, True):
        parameters.append(nn.Parameter(torch.arange(12.0).reshape(3, 4)))
        optimizers.append(torch.optim.Adam([parameters[-1]], lr=0.1, eps=1.0, fused=fused))
    for _ in range(3):
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            _, found = gradients(make(parameter), [[parameter]], clip)
            update(parameter, optimizer).apply(found)
    torch.testing.assert_close(*(p.detach() for p in parameters))


def test_precision_is_known():
    pair = as_pair(vae())
    with pytest.raises(ValueError, match="precision must be 'float32' or 'bf16', got 'fp8'"):
        Update("objective", pair, pv.ELBO(), torch.optim.SGD(pair.parameters(), lr=1.0), precision="fp8")


def test_a_step_is_the_optimizers_on_the_mean_objective():
    program, twin = vae(), vae()
    pair, goal = as_pair(program), pv.ELBO(3)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    step = Update("objective", pair, goal, torch.optim.SGD(pair.parameters(), lr=0.1))
    as_pair(twin)
    for i in range(3):
        with seeded(i):
            value = step((X,))
        with seeded(i):
            loss = -goal(as_pair(twin), X).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(value, -loss.detach())
    for name, theirs in weights(twin).items():
        torch.testing.assert_close(weights(program)[name], theirs)


# ---- Adam's kernel
ADAMS = {
    "adam": partial(torch.optim.Adam, lr=0.01, fused=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "decay": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1, fused=True),
    "decoupled": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.3, betas=(0.5, 0.7), eps=1e-3, fused=True),
    "rate in a tensor": partial(torch.optim.Adam, lr=torch.tensor(0.01), fused=True),
    "not fused": partial(torch.optim.Adam, lr=0.01),
    "foreach": partial(torch.optim.Adam, lr=0.01, foreach=True),
    "amsgrad": partial(torch.optim.Adam, lr=0.01, amsgrad=True, fused=True),
    "maximize": partial(torch.optim.Adam, lr=0.01, maximize=True, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
}
KERNEL = {"adam", "adamw", "decay", "decoupled", "rate in a tensor"}


def groups(parameters):
    """Two groups with settings of their own."""
    return [{"params": parameters[:1], "lr": 0.03}, {"params": parameters[1:]}]


def state_of(optimizer):
    """All numbers of an optimizer's state."""
    state = optimizer.state_dict()
    flat = {f"{i} {k}": torch.as_tensor(v) for i, s in state["state"].items() for k, v in s.items()}
    return {k: v.clone() for k, v in flat.items()}, state["param_groups"]


def identical(ours, theirs):
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][k], theirs[0][k]) for k in ours[0])
    assert [{**g} for g in ours[1]] == [{**g} for g in theirs[1]]


@pytest.mark.parametrize("name", ADAMS)
@pytest.mark.parametrize("grouped", [False, True])
def test_steps_are_the_optimizers_bit_for_bit(name, grouped):
    mine, yours = some(), some()
    arrange = groups if grouped else list
    optimizer, reference = (copy.deepcopy(ADAMS[name])(arrange(p)) for p in (mine, yours))
    ours, generator = update(mine, optimizer), torch.Generator().manual_seed(0)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (optimizer, reference)]
    for step in range(8):
        found = [torch.randn(p.shape, generator=generator) for p in mine]
        if step == 4:  # on from a copy of the state, as after loading
            for o in (optimizer, reference):
                o.load_state_dict(copy.deepcopy(o.state_dict()))
        if step == 6:
            for o in (optimizer, reference):
                o.param_groups[0]["weight_decay"] = 0.05
        ours.apply(found)
        for p, g in zip(yours, found, strict=True):
            p.grad = g
        reference.step()
        for schedule in schedules:
            schedule.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True)), step
        identical(state_of(optimizer), state_of(reference))
        if 0 < step < 4:
            assert bool(ours._adam.columns) == (name in KERNEL)


def test_the_kernel_is_called_without_the_optimizer(monkeypatch):
    parameters = some()
    optimizer = ADAMS["adam"](parameters)
    ours, calls = update(parameters, optimizer), []
    monkeypatch.setattr(
        optimizer, "step", lambda: calls.append(len(optimizer.state)) or type(optimizer).step(optimizer)
    )
    for _ in range(3):
        ours.apply([torch.ones_like(p) for p in parameters])
    assert calls == [0]


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_of_an_optimizer_are_called_at_every_step(kind):
    parameters = some()
    optimizer = ADAMS["adam"](parameters)
    ours, calls = update(parameters, optimizer), []
    ours.apply([torch.ones_like(p) for p in parameters])
    getattr(optimizer, f"register_step_{kind}_hook")(lambda *_: calls.append(1))
    for _ in range(3):
        ours.apply([torch.ones_like(p) for p in parameters])
    assert len(calls) == 3


def by_itself(optimizer, parameters, found):
    """The optimizer's own step along given gradients."""
    for p, g in zip(parameters, found, strict=True):
        p.grad = g
    optimizer.step()


def test_the_optimizer_can_go_on_by_itself_at_any_time():
    mine, yours = some(), some()
    optimizer, reference = ADAMS["adam"](mine), ADAMS["adam"](yours)
    ours = update(mine, optimizer)
    for step in range(6):
        found = [torch.full_like(p, step - 2.5) for p in mine]
        if step % 2:
            by_itself(optimizer, mine, found)
        else:
            ours.apply(found)
        by_itself(reference, yours, found)
    assert all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True))
    identical(state_of(optimizer), state_of(reference))


@pytest.mark.parametrize("first", [0, 2, 3])
@pytest.mark.parametrize("late", [lambda step: 0, lambda step: 1, lambda step: step % 2])
def test_parameters_that_have_a_gradient_at_times_only(first, late):
    mine, yours = some(), some()
    optimizer, reference = ADAMS["adam"](mine), ADAMS["adam"](yours)
    ours = update(mine, optimizer)
    for step in range(6):
        found = [torch.full_like(p, step - 2.5) for p in mine]
        if step < first:
            found[late(step)] = None
        ours.apply(found)
        by_itself(reference, yours, found)
        assert all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True))
    identical(state_of(optimizer), state_of(reference))


def test_a_parameter_that_is_never_used_stays():
    program = vae()
    program.extra = nn.Linear(WIDTH, 2)
    pair = as_pair(program)
    before = {name: p.detach().clone() for name, p in program.named_parameters()}
    step = Update("objective", pair, pv.ELBO(), ADAMS["adam"](pair.parameters()))
    for _ in range(3):
        step((X,))
    after = weights(program)
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("extra"), name
    assert program.extra.weight.grad is None


def test_parameters_whose_data_were_put_elsewhere_go_on_training():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.Adam([w], lr=0.1, fused=True) for w in weights]
    pair = as_pair(vae())
    update = Update("objective", pair, pv.ELBO(), optimizers[0])
    for step in range(6):
        update.apply([torch.full((3,), 1.0 + step)])
        weights[1].grad = torch.full((3,), 1.0 + step)
        optimizers[1].step()
        if step == 2:
            weights[0].data = weights[0].data.clone()
        assert torch.equal(*weights)


def test_captured_convolutions_learn_as_written():
    """What a compiled graph gives may have another memory order than what it was traced from."""
    x = (pv.digits().train.x[:128].unflatten(1, (1, 8, 8)) > 0.5).float()
    ended = []
    for compile in ("off", "require"):
        with seeded(0):
            book = pv.Codebook(8, 4)
            program = pv.VAE(
                pv.CodePrior(pv.UniformCodes(8, (4, 4)), book),
                pv.Bernoulli(pv.ConvDecoder(4, (16,), (1, 8, 8), spatial=True), event_dim=3),
                pv.Quantised(pv.ConvEncoder((1, 8, 8), (16,), 4, spatial=True), book, event_dim=3),
            )
        goal = pv.ELBO(penalties=[pv.Commitment()])
        fit(program, x, objective=goal, epochs=2, batch_size=64, optimizer=FUSED, compile=compile)
        ended.append(program.state_dict())
    torch.testing.assert_close(*ended, rtol=1e-4, atol=1e-4)
