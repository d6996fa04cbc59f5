"""Steps captured and as written: the same values and gradients for every objective and every program."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import LATENT, PROGRAMS, WIDTH, OneLevel, case, gaussian, vectorised
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from small import conditions, cvae, pixels, vae, weights
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

import ppl_vae as pv
from ppl_vae import steps
from ppl_vae.batches import Data, prepare
from ppl_vae.capture import Engine
from ppl_vae.estimators import doubly
from ppl_vae.layout import inspect
from ppl_vae.objectives import as_objective
from ppl_vae.pairs import Pair, as_pair
from ppl_vae.rng import seeded
from ppl_vae.steps import Feed, Given, Stepper
from ppl_vae.transforms import Transform
from ppl_vae.updates import Update

X = 0.5 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
sgd = partial(torch.optim.SGD, lr=1e-2)

OBJECTIVES = {
    "elbo": lambda n: pv.ELBO(),
    "elbo, 3 particles, beta": lambda n: pv.ELBO(3, beta=0.5),
    "analytic": lambda n: pv.ELBO(kl="analytic"),
    "auto, beta": lambda n: pv.ELBO(2, kl="auto", beta=0.3),
    "elbo, doubly": lambda n: pv.ELBO(2, estimator=doubly),
    "iwae": lambda n: pv.IWAE(3),
    "iwae, doubly": lambda n: pv.IWAE(3, estimator=doubly),
    "Trace_ELBO": lambda n: Trace_ELBO(),
    "TraceMeanField_ELBO": lambda n: vectorised(TraceMeanField_ELBO, n),
}
OUTSIDE = {"bernoulli", "category", "baseline", "shared latent", "auto diagonal"}  # no bound by pathwise gradients
SCALED = {"scaled", "nested, subsampled"}  # which only Pyro's objectives take
GRID = [
    (name, goal)
    for name in PROGRAMS
    if name not in OUTSIDE
    for goal in OBJECTIVES
    if not (name in SCALED and not goal.startswith("Trace")) and (name, goal) != ("bottom up", "analytic")
]


def update_of(pair, goal, optimizer=sgd, **options):
    parameters = [p for p in pair.parameters() if p.requires_grad]
    return Update("objective", pair, as_objective(goal), optimizer(parameters), **options)


def found(update, how, *batch):
    """The value, the gradients and the random numbers that come next, run in one way; and which are used."""
    stepper = Stepper(update, how)
    with seeded(0):
        results = [*stepper.gradients(*batch), torch.rand(2)]
    assert (len(stepper.gradients.graphs) > 0) == (how == "require")
    return results, [*stepper.gradients.used.values()]


def agree(update, *batch):
    (ours, used), (theirs, same) = (found(update, how, *batch) for how in ("off", "require"))
    assert used == same
    assert any(used[0])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "goal"),
    GRID,
)
def test_captured_and_as_written(interpreted, name, goal):
    c = case(name)
    agree(update_of(c.pair, OBJECTIVES[goal](c.nesting)), *c.batch)
    assert len(interpreted) == 1


def compiled_program():
    """Draws of several kinds, dropout, running statistics, a closed-over tensor, two levels, unused parameters."""

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(WIDTH, 2 * LATENT), nn.Dropout(0.3), nn.BatchNorm1d(2 * LATENT))
            self.second = nn.Linear(WIDTH + LATENT, 2 * LATENT)
            self.low, self.out = nn.Linear(LATENT, 2 * LATENT), nn.Linear(LATENT, 2 * WIDTH)
            self.unused = nn.Linear(2, 2)
            self.warmth = [torch.tensor(0.5)]

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                h = pyro.sample("h", dist.Laplace(x.new_zeros(LATENT), 1.0).to_event(1))
                z = pyro.sample("z", gaussian(self.low(h)))
                pyro.sample("x", gaussian(self.out(z) * self.warmth[0]), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                h = pyro.sample("h", gaussian(self.first(x)))
                joined = torch.cat([x.expand(*h.shape[:-1], -1), h], -1)
                pyro.sample("z", gaussian(self.second(joined)))

    with seeded(1):
        return Program()


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_compiled_and_as_written(precision):
    program = compiled_program()
    pair = as_pair(program)
    inspect(pair, (X,))
    update = update_of(pair, pv.IWAE(3), clip_norm=1.0, precision=precision)
    graphs = {how: Stepper(update, how).gradients for how in ("off", "require")}
    for warmth in (0.5, 1.5):
        program.warmth[0].fill_(warmth)
        results = {}
        for how, gradients in graphs.items():
            before = weights(program)
            with seeded(0):
                results[how] = [*gradients(X), torch.rand(2), *(b.clone() for b in program.buffers())]
            program.load_state_dict(before)
        for a, b in zip(*results.values(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    ready, *more = graphs["require"].graphs.values()
    assert ready.graph.compiled
    assert not more


# ---- what cannot be captured
def warned_once(function, message):
    """Run a function, which warns once."""
    with pytest.warns(UserWarning, match=message) as caught:
        function()
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        (name, loss)
        for name in ("bernoulli", "shared latent", "auto diagonal")
        for loss in (Trace_ELBO, TraceGraph_ELBO)
    ]
    + [("one level", partial(RenyiELBO, num_particles=2)), ("baseline", TraceGraph_ELBO)],
)
def test_pyros_own_run_as_written(interpreted, name, loss):
    c, made = case(name), loss(max_plate_nesting=1)
    reason = rf"{type(made).__name__} runs through Pyro's own loss_and_grads, which reads numbers back"
    update = update_of(c.pair, made)
    with pytest.raises(ValueError, match=rf"compile='require': {reason}"):
        Stepper(update, "require").gradients(*c.batch)
    plain = Stepper(update_of(c.pair, loss(max_plate_nesting=1)), "off")
    stepper = Stepper(update)
    stepper.engine = stepper.gradients.engine = Engine("auto")
    results = []

    def runs():
        for s in (plain, stepper):
            with seeded(0):
                results.append([t for _ in range(2) for t in s.gradients(*c.batch)])

    warned_once(runs, rf"^compile='auto': {reason}.*; compile='off' silences this$")
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert stepper.engine.describe().startswith(f"eager: {type(made).__name__}")
    assert interpreted == []


@pytest.mark.parametrize("name", ["bernoulli", "category", "shared latent", "auto diagonal", *sorted(SCALED)])
@pytest.mark.parametrize("goal", ["elbo", "iwae, doubly"])
def test_what_an_objective_refuses_it_refuses_captured(interpreted, name, goal):
    c = case(name)
    errors = []
    for how in ("off", "require", "auto"):
        with pytest.raises(ValueError, match="site") as caught:
            Stepper(update_of(c.pair, OBJECTIVES[goal](c.nesting)), how).gradients(*c.batch)
        errors.append(str(caught.value))
    assert len(set(errors)) == 1


class Branching(OneLevel):
    """Python looks at a number."""

    def guide(self, x):
        super().guide(x if x.mean() > 0 else 2 * x)


def test_control_flow_that_depends_on_data(interpreted):
    pair = as_pair(Branching())
    inspect(pair, (X,))
    with pytest.raises(ValueError, match="compile='require': it reads a number back from a tensor, or its shapes"):
        Stepper(update_of(pair, pv.ELBO()), "require").gradients(X)
    stepper = Stepper(update_of(pair, pv.ELBO()), "auto")

    def runs():
        for batch in (X, X - 1, X[:3]):
            results = []
            for s in (stepper, Stepper(update_of(pair, pv.ELBO()), "off")):
                with seeded(0):
                    results.append(s.gradients(batch))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    warned_once(runs, "compile='auto': it reads a number back.*it runs uncaptured")


# ---- what belongs to modules
class Special(OneLevel):
    """Of one kind: with dropout, running statistics, a number kept in a buffer, tied weights, and so on."""

    def __init__(self, kind):
        super().__init__()
        with seeded(1):
            self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * LATENT))
        self.kind = kind
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(WIDTH), persistent=False)
        if kind == "dropout":
            self.encoder.append(nn.Dropout(0.5))
        elif kind == "batch norm":
            self.encoder.append(nn.BatchNorm1d(2 * LATENT))
        elif kind == "frozen":
            self.encoder[0].requires_grad_(False)
        elif kind == "unused":
            self.spare = nn.Linear(3, 3)
        elif kind == "tied":
            self.encoder[0] = nn.Linear(WIDTH, WIDTH)
            self.again = nn.Linear(WIDTH, WIDTH)
            self.again.weight = self.encoder[0].weight

    def guide(self, x):
        if self.kind == "in place":
            self.count += 1
            self.average.mul_(0.9).add_(x.detach().mean(0))
        elif self.kind == "replaced":  # torch's way to keep a moving average, too
            self.count = self.count + 1
            self.average = 0.9 * self.average + x.detach().mean(0)
        elif self.kind == "tied":
            x = self.again(x)
        if self.kind in ("in place", "replaced"):
            x = x + 0.1 * self.count + self.average
        super().guide(x)


@pytest.mark.parametrize(
    "kind", ["dropout", "batch norm", "frozen", "unused", "tied", "in place", "replaced", "nothing"]
)
@pytest.mark.parametrize("optimizer", [sgd, adam], ids=["sgd", "adam"])
@pytest.mark.filterwarnings("ignore:.*not registered in the param store because requires_grad=False")
def test_steps_leave_modules_as_steps_as_written_do(interpreted, kind, optimizer):
    ends, values = [], []
    for how in ("off", "require"):
        with seeded(0):
            program = Special(kind)
        pair = as_pair(program)
        inspect(pair, (X,))
        stepper = Stepper(update_of(pair, pv.ELBO(2), optimizer, clip_norm=1.0), how)
        start = weights(program)
        with seeded(0):
            values.append(torch.stack([stepper((X * (1 + i / 10),)) for i in range(4)]))
        ends.append(weights(program) | {"average": program.average.clone()})
    torch.testing.assert_close(values[1], values[0])
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=1e-4, atol=1e-6)
    still = {"frozen": "encoder.0.", "unused": "spare."}.get(kind, "-")
    for name in start:
        if name.startswith(still):
            assert torch.equal(ends[1][name], start[name])
    assert kind != "unused" or program.spare.weight.grad is None
    assert kind not in ("in place", "replaced") or float(program.count) == 5  # `inspect` counts
    assert len(interpreted) == 1


class ByLength(OneLevel):
    """Short batches pass by one of the nets, and one of the parameters."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def guide(self, x):
        super().guide(x * self.scale if len(x) > 3 else x + self.shift)


