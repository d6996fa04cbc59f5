"""Codebooks: nearest codes, averages and revival by their definitions; quantised programs and their bounds."""

import copy
import math
from functools import partial

import pyro
import pytest
import torch
from sklearn.cluster import KMeans
from small import fit, weights
from torch import nn

import ppl_vae as pv
from ppl_vae.annealing import annealed
from ppl_vae.codebooks import Codebook, ProductCodebook, ResidualCodebook, Summed
from ppl_vae.codes import CodePrior, Quantised, QuantisedPoint, check_usage, perplexity, usage
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.quantising import Commitment
from ppl_vae.rng import seeded
from ppl_vae.schedules import Annealing
from ppl_vae.steps import Stepper
from ppl_vae.traces import log_terms, run_pair
from ppl_vae.updates import Update

LEARNED = {"ema": None, "revive": None}


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def placed(vectors, **options):
    """A codebook with its codes at vectors."""
    book = Codebook(*vectors.shape, **options).to(vectors.dtype)
    book.place(vectors)
    return book


def two(kind, **options):
    return kind(placed(torch.randn(6, 3), **options), placed(0.3 * torch.randn(6, 3), **options))


BOOKS = {
    "one": lambda **options: placed(torch.randn(6, 3), **options),
    "product": lambda **options: two(ProductCodebook, **options),
    "residual": lambda **options: two(ResidualCodebook, **options),
}


# ---- nearest codes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_the_nearest_code_is_that_of_brute_force(dtype, chunk):
    book = placed(torch.randn(20, 5, dtype=dtype), chunk=chunk)
    features = torch.randn(3, 4, 5, 5, dtype=dtype)
    distances = (features.unsqueeze(-2) - book.vectors).square().sum(-1)
    assert torch.equal(book.nearest(features), distances.argmin(-1))
    assert torch.equal(book.find(book.embed(torch.arange(20))), torch.arange(20))


def test_of_codes_at_one_distance_the_first_is_taken():
    book = placed(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 1.0]]))
    assert book.nearest(torch.tensor([[0.0, 0.0], [0.0, 1.0]])).tolist() == [1, 1]


def test_codes_close_together_and_far_from_the_origin_are_told_apart():
    codes = 1000 + torch.arange(50.0).reshape(50, 1) * 1e-3 + torch.zeros(50, 4)
    assert torch.equal(placed(codes).nearest(codes), torch.arange(50))


def test_no_more_than_a_chunk_of_distances_is_held(monkeypatch):
    book, sizes, addmm = placed(torch.randn(10, 2), chunk=8), [], torch.addmm

    def watched(*arguments, **options):
        sizes.append(addmm(*arguments, **options).shape)
        return addmm(*arguments, **options)

    monkeypatch.setattr(torch, "addmm", watched)
    book.nearest(torch.randn(20, 2))
    assert sizes == [(8, 10), (8, 10), (4, 10)]


# ---- codebooks that are averaged
def lloyd(vectors, features):
    """A step of k-means; codes without features stay."""
    nearest = (features[:, None] - vectors).square().sum(-1).argmin(1)
    means = [features[nearest == k].mean(0) if (nearest == k).any() else v for k, v in enumerate(vectors)]
    return torch.stack(means)


def test_without_memory_a_pass_is_a_step_of_lloyd():
    vectors, features = torch.randn(8, 3), torch.randn(40, 3)
    vectors[3] = 100.0  # which nothing is near to
    book = placed(vectors, ema=0.0, revive=None).train()
    for _ in range(3):
        assert torch.equal(book(features).vectors, book.vectors[book.nearest(features)])
        torch.testing.assert_close(book.vectors, vectors, rtol=1e-5, atol=1e-5)
        vectors = lloyd(vectors, features)


def test_the_average_is_that_of_its_definition():
    batches, gamma = [torch.randn(30, 2, dtype=torch.float64) for _ in range(4)], 0.7
    vectors = torch.randn(4, 2, dtype=torch.float64)
    book = placed(vectors, ema=gamma).train()
    counts, sums = torch.zeros(4, 1).double(), torch.zeros(4, 2).double()
    for x in batches:
        book(x.reshape(5, 3, 2, 2))
        torch.testing.assert_close(book.vectors, vectors, rtol=1e-5, atol=1e-5)
        hot = nn.functional.one_hot((x[:, None] - vectors).square().sum(-1).argmin(1), 4).double()
        counts, sums = gamma * counts + (1 - gamma) * hot.sum(0)[:, None], gamma * sums + (1 - gamma) * hot.T @ x
        assert (counts > 0).all()
        vectors = sums / counts


