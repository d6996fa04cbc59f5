"""Looking at a pair before using it: what it declares; every refusal names its site, tensor, row or value."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import LATENT, PROGRAMS, ROWS, WIDTH, OneLevel, case
from torch import nn

import ppl_vae as pv
from ppl_vae.batches import prepare
from ppl_vae.layout import check_finite, inspect
from ppl_vae.pairs import Pair, as_pair

X = torch.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH)


def pair_of(likelihood, latent=None):
    """A one-level pair with any likelihood of z (B, LATENT)."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", latent or dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", latent or dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))

    return Pair(model, guide)


def wide(z):
    return z.sum(-1, keepdim=True).expand(*z.shape[:-1], WIDTH)


# ---------------------------------------------------------------- what it finds
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one level", {"nesting": 1, "latents": ("z",), "score_only": (), "outside": (), "population": None}),
        ("given rows", {"population": 50}),
        ("drawn rows", {"population": None}),
        ("two levels", {"latents": ("h", "z")}),
        ("bottom up", {"latents": ("z", "h")}),
        ("nested", {"nesting": 2, "latents": ("z", "u")}),
        ("bernoulli", {"score_only": ("z",)}),
        ("category", {"score_only": ("z",), "enumerated": ()}),
        ("shared latent", {"outside": ("w",)}),
        ("auto normal", {"latents": ("z_unconstrained", "z")}),
    ],
)
def test_layouts(name, expected):
    layout = case(name).pair.layout
    assert {key: getattr(layout, key) for key in expected} == expected


def test_observed_sites():
    """Which tensor of the batch, which family, and the support if it holds for all data."""
    assert case("one level").pair.layout.observed["x"][:2] == (None, "Normal")  # x[rows] is another tensor
    pair = pair_of(lambda z: dist.Bernoulli(logits=wide(z)).to_event(1))
    inspect(pair, (torch.ones(ROWS, WIDTH),))
    assert pair.layout.observed["x"] == (0, "Bernoulli", torch.distributions.constraints.boolean)


def test_a_support_that_depends_on_parameters_speaks_of_its_batch_alone():
    """Counts out of a number that differs by row: nothing can be said of other rows."""

    def model(x, total):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Binomial(total, logits=z), obs=x)

    def guide(x, total):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x, total = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 5.0, 9.0])
    pair = Pair(model, guide)
    assert inspect(pair, (x, total)).observed["x"] == (0, "Binomial", None)
    assert len(pv.log_likelihood(pair, (x, total), 5, batch_size=2).value) == 3
    with pytest.raises(ValueError, match=r"site 'x': Binomial takes .* got 2 in row 0"):
        inspect(pair, (x[1:], total[:2]))


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_inspection_draws_nothing_of_the_callers(name):
    c = case(name)
    torch.manual_seed(5)
    state, settings = torch.get_rng_state(), pyro.settings.get()
    inspect(c.pair, c.batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert pyro.settings.get() == settings
    assert all(p.grad is None for p in c.pair.parameters())


def test_inspection_leaves_running_statistics_and_modes_alone():
    """BatchNorm would learn from data that are only looked at, those held out among them."""
    norm, dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5).eval()
    program = pv.VAE(
        pv.StandardNormal(LATENT),
        pv.Normal(nn.Linear(LATENT, WIDTH), 1.0),
        pv.mean_field(nn.Sequential(norm, dropout, nn.Linear(WIDTH, 2 * LATENT))),
    )
    before = {name: value.clone() for name, value in program.state_dict().items()}
    for look in (inspect, lambda pair, batch: prepare(pair, batch), lambda pair, batch: prepare(pair, [batch])):
        look(as_pair(program), (X,))
        assert norm.num_batches_tracked == 0
        assert all(torch.equal(before[name], value) for name, value in program.state_dict().items())
        assert [program.training, norm.training, dropout.training] == [True, True, False]
    with pytest.raises(ValueError, match="cannot take a batch"):
        inspect(as_pair(program), (X[:, 1:],))
    assert [program.training, norm.training, dropout.training] == [True, True, False]


# ---------------------------------------------------------------- transformed distributions
@pytest.mark.parametrize(
    ("law", "right", "wrong"),
    [
        (lambda z: dist.LogNormal(z, 1.0), 0.3, -0.5),  # positive, though made of a normal
        (lambda z: dist.Gumbel(z, 1.0), -3.0, None),  # any number, though made of a uniform
        (lambda z: dist.HalfNormal(z.exp()), 0.3, -0.5),
        (lambda z: dist.LogNormal(z, 1.0).mask(z < 9), 0.3, -0.5),
    ],
)
def test_the_support_is_that_of_the_transformed_value(law, right, wrong):
    pair = pair_of(lambda z: law(wide(z)).to_event(1))
    inspect(pair, (torch.full((ROWS, WIDTH), right),))
    if wrong is not None:
        with pytest.raises(
            ValueError, match=f"site 'x': .*Normal takes .* got {wrong} in row 0.*rescale the data"
        ):
            inspect(pair, (torch.full((ROWS, WIDTH), wrong),))


