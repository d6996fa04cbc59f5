"""Weights on disk: every bit comes back, nothing but weights is read, and errors change nothing."""

import json
import pickle
import re
import stat
import struct
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import save_file
from small import LATENT, LIKELIHOODS, WIDTH, conditions, cvae, fit, pixels, same, vae, weights
from torch.distributions import constraints

import ppl_vae as pv

X, HELD_OUT = pixels(64), pixels(40, seed=1)
PROGRAMS = {f"vae {kind}": partial(vae, kind) for kind in LIKELIHOODS} | {"cvae": cvae}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def bits(state):
    return {name: value.contiguous().view(torch.uint8).tolist() for name, value in state.items() if value.dim()}


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_every_bit_comes_back(make, path):
    program, again = make(seed=0), make(seed=1)
    odd = next(iter(program.parameters()))
    with torch.no_grad():  # what text would lose
        odd.view(-1)[:4] = torch.tensor([1e-45, -0.0, torch.inf, 1 / 3])
    assert pv.save_weights(program, path) == path
    assert pv.load_weights(again, path) is None
    assert bits(weights(again)) == bits(weights(program))
    assert same(weights(again), weights(program))


def test_a_loaded_program_gives_the_same_numbers(path):
    program = vae()
    fit(program, X, epochs=2)
    pv.save_weights(program, path)
    pv.load_weights(again := vae(seed=1), path)
    for judge in (partial(pv.log_likelihood, particles=7), partial(pv.elbo, particles=2)):
        assert torch.equal(judge(program, HELD_OUT).value, judge(again, HELD_OUT).value)
    assert torch.equal(pv.sample(program, 3), pv.sample(again, 3))


def test_buffers_and_other_types_are_kept(path):
    def normalised():
        program = vae()
        net = torch.nn.Sequential(torch.nn.BatchNorm1d(WIDTH), pv.MLP(WIDTH, 4))
        program.posterior = pv.mean_field(net).double()
        return program

    program, again = normalised(), normalised()
    program.posterior.net[0](
        torch.randn(9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    pv.save_weights(program, path)
    pv.load_weights(again, path)
    state = weights(again)
    assert same(state, weights(program))
    assert state["posterior.net.0.num_batches_tracked"] == 1
    assert state["posterior.net.0.running_mean"].dtype == torch.float64


def test_parts_that_model_and_guide_share_are_saved(path):
    def shared():
        program = vae()
        program.guide_too = program.likelihood.net  # the same module under two names
        return program

    pv.save_weights(program := shared(), path)
    pv.load_weights(again := shared(), path)
    assert again.guide_too is again.likelihood.net
    assert same(weights(program), weights(again))


def test_the_file_is_plain_safetensors_on_the_cpu_that_others_may_read(path):
    pv.save_weights(vae(), path)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert set(header) - {"__metadata__"} == set(weights(pv.as_pair(vae())))
    assert (header["programs.0.prior.loc"]["dtype"], header["programs.0.prior.loc"]["shape"]) == ("F32", [LATENT])
    plain = path.with_name("plain")
    plain.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


# ---- what is refused


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a file was executed')",))


def other_program():
    return pv.VAE(pv.StandardNormal(3), pv.Normal(pv.MLP(3, 16, WIDTH), 0.2), pv.mean_field(pv.MLP(WIDTH, 16, 6)))


def spoil(path, how):
    """Put something at `path` that is not a file of weights of `vae()`."""
    pv.save_weights(vae(seed=1), path)
    whole = path.read_bytes()
    if how == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif how == "torch":
        torch.save({"weights": torch.ones(3)}, path)
    elif how == "another":
        pv.save_weights(other_program(), path)
    elif how == "another kind":
        pv.save_weights(vae("bernoulli"), path)
    elif how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {"cut": whole[:-5], "cut header": whole[:20], "empty": b"", "garbage": b"\xff" * 999}[how]
        )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "is damaged, or no safetensors file"),
        ("cut header", "is damaged, or no safetensors file"),
        ("empty", "is damaged, or no safetensors file"),
        ("garbage", "is damaged, or no safetensors file"),
        ("pickle", "is damaged, or no safetensors file"),
        ("torch", "is damaged, or no safetensors file"),
        ("missing", "path: no weights at"),
        ("folder", "path: no weights at"),
        (
            "another",
            "another program's weights: programs.0.likelihood.net.0.weight has shape (16, 3), expected shape",
        ),
        (
            "another kind",
            "holds another program's weights: programs.0.likelihood.scale.raw has nothing, expected shape ()",
        ),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_what_is_no_file_of_these_weights_is_refused_and_nothing_changes(how, message, trained, path):
    program = vae()
    if trained:
        fit(program, X, epochs=1)
    before = weights(program)
    spoil(path, how)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        pv.load_weights(program, path)
    assert str(path) in str(caught.value)
    assert same(weights(program), before)
    fit(program, X, epochs=1)  # and it works as if nothing had been tried


