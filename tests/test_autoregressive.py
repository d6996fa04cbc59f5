"""Autoregressive grids: causal nets without blind spots, probabilities that sum to 1, samples that agree."""

import functools
import itertools
import math

import pyro
import pytest
import torch
from scipy import stats
from small import fit, weights
from test_steps import agree, update_of

import ppl_vae as pv
from ppl_vae.autoregressive import (
    CodeGrid,
    GatedPixelCNN,
    LevelGrid,
    LogisticGrid,
    PixelCNN,
    PixelCNNPlusPlus,
)
from ppl_vae.layout import inspect
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.transforms import LEVELS

KINDS = {
    "plain": lambda grid, **more: PixelCNN(grid, 2, **more),
    "gated": lambda grid, **more: GatedPixelCNN(grid, 4, **more),
    "plusplus": lambda grid, **more: PixelCNNPlusPlus(grid, 2, **({"levels": 1} | more)),
    "plusplus, 2 levels": lambda grid, **more: PixelCNNPlusPlus(grid, 2, **({"levels": 2} | more)),
}
GRIDS = {
    "codes": lambda h, w: CodeGrid(3, (h, w), width=6),
    "levels": lambda h, w: LevelGrid((1, h, w), width=6),
    "levels in colour": lambda h, w: LevelGrid((3, h, w), width=6),
    "logistics": lambda h, w: LogisticGrid((1, h, w), width=6, components=2),
    "logistics in colour": lambda h, w: LogisticGrid((3, h, w), width=6, components=2),
}
SMALL = {
    "plain": lambda grid: PixelCNN(grid, 1),
    "gated": lambda grid: GatedPixelCNN(grid, 1),
    "plusplus": lambda grid: PixelCNNPlusPlus(grid, 1, levels=1),
}
kinds = pytest.mark.parametrize("kind", KINDS)
grids = pytest.mark.parametrize("name", GRIDS)


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def spread(module, factor=2.0):
    """The same in float64 with weights far from small, so that positions depend on each other."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.mul_(factor)
    return module.eval()


def values(grid, *lead):
    if isinstance(grid, CodeGrid):
        return torch.randint(0, grid.codes, (*lead, *grid.event))
    return torch.randint(0, 256, (*lead, *grid.event)) / torch.tensor(255.0, dtype=torch.float64)


def influence(net, inputs, h, w):
    """Sum of |gradients| of the features at each position by what stands at each, (h w, h w), over some inputs."""
    x = torch.randn(4, inputs, h, w, dtype=torch.float64, requires_grad=True)
    y = net(x)
    y = (y * torch.randn_like(y)).sum(1).flatten(1)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(h * w)]
    return torch.stack([r.abs().sum((0, 1)).flatten() for r in rows])


# ---- nets
@kinds
@grids
def test_no_feature_sees_its_own_position_or_a_later_one_in_any_channel(kind, name):
    h, w = (4, 6) if "2" in kind else (5, 6)
    grid = GRIDS[name](h, w)
    found = influence(spread(KINDS[kind](grid)).net, grid.inputs, h, w)
    later = torch.ones(h * w, h * w).triu().bool()
    assert (found[later] == 0).all()
    assert (found.diagonal(-1)[torch.arange(1, h * w) % w > 0] > 0).all()  # the position to the left


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_every_earlier_position_is_seen(kind):
    h, w = (4, 6) if "2" in kind else (5, 6)
    grid = GRIDS["codes"](h, w)
    found = influence(spread(KINDS[kind](grid)).net, grid.inputs, h, w)
    assert (found[torch.ones(h * w, h * w).tril(-1).bool()] > 0).all()


def test_one_stack_alone_has_a_blind_spot_to_the_upper_right():
    grid = GRIDS["codes"](5, 6)
    found = influence(spread(PixelCNN(grid, 8, first=3)).net, grid.inputs, 5, 6)
    seen = found[2 * 6].reshape(5, 6) > 0  # from the first position of the third row
    assert seen.tolist()[:3] == [[True] * 3 + [False] * 3, [True] * 2 + [False] * 4, [False] * 6]


def test_a_colour_depends_on_those_before_it_alone():
    grid = spread(LevelGrid((3, 2, 2), width=6))
    features, x = torch.randn(1, 6, 2, 2, dtype=torch.float64), values(grid, 1).requires_grad_()
    for colour in range(3):
        logits = grid.colour(colour, grid.hidden(features), x[:, :colour]).logits
        by = torch.autograd.grad((logits * torch.randn_like(logits)).sum() + 0 * x.sum(), x)[0].abs()
        assert (by[:, colour:] == 0).all()
        assert (by[:, :colour] > 0).all()


# ---- laws
def everything(levels, *event):
    """All grids of some levels."""
    return torch.tensor([*itertools.product(range(levels), repeat=math.prod(event))]).reshape(-1, *event)


@torch.no_grad()
def probabilities(law, x):
    return torch.cat([law.log_prob(part).exp() for part in x.split(512)])  # which a cache holds


@pytest.mark.parametrize("kind", SMALL)
def test_probabilities_of_coupled_colours_sum_to_one(kind):
    """By importance sampling: a third of colours black, a third full, others uniform."""
    law, count = SMALL[kind](LogisticGrid((3, 1, 1), width=4, components=2)).double()(), 20_000
    x = torch.randint(1, 255, (count, 3, 1, 1))
    x[torch.rand(x.shape) < 2 / 3] = 0
    x[(x == 0) & (torch.rand(x.shape) < 0.5)] = 255
    drawn = torch.where(x % 255 == 0, 1 / 3, 1 / 3 / 254).double().log().flatten(1).sum(1)
    weights = probabilities(law, x.double() / 255) / drawn.exp()
    error = float(weights.std()) / count**0.5
    assert error < 0.03
    assert abs(float(weights.mean()) - 1) < 4 * error


def surprise(counts, chances):
    """Pearson's statistic, rare grids taken together, and what chance stays under in 9,999 cases of 10,000."""
    expected = chances * counts.sum()
    order = expected.argsort()
    rare = int((expected < 5).sum()) + 1
    expected, counts = (torch.cat([t[order[:rare]].sum()[None], t[order[rare:]]]) for t in (expected, counts))
    assert len(expected) > 5
    return float(((counts - expected) ** 2 / expected).sum()), stats.chi2.ppf(0.9999, len(expected) - 1)


