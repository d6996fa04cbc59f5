"""What changes while graphs are in use, and is no tensor: seen and captured anew, or told and given up."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from small import fit, pixels, same, vae, weights
from torch import nn

import ppl_vae as pv
from ppl_vae import capture
from ppl_vae.capture import Captured, Engine
from ppl_vae.rng import seeded

X = pixels(48)
adam = partial(torch.optim.Adam, lr=1e-2, fused=True)
sgd = partial(torch.optim.SGD, lr=1e-3)
FACTOR = [1.0]


class Scaled(nn.Module):
    """A net around a net: a number in an attribute, one in a list, a layer with modes."""

    def __init__(self, inner, *, counts=False, caches=False):
        super().__init__()
        self.inner, self.dropout, self.factor = inner, nn.Dropout(0.5), 1.0
        self.counts, self.caches, self.calls, self.size = counts, caches, 0, None

    def forward(self, x):
        if self.counts:
            self.calls += 1
        if self.caches and self.size is None:
            self.size = x.shape[-1]
        return self.inner(self.dropout(x)) * self.factor * FACTOR[0]


def program(**options):
    made = vae()
    made.likelihood.net = Scaled(made.likelihood.net, **options)
    return made


class At(pv.Hook):
    """Does something to the program at some steps."""

    def __init__(self, what, *steps):
        self.what, self.steps = what, steps

    def on_step(self, run):
        if run.step in self.steps:
            self.what(run)


def net(run):
    return run.pair.program.likelihood.net


def anneal(run):
    net(run).factor *= 0.5


def freeze(run):
    for parameter in run.pair.program.posterior.parameters():
        parameter.requires_grad_(False)


def settle(run):
    net(run).dropout.eval()


def trained(how, hook, make=program, epochs=3, **options):
    """The history, the weights and the run of 3 epochs of 3 steps."""
    made = make()
    run = fit(made, X, epochs=epochs, batch_size=16, compile=how, hooks=[hook], **options)
    return [row["train"] for row in run.history], weights(made), run


def agree(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    for name in theirs[1]:
        torch.testing.assert_close(ours[1][name], theirs[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", [adam, sgd], ids=["adam", "sgd"])
@pytest.mark.parametrize("change", [anneal, freeze, settle])
@pytest.mark.filterwarnings("ignore:.*not registered in the param store because requires_grad=False")
def test_what_hooks_change_is_seen(interpreted, change, optimizer):
    plain = trained("off", At(change, 4), optimizer=optimizer)
    agree(trained("require", At(change, 4), optimizer=optimizer), plain)
    assert len(interpreted) == 2
    never = trained("off", At(change), optimizer=optimizer)
    assert plain[0][0] == never[0][0]
    assert not same(plain[1], never[1])


@pytest.mark.parametrize("optimizer", [adam, sgd], ids=["adam", "sgd"])
def test_parameters_that_an_optimizer_is_given_later_are_trained(interpreted, optimizer):
    """As layers are thawed one after the other."""

    def make():
        made = program()
        made.posterior.requires_grad_(False)
        return made

    def thaw(run):
        late = [*run.pair.program.posterior.parameters()]
        for parameter in late:
            parameter.requires_grad_(True)
        run.updates[0].optimizer.add_param_group({"params": late})

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*not registered in the param store because requires_grad=False"
        )
        plain = trained("off", At(thaw, 4), make, optimizer=optimizer)
        agree(trained("require", At(thaw, 4), make, optimizer=optimizer), plain)
    assert len(interpreted) == 2
    start = weights(make())
    changed = [name for name in start if not torch.equal(plain[1][name], start[name])]
    assert any(name.startswith("posterior") for name in changed)


def test_a_number_that_keeps_changing_is_named_and_given_up(interpreted, monkeypatch):
    monkeypatch.setattr(capture, "MOST", 3)
    hook = At(anneal, *range(1, 9))
    plain = trained("off", hook)
    with pytest.raises(
        ValueError, match=r"^compile='require': Scaled\.factor changed again, and has had 3 graphs"
    ):
        trained("require", hook)
    monkeypatch.setattr(capture, "WORTH", 1)
    interpreted.clear()
    with pytest.warns(
        UserWarning, match=r"Scaled\.factor changed again.*; keep what changes in a tensor"
    ) as caught:
        ours = trained("auto", hook)
    assert len(caught) == 1
    assert len(interpreted) == 3
    agree(ours, plain)
    assert ours[2].engine.describe().startswith("eager: Scaled.factor changed again")


def test_a_program_that_counts_its_runs_is_not_captured(interpreted, monkeypatch):
    make = partial(program, counts=True)
    with pytest.raises(ValueError, match=r"^compile='require': running the program changes Scaled\.calls"):
        trained("require", At(anneal), make)
    monkeypatch.setattr(capture, "WORTH", 1)
    plain = trained("off", At(anneal), make)
    with pytest.warns(UserWarning, match=r"running the program changes Scaled\.calls") as caught:
        ours = trained("auto", At(anneal), make)
    assert len(caught) == 1
    assert ours[0] == plain[0]
    calls = [run.pair.program.likelihood.net.calls for run in (ours[2], plain[2])]
    assert calls[0] == calls[1]  # tracing leaves nothing behind


def test_what_a_program_keeps_once_is_no_hindrance(interpreted):
    net = Scaled(nn.Linear(3, 2), caches=True).eval()
    run = Captured(Engine("require"), [net], lambda x: [net(x)])
    for x in (torch.ones(4, 3), torch.zeros(4, 3)):
        torch.testing.assert_close(run(x)[0], net(x).detach())
    assert net.size == 3
    assert len(run.graphs) == 1


@pytest.mark.parametrize("how", ["auto", "require"])
def test_numbers_out_of_sight_are_found_out_at_the_second_epoch(interpreted, monkeypatch, how):
    def shrink(run):
        FACTOR[0] *= 0.5

    monkeypatch.setattr(capture, "WORTH", 1)
    try:
        plain = trained("off", At(shrink, 3, 6))
        FACTOR[0] = 1.0
        if how == "require":
            with pytest.raises(ValueError, match="compile='require': the program computes other things"):
                trained(how, At(shrink, 3, 6))
            return
        with pytest.warns(UserWarning, match="the program computes other things than at first; keep") as caught:
            ours = trained(how, At(shrink, 3, 6))
        assert len(caught) == 1
        agree(ours, plain)
        assert ours[2].engine.describe() == "eager: the program computes other things than at first"
    finally:
        FACTOR[0] = 1.0


def test_what_stays_is_not_given_up(interpreted):
    """Tracing again draws nothing and changes nothing: one run and the next, with and without, are the same."""
    runs = [trained("require", At(anneal), optimizer=adam) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert len(interpreted) == 2  # one for each run
    assert runs[0][2].engine.describe().startswith("compiled in")


def test_a_captured_function_inside_another_is_a_part_of_it(interpreted):
    inner_net = nn.Linear(2, 2)
    inner = Captured(Engine("require"), [inner_net], lambda x: [inner_net(x)])
    x = torch.ones(3, 2)
    outer = Captured(Engine("require"), [inner_net], lambda x: [inner(x)[0].exp()])
    for given in (x, -x):
        torch.testing.assert_close(outer(given)[0], inner_net(given).exp().detach())
    assert not inner.graphs
    torch.testing.assert_close(inner(x)[0], inner_net(x).detach())
    assert len(inner.graphs) == 1


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_captured(interpreted, layer):
    with seeded(0):
        recurrent = layer(3, 4, batch_first=True, num_layers=2)
    run = Captured(Engine("require"), [recurrent], lambda x: [recurrent(x)[0]])
    for x in (torch.ones(2, 5, 3), torch.rand(2, 5, 3)):
        torch.testing.assert_close(run(x)[0], recurrent(x)[0].detach())
    assert len(interpreted) == 1


# ---- what else programs and hooks do to modules
class Around(nn.Module):
    """A net around a net, with a way of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("level", torch.tensor(1.0))
        self.register_buffer("late", None)
        self.cache = {}

    def forward(self, x):
        return self.inner(x) * self.level