def test_weights_more_than_the_program_has_are_named(path):
    program = vae("learned")
    pv.save_weights(program, path)
    with pytest.raises(ValueError, match=r"likelihood.scale.raw has shape \(\), expected nothing"):
        pv.load_weights(vae("bernoulli"), path)


@pytest.mark.parametrize("place", ["missing/weights", "folder"])
def test_a_place_that_cannot_be_written(tmp_path, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"path: cannot write {tmp_path / place}"):
        pv.save_weights(vae(), tmp_path / place)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


# ---- programs with bare pyro.param statements, whose parameters exist from the first run on


def bare(scale=1.0, width=WIDTH, name="a.loc"):
    """A pair of functions with two parameters of their own and a net that they close over."""
    net = torch.nn.Linear(WIDTH, 1)

    def model(x):
        loc = pyro.param(name, torch.zeros(width))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + loc, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        sigma = pyro.param("sigma", torch.tensor(scale), constraint=constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(net(x), sigma).to_event(1))

    return pv.Pair(model, guide)


@pytest.mark.parametrize("ran", [True, False])
def test_bare_parameters_come_back_before_and_after_the_first_run(ran, path):
    pair = bare()
    fit(pair, X, epochs=3, optimizer=partial(torch.optim.Adam, lr=0.05))
    pv.save_weights(pair, path)
    again = bare(scale=9.0)
    if ran:
        fit(again, X, epochs=1)
    pv.load_weights(again, path)
    assert torch.equal(pv.elbo(again, HELD_OUT).value, pv.elbo(pair, HELD_OUT).value)
    assert same(weights(again), weights(pair))
    assert len(weights(pair)) == 4


def test_another_programs_bare_parameters_are_refused_at_the_first_run(path):
    pv.save_weights(trained := bare(), path)
    fit(trained, X, epochs=1)
    pv.save_weights(trained, path)
    wider = bare(width=1)
    pv.load_weights(wider, path)
    with pytest.raises(
        ValueError, match=re.escape("param 'a.loc': the loaded weights have shape (12,), the program's (1,)")
    ):
        pv.elbo(wider, X)


def test_another_programs_bare_parameters_are_refused_at_once_after_it(path):
    pair, other = bare(), bare(name="b.loc")
    for each in (pair, other):
        fit(each, X, epochs=1)
    pv.save_weights(other, path)
    with pytest.raises(ValueError, match=r"another program's weights: params\.a/loc has nothing"):
        pv.load_weights(pair, path)


def test_a_bare_parameter_too_many_is_refused_after_the_first_run(path):
    fit(pair := bare(), X, epochs=1)
    save_file(weights(pair) | {"params.more": torch.zeros(3)}, pv.save_weights(pair, path))
    with pytest.raises(ValueError, match=r"params.more has shape \(3,\), expected nothing"):
        pv.load_weights(pair, path)
    pv.load_weights(fresh := bare(), path)
    with pytest.raises(ValueError, match="the loaded weights are another program's: it has no 'more'"):
        pv.elbo(fresh, X)


def test_before_the_first_run_the_last_file_counts(path):
    first, second = bare(name="b.loc"), bare()
    for each in (first, second):
        fit(each, X, epochs=1)
    pair = bare()
    for each in (first, second):
        pv.save_weights(each, path)
        pv.load_weights(pair, path)
    assert torch.equal(pv.elbo(pair, X).value, pv.elbo(second, X).value)