@kinds
def test_probabilities_of_all_grids_of_codes_sum_to_one_and_are_those_of_draws(kind):
    law = spread(KINDS[kind](GRIDS["codes"](2, 2)))()
    chances = probabilities(law, everything(3, 2, 2))
    torch.testing.assert_close(chances.sum(), torch.ones((), dtype=torch.float64))
    number = (law.sample((5_000,)).flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    counts = torch.bincount(number, minlength=81)
    found, limit = surprise(counts, chances)
    assert found < limit
    assert surprise(counts, torch.full((81,), 1 / 81, dtype=torch.float64))[0] > 2 * limit


@pytest.mark.parametrize(
    ("kind", "make", "event"),
    [
        *((kind, make, (1, 1, 2)) for kind in SMALL for make in (LevelGrid, LogisticGrid)),
        ("gated", LevelGrid, (2, 1, 1)),
    ],
)
def test_probabilities_of_all_pictures_of_two_numbers_sum_to_one_and_are_those_of_draws(kind, make, event):
    law = spread(SMALL[kind](make(event, width=4)))()
    chances = probabilities(law, everything(256, *event).double() / 255).reshape(256, 256)
    torch.testing.assert_close(chances.sum(), torch.ones((), dtype=torch.float64))
    apart = chances.sum(1, keepdim=True) * chances.sum(0)
    assert (chances - apart).abs().sum() > 1e-3  # the second number depends on the first
    drawn = (law.sample((5_000,)) * 255).round().long().flatten(1) // 16
    counts = torch.bincount(16 * drawn[:, 0] + drawn[:, 1], minlength=256)
    found, limit = surprise(counts, chances.reshape(16, 16, 16, 16).sum((1, 3)).flatten())
    assert found < limit


@kinds
@grids
def test_cached_draws_are_those_of_the_whole_net_at_each_position(kind, name):
    grid = GRIDS[name](4, 6)
    model = spread(KINDS[kind](grid, context=2))
    law = model(torch.randn(3, 2, dtype=torch.float64))
    drawn = []
    for cached in (True, False):
        with seeded(1):
            drawn.append(law.sample((2,), cached=cached))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (2, 3, *grid.event)
    assert drawn[0].unique().numel() > 1
    assert isinstance(grid, CodeGrid) or LEVELS.check(drawn[0]).all()


@kinds
def test_cached_draws_with_a_map_as_context(kind):
    model = spread(KINDS[kind](GRIDS["codes"](4, 6), context=2, spatial=True), 3.0)
    law = model(torch.randn(30, 2, 4, 6, dtype=torch.float64))
    drawn = []
    for cached in (True, False):
        with seeded(1):
            drawn.append(law.sample(cached=cached))
    assert torch.equal(*drawn)


# ---- contexts and shapes
@kinds
@pytest.mark.parametrize("spatial", [False, True])
def test_leading_dimensions_of_context_and_data(kind, spatial):
    model = spread(KINDS[kind](GRIDS["codes"](4, 4), context=2, spatial=spatial))
    c = torch.randn(5, 3, 2, *((4, 4) if spatial else ()), dtype=torch.float64)
    x = values(model.grid, 3)
    law = model(c)
    assert (law.batch_shape, law.event_shape) == ((5, 3), (4, 4))
    table = law.log_prob(x)  # (K, B)
    for k, b in ((0, 0), (4, 2)):
        torch.testing.assert_close(table[k, b], model(c[k, b]).log_prob(x[b]))
    assert table.std(0).min() > 1e-3
    torch.testing.assert_close(model(c[0]).expand((5, 3)).log_prob(x), table[:1].expand(5, 3))
    torch.testing.assert_close(model(c[0]).log_prob(x.expand(2, 3, 4, 4)), table[:1].expand(2, 3))
    assert law.sample((2,)).shape == (2, 5, 3, 4, 4)


def test_a_law_without_context_expands_as_a_prior_does():
    prior = spread(GatedPixelCNN(GRIDS["codes"](3, 2), 2))
    x = values(prior.grid, 5, 3)
    plain = prior(torch.zeros(7)).log_prob(x)
    torch.testing.assert_close(prior().expand((5, 3)).log_prob(x), plain)
    torch.testing.assert_close(prior().expand((5, 3)).log_prob(x[0]), plain[:1].expand(5, 3))
    assert prior().expand((5, 3)).sample().shape == (5, 3, 3, 2)
    assert prior().log_prob(x[0, 0]).shape == ()


@kinds
def test_a_label_changes_the_law_and_positions_of_a_map_change_theirs(kind):
    model = KINDS[kind](GRIDS["codes"](4, 4), context=10, embedding=pv.OneHot(10))
    x = values(model.grid).expand(10, -1, -1)
    assert model(torch.arange(10)).log_prob(x).unique().numel() == 10
    mapped = KINDS[kind](GRIDS["codes"](4, 4), context=1, spatial=True).double()
    c = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    slopes = torch.autograd.grad(mapped(c).log_prob(x[0]), c)[0]
    assert (slopes[0, ::2, ::2] != 0).all()
    assert (slopes != 0).sum() > 12


def test_dropout_is_for_training_alone():
    density = PixelCNNPlusPlus(GRIDS["logistics"](4, 4), 1, levels=2, dropout=0.5)
    x = values(density.grid, 3).float()
    assert not torch.equal(density().log_prob(x), density().log_prob(x))
    density.eval()
    assert torch.equal(density().log_prob(x), density().log_prob(x))


@grids
def test_before_training_positions_have_the_datas_frequencies(name):
    model = GatedPixelCNN(GRIDS[name](4, 4), 2)
    x = values(model.grid, 200)
    x = (x.float() * (0.3 if x.is_floating_point() else 1)).mul(255 if x.is_floating_point() else 1).round()
    x = x / 255 if "codes" not in name else x.long().clamp(max=1)
    before = model().log_prob(x).mean()
    model.start_from(x)
    assert model().log_prob(x).mean() > before + 1
    with pytest.raises(ValueError, match=r"x: expected shape \(N, .*4, 4\), got \(200, 4\)"):
        model.start_from(x.flatten(1)[:, :4])
    with pytest.raises(ValueError, match="x: it has entries that are not"):
        model.start_from(x + 3)


# ---- as parts of programs
@pytest.mark.parametrize("kind", ["gated", "plusplus, 2 levels"])
def test_a_density_of_pictures_trains_captured_and_as_written(interpreted, kind):
    program = pv.Density(KINDS[kind](GRIDS["logistics in colour"](4, 4)))
    pair, x = as_pair(program), values(program.likelihood.grid, 5).float()
    inspect(pair, (x,))
    agree(update_of(pair, pv.ELBO()), x)
    assert len(interpreted) == 1


def test_a_decoder_trains_on_bytes_and_evaluates():
    net = pv.ConvDecoder(2, (4,), (3, 4, 4))
    likelihood = GatedPixelCNN(LevelGrid((1, 4, 4), width=6), 2, context=3, embedding=net, spatial=True)
    encoder = torch.nn.Sequential(torch.nn.Flatten(-3), pv.MLP(16, 8, 4))
    vae = pv.VAE(pv.StandardNormal(2), likelihood, pv.mean_field(encoder))
    x = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    before = weights(likelihood)
    fit(vae, x, epochs=1, batch_size=10, compile="off")
    assert [n for n, p in likelihood.named_parameters() if torch.equal(before[n], p)] == []
    bound = pv.log_likelihood(vae, x, particles=5).value
    assert (pv.bits_per_dimension(bound, 16) > 5).all()  # noise of 8 bits
    assert LEVELS.check(pv.sample(vae, 3)).all()
    assert pv.reconstruct(vae, x).shape == x.shape


def test_a_prior_over_codes_learns_what_codes_follow_each_other():
    prior = PixelCNN(CodeGrid(4, (3, 3), width=8), 2)
    first = torch.randint(0, 4, (512, 1, 1))
    x = (first + torch.arange(9).reshape(3, 3)) % 4  # two bits in all, of eighteen
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    fit(pv.Density(prior), x, epochs=20, batch_size=64, optimizer=adam, compile="off")
    assert prior.eval()().log_prob(x).mean() > -math.log(4) - 0.1


def test_pyro_scores_it_in_a_plate():
    prior = spread(GatedPixelCNN(GRIDS["codes"](3, 2), 2))
    x = values(prior.grid, 4)

    def model():
        with pyro.plate("data", 4):
            pyro.sample("z", prior(), obs=x)

    found = pyro.poutine.trace(model).get_trace().log_prob_sum()
    torch.testing.assert_close(found, prior().log_prob(x).sum())


# ---- what is refused
def test_pictures_are_levels_in_all_rows():
    x = values(GRIDS["levels"](2, 2), 300).float()
    x[270, 0, 1, 1] = 0.5  # between 127 / 255 and 128 / 255, and beyond the first batch
    with pytest.raises(ValueError, match=r"takes pixels of 8 bits, 0, 1/255, \.\.\., 1, got 0\.5 in row 270"):
        fit(pv.Density(PixelCNN(GRIDS["levels"](2, 2), 1)), x, epochs=1)


def test_wrong_sizes_are_refused():
    codes = GRIDS["codes"](4, 6)
    for make, message in (
        (lambda: CodeGrid(3, (4,), 6), r"shape must be two positive sizes \(h, w\), got \(4,\)"),
        (lambda: CodeGrid(0, (4, 4), 6), "codes must be at least 1, got 0"),
        (lambda: LevelGrid((4, 4), 6), r"shape must be three positive sizes \(C, h, w\), got \(4, 4\)"),
        (lambda: LogisticGrid((2, 4, 4), 6), "of 1 or 3 channels, got 2; use LevelGrid"),
        (lambda: LogisticGrid((1, 4, 4), 6, components=0), "components must be at least 1, got 0"),
        (lambda: PixelCNN(codes, 0), "blocks must be at least 1, got 0"),
        (lambda: PixelCNN(codes, kernel=4), "kernel must be an odd number, 3 at least, got 4"),
        (lambda: GatedPixelCNN(codes, first=1), "first must be an odd number, 3 at least, got 1"),
        (lambda: GatedPixelCNN(codes, layers=0), "layers must be at least 1, got 0"),
        (lambda: GatedPixelCNN(codes, embedding=pv.OneHot(3)), "context must tell how many features"),
        (lambda: GatedPixelCNN(codes, context=-1), "context must be at least 0, got -1"),
        (lambda: PixelCNNPlusPlus(codes, levels=3), "4 x 6 cannot be halved 2 times; give fewer levels than 3"),
        (lambda: PixelCNNPlusPlus(codes, levels=2, dropout=1.0), "dropout must be a probability below 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("validate", [True, False])
def test_wrong_values_and_contexts_are_refused(validate):
    model = GatedPixelCNN(GRIDS["codes"](4, 6), 1, context=2)
    mapped = GatedPixelCNN(GRIDS["codes"](4, 6), 1, context=2, spatial=True)
    x = values(model.grid, 3)
    with pyro.validation_enabled(validate):
        for call, message in (
            (lambda: model(torch.zeros(3, 2)).log_prob(x.mT), r"expected shape \(..., 4, 6\), got \(3, 6, 4\)"),
            (lambda: model(torch.zeros(3, 2)).log_prob(x[0, 0]), r"expected shape \(..., 4, 6\), got \(6,\)"),
            (lambda: model(), "GatedPixelCNN: it wants a context of 2 features, got none"),
            (lambda: model(x, x), "got 2 contexts; give it an embedding of all of them"),
            (lambda: model(torch.zeros(3, 5)), r"expected shape \(..., 2\) once embedded, got \(3, 5\)"),
            (lambda: mapped(torch.zeros(3, 2)), r"expected shape \(..., 2, 4, 6\) once embedded, got \(3, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    with pytest.raises(ValueError, match="within the support"):
        model(torch.zeros(3, 2)).log_prob(x + 3)