def test_on_one_batch_the_average_ends_at_a_fixed_point_of_k_means():
    features = torch.randn(60, 2, dtype=torch.float64)
    book = placed(features[:5].clone(), ema=0.8).train()
    for _ in range(200):
        book(features)
    torch.testing.assert_close(lloyd(book.vectors, features), book.vectors, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(book.vectors, features[:5], atol=0.1)


def test_judging_moves_no_code():
    book = placed(torch.randn(4, 2)).eval()
    before = weights(book)
    book(torch.randn(10, 2))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(book).values(), strict=True))


@pytest.mark.parametrize("ema", [0.9, None])
def test_a_dead_code_revives_at_a_feature_of_the_batch(ema):
    far = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0]])
    book = placed(far, ema=ema, revive=3).train()
    for unused in (1, 2, 3):
        book(0.1 * torch.randn(20, 2) + torch.tensor([0.0, 1.0]).repeat(10)[:, None])
        assert book.unused.tolist() == [0, 0, unused]
        assert book.vectors[2].tolist() == [50, 50]
    features = 0.1 * torch.randn(20, 2) + torch.tensor([0.0, 1.0]).repeat(10)[:, None]
    living = book.vectors[:2].clone()
    book(features)
    assert (features == book.vectors[2]).all(1).any()
    torch.testing.assert_close(book.vectors[:2], living, rtol=0, atol=0.5)
    for _ in range(3):  # from now on it has features of its own
        book(features)
    assert book.unused.tolist() == [0, 0, 0]


def test_the_first_batch_places_all_codes():
    book, features = Codebook(6, 3).train(), torch.randn(50, 3)
    book(features)
    assert (features[:, None] == book.vectors).all(-1).any(0).all()
    assert book.counts.sum() == pytest.approx(0.01 * 50)


def test_codes_start_from_k_means_of_features():
    features = torch.randn(3000, 2) + 10 * torch.randn(7, 2)[torch.randint(7, (3000,))]
    book = Codebook(7, 2, ema=None)
    book.start_from(features.reshape(3, 1000, 2))
    ours = float((features - book(features).vectors).square().sum().detach())
    assert ours < 1.1 * KMeans(7, n_init=10, random_state=0).fit(features.numpy()).inertia_
    assert book.unused.tolist() == [0] * 7
    with seeded(1):
        book.start_from(features)
        first = book.vectors.detach().clone()
    with seeded(1):
        book.start_from(features)
    assert torch.equal(first, book.vectors)


# ---- several codebooks
def test_a_product_quantises_each_group_by_itself():
    book, x = BOOKS["product"](), torch.randn(4, 5, 6)
    features, vectors, indices = book.eval()(x)
    parts = [b(g) for b, g in zip(book.each, x.split(3, -1), strict=True)]
    assert torch.equal(features, x)
    assert torch.equal(vectors, torch.cat([p.vectors for p in parts], -1))
    assert torch.equal(indices, torch.stack([p.indices for p in parts], -1))


def test_a_residual_codebook_quantises_what_is_left():
    book, x = BOOKS["residual"]().eval(), torch.randn(400, 3)
    features, vectors, indices = book(x)
    first, second = book.each
    left = x - first(x).vectors
    assert torch.equal(features, torch.cat([x, left], -1))
    assert torch.equal(indices, torch.stack([first.nearest(x), second.nearest(left)], -1))
    torch.testing.assert_close(Summed(2)(vectors), first(x).vectors + second(left).vectors)
    assert (x - Summed(2)(vectors)).square().mean() < (x - first(x).vectors).square().mean()
    grid = vectors.movedim(-1, 0).reshape(6, 20, 20)
    torch.testing.assert_close(Summed(2, event_dim=3)(grid), grid[:3] + grid[3:])


@pytest.mark.parametrize("name", BOOKS)
def test_indices_of_vectors_are_found_again(name):
    book = BOOKS[name]()
    indices = torch.randint(6, (50,) if book.books is None else (50, 2))
    vectors = book.embed(indices)
    assert torch.equal(book.find(vectors * (1 + 1e-6)), indices)
    assert vectors.shape == (50, book.parts)


@pytest.mark.parametrize("name", BOOKS)
def test_all_codebooks_start_from_features(name):
    book = BOOKS[name]().eval()
    x = torch.randn(500, book.width)

    def error():
        found = book(x).vectors
        return float((x - (Summed(2)(found) if name == "residual" else found)).square().mean())

    before = error()
    book.start_from(x)
    assert error() < 0.8 * before