class Twice(Around):
    """One module under two names."""

    def __init__(self, inner):
        super().__init__(inner)
        self.again = self.inner


class Average(Around):
    """A moving average that is put in the place of the last one."""

    def forward(self, x):
        out = self.inner(x)
        if self.training:
            self.level = 0.9 * self.level + 0.1 * out.detach().square().mean()
        return out * self.level


class Notes(Around):
    """Notes the size of its latest input, as many layers do."""

    def forward(self, x):
        self.size = x.shape[-2]
        return super().forward(x)


class Late(Around):
    """Makes a buffer when it is first used."""

    def forward(self, x):
        if self.late is None:
            self.late = torch.full((x.shape[-1],), 0.5)
        return super().forward(x + self.late)


class Caches(Around):
    """Keeps a constant for each size in a dictionary."""

    def forward(self, x):
        n = x.shape[-1]
        if n not in self.cache:
            self.cache[n] = torch.full((n,), 0.5)
        return super().forward(x + self.cache[n])


class Literal(Around):
    """Makes a tensor of a number out of sight."""

    def forward(self, x):
        return self.inner(x) * torch.tensor(FACTOR[0])


class FirstRun(Around):
    """Sets itself up when it is first run in training, as ActNorm does."""

    def __init__(self, inner):
        super().__init__(inner)
        self.first = True

    def forward(self, x):
        out = self.inner(x)
        if self.training and self.first:
            self.level.copy_(1 + out.detach().mean().abs())
            self.first = False
        return out * self.level


