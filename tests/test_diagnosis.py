"""Numbers gone wrong: site and datum are found, and batch and state are saved as they were."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from faulty import BAD, MARKED, Marked, Plain, Watch, X, fitted, line, marked_vae
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from small import LATENT, WIDTH, fit, same, vae, weights
from torch import nn

import ppl_vae as pv
from ppl_vae.alternating import RWS
from ppl_vae.diagnosis import diagnose
from ppl_vae.faults import SAVED, Faults, load_fault
from ppl_vae.layout import inspect
from ppl_vae.objectives import as_objective
from ppl_vae.packing import DamagedError, pack, unpack
from ppl_vae.pairs import as_pair
from ppl_vae.resuming import load_random
from ppl_vae.rng import seeded
from ppl_vae.updates import Update, all_finite


# ---- what is found
def updates_of(pair, objective):
    goal = as_objective(objective)
    parameters = [p for p in pair.parameters() if p.requires_grad]
    return [Update("objective", pair, goal, torch.optim.SGD([*parameters, *goal.parameters()], lr=0.1))]


def found_in(program, objective, *batch):
    pair = as_pair(program)
    inspect(pair, tuple(torch.ones_like(c) for c in batch))
    return diagnose(pair, updates_of(pair, objective), batch)


class Scaled(nn.Module):
    """Scaled by hand, with a latent outside the data plate, or an enumerated one."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.loc, self.mean = kind, nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def model(self, x):
        pyro.module("scaled", self)
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0)) if self.kind == "outside" else 0.0
        with pyro.plate("data", len(x), dim=-1), pyro.poutine.scale(scale=0.5):
            if self.kind == "enumerated":
                shift = pyro.sample("shift", dist.Categorical(torch.ones(3))).float()
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            scale = torch.where(x > 100, torch.nan, torch.ones_like(x))
            pyro.sample("x", dist.Normal(z + shift, scale), obs=x)

    def guide(self, x):
        pyro.module("scaled", self)
        if self.kind == "outside":
            pyro.sample("shift", dist.Normal(self.mean, 1.0))
        with pyro.plate("data", len(x), dim=-1), pyro.poutine.scale(scale=0.5):
            pyro.sample("z", dist.Normal(self.mean, 1.0))


@pytest.mark.parametrize("kind", ["scaled", "outside", "enumerated"])
def test_site_and_datum_are_found_in_programs_without_a_table(kind):
    loss = TraceEnum_ELBO(max_plate_nesting=1) if kind == "enumerated" else Trace_ELBO()
    program = Scaled(kind)
    if kind == "enumerated":
        program = pv.Pair(config_enumerate(program.model), program.guide)
    x = torch.zeros(8)
    assert found_in(program, loss, x) is None
    x[5] = 1000.0
    found = found_in(program, loss, x)
    assert (found.site, found.row) == ("x", 5)
    assert found.what == "site 'x' (likelihood): the log-density of {datum} is nan"


GOALS = [pv.ELBO(), pv.IWAE(3), Trace_ELBO(), RWS(3)]


@pytest.mark.parametrize("objective", GOALS, ids=["ELBO", "IWAE", "Trace_ELBO", "RWS"])
def test_the_site_comes_first_that_is_drawn_first(objective):
    found = found_in(marked_vae(), objective, MARKED)
    assert (found.site, found.row) == ("z", BAD)
    assert "(posterior)" in found.what


def test_of_several_wrong_data_the_first_is_named_and_the_others_are_counted():
    x = MARKED.clone()
    x[30:32] = 1000.0
    found = found_in(marked_vae(), pv.ELBO(), x)
    assert found.row == BAD
    assert "of {datum}, and of 2 more of its batch is nan" in found.what


def test_parameters_that_are_wrong_for_every_datum_are_no_datums_fault():
    program = vae()
    with torch.no_grad():
        program.likelihood.net[-1].bias.fill_(1e30)
    found = found_in(program, pv.ELBO(), X)
    assert (found.site, found.row) == ("x", None)
    assert "of every datum of the batch is -inf: too large a step" in found.what