# ---- points
@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.parametrize("event_dim", [1, 3])
def test_the_gradient_goes_straight_through(name, event_dim):
    book = BOOKS[name](**LEARNED)
    x = torch.randn(4, book.width, *(5, 5)[: event_dim - 1], requires_grad=True)
    z = Quantised(nn.Identity(), book, event_dim)(x).rsample()
    g = torch.randn_like(z)
    if name == "residual":  # of the sum, which is what a decoder takes
        z, g = Summed(2, event_dim)(z), torch.randn_like(x)
    found, *codes = torch.autograd.grad((z * g).sum(), [x, *book.parameters()], allow_unused=True)
    torch.testing.assert_close(found, g, rtol=0, atol=0)
    assert codes == [None] * len(codes)


def test_a_point_is_its_codes_with_probability_one():
    book = placed(torch.randn(6, 3))
    point = Quantised(nn.Identity(), book, event_dim=3).eval()(1e4 * torch.randn(4, 3, 2, 5, requires_grad=True))
    assert (point.batch_shape, point.event_shape) == ((4,), (3, 2, 5))
    assert torch.equal(point.rsample(), book.embed(point.indices).movedim(-1, 1))
    wide = point.expand((7, 4))
    assert (wide.batch_shape, wide.event_shape, wide.indices.shape) == ((7, 4), (3, 2, 5), (7, 4, 2, 5))
    z = wide.sample()
    assert torch.equal(z, wide.mean)
    assert wide.log_prob(z).tolist() == [[0.0] * 4] * 7
    z = z.clone()
    z[2, 1, 0, 0, 0] += 1e-3
    assert wide.log_prob(z).isneginf().nonzero().tolist() == [[2, 1]]
    assert point.rsample((2,)).shape == (2, 4, 3, 2, 5)


# ---- priors
class Indices(pv.Conditional):
    """Independent indices of unequal probabilities."""

    def __init__(self, *shape):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(*shape, 6))

    def forward(self, *context):
        return pyro.distributions.Categorical(logits=self.logits).to_event(self.logits.dim() - 1)