def test_a_refused_file_leaves_bare_parameters_as_they_would_have_been(path):
    class Mixed(torch.nn.Module):
        """A registered net and a bare parameter."""

        def __init__(self, name, width):
            super().__init__()
            self.net, self.name = torch.nn.Linear(width, 1), name
            torch.nn.init.zeros_(self.net.weight)

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], x.shape[-1]), 1.0).to_event(1), obs=x)

        def guide(self, x):
            shift = pyro.param(self.name, torch.zeros(1))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(self.net(x) + shift, 1.0).to_event(1))

    other = Mixed("other", 5)
    fit(other, X[:, :5], epochs=1)
    pv.save_weights(other, path)
    program = Mixed("own", WIDTH)
    with pytest.raises(ValueError, match=r"another program's weights: programs\.0\.net\.weight"):
        pv.load_weights(program, path)
    assert fit(program, X, epochs=1).history  # nothing of the file is waited for


# ---- saving while training


def test_the_best_weights_are_on_disk_while_training_goes_on(path):
    states, disk = [], []

    class Look(pv.Hook):
        def on_epoch(self, run):
            states.append(weights(run.pair))
            pv.load_weights(copied := vae(seed=1), path)
            disk.append(weights(pv.as_pair(copied)))

    worse = partial(torch.optim.SGD, lr=1e-4, maximize=True)
    options = {
        "optimizer": worse,
        "epochs": 3,
        "hooks": [pv.Save(path), Look()],
        "objective": pv.ELBO(kl="analytic"),
    }
    run = fit(vae(), X, HELD_OUT, **options)
    assert run.best_epoch == 1
    assert all(same(d, states[0]) for d in disk)  # the first epoch's, that were the best
    pv.load_weights(again := vae(seed=1), path)
    assert same(weights(pv.as_pair(again)), states[0])


def test_without_validation_the_latest_weights_are_on_disk(path):
    seen = []

    class Look(pv.Hook):
        def on_epoch(self, run):
            pv.load_weights(copied := vae(seed=1), path)
            seen.append(same(weights(pv.as_pair(copied)), weights(run.pair)))

    fit(vae(), X, epochs=3, hooks=[pv.Save(path), Look()])
    assert seen == [True] * 3


def test_no_folder_for_the_weights_is_refused_before_training(tmp_path):
    program = vae()
    with pytest.raises(ValueError, match="there is no folder"):
        fit(program, X, hooks=[pv.Save(tmp_path / "missing" / "weights")])
    assert same(weights(program), weights(vae()))


@pytest.mark.gpu
def test_training_on_the_gpu_is_judged_saved_and_loaded_like_that_on_the_cpu(path):
    program, labels = cvae(), conditions(X)
    options = {"epochs": 20, "batch_size": 16, "hooks": [pv.Save(path)], "progress": False}
    run = pv.fit(program, (X, labels), (X, labels), device="cuda", **options)
    assert next(program.parameters()).is_cuda
    assert run.history[-1]["train"] > run.history[0]["train"]
    on_gpu = pv.log_likelihood(program, (X, labels), particles=200)
    assert on_gpu.value.device.type == "cpu"
    pv.load_weights(there := cvae(seed=1), path)  # a file from a GPU, in a program on the CPU
    assert not next(there.parameters()).is_cuda
    for name, value in weights(program).items():
        assert torch.equal(value.cpu(), weights(there)[name])
    on_cpu = pv.log_likelihood(there, (X, labels), particles=200)
    # Other draws, the same bound: the difference of the means is within its Monte Carlo error.
    spread = (on_gpu.monte_carlo_stderr**2 + on_cpu.monte_carlo_stderr**2) ** 0.5
    assert abs(on_gpu.mean - on_cpu.mean) < 5 * spread
    pictures = [pv.reconstruct(p, X, labels).cpu() for p in (program, there)]
    torch.testing.assert_close(*pictures, rtol=1e-3, atol=1e-4)
    pv.load_weights(back := cvae(seed=2).to("cuda"), path)
    assert same(weights(back), weights(program))