@pytest.mark.parametrize("how", ["require", "auto"])
def test_which_parameters_are_used_is_known_for_each_shape(interpreted, monkeypatch, how):
    """Under "auto", one shape may be captured and another not."""
    ends = []
    for compile in ("off", how):
        with seeded(0):
            program = ByLength()
        pair = as_pair(program)
        inspect(pair, (X,))
        feed = Given()
        if compile == "auto":
            feed.uses = lambda x: 0 if len(x) > 3 else 1e9
        stepper = Stepper(update_of(pair, pv.ELBO(), clip_norm=1.0), compile, feed)
        with seeded(0):
            for rows in (6, 3, 6, 6, 3, 3, 6):
                stepper((X[:rows],))
        ends.append(weights(program))
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=1e-4, atol=1e-6)
    assert len(interpreted) == {"require": 2, "auto": 1}[how]


def test_plain_functions_around_nets_with_statistics(interpreted):
    """Nets that functions close over are out of the pair's reach, but not of the graph's."""
    ends = []
    for how in ("off", "require"):
        with seeded(0):
            program = Special("batch norm")
        pair = Pair(lambda x, p=program: p.model(x), lambda x, p=program: p.guide(x))
        inspect(pair, (X,))
        program.train()
        stepper = Stepper(update_of(pair, pv.ELBO(), clip_norm=1.0), how)
        with seeded(0):
            for i in range(3):
                stepper((X * (1 + i / 10),))
        ends.append(weights(program))
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=1e-4, atol=1e-6)
    assert int(ends[1]["encoder.2.num_batches_tracked"]) > 3