@pytest.mark.parametrize(("name", "shape"), [("one", (2, 1)), ("product", (1, 1, 2)), ("residual", (2,))])
def test_a_prior_over_codes_is_that_of_their_indices(name, shape):
    book = BOOKS[name]()
    indices = Indices(*shape)
    prior = CodePrior(indices, book)()
    every = torch.cartesian_prod(torch.arange(6), torch.arange(6)).reshape(36, *shape)
    z = book.embed(every).movedim(-1, 1).requires_grad_()
    log_prob = prior.log_prob(z)
    torch.testing.assert_close(log_prob, indices().log_prob(every))
    torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0))
    assert not torch.autograd.grad(log_prob.sum(), [z, indices.logits], allow_unused=True)[0]
    assert prior.log_prob(z + 0.01).isneginf().all()
    drawn = prior.expand((20_000,)).sample()
    assert drawn.shape == (20_000, *prior.event_shape)
    found = book.find(drawn.movedim(1, -1)).flatten(1)
    shares = torch.bincount(6 * found[:, 0] + found[:, 1], minlength=36) / 20_000
    p = log_prob.detach().exp()
    assert ((shares - p).abs() < 4.5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


# ---- programs
def vqvae(kind="one", prior=None, **options):
    """Four pixels, two places of three entries or more, codes from six; always the same for the same arguments."""
    with seeded(0):
        book = BOOKS[kind](**options)
        encoder = nn.Sequential(pv.MLP(4, 8, 2 * book.width), nn.Unflatten(-1, (book.width, 2)))
        decoder = nn.Sequential(nn.Flatten(-2), pv.MLP(2 * book.parts, 8, 4))
        places = (2,) if book.books is None else (2, book.books)
        return pv.VAE(
            CodePrior(pv.UniformCodes(6, places) if prior is None else prior, book),
            pv.Normal(decoder, pv.LearnedScale(0.5)),
            Quantised(encoder, book, event_dim=2),
        )


def test_the_bound_is_the_joint_probability_and_lies_below_the_evidence():
    program, x = vqvae(prior=Indices(2)).eval(), torch.randn(7, 4)
    book, prior = program.posterior.codebook, program.prior
    every = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    z = book.embed(every).movedim(-1, 1)
    joint = prior().log_prob(z)[:, None] + program.likelihood(z[:, None]).log_prob(x)
    point = program.posterior(x).indices
    for bound in (pv.elbo(program, x, particles=3), pv.log_likelihood(program, x, particles=5, chunk=2)):
        torch.testing.assert_close(bound.value, joint[6 * point[:, 0] + point[:, 1], range(7)].double())
        assert bound.direction == "lower"
        assert (bound.value < joint.logsumexp(0)).all()
    terms = log_terms(as_pair(program), x, particles=4)
    assert terms.samples["z"].shape == (4, 7, 3, 2)
    assert (terms.posterior == 0).all()


@pytest.mark.parametrize("options", [{}, LEARNED], ids=["averaged", "learned"])
@pytest.mark.parametrize("name", BOOKS)
def test_the_losses_are_their_formulas(name, options):
    program, x = vqvae(name, **options).eval(), torch.randn(7, 4)
    model, guide = run_pair(as_pair(program), (x,), 3)
    found = Commitment(0.3)(model, guide, (x,))
    features = program.posterior.net(x).movedim(1, -1)
    first, *rest = program.posterior.codebook.each if name == "residual" else [program.posterior.codebook]
    distances = (features - first(features).vectors).square().sum((1, 2))
    for book in rest:
        left = features - first(features).vectors
        distances = distances + (left - book(left).vectors).square().sum((1, 2))
    torch.testing.assert_close(found, (0.3 + bool(options)) * distances)
    codes = list(program.posterior.codebook.parameters())
    assert len(codes) == (len(rest) + (2 if name == "product" else 1)) * bool(options)
    if name != "one":
        return
    encoder = [*program.posterior.net.parameters()]
    (slope, *moved) = torch.autograd.grad(found.sum(), [encoder[-1], *codes])
    (alone,) = torch.autograd.grad(0.3 * (features - first(features).vectors.detach()).square().sum(), encoder[-1])
    torch.testing.assert_close(slope, alone)
    if codes:
        e = first(features).vectors
        (expected,) = torch.autograd.grad((features.detach() - e).square().sum(), codes)
        torch.testing.assert_close(moved[0], expected)


def test_losses_of_several_latents_are_summed_and_of_none_refused():
    x, book = torch.randn(5, 3), BOOKS["one"]()
    point = Quantised(nn.Identity(), book).eval()(x)
    site = {"fn": point, "value": point.sample(), "cond_indep_stack": ()}
    site["value"], site["fn"] = site["value"][None], point.expand((1, 5))
    one, both = (Commitment()({}, sites, (x,)) for sites in ({"a": site}, {"a": site, "b": site}))
    torch.testing.assert_close(both, 2 * one)
    with pytest.raises(ValueError, match="no latent of the guide is quantised"):
        Commitment()({}, {"z": site | {"fn": pyro.distributions.Normal(0.0, 1.0)}}, ())


def trained(program, how, x, steps=6):
    """The program after some steps, and the values of its objective."""
    objective = pv.ELBO(2, penalties=[Commitment()])
    pair, sgd = as_pair(program), torch.optim.SGD([*program.parameters()], lr=1e-2)
    inspect(pair, (x,))
    stepper = Stepper(Update("objective", pair, objective, sgd), how)
    with seeded(3):
        return [float(stepper((x[i : i + 16],))) for i in range(steps)], weights(program)


@pytest.mark.parametrize("ema", [0.7, None])
@pytest.mark.parametrize("kind", BOOKS)
def test_training_captured_is_training_as_written(interpreted, kind, ema):
    x, start = torch.randn(40, 4), weights(vqvae(kind, ema=ema, revive=2))
    values, after = trained(vqvae(kind, ema=ema, revive=2), "off", x)
    captured, same = trained(vqvae(kind, ema=ema, revive=2), "require", x)
    assert len(interpreted) == 1
    assert captured == pytest.approx(values, rel=1e-5)
    for name in after:
        torch.testing.assert_close(same[name], after[name], rtol=1e-4, atol=1e-5)
    unmoved = [n for n in after if "unused" not in n and torch.equal(after[n], start[n])]
    assert unmoved == ["prior.prior.logits"]


@pytest.mark.slow
def test_compiled_draws_are_codes_exactly():
    x = torch.randn(40, 4)
    values, compiled = (trained(vqvae(ema=0.7, revive=2), how, x)[0] for how in ("off", "require"))
    assert compiled == pytest.approx(values, rel=1e-4)


def test_a_small_program_learns_clusters_and_uses_its_codes(interpreted):
    x = 3 * torch.randn(6, 4)[torch.randint(6, (512,))] + 0.1 * torch.randn(512, 4)
    program, objective = vqvae(), pv.ELBO(penalties=[Commitment()])
    before = pv.elbo(program, x).value.mean()
    optimizer = partial(torch.optim.Adam, lr=5e-3, fused=True)
    fit(program, x, objective=objective, optimizer=optimizer, epochs=25, batch_size=64, seed=0, compile="require")
    assert len(interpreted) == 1
    indices = program.eval().posterior(x).indices
    assert perplexity(indices, 6) > 2.5
    check_usage(indices, 6)
    assert pv.elbo(program, x).value.mean() > before + 5


def test_double_precision_and_pictures():
    book = placed(torch.randn(8, 5)).double()
    encoder = nn.Sequential(nn.Conv2d(1, 5, 4, 2, 1), nn.Conv2d(5, 5, 4, 2, 1))
    decoder = nn.Sequential(nn.ConvTranspose2d(5, 5, 4, 2, 1), nn.ConvTranspose2d(5, 1, 4, 2, 1))
    program = pv.VAE(
        CodePrior(pv.UniformCodes(8, (2, 3)), book),
        pv.Normal(pv.Batched(decoder, 5, 2, 3), 0.5, event_dim=3),
        Quantised(pv.Batched(encoder, 1, 8, 12), book, event_dim=3),
    ).double()
    x = torch.randn(4, 1, 8, 12, dtype=torch.float64)
    found = pv.log_likelihood(program, x, particles=3)
    terms = log_terms(as_pair(program.eval()), x, particles=3)
    assert (terms.samples["z"].shape, terms.likelihood.dtype) == ((3, 4, 5, 2, 3), torch.float64)
    torch.testing.assert_close(terms.prior, torch.full((3, 4), -6 * math.log(8)).double())
    assert found.value.isfinite().all()
    assert pv.sample(program, 5).shape == pv.reconstruct(program, x[[0] * 5]).shape == (5, 1, 8, 12)


def test_the_model_finds_the_codes_that_the_guide_used_while_they_move():
    program, x = vqvae(prior=Indices(2), ema=0.5).train(), torch.randn(30, 4)
    for _ in range(5):
        log_terms(as_pair(program), x[:15])
        before = program.posterior.codebook.vectors.clone()
        terms = log_terms(as_pair(program), x[15:])
        assert not torch.equal(before, program.posterior.codebook.vectors)
        assert terms.prior.isfinite().all()
        assert (terms.posterior == 0).all()


def test_an_estimator_that_runs_the_guide_twice_wants_codes_that_rest():
    x, run = torch.randn(9, 4), pv.ELBO(2, estimator=pv.doubly)
    with pytest.raises(ValueError, match="draws random numbers outside its sample statements"):
        run(as_pair(vqvae().train()), x)
    program = vqvae(**LEARNED).train()
    found = [pv.ELBO(2, estimator=e)(as_pair(program), x) for e in (pv.doubly, pv.pathwise)]
    torch.testing.assert_close(found[0], found[1])
    parameters = [p for p in program.parameters() if p is not program.posterior.codebook.vectors]
    slopes = [torch.autograd.grad(value.sum(), parameters) for value in found]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_pyro_itself_takes_the_program_with_its_checks_on():
    program, x = vqvae().eval(), torch.randn(5, 4)
    with pyro.validation_enabled(True), pyro.get_param_store().scope():
        loss = pyro.infer.Trace_ELBO().loss(program.model, program.guide, x)
    assert -loss == pytest.approx(float(pv.elbo(program, x).value.sum()), rel=1e-5)


def test_codes_start_from_data_through_the_net():
    program, x = vqvae(), torch.randn(300, 4)
    posterior = program.posterior.eval()

    def error():
        point = posterior(x)
        return float((point.features - point.vectors).detach().square().mean())

    before = error()
    posterior.start_from(x)
    assert error() < 0.5 * before


def test_a_program_saves_its_codes_once_and_is_copied_whole():
    program = vqvae()
    assert [n for n in program.state_dict() if n.endswith("vectors")] == ["posterior.codebook.vectors"]
    other = copy.deepcopy(program)
    assert other.prior.__dict__["codebook"] is other.posterior.codebook


def test_codes_are_no_points_and_no_reals_to_those_who_judge():
    program, x = vqvae(), torch.randn(6, 4)
    layout = inspect(as_pair(program), (x,))
    assert (layout.points, layout.score_only) == ((), ())
    with pytest.raises(ValueError, match="'z': it is discrete"):
        annealed(program, x, Annealing(chains=2, distributions=3, leapfrog=1), compile="off")


# ---- usage
def test_perplexity_and_usage_are_their_formulas():
    indices = torch.tensor([[0, 0, 0], [5, 5, 2]])
    shares = [1 / 2, 1 / 3, 1 / 6]
    assert perplexity(indices, 10) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert usage(indices, 10) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("indices", "codes"),
    [
        (torch.zeros(100, dtype=torch.long), 16),
        ((torch.arange(1000) % 500 == 0).long(), 4),
        (torch.arange(1000) % 9, 100),
        (torch.zeros(50, dtype=torch.long), 3),
    ],
)
def test_a_collapsed_codebook_is_told_of_by_its_usage(indices, codes):
    with pytest.warns(UserWarning, match=rf"usage: \d+ of {codes} codes are in use, with a perplexity of \d"):
        check_usage(indices, codes)


