"""The model M2: bounds against sums over all labels, labels known and missing, enumerated and relaxed."""

from functools import partial

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn
from torch.distributions import MultivariateNormal
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from trials import answers, captured_as_written, trains_under_fit, trains_under_svi, unbiased

import ppl_vae as pv
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.scores import Score, leave_one_out
from ppl_vae.semisupervised import SemiSupervisedVAE
from ppl_vae.traces import log_terms

WIDTH, CLASSES = 4, 3
PROBS = [0.5, 0.2, 0.3]
X = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([-1, 0, 2, -1, -1, 1])
MISSING = torch.full((6,), -1)


def indicators(y):
    return nn.functional.one_hot(y.clamp(min=0), CLASSES).float()


def m2(conditional=False, **options):
    """M2 of nets, with p(z) or with p(z | y)."""
    tanh = partial(pv.MLP, activation=nn.Tanh)
    with seeded(0):
        return SemiSupervisedVAE(
            CLASSES,
            tanh(WIDTH, 6, CLASSES),
            pv.conditional_normal(tanh(CLASSES, 4)) if conditional else pv.StandardNormal(2),
            pv.Normal(pv.Concat(tanh(2 + CLASSES, 6, WIDTH), None, None), 0.5),
            pv.mean_field(pv.Concat(tanh(WIDTH + CLASSES, 6, 4), None, None)),
            **options,
        )


class Exact:
    """z ~ N(0, 1), x ~ N(w z + m[y], s²), under the exact q(z | x, y) or a wider one, and any q(y | x)."""

    def __init__(self, widen=1.0, **options):
        g = torch.Generator().manual_seed(1)
        draw = partial(torch.randn, generator=g, dtype=torch.float64)
        self.w, self.m, self.s = draw(WIDTH), 1.5 * draw(CLASSES, WIDTH), 0.8
        precision = float(1 + self.w @ self.w / self.s**2)
        rows = self.w / self.s**2 / precision
        decoder, encoder = nn.Linear(1 + CLASSES, WIDTH, bias=False), nn.Linear(WIDTH + CLASSES, 1, bias=False)
        classifier = nn.Linear(WIDTH, CLASSES).double()
        with torch.no_grad():
            decoder.double().weight.copy_(torch.cat([self.w[:, None], self.m.T], 1))
            encoder.double().weight.copy_(torch.cat([rows, -self.m @ rows])[None])
            classifier.weight.copy_(0.5 * draw(CLASSES, WIDTH))
            classifier.bias.copy_(draw(CLASSES))
        self.program = SemiSupervisedVAE(
            CLASSES,
            classifier,
            pv.StandardNormal(1),
            pv.Normal(pv.Concat(decoder, None, None), self.s),
            pv.Normal(pv.Concat(encoder, None, None), widen * precision**-0.5),
            label_probs=PROBS,
            **options,
        ).double()
        self.program.eval()
        self.program.likelihood.scale.value.fill_(self.s)
        self.program.posterior.scale.value.fill_(widen * precision**-0.5)
        self.widen = torch.tensor(widen, dtype=torch.float64)

    def joint(self, x):
        """Log p(x, y) for every y, (B, C)."""
        law = MultivariateNormal(self.m, self.s**2 * torch.eye(WIDTH) + self.w.outer(self.w))
        return law.log_prob(x[:, None]) + torch.tensor(PROBS, dtype=torch.float64).log()

    def bound(self, x, y):
        """Eq. 6 of labelled data and eq. 7 of the others, (B,)."""
        gap = (self.widen**2 - 1) / 2 - self.widen.log()  # KL(q(z | x, y) || p(z | x, y))
        log_q = self.program.classifier(x).log_softmax(-1)
        each = self.joint(x) - gap
        missing = (log_q.exp() * (each - log_q)).sum(-1)
        return torch.where(y < 0, missing, each.gather(1, y.clamp(min=0)[:, None])[:, 0])


def evidence(exact, x, y):
    """Log p(x, y) where y is known, log p(x) elsewhere, (B,)."""
    joint = exact.joint(x)
    return torch.where(y < 0, joint.logsumexp(1), joint.gather(1, y.clamp(min=0)[:, None])[:, 0])


# ---- which bound is which