def test_a_parameter_or_an_entry_that_is_not_finite_is_named():
    program = vae()
    x = X.clone()
    x[7, 3] = torch.inf
    found = found_in(program, pv.ELBO(), x)
    assert (found.what, found.site, found.row) == ("tensor 0 of {datum} holds NaN or infinity", "x", 7)
    with torch.no_grad():
        program.posterior.net[0].weight[0, 0] = torch.nan
    assert found_in(program, pv.ELBO(), X).what == "parameter 'posterior.net.0.weight' holds NaN or infinity"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("value", "the objective of {datum} is nan, though its densities are finite"),
        ("slope", r"the gradient of 'likelihood.net.0.weight' at {datum} is not finite, though the objective is"),
    ],
)
def test_an_objective_or_a_gradient_alone_is_traced_to_its_datum(wrong, text):
    program = vae()
    before, random = weights(program), torch.get_rng_state()
    found = found_in(program, Plain(wrong), MARKED)
    assert (found.what, found.site, found.row) == (text, None, BAD)
    assert found_in(program, Plain(wrong), X) is None
    assert same(weights(program), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_datum_is_found_though_batch_normalisation_spreads_it_and_statistics_stay():
    with seeded(0):
        program = vae()
        program.likelihood.net = nn.Sequential(nn.Linear(LATENT, 8), nn.BatchNorm1d(8), nn.Linear(8, WIDTH))
        program.likelihood.net[1].weight.data.fill_(1.0)
    program.likelihood = Marked(program.likelihood, 0)
    program.train()
    program.posterior = Far(program.posterior)
    before = weights(program)
    found = found_in(program, Trace_ELBO(), MARKED)
    assert (found.site, found.row) == ("x", BAD)
    assert same(weights(program), before)


class Far(nn.Module):
    """A posterior that puts a marked datum far away."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        found = self.inner(x.clamp(max=1)).base_dist
        return dist.Normal(found.loc + 1e4 * (x[:, :1] > 100), found.scale).to_event(1)


def test_a_program_that_fails_on_wrong_numbers_is_quoted():
    class Fails(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                if bool((x > 100).any()):
                    raise RuntimeError("probabilities are not finite\nmore")
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))

    found = found_in(Fails(), Trace_ELBO(), torch.full((3,), 1000.0))
    assert found.what == "the program cannot be run on the batch (RuntimeError: probabilities are not finite)"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_finite_numbers_are_finite_though_their_sum_is_not(value, dtype):
    large = torch.full((4, 3), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([large, torch.ones(2)])
    large[2, 1] = value
    assert not all_finite([torch.ones(2), large])


# ---- files
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_the_file_shows_the_fault_again(policy, tmp_path):
    watch = Watch()
    with pytest.raises(pv.NonFiniteError, match=r"Batch and state are in .*step-00000\d.safetensors") as caught:
        fitted(policy, marked_vae(), MARKED, most=1, folder=tmp_path / "faults", hooks=[watch], report_every=1)
    fault = caught.value.run.faults[0]
    saved = load_fault(fault.file)
    assert fault.file == str(tmp_path / "faults" / f"step-{fault.step:06d}.safetensors")
    assert saved.fault == fault
    assert saved.rows.tolist() == [*pv.Data(X).rows(16, 3, 0)][fault.step - 1].tolist()
    assert torch.equal(saved.batch[0], MARKED[saved.rows])
    assert same(saved.weights, watch.seen[saved.weights_step][0])
    assert saved.weights_step in ([fault.step - 1] if policy == "skip" else [fault.step - 2, fault.step - 1])
    pair = as_pair(marked_vae())
    pair.load_state_dict(saved.weights)
    terms = pv.log_terms(pair, *saved.batch)
    wrong = ~terms.posterior.isfinite()[0]
    assert saved.rows[wrong].tolist() == [BAD] == [fault.datum]


def test_what_only_some_draws_do_is_found_again_with_the_draws_that_were_saved(tmp_path):
    """A likelihood that is not defined for rare values of z, on pixels that are redrawn."""

    class Rare(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, z):
            found = self.inner(z).base_dist
            return dist.Bernoulli(logits=found.logits + 0 * (2.2 - z[..., :1]).sqrt()).to_event(1)

    program = vae("bernoulli")
    program.likelihood = Rare(program.likelihood)
    data = pv.Data(X.clamp(0, 1), transform=pv.redraw)
    run = fitted("skip", program, data, folder=tmp_path / "faults", most=50, epochs=4)
    assert run.faults
    fault = run.faults[0]
    saved = load_fault(fault.file)
    assert fault.site == "x"
    assert set(saved.batch[0].unique().tolist()) == {0.0, 1.0}
    pair = as_pair(program)
    pair.load_state_dict(saved.weights)
    with seeded(None):
        load_random(saved.random, torch.device("cpu"))
        values = pv.ELBO()(pair, *saved.batch)
    assert saved.rows[~values.isfinite()].tolist()[0] == fault.datum


def test_the_first_few_are_saved_and_all_are_listed(tmp_path):
    run = fitted("skip", vae(), [MARKED[16:32]] * 15, objective=Plain(), most=50, folder=tmp_path / "f", epochs=1)
    assert len(run.faults) == 15
    assert [fault.file is not None for fault in run.faults] == [True] * SAVED + [False] * 5
    assert len([*(tmp_path / "f").iterdir()]) == SAVED


def test_two_at_one_step_have_a_file_each(tmp_path):
    run = line(12.0, folder=tmp_path / "f")
    steps_ = [f.step for f in run.faults]
    assert len({f.file for f in run.faults}) == 3
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == sorted(
        f"step-{s:06d}{'' if steps_[:i].count(s) == 0 else f'-{steps_[:i].count(s) + 1}'}.safetensors"
        for i, s in enumerate(steps_)
    )


def test_a_file_that_cannot_be_written_is_told_and_training_goes_on(tmp_path):
    class InTheWay(pv.Hook):
        def on_start(self, run):
            (tmp_path / "f").write_text("a file")

    how = {"objective": Plain(), "folder": tmp_path / "f", "epochs": 1, "hooks": [InTheWay()]}
    with pytest.warns(UserWarning, match="faults: .* was not saved"):
        run = fitted("skip", vae(), [MARKED[16:32], X], **how)
    assert [fault.file for fault in run.faults] == [None]
    assert (tmp_path / "f").read_text() == "a file"


def test_a_file_of_before_there_were_numbers_of_processes_is_read(tmp_path):
    run = fitted("skip", vae(), [MARKED[16:32]], objective=Plain(), folder=tmp_path / "f", epochs=1)
    held = unpack(run.faults[0].file, "fault")
    del held["fault"]["rank"]
    pack(run.faults[0].file, "fault", held)
    assert load_fault(run.faults[0].file).fault == run.faults[0]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "fault.safetensors"
    for value in ({}, [], {"fault": {"step": 1}, "batch": []}):
        pack(path, "fault", value)
        with pytest.raises(DamagedError, match="holds no fault"):
            load_fault(path)
    pack(path, "checkpoint", {})
    with pytest.raises(DamagedError, match="no fault"):
        load_fault(path)
    with pytest.raises(ValueError, match="there is no file"):
        load_fault(tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "ignore"}, "policy must be 'stop', 'skip' or 'back', got 'ignore'"),
        ({"policy": None}, "policy must be 'stop', 'skip' or 'back', got None"),
        ({"most": 0}, "most must be at least 1, got 0"),
        ({"most": True}, "most must be a whole number, got True"),
        ({"most": 2.0}, "most must be a whole number, got 2.0"),
        ({"folder": 3}, "folder must be a path, or None to save nothing, got 3"),
        ({"folder": __file__}, "folder: .* is a file; give a folder, or a name that is free"),
        ({"folder": "none/there"}, "folder: cannot make none/there"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Faults(**settings)


@pytest.mark.parametrize("faults", ["skip", None, Faults])
def test_what_is_no_faults_is_refused_before_training(faults):
    program = vae()
    before = weights(program)
    with pytest.raises(ValueError, match=r"faults: expected Faults, such as Faults\('skip'\), got"):
        fit(program, X, faults=faults)
    assert same(weights(program), before)