# ---- feeds
def batches(feed, seed=3, epoch=1):
    with seeded(0):
        return [feed.present(*feed.columns, *item) for item in feed.epoch(seed, epoch)]


@pytest.mark.parametrize("transform", [None, pv.redraw, pv.threshold(0.4), lambda x: x * 2])
@pytest.mark.parametrize("raw", [True, False])
def test_a_feed_gives_the_batches_of_its_source(transform, raw):
    x = pixels(50).clamp(0, 1)
    x = (x * 255).byte() if raw else x
    data = Data(x, conditions(pixels(50)), transform=transform).to("cpu", torch.float32)
    feed = Feed(data, 16, epochs=2)
    assert (feed.columns == ()) == (transform is not None and not isinstance(transform, Transform))
    with seeded(0):
        expected = [*data.epoch(16, 3, 1)]
    for ours, theirs in zip(batches(feed), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with seeded(0):
        ordered = [feed.present(*feed.columns, *item) for item in feed.ordered()]
    with seeded(0):
        for ours, theirs in zip(ordered, data.batches(16), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_data_that_do_not_lie_on_the_device_are_gathered_outside():
    data = Data(pixels(10)).to("cpu", resident=False)
    assert Feed(data, 4, 1).columns == ()


@pytest.mark.parametrize(("rows", "size", "full", "short"), [(50, 16, 3, 1), (48, 16, 3, 0), (10, 16, 0, 1)])
def test_how_often_a_shape_will_come(rows, size, full, short):
    feed = Feed(Data(pixels(rows)), size, epochs=7)
    if full:
        assert feed.uses(*feed.columns, torch.arange(size)) == 7 * full
    if short:
        assert feed.uses(*feed.columns, torch.arange(rows % size)) == 7 * short


def test_how_often_a_streams_shape_will_come_is_seen():
    source = prepare(as_pair(vae()), [pixels(4), pixels(4)], 4)
    feed = Feed(source, 4, epochs=9)
    assert [feed.uses(pixels(4)) for _ in range(60)] == [0] * (steps.OFTEN - 1) + [18] * (61 - steps.OFTEN)
    assert feed.uses(pixels(3)) == 0


def test_pixels_redrawn_inside_are_those_of_the_run_as_written(interpreted):
    values = []
    for how in ("off", "require"):
        program = vae("bernoulli")
        pair = as_pair(program)
        source = prepare(pair, Data(pixels(40).clamp(0, 1), transform=pv.redraw), 16)
        feed = Feed(source, 16, 3)
        stepper = Stepper(update_of(pair, pv.ELBO()), how, feed)
        with seeded(0):
            values.append(torch.stack([stepper(item) for epoch in range(3) for item in feed.epoch(0, epoch)]))
    torch.testing.assert_close(values[1], values[0])
    assert len(interpreted) == 2  # 16 rows, and the 8 left over


# ---- replayed on CUDA: what of it can be run here
class OnGPU(nn.Parameter):
    """A parameter that says that it is on a GPU."""

    is_cuda = True


def recording(monkeypatch, optimizer):
    """In place of a recorded step: one that runs again, with the learning rates that it was recorded with."""
    made = []

    class Recorded:
        def __init__(self, function, tensors):
            self.function, self.rates = function, [g["lr"] for g in optimizer.param_groups]
            assert all(torch.is_tensor(rate) for rate in self.rates)
            self.runs = 0
            made.append(self)

        def __call__(self, *tensors):
            self.runs += 1
            kept = [g["lr"] for g in optimizer.param_groups]
            for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate.clone()
            value = self.function(*tensors)
            for group, rate in zip(optimizer.param_groups, kept, strict=True):
                group["lr"] = rate
            return value

    monkeypatch.setattr(steps, "CudaGraph", Recorded)
    return made


falling = partial(ExponentialLR, gamma=0.9)


def on_gpu(monkeypatch, factory=adam, schedule=falling):
    """A stepper of a program whose parameters say that they are on a GPU, and a schedule of its rates."""
    program = vae()
    for module in program.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            module._parameters[name] = OnGPU(p.detach())
    pair = as_pair(program)
    inspect(pair, (pixels(16),))
    update = update_of(pair, pv.ELBO(), factory)
    made, stepper = schedule(update.optimizer), Stepper(update, "require")
    stepper.gradients.device_only = lambda arguments: True
    return program, stepper, made, recording(monkeypatch, update.optimizer)


def test_what_uses_tensors_of_the_host_is_not_recorded(interpreted, monkeypatch):
    _, stepper, _, made = on_gpu(monkeypatch)
    del stepper.gradients.device_only  # the stand-in; in truth these tensors are on the CPU
    for _ in range(steps.WARM_UP + 3):
        assert stepper.replayed(stepper.rates, (pixels(16),)).isfinite()
    assert made == []


def test_a_recording_that_fails_is_told_and_left(interpreted, monkeypatch):
    _, stepper, _, _ = on_gpu(monkeypatch)
    stepper.engine.compile = "auto"

    class Failing:
        def __init__(self, function, tensors):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(steps, "CudaGraph", Failing)
    with pytest.warns(UserWarning, match=r"cannot be recorded as a CUDA graph \(operation not permitted"):
        values = [stepper.replayed(stepper.rates, (pixels(16),)) for _ in range(steps.WARM_UP + 3)]
    assert torch.stack(values).isfinite().all()


def test_a_step_is_recorded_once_warm_and_then_replayed(interpreted, monkeypatch):
    program, stepper, schedule, made = on_gpu(monkeypatch)
    reference = vae()
    twin = as_pair(reference)
    inspect(twin, (pixels(16),))
    plain = Stepper(update_of(twin, pv.ELBO(), adam), "off")
    other = ExponentialLR(plain.update.optimizer, 0.9)
    for step in range(10):
        batch = (pixels(16, seed=step),)
        with seeded(step):
            value = stepper.replayed(stepper.rates, batch)
        with seeded(step):
            torch.testing.assert_close(value, plain(batch))
        assert len(made) == (step >= steps.WARM_UP)
        assert isinstance(stepper.update.optimizer.param_groups[0]["lr"], float)  # for schedulers and for hooks
        schedule.step()
        other.step()
    assert made[0].runs == 10 - steps.WARM_UP
    assert len(interpreted) == 1
    for name, theirs in weights(reference).items():
        torch.testing.assert_close(weights(program)[name], theirs)
    for _ in range(5):  # another shape warms up again
        stepper.replayed(stepper.rates, (pixels(7),))
    assert len(made) == 2


def test_what_is_recorded_for_good_and_then_changed_is_not_replayed(interpreted, monkeypatch):
    _, stepper, _, made = on_gpu(monkeypatch)
    for _ in range(5):
        stepper.replayed(stepper.rates, (pixels(16),))
    assert made[0].runs == 2
    stepper.update.optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    for _ in range(3):
        stepper.replayed(stepper.rates, (pixels(16),))
    assert made[0].runs == 2


def test_a_schedule_of_momentum_is_never_recorded(interpreted, monkeypatch):
    cycle = partial(OneCycleLR, max_lr=0.1, total_steps=50)
    _, stepper, schedule, made = on_gpu(monkeypatch, schedule=cycle)
    for _ in range(6):
        stepper.replayed(stepper.rates, (pixels(16),))
        schedule.step()
    assert made == []


def test_loaded_state_is_not_what_was_recorded(interpreted, monkeypatch):
    _, stepper, _, made = on_gpu(monkeypatch)
    optimizer = stepper.update.optimizer
    for _ in range(5):
        stepper.replayed(stepper.rates, (pixels(16),))
    optimizer.load_state_dict(optimizer.state_dict())
    stepper.replayed(stepper.rates, (pixels(16),))
    assert made[0].runs == 2


@pytest.mark.parametrize("factory", [sgd, partial(torch.optim.Adam, lr=torch.tensor(0.01))])
def test_optimizers_whose_step_cannot_be_recorded(interpreted, monkeypatch, factory):
    _, stepper, _, made = on_gpu(monkeypatch, factory)
    assert not stepper.rates.capturable
    for _ in range(5):
        stepper.replayed(stepper.rates, (pixels(16),))
    assert made == []


def test_on_the_cpu_nothing_of_an_optimizer_is_changed():
    pair = as_pair(vae())
    update = update_of(pair, pv.ELBO(), adam)
    stepper = Stepper(update, "require")
    assert not stepper.rates.capturable
    assert not update.optimizer.param_groups[0]["capturable"]
    assert Stepper(update, "off").rates is None


# ---- on a GPU
def run_on_gpu(compile, scheduler=None, optimizer=adam, epochs=6):
    program = vae("bernoulli")
    data = Data((pixels(100).clamp(0, 1) * 255).byte(), transform=pv.redraw)
    run = pv.fit(
        program, data, pixels(40).clamp(0, 1).round(), epochs=epochs, batch_size=16, device="cuda", progress=False,
        compile=compile, scheduler=scheduler, scheduler_every="step", optimizer=optimizer,
    )  # fmt: skip
    return [(row["train"], row["valid"], row["lr"]) for row in run.history], weights(program)


@pytest.mark.gpu
@pytest.mark.parametrize("objective", [pv.ELBO(), pv.ELBO(kl="analytic"), pv.IWAE(5, estimator=doubly)], ids=repr)
def test_captured_and_as_written_on_a_gpu(objective):
    pair = as_pair(cvae()).to("cuda")
    x = pixels(32)
    batch = (x.cuda(), conditions(x).cuda())
    inspect(pair, batch)
    results = []
    for how in ("off", "require"):
        gradients = Stepper(update_of(pair, objective), how).gradients
        with seeded(0, "cuda"):
            results.append([*gradients(*batch), torch.rand(2, device="cuda")])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", [None, partial(ExponentialLR, gamma=0.9)])
def test_replayed_steps_are_the_steps_as_written(scheduler):
    (ours, end), (theirs, other) = (run_on_gpu(how, scheduler) for how in ("require", "off"))
    for row, same in zip(ours, theirs, strict=True):
        assert row == pytest.approx(same, rel=1e-3)
    for name in end:
        torch.testing.assert_close(end[name], other[name], rtol=1e-2, atol=1e-3)
    assert ours == run_on_gpu("require", scheduler)[0]


@pytest.mark.gpu
def test_steps_are_replayed_and_those_of_one_cycle_are_not():
    for cycle in (False, True):
        pair = as_pair(vae()).to("cuda")
        x = pixels(32).cuda()
        inspect(pair, (x,))
        update = update_of(pair, pv.ELBO(), adam)
        schedule = (
            OneCycleLR(update.optimizer, 0.1, total_steps=50) if cycle else ExponentialLR(update.optimizer, 0.9)
        )
        stepper = Stepper(update, "require")
        with seeded(0, "cuda"):
            for _ in range(10):
                stepper((x,))
                schedule.step()
        assert any(isinstance(r, steps.CudaGraph) for r in stepper.replays.values()) != cycle
        assert stepper.rates.capturable != cycle


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", [partial(OneCycleLR, max_lr=0.05, total_steps=42)])
def test_one_cycle_on_a_gpu_is_that_as_written(scheduler):
    ours, theirs = (run_on_gpu(how, scheduler)[0] for how in ("require", "off"))
    for row, same in zip(ours, theirs, strict=True):
        assert row == pytest.approx(same, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.AdamW, torch.optim.Adamax])
def test_other_optimizers_on_a_gpu(make):
    factory = partial(make, lr=1e-2)
    ours, theirs = (
        run_on_gpu(how, partial(ExponentialLR, gamma=0.95), factory, 3)[0] for how in ("require", "off")
    )
    for row, same in zip(ours, theirs, strict=True):
        assert row == pytest.approx(same, rel=1e-3)