@pytest.mark.parametrize("y", [Y, MISSING, Y.clamp(min=0)])
def test_enumeration_gives_the_papers_bound(y):
    exact, x = Exact(), X.double()
    value = pv.PyroObjective(TraceEnum_ELBO(max_plate_nesting=1))
    pair = as_pair(exact.program)
    inspect(pair, (x, y))
    found, expected = value(pair, x, y).mean(), exact.bound(x, y).mean()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # q(z | x, y) is exact: no variance
    names = list(exact.program.classifier.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found, names, allow_unused=True),
        torch.autograd.grad(expected, names, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(
            torch.zeros_like(theirs) if ours is None else ours, theirs, atol=1e-8, rtol=1e-6
        )


def test_each_datum_has_its_own_bound():
    exact, x = Exact(1.3), X.double()
    with seeded(0), torch.no_grad():
        weight = log_terms(as_pair(exact.program), x, Y, particles=50_000).weight()
    unbiased(weight, evidence(exact, x, Y))
    error = weight.std(0) / len(weight) ** 0.5
    assert bool(((weight.mean(0) - exact.bound(x, Y)).abs() < 5 * error).all())


def test_labels_draw_as_the_classifier_says_and_known_ones_stay():
    exact, x = Exact(), X.double()
    with seeded(0), torch.no_grad():
        terms = log_terms(as_pair(exact.program), x, Y, particles=20_000)
    drawn, known = terms.samples["y"], Y >= 0
    assert bool((drawn == indicators(Y))[:, known].all())
    share, expected = drawn.mean(0)[~known], exact.program.classify(x)[~known]
    assert bool(((share - expected).abs() < 5 * (expected * (1 - expected) / len(drawn)).sqrt()).all())


def test_known_labels_are_the_same_enumerated_and_relaxed():
    y = Y.clamp(min=0)
    values = []
    for labels in ("enumerated", "relaxed"):
        with seeded(0):
            exact = Exact(1.3, labels=labels)
            weight = log_terms(as_pair(exact.program), X.double(), y, particles=20_000).weight()
        unbiased(weight, evidence(exact, X.double(), y))
        values.append(weight)
    error = (values[0].var(0) + values[1].var(0)).div(20_000).sqrt()
    assert bool(((values[0] - values[1]).mean(0).abs() < 5 * error).all())


def test_relaxed_labels_bound_the_relaxed_model():
    # x ~ N(w z + Σ_c y_c m_c, s²) with y relaxed: log p(x) by drawing y from its prior.
    exact, x = Exact(1.3, labels="relaxed"), X.double()
    with seeded(0), torch.no_grad():
        weight = log_terms(as_pair(exact.program), x, MISSING, particles=100_000).weight()
        law = ExpRelaxedCategorical(exact.program.temperature, logits=exact.program.label_logits)
        means = law.sample((100_000,)).exp() @ exact.m
    covariance = exact.s**2 * torch.eye(WIDTH) + exact.w.outer(exact.w)
    given = MultivariateNormal(means[:, None], covariance).log_prob(x)  # (S, B)
    logs, errors = [], []
    for w in (weight, given):
        logs.append(w.logsumexp(0) - torch.tensor(float(len(w))).log())
        share = w.softmax(0) * len(w)
        errors.append(share.std(0) / len(w) ** 0.5)
    error = (errors[0] ** 2 + errors[1] ** 2).sqrt()
    assert bool((error < 0.1).all())
    assert bool(((logs[0] - logs[1]).abs() < 5 * error).all())


def test_relaxed_labels_stay_finite_however_sure_the_classifier():
    program = m2(labels="relaxed", temperature=0.1)
    with torch.no_grad():
        program.classifier[-1].bias.copy_(torch.tensor([1e3, -1e3, 0.0]))
    value = pv.ELBO(5)(as_pair(program), X, Y)
    gradients = torch.autograd.grad(value.sum(), list(program.parameters()))
    assert all(bool(t.isfinite().all()) for t in (value, *gradients))


# ---- the classifier's term


def test_the_classifiers_term_is_added_to_labelled_data_in_training_alone():
    program, pair = m2(alpha=3.0), None
    pair = as_pair(program)
    values = {}
    for training in (True, False):
        program.train(training)
        with seeded(0):
            values[training] = log_terms(pair, X, Y, particles=4).weight()
    log_q = program.classifier(X).log_softmax(-1)
    term = torch.where(Y < 0, 0.0, 3 * log_q.gather(1, Y.clamp(min=0)[:, None])[:, 0])
    assert bool((term[Y >= 0] < 0).all())
    torch.testing.assert_close(values[True] - values[False], term.expand(4, -1))


def test_the_classifiers_term_is_in_pyros_enumeration_once():
    program = m2(alpha=3.0)
    pair = as_pair(program)
    inspect(pair, (X, Y))
    values = []
    for training in (True, False):
        program.train(training)
        with seeded(0):
            values.append(pv.PyroObjective(TraceEnum_ELBO(max_plate_nesting=1))(pair, X, Y).mean())
    log_q = program.classifier(X).log_softmax(-1)
    term = torch.where(Y < 0, 0.0, 3 * log_q.gather(1, Y.clamp(min=0)[:, None])[:, 0])
    torch.testing.assert_close(values[0] - values[1], term.mean(), rtol=1e-4, atol=1e-4)


def test_labels_teach_the_classifier():
    g = torch.Generator().manual_seed(5)
    y = torch.randint(CLASSES, (120,), generator=g)
    x = 3 * nn.functional.one_hot(y, WIDTH).float() + 0.5 * torch.randn(120, WIDTH, generator=g)
    few = torch.where(torch.arange(120) < 12, y, -1)
    for labels, objective in (("enumerated", TraceEnum_ELBO(max_plate_nesting=1)), ("relaxed", pv.ELBO())):
        program = m2(labels=labels, alpha=5.0)
        optimizer = partial(torch.optim.Adam, lr=2e-2)
        pv.fit(
            program, (x, few), objective=objective, epochs=15, batch_size=30, optimizer=optimizer, compile="off",
            device="cpu", progress=False,
        )  # fmt: skip
        assert program.accuracy(x, y) > 0.9


# ---- as every program


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("y", [Y, MISSING, Y.clamp(min=0)])
def test_it_trains_under_pyros_svi(y, conditional):
    if bool((y < 0).any()):
        trains_under_svi(m2(conditional, alpha=1.0), TraceEnum_ELBO(max_plate_nesting=1), X, y)
        trains_under_svi(m2(conditional, labels="relaxed"), Trace_ELBO(), X, y)
    trains_under_svi(m2(conditional, labels="relaxed", alpha=1.0), Trace_ELBO(), X, y)


@pytest.mark.parametrize("conditional", [False, True])
def test_enumerated_labels_train_under_fit(conditional):
    program = trains_under_fit(m2(conditional, alpha=1.0), TraceEnum_ELBO(max_plate_nesting=1), X, Y)
    answers(program, X, Y, context=(Y,))


@pytest.mark.parametrize("goal", [pv.ELBO, pv.IWAE])
def test_enumerated_labels_train_by_scores(interpreted, goal):
    objective = goal(4, estimator=Score(leave_one_out.replace, paths=True))
    trains_under_fit(m2(alpha=1.0), objective, X, Y)
    captured_as_written(m2(alpha=1.0), objective, X, Y)
    assert interpreted


def test_the_score_gradient_is_that_of_the_sum_over_labels():
    program = m2()
    parameters, pair, found = list(program.parameters()), as_pair(program), []
    inspect(pair, (X, Y))
    for objective in (
        pv.ELBO(400, estimator=Score(leave_one_out.replace, paths=True)),
        pv.PyroObjective(TraceEnum_ELBO(400, max_plate_nesting=1, vectorize_particles=True)),
    ):
        drawn = []
        with seeded(0):
            for _ in range(25):
                gradients = torch.autograd.grad(objective(pair, X, Y).sum(), parameters)
                drawn.append(torch.cat([g.flatten() for g in gradients]))
        found.append((torch.stack(drawn).mean(0), torch.stack(drawn).var(0) / len(drawn)))
    (first, one), (second, other) = found
    assert bool(((first - second).abs() < 5 * (one + other).sqrt() + 1e-4).all())


def test_codes_are_the_classifiers_probabilities_and_the_known_labels():
    program = m2().eval()
    expected = torch.where((Y < 0)[:, None], program.classify(X), indicators(Y))
    torch.testing.assert_close(pv.encode(program, X, Y)["y"], expected)


@pytest.mark.parametrize("conditional", [False, True])
def test_relaxed_labels_train_under_fit(interpreted, conditional):
    program = m2(conditional, labels="relaxed", alpha=1.0)
    trains_under_fit(program, pv.ELBO(kl="auto"), X, Y, compile="require")
    assert interpreted
    answers(trains_under_fit(program, pv.ELBO(), X, Y), X, Y, context=(Y,))


@pytest.mark.parametrize("goal", [pv.ELBO, partial(pv.IWAE, 3), partial(pv.IWAE, 3, estimator=pv.doubly)])
def test_captured_and_as_written(interpreted, goal):
    captured_as_written(m2(labels="relaxed", alpha=2.0), goal(), X, Y)


def test_pathwise_gradients_of_a_category_are_refused():
    with pytest.raises(ValueError, match="site 'y': its distribution has no reparameterised sampler"):
        trains_under_fit(m2(), pv.ELBO(), X, Y)


def test_samples_follow_the_labels_asked_for():
    exact = Exact()
    program = exact.program
    labels = torch.arange(3).repeat(2000)
    with seeded(0):
        drawn = pv.sample(program, 6000, labels)
    found = torch.stack([drawn[labels == c].mean(0) for c in range(CLASSES)])
    error = (exact.s**2 + exact.w**2).sqrt() / 2000**0.5
    assert bool(((found - exact.m).abs() < 5 * error).all())
    free = pv.sample(program, 6000)
    spread = (torch.tensor(PROBS, dtype=torch.float64)[:, None] * exact.m).sum(0)
    assert bool(((free.mean(0) - spread).abs() < 5 * free.std(0) / 6000**0.5).all())


def test_classify_and_accuracy():
    program = m2()
    program.classifier.append(nn.Dropout(0.9))
    logits = program.classifier[:-1](X)
    torch.testing.assert_close(program.classify(X), logits.softmax(-1))
    assert program.classifier[-1].training
    best = logits.argmax(-1)
    assert program.accuracy(X, best) == 1
    assert program.accuracy(X, torch.where(torch.arange(6) < 3, best, -1)) == 1
    assert program.accuracy(X, torch.where(torch.arange(6) < 3, best, (best + 1) % 3)) == 0.5
    with pytest.raises(ValueError, match="every label is missing"):
        program.accuracy(X, MISSING)


def test_labels_are_checked():
    for y, message in [
        (Y.float(), "labels must be integers, got torch.float32"),
        (torch.where(Y == 2, 3, Y), "unknown label 3 in row 2: labels run from 0 to 2"),
        (torch.where(Y == 2, -2, Y), "unknown label -2 in row 2"),
        (Y[:, None], r"y: expected one label per datum, \(B,\), got shape \(6, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            trains_under_fit(m2(), TraceEnum_ELBO(max_plate_nesting=1), X, y)
    with pytest.raises(ValueError, match="y: expected 2 labels, one per sample, got 6"):
        pv.sample(m2(), 2, Y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "hard"}, "labels must be 'enumerated' or 'relaxed', got 'hard'"),
        ({"alpha": -1.0}, "alpha must be finite and not negative, got -1.0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        (
            {"label_probs": [0.5, 0.5]},
            r"label_probs: expected 3 positive numbers, one per class, got \[0.5, 0.5\]",
        ),
        ({"label_probs": [1.0, 1.0, 0.0]}, "label_probs: expected 3 positive numbers"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        m2(**options)
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        SemiSupervisedVAE(
            1, nn.Identity(), pv.StandardNormal(1), pv.Normal(nn.Identity(), 1.0), pv.StandardNormal(1)
        )


def test_a_label_that_contradicts_what_is_known_has_no_density():
    program = m2()
    z = torch.zeros(1, 6, 2)
    right = pv.log_joint(as_pair(program), {"y": indicators(Y)[None], "z": z}, X, Y)
    wrong = pv.log_joint(as_pair(program), {"y": indicators((Y + 1) % 3)[None], "z": z}, X, Y)
    assert bool(((wrong - right) < -9000)[:, Y >= 0].all())
    assert bool(((wrong - right) > -100)[:, Y < 0].all())


def test_pyros_handlers_see_one_statement_for_the_label():
    trace = poutine.trace(m2().eval().model).get_trace(X, Y)
    assert [n for n, s in trace.nodes.items() if s["type"] == "sample" and n != "data"] == ["y", "z", "x"]
    assert not trace.nodes["y"]["is_observed"]