class FirstNumber(Around):
    """The same, with a number that a hook changes later."""

    def __init__(self, inner):
        super().__init__(inner)
        self.factor = None

    def forward(self, x):
        if self.training and self.factor is None:
            self.factor = 0.7
        return self.inner(x) * (self.factor or 1.0)


class Remembers(Around):
    """Keeps its latest output, which nothing reads, in an attribute and in a pair."""

    def forward(self, x):
        out = super().forward(x)
        self.last, self.both = out, (out, 1)
        return out


def around(kind):
    made = vae()
    made.likelihood.net = kind(made.likelihood.net)
    return made


def nothing(run):
    pass


def replace_buffer(run):
    net(run).level = net(run).level * 0.5


def assign(run):
    run.pair.load_state_dict({k: v * 0.9 for k, v in run.pair.state_dict().items()}, assign=True)


def exchange_module(run):
    copied = copy.deepcopy(net(run).inner)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    net(run).inner = copied


def as_numpy(run):
    net(run).factor = np.float64(0.5**run.step)


CASES = {
    "one module, two names": (Twice, nothing),
    "a moving average": (Average, nothing),
    "notes": (Notes, nothing),
    "a late buffer": (Late, nothing),
    "a cache": (Caches, nothing),
    "a first run": (FirstRun, nothing),
    "a number of the first run": (FirstNumber, anneal),
    "a late change of it": (FirstNumber, nothing),
    "a buffer replaced": (Around, replace_buffer),
    "weights exchanged": (Around, exchange_module),
    "a number of numpy's": (Scaled, as_numpy),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["require", "auto"])
def test_whatever_modules_do_runs_are_the_same(interpreted, monkeypatch, name, how):
    """Under "auto", the short last batch and validation run as they are written, between captured steps."""
    kind, change = CASES[name]
    monkeypatch.setattr(capture, "WORTH", 8)
    runs = {}
    for compile in ("off", how):
        made = around(kind)
        if kind is Scaled:
            made.likelihood.net.dropout.p = 0.0
        run = fit(
            made, X[:40], X[:24], epochs=4, batch_size=16, compile=compile, hooks=[At(change, 4, 7)], optimizer=sgd
        )
        after = float(pv.elbo(made, X, compile="off").mean)  # no stand-in was left
        copy.deepcopy(made)
        history = [v for row in run.history for k, v in row.items() if k in ("train", "valid")]
        runs[compile] = history, weights(made), after
    agree((*runs[how][:2],), runs["off"])
    assert runs[how][2] == pytest.approx(runs["off"][2], rel=1e-4)
    assert 1 <= len(interpreted) <= 15  # two shapes and validation's, for each of up to four numbers


def test_data_put_elsewhere_are_found_where_functions_close_over_nets(interpreted):
    def shrink(run):
        for parameter in run.pair.parameters():
            parameter.data = parameter.data * 0.5

    runs = []
    for how in ("off", "require"):
        made = vae()
        pair = pv.Pair(lambda x, made=made: made.model(x), lambda x, made=made: made.guide(x))
        run = fit(pair, X, epochs=2, batch_size=16, compile=how, hooks=[At(shrink, 4)], optimizer=sgd)
        runs.append(([row["train"] for row in run.history], weights(made)))
    agree(runs[1], runs[0])


def test_parameters_that_the_optimizer_does_not_have_any_more(interpreted, monkeypatch):
    """As `load_state_dict` with ``assign=True`` makes them: what it loads is used, and not trained."""
    monkeypatch.setattr(capture, "WORTH", 1)
    plain = trained("off", At(assign, 4), partial(around, Around), optimizer=sgd)
    with pytest.warns(UserWarning, match="the program computes other things than at first"):
        ours = trained("auto", At(assign, 4), partial(around, Around), optimizer=sgd)
    assert ours[0] == pytest.approx(plain[0], rel=1e-4)