# ---------------------------------------------------------------- values
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 4])
def test_a_row_that_is_not_finite_is_named(bad, row):
    x = X.clone()
    x[row, 2] = bad
    with pytest.raises(ValueError, match=f"batch tensor 0: row {row} holds NaN or infinity; remove or impute it"):
        inspect(as_pair(OneLevel()), (x,))
    with pytest.raises(ValueError, match=f"data column 0: row {row} "):
        pv.log_likelihood(OneLevel(), x, 2)
    check_finite(torch.tensor([1, 2]), "integers are finite")


@pytest.mark.parametrize("row", [0, 4])
def test_greyscale_under_a_bernoulli(row):
    x = torch.ones(ROWS, WIDTH)
    x[row, 1] = 0.25
    pair = pair_of(lambda z: dist.Bernoulli(logits=wide(z)).to_event(1))
    message = (
        f"site 'x': Bernoulli takes Boolean.*got 0.25 in row {row}; binarise the data .*or choose a likelihood"
    )
    with pytest.raises(ValueError, match=message):
        inspect(pair, (x,))
    with pytest.raises(ValueError, match=message):  # also where the row is beyond the first batch
        pv.elbo(pair, x, batch_size=2)


def test_counts_outside_their_support():
    pair = pair_of(lambda z: dist.Poisson(wide(z).exp()).to_event(1))
    with pytest.raises(ValueError, match=r"site 'x': Poisson takes .*got -1 in row 2; rescale the data or choose"):
        inspect(pair, (torch.tensor([[1.0] * WIDTH, [0.0] * WIDTH, [-1.0] * WIDTH]),))


# ---------------------------------------------------------------- columns that the model reshapes
def binary(count):
    """Binary pixels (count, 12), with both values in every row."""
    return (torch.arange(count * 12) % 5 % 2).float().reshape(count, 12)


class Reshaping(nn.Module):
    """A model that flattens pictures (B, 3, 4) before it observes them, as Pyro's tutorial does."""

    def __init__(self, reshape, law=dist.Bernoulli):
        super().__init__()
        self.reshape, self.law, self.loc = reshape, law, nn.Parameter(torch.zeros(()))

    def model(self, x):
        flat = self.reshape(x)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            shape = (*z.shape, *flat.shape[1:])
            law = self.law(logits=z.reshape(*z.shape, *[1] * (flat.dim() - 1)).expand(shape))
            pyro.sample("x", law.to_event(flat.dim() - law.event_dim - 1) if flat.dim() > 1 else law, obs=flat)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x.reshape(-1, 12),
        lambda x: x.flatten(1),
        lambda x: x.view(len(x), 2, 6),
        lambda x: x.movedim(-1, 1),
        lambda x: x,
    ],
)
def test_columns_that_the_model_reshapes_are_checked_whole(reshape):
    x = binary(50).reshape(-1, 3, 4)
    pair = as_pair(Reshaping(reshape))
    prepare(pair, x, 16)
    x[36, 2, 1] = 0.25
    with pytest.raises(ValueError, match=r"^site 'x': Bernoulli .* got 0.25 in row 36"):
        prepare(pair, x, 16)
    batches = prepare(pair, list(x.split(16)), 16).batches()
    with pytest.raises(ValueError, match=r"^data batch 2: site 'x': Bernoulli .* got 0.25 in row 4"):
        list(batches)


@pytest.mark.parametrize(
    "observed", [lambda x: x[:, :4], lambda x: x[:, :1].expand(-1, 12), lambda x: (x > 0.5).float()]
)
def test_other_values_made_of_a_column_say_nothing_of_all_of_it(observed):
    x = binary(50)
    x[36, 5] = 0.25  # not observed
    prepare(as_pair(Reshaping(observed)), x, 16)


def test_a_support_of_whole_vectors_is_not_asked_of_another_shape():
    """One-hot rows of four hold for (B, 3, 4), while (B, 12) is no one-hot row."""
    x = torch.eye(4)[torch.arange(150) % 4].reshape(50, 12)
    prepare(as_pair(Reshaping(lambda x: x.reshape(-1, 3, 4), dist.OneHotCategorical)), x, 16)


def test_columns_that_share_their_memory_are_told_apart():
    both = torch.cat([binary(50) + 0.25, binary(50)])

    class Second(Reshaping):
        def model(self, c, x):
            super().model(x)

        def guide(self, c, x):
            super().guide(x)

    program = Second(lambda x: x.flatten(1))
    prepare(as_pair(program), (both[:50], both[50:]), 50)
    assert as_pair(program).layout.observed["x"][0] == 1