@pytest.mark.parametrize(
    ("indices", "codes"),
    [(torch.arange(100) % 12, 100), (torch.arange(10), 512), (torch.arange(9) % 2, 2), (torch.zeros(3).long(), 1)],
)
def test_a_codebook_in_use_is_not(indices, codes):
    check_usage(indices, codes)  # a warning would be an error


# ---- what is refused
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Codebook(0, 2), "codes must be at least 1, got 0"),
        (lambda: Codebook(2, 2, revive=0), "revive must be at least 1, got 0"),
        (lambda: Codebook(2, 2, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: Codebook(2, 2, ema=1.0), r"ema must lie in \[0, 1\), or be None for learned codes, got 1.0"),
        (lambda: Codebook(2, 3)(torch.zeros(4, 2)), r"features: expected shape \(..., 3\), got \(4, 2\)"),
        (lambda: Codebook(5, 3).start_from(torch.zeros(4, 3)), "features: expected at least 5, .* got 4"),
        (lambda: Codebook(2, 3).place(torch.zeros(3, 2)), r"vectors: expected shape \(2, 3\), got \(3, 2\)"),
        (lambda: Codebook(1, 1).place(torch.tensor([[math.nan]])), "vectors: expected finite numbers"),
        (lambda: ProductCodebook(), "books: expected one or more codebooks"),
        (lambda: ProductCodebook(Codebook(2, 3), Codebook(3, 3)), "books: all must have equally many codes"),
        (lambda: ProductCodebook(Codebook(2, 3), Codebook(2, 3, ema=None)), "be learned or averaged alike"),
        (lambda: ResidualCodebook(Codebook(2, 3), Codebook(2, 4)), r"must be equally wide, got widths \[3, 4\]"),
        (
            lambda: Quantised(nn.Identity(), Codebook(2, 3), event_dim=3)(torch.zeros(5, 2, 4, 4)),
            r"net: with event_dim=3 it must give features \(..., 3, \*grid\), .*, got \(5, 2, 4, 4\)",
        ),
        (lambda: CodePrior(pv.UniformCodes(9, (2,)), Codebook(8, 3))(), "prior: it has 9 values .* 8 codes"),
        (
            lambda: CodePrior(pv.UniformCodes(6, (2, 3)), BOOKS["product"]())(),
            r"prior: its events must be \(\*grid, 2\) for 2 codebooks, got \(2, 3\)",
        ),
        (lambda: perplexity(torch.tensor([0, 4]), 4), r"indices must lie in 0 .. 3, got 0 .. 4"),
        (lambda: usage(torch.tensor([]), 4), "indices: expected whole numbers"),
        (lambda: Commitment(-1.0), "weight must be finite and not negative, got -1"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_point_keeps_what_it_came_from():
    point = Quantised(nn.Identity(), BOOKS["one"]()).eval()(torch.randn(4, 3))
    assert isinstance(point, QuantisedPoint)
    assert torch.equal(point.vectors, point.mean)
    assert point.support.is_discrete
    assert point.support.check(point.mean).all()


@pytest.mark.gpu
def test_a_gpu_finds_the_codes_and_averages_that_the_processor_finds():
    books = [placed(torch.randn(50, 8), ema=0.5, revive=None).train()]
    books.append(copy.deepcopy(books[0]).cuda())
    for _ in range(3):
        features = torch.randn(500, 8)
        first, second = (book(features.to(book.vectors)) for book in books)
        assert torch.equal(second.indices.cpu(), first.indices)
        torch.testing.assert_close(second.vectors.cpu(), first.vectors)