@pytest.mark.parametrize("validated", [False, True])
def test_literals_made_of_numbers_out_of_sight(interpreted, monkeypatch, validated):
    def shrink(run):
        FACTOR[0] *= 0.5

    monkeypatch.setattr(capture, "WORTH", 1)
    runs = []
    try:
        for how in ("off", "auto"):
            FACTOR[0] = 1.0
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                made = around(Literal)
                run = fit(
                    made, X, X[:16] if validated else None, epochs=4, batch_size=16, compile=how,
                    hooks=[At(shrink, 3, 6, 9)], optimizer=sgd,
                )  # fmt: skip
            runs.append([v for row in run.history for k, v in row.items() if k in ("train", "valid")])
        assert [str(w.message)[:50] for w in caught] == ["compile='auto': the program computes other things "]
        assert runs[1] == pytest.approx(runs[0], rel=1e-4, nan_ok=True)
    finally:
        FACTOR[0] = 1.0


def test_a_number_first_changed_late_is_found_at_the_fourth_epoch_or_the_eighth(interpreted):
    def shrink(run):
        FACTOR[0] = 0.5

    try:
        with pytest.raises(ValueError, match="the program computes other things"):
            trained("require", At(shrink, 16), partial(around, Literal), epochs=9)
    finally:
        FACTOR[0] = 1.0


def test_what_reads_numbers_from_the_second_epoch_on(interpreted, monkeypatch):
    class Reads(Around):
        def forward(self, x):
            return self.inner(x) * (1.0 if FACTOR[0] == 1 else float(x.mean() > -1e9))

    def switch(run):
        FACTOR[0] = 2.0

    monkeypatch.setattr(capture, "WORTH", 1)
    try:
        with pytest.warns(UserWarning, match="it reads a number back from a tensor"):
            trained("auto", At(switch, 3), partial(around, Reads))
        FACTOR[0] = 1.0
        with pytest.raises(ValueError, match="compile='require': it reads a number back"):
            trained("require", At(switch, 3), partial(around, Reads))
    finally:
        FACTOR[0] = 1.0


def test_an_optimizers_parameters_in_another_order(interpreted):
    def turn(run):
        for group in run.updates[0].optimizer.param_groups:
            group["params"].reverse()

    for optimizer in (adam, sgd):
        plain = trained("off", At(turn, 4), vae, optimizer=optimizer)
        agree(trained("require", At(turn, 4), vae, optimizer=optimizer), plain)


def test_objects_that_are_no_modules(interpreted):
    class Plain:
        def __init__(self):
            self.inner, self.temperature = vae(), 1.0

        def model(self, x):
            self.inner.model(x * self.temperature)

        def guide(self, x):
            self.inner.guide(x * self.temperature)

    def cool(run):
        run.pair.program.temperature = 0.5

    runs = []
    for how in ("off", "require"):
        made = Plain()
        run = fit(made, X, epochs=3, batch_size=16, compile=how, hooks=[At(cool, 4)], optimizer=sgd)
        runs.append(([row["train"] for row in run.history], weights(made.inner)))
    agree(runs[1], runs[0])
    assert len(interpreted) == 2


def test_tensors_of_other_shapes_are_told():
    net = nn.Linear(2, 2)
    run = Captured(Engine("require"), [net], lambda x: [net(x)])
    run(torch.ones(3, 2))
    net.weight.data, net.bias.data = torch.ones(3, 2), torch.ones(3)
    with pytest.raises(ValueError, match=r"a tensor of the program is now \(3, 2\).*was \(2, 2\) when its graph"):
        run(torch.ones(3, 2))


def test_what_is_only_remembered_is_no_hindrance(interpreted):
    made = around(Remembers)
    run = fit(made, X, epochs=2, batch_size=16, compile="require", optimizer=sgd)
    plain = around(Remembers)
    theirs = fit(plain, X, epochs=2, batch_size=16, compile="off", optimizer=sgd)
    agree(
        ([r["train"] for r in run.history], weights(made)), ([r["train"] for r in theirs.history], weights(plain))
    )
    assert len(interpreted) == 1
    torch.save(made.state_dict(), "/dev/null")
    assert not hasattr(made.likelihood.net, "both") or isinstance(made.likelihood.net.last, torch.Tensor)


def test_a_moving_average_in_a_plain_tensor_is_given_up(interpreted):
    class Plain(Around):
        def __init__(self, inner):
            super().__init__(inner)
            self.average = torch.tensor(1.0)

        def forward(self, x):
            out = self.inner(x)
            if self.training:
                self.average = 0.9 * self.average + 0.1 * (1 + out.detach().mean().abs())
            return out * self.average

    with pytest.raises(
        ValueError, match=r"running the program changes Plain\.average; keep what changes in a tensor"
    ):
        trained("require", At(nothing), partial(around, Plain), optimizer=sgd)