# ---------------------------------------------------------------- shapes
@pytest.mark.parametrize(
    "batch",
    [(), (torch.zeros(()),), (torch.zeros(0, WIDTH),), (X, torch.zeros(ROWS - 1)), (X, torch.zeros(()))],
    ids=["nothing", "scalar", "empty", "lengths differ", "scalar condition"],
)
def test_batches_must_have_rows(batch):
    with pytest.raises(ValueError, match="batch: tensors must share a first dimension of at least 1, got"):
        inspect(as_pair(OneLevel()), batch)


@pytest.mark.parametrize("shape", [(ROWS, WIDTH + 1), (ROWS, 2, WIDTH + 1), (ROWS,)])
def test_wrong_width_or_rank(shape):
    shown = rf"\({', '.join(map(str, shape))},?\)"
    with pytest.raises(
        ValueError, match=rf"cannot take a batch of {shown} float32: .*x\.flatten\(1\).*first width"
    ):
        inspect(as_pair(OneLevel()), (torch.zeros(shape),))


def test_the_wrong_type():
    with pytest.raises(ValueError, match=r"cannot take a batch of \(6, 4\) int64: .*use x\.float\(\)") as caught:
        inspect(as_pair(OneLevel()), (torch.zeros(ROWS, WIDTH, dtype=torch.int64),))
    assert "flatten" not in str(caught.value)


def test_too_many_tensors():
    with pytest.raises(ValueError, match=r"cannot take a batch of .*positional argument"):
        inspect(as_pair(OneLevel()), (X, X))


def test_a_likelihood_of_another_width():
    """Pyro would broadcast the one pixel and count it four times."""
    pair = pair_of(lambda z: dist.Normal(z[..., :1], 1.0).to_event(1))
    with pytest.raises(
        ValueError, match=r"site 'x': observed value has shape \(6, 4\), its distribution \(6, 1\)"
    ):
        inspect(pair, (X,))


@pytest.mark.parametrize("site", ["z", "x"])
def test_event_dimensions_not_declared(site):
    """Also where a width happens to be that of the batch."""
    undeclared, unit = dist.Normal(torch.zeros(2, ROWS), 1.0), dist.Normal(0.0, 1.0)
    pair = pair_of(lambda z: undeclared if site == "x" else unit, undeclared if site == "z" else unit)
    with pytest.raises(
        ValueError, match=rf"site '{site}': its distribution has batch shape \(2, 6\), .*\.to_event"
    ):
        inspect(pair, (X,))


def test_a_program_may_refuse_data_in_its_own_words():
    class Picky(OneLevel):
        def check(self, x):
            raise ValueError("only cats")

    with pytest.raises(ValueError, match="only cats"):
        inspect(as_pair(Picky()), (X,))


# ---------------------------------------------------------------- sites that do not match
def sample(name, x, **options):
    with pyro.plate(f"rows of {name}", len(x), dim=-1):
        return pyro.sample(name, dist.Normal(x.new_zeros(len(x)), 1.0), **options)


def both(*programs):
    return lambda x: [program(x) for program in programs]


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (partial(sample, "z"), lambda x: None, "site 'z': a latent of the model that the guide does not draw"),
        (lambda x: None, partial(sample, "q"), "site 'q': drawn by the guide, but no latent of the model"),
        (
            lambda x: sample("x", x, obs=x[:, 0]),
            partial(sample, "x"),
            "site 'x': drawn by the guide, but no latent of the model",
        ),
        (
            partial(sample, "z"),
            both(partial(sample, "z"), lambda x: sample("x", x, obs=x[:, 0])),
            "site 'x': the guide observes it; a guide only draws latents",
        ),
    ],
    ids=["missing", "extra", "observed in the model", "observed in the guide"],
)
def test_sites_must_match(model, guide, message):
    with pytest.raises(ValueError, match=message):
        inspect(Pair(model, guide), (X,))


def test_auxiliary_draws_of_a_guide_are_allowed():
    pair = Pair(
        partial(sample, "z"), both(partial(sample, "z"), partial(sample, "a", infer={"is_auxiliary": True}))
    )
    assert inspect(pair, (X,)).latents == ("z", "a")


def test_errors_of_other_kinds_pass_through():
    def broken(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        inspect(Pair(broken, lambda x: None), (X,))


def test_a_second_look_replaces_the_first():
    pair = as_pair(OneLevel())
    first = inspect(pair, (X,))
    assert inspect(pair, (X,)) == first
    assert isinstance(pair, nn.Module)
    assert pair.layout == first
