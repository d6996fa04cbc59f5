"""Codes of data, the bits that they and the pixels take, and how much of a codebook they use."""

import csv
import math
import re
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import entropy
from small import CLASSES, fit, same, weights
from test_codebooks import BOOKS, Indices, placed
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, kl_divergence

import ppl_vae as pv
from ppl_vae.coding import WatchCodes, code_indices, code_length, code_use
from ppl_vae.rng import seeded

SHAPE = (1, 4, 4)
ADAM = partial(torch.optim.Adam, lr=0.03)
BIT = math.log(2)


@pytest.fixture(autouse=True)
def seed():
    with seeded(0):
        yield


def pictures(count=10):
    return torch.randn(count, *SHAPE)


def vqvae(kind="one", prior=None):
    """Pictures of 4 x 4 pixels, a 2 x 2 grid, codes from six; always the same for the same arguments."""
    with seeded(0):
        book = BOOKS[kind]()
        places = (2, 2) if book.books is None else (2, 2, book.books)
        program = pv.VAE(
            pv.CodePrior(prior or pv.UniformCodes(6, places), book),
            pv.Normal(pv.ConvDecoder(book.parts, (4,), SHAPE, spatial=True), 0.3, event_dim=3),
            pv.Quantised(pv.ConvEncoder(SHAPE, (8,), book.width, spatial=True), book, event_dim=3),
        )
        program.posterior.start_from(pictures(50))
        return program


class TwoLatents(nn.Module):
    """A vector of residual codes, a row of two codes that depends on it, and a normal latent."""

    def __init__(self):
        super().__init__()
        self.top, self.bottom = BOOKS["residual"](), BOOKS["one"]()
        self.up, self.down = nn.Linear(8, 3), nn.Sequential(nn.Linear(8 + 6, 6), nn.Unflatten(-1, (3, 2)))
        self.decoder = pv.MLP(6 + 6 + 1, 8, 8)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", pv.CodePrior(pv.UniformCodes(6, (2,)), self.top)())
            bottom = pyro.sample("bottom", pv.CodePrior(pv.UniformCodes(6, (2,)), self.bottom)())
            u = pyro.sample("u", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            loc = self.decoder(torch.cat([top, bottom.flatten(-2), u], -1))
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("top", self.top)
        pyro.module("bottom", self.bottom)
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", pv.Quantised(self.up, self.top)(x))
            joined = torch.cat([x.expand(*top.shape[:-1], -1), top], -1)
            pyro.sample("bottom", pv.Quantised(self.down, self.bottom, 2)(joined))
            pyro.sample("u", dist.Normal(x[:, :1], 0.5).to_event(1))


class Patches(nn.Module):
    """One code for each of four patches of two pixels, in a plate of their own."""

    def __init__(self):
        super().__init__()
        self.book, self.net, self.law = BOOKS["one"](), nn.Linear(2, 3), Indices()

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("patches", 4, dim=-2):
            z = pyro.sample("z", pv.CodePrior(self.law, self.book)())
            pyro.sample("x", dist.Normal(z[..., :2], 0.5).to_event(1), obs=x.transpose(0, 1))

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("patches", 4, dim=-2):
            pyro.sample("z", pv.Quantised(self.net, self.book)(x.transpose(0, 1)))


class Collapsed(nn.Module):
    """The features of a net, so far from all codes but one that this is the nearest."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return 1e-3 * self.net(x)


def collapsed():
    program = vqvae()
    program.posterior.codebook.place(torch.arange(6.0)[:, None].expand(6, 3).clone())
    program.posterior.net = Collapsed(program.posterior.net)
    return program.eval()


# ---- which codes
def nearest(book, features):
    """By brute force, for features (..., D)."""
    return (features.unsqueeze(-2) - book.vectors).square().sum(-1).argmin(-1)


def by_hand(book, features):
    """The indices that a codebook of any kind gives to features (..., width)."""
    if book.books is None:
        return nearest(book, features)
    first, second = book.each
    if features.shape[-1] == 6:  # groups
        rest = features[..., 3:]
        features = features[..., :3]
    else:
        rest = features - first.vectors[nearest(first, features)]
    return torch.stack([nearest(first, features), nearest(second, rest)], -1)


@pytest.mark.parametrize("form", ["tensor", "columns", "stream"])
@pytest.mark.parametrize("kind", BOOKS)
def test_indices_are_those_of_the_quantiser_called_by_hand(kind, form):
    program, x = vqvae(kind), pictures()
    data = {"tensor": x, "columns": pv.Data(x), "stream": pv.Stream(x.split(4))}[form]
    found = code_indices(program, data, batch_size=3)
    with torch.no_grad():
        wanted = by_hand(program.posterior.codebook, program.eval().posterior.net(x).movedim(1, -1))
    assert list(found) == ["z"]
    assert found["z"].dtype == torch.int64
    assert found["z"].shape == ((10, 2, 2) if kind == "one" else (10, 2, 2, 2))
    assert torch.equal(found["z"], wanted)
    assert len(wanted.unique()) > 2


def test_a_label_has_its_part_in_the_codes_of_a_cvae():
    book, label = BOOKS["one"](), pv.OneHot(CLASSES)
    encoder = nn.Sequential(nn.Linear(4 + CLASSES, 6), nn.Unflatten(-1, (3, 2)))
    program = pv.CVAE(
        pv.CodePrior(pv.UniformCodes(6, (2,)), book),
        pv.Normal(pv.Concat(pv.MLP(6 + CLASSES, 4), nn.Flatten(-2), label), 0.3),
        pv.Quantised(pv.Concat(encoder, None, label), book, event_dim=2),
    ).eval()
    x, labels = torch.randn(30, 4), torch.arange(30) % CLASSES
    found = code_indices(program, pv.Data(x, labels), batch_size=7)["z"]
    with torch.no_grad():
        features = encoder(torch.cat([x, nn.functional.one_hot(labels, CLASSES)], 1))
    assert torch.equal(found, nearest(book, features.movedim(1, -1)))
    assert not torch.equal(found, code_indices(program, pv.Data(x, (labels + 1) % CLASSES))["z"])


def test_every_quantised_latent_has_its_indices_and_no_other():
    program, x = TwoLatents().eval(), 3 * torch.randn(20, 8)
    found = code_indices(program, x, batch_size=6)
    with torch.no_grad():
        top = by_hand(program.top, program.up(x))
        features = program.down(torch.cat([x, program.top.embed(top)], 1))
    assert list(found) == ["top", "bottom"]
    assert torch.equal(found["top"], top)
    assert torch.equal(found["bottom"], nearest(program.bottom, features.movedim(1, -1)))
    use = code_use(program, x, warn=False)
    assert {name: u.places for name, u in use.items()} == {"top": 2, "bottom": 2}


def test_plates_inside_a_datum_are_places_of_its_codes():
    program, x = Patches().eval(), torch.randn(9, 4, 2)
    found = code_indices(program, x, batch_size=4)["z"]
    with torch.no_grad():
        assert torch.equal(found, nearest(program.book, program.net(x)))
    assert code_use(program, x, warn=False)["z"].places == 4
    length = code_length(program, x)
    bits = -program.law().logits.detach().log_softmax(-1)[found].sum(1) / BIT
    assert length.codes.mean == pytest.approx(float(bits.mean()), rel=1e-5)


def test_the_program_is_left_as_it_was():
    program, x = vqvae().train(), pictures()
    before, state = weights(program), torch.get_rng_state()
    code_indices(program, x)
    code_length(program, x)
    code_use(program, x)
    assert same(before, weights(program))
    assert program.training
    assert torch.equal(state, torch.get_rng_state())


def test_redrawn_pixels_depend_on_the_seed_alone():
    program, x = vqvae().eval(), pv.Data(torch.rand(40, *SHAPE), transform=pv.redraw)
    first, again, other = (code_indices(program, x, seed=s)["z"] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    length = code_length(program, x, seed=1)
    assert torch.equal(length.bound.value, pv.elbo(program, x, seed=1).value)
    assert length.use == code_use(program, x, seed=1)


# ---- bits
@pytest.mark.parametrize("kind", BOOKS)
def test_bits_of_codes_and_pixels_add_up_to_the_bound(kind):
    program, x = vqvae(kind).eval(), pictures()
    length = code_length(program, x, batch_size=3)
    places = 4 if kind == "one" else 8
    with torch.no_grad():
        z = program.posterior(x).mean
        likelihood = program.likelihood(z).log_prob(x).double()
    torch.testing.assert_close(length.bound.value, likelihood - places * math.log(6))
    assert length.bound.direction == "lower"
    assert length.codes.mean == pytest.approx(places * math.log2(6))
    assert length.codes.stderr == pytest.approx(0, abs=1e-9)
    assert length.per_code.mean == pytest.approx(math.log2(6))
    assert length.pixels.mean == pytest.approx(float(-likelihood.mean()) / BIT)
    assert -(length.codes.mean + length.pixels.mean) * BIT == pytest.approx(length.bound.mean)
    assert length.per_dimension.mean == pytest.approx((length.codes.mean + length.pixels.mean) / 16)
    assert length.per_dimension.stderr == pytest.approx(length.bound.mean_stderr / (16 * BIT))
    assert f"bits per code {length.per_code:.3f}" in str(length)
    assert f"\n  z: {code_use(program, x)['z']}" in str(length)


def mixture(scale):
    """A program whose p(x) is a mixture of six normals, at the codes, and the mixture."""
    program = pv.VAE(
        pv.CodePrior(Indices(), book := placed(torch.randn(6, 3))),
        pv.Normal(nn.Identity(), scale),
        pv.Quantised(nn.Identity(), book),
    )
    components = dist.Normal(book.vectors.double(), scale).to_event(1)
    return program.double().eval(), MixtureSameFamily(Categorical(logits=program.prior.prior.logits), components)


def test_where_codes_are_certain_the_bound_is_log_p():
    program, law = mixture(0.02)
    x = law.sample((200,))
    bound = code_length(program, x).bound
    torch.testing.assert_close(bound.value, law.log_prob(x), rtol=0, atol=1e-6)


def test_elsewhere_the_bound_is_one_term_of_log_p():
    program, law = mixture(1.0)
    x = law.sample((200,))
    bound, exact = code_length(program, x).bound.value, law.log_prob(x).detach()
    terms = law.component_distribution.log_prob(x[:, None]) + law.mixture_distribution.logits
    chosen = code_indices(program, x)["z"]
    torch.testing.assert_close(bound, terms[range(200), chosen].detach())
    assert (bound < exact).all()
    assert float((exact - bound).mean()) > 0.3


def test_no_code_gives_a_higher_bound_than_their_sum():
    program, x = vqvae(prior=Indices(2, 2)).eval(), pictures(5)
    every = torch.cartesian_prod(*[torch.arange(6)] * 4).reshape(-1, 2, 2)
    z = program.posterior.codebook.embed(every).movedim(-1, 1)
    with torch.no_grad():
        joint = program.prior().log_prob(z)[:, None] + program.likelihood(z[:, None]).log_prob(x)
    bound = code_length(program, x).bound.value
    digits = code_indices(program, x)["z"].flatten(1) @ torch.tensor([216, 36, 6, 1])
    torch.testing.assert_close(bound, joint[digits, range(5)].double())
    assert (bound < joint.double().logsumexp(0)).all()


def test_what_the_second_stage_learns_is_the_bits_of_codes():
    prior = pv.PixelCNN(pv.CodeGrid(6, (2, 2), width=4), 1, first=3)
    program, x = vqvae().eval(), pictures(64)
    indices = code_indices(program, x)["z"]
    uniform = code_length(program, x)
    fit(pv.Density(prior), indices, epochs=10, batch_size=16, optimizer=ADAM, compile="off")
    program.prior.prior = prior.eval()
    learned = code_length(program, x)
    alone = pv.log_likelihood(pv.Density(prior), indices)
    assert learned.codes.mean == pytest.approx(-alone.mean / BIT, rel=1e-5)
    assert learned.codes.mean < uniform.codes.mean - 3 * learned.codes.stderr
    assert learned.pixels == uniform.pixels
    assert learned.use == uniform.use


def test_latents_without_codes_count_by_their_divergence():
    program, x = TwoLatents().eval(), 3 * torch.randn(20, 8)
    length = code_length(program, x)
    rate = kl_divergence(torch.distributions.Normal(x[:, 0], 0.5), torch.distributions.Normal(0.0, 1.0))
    assert length.codes.mean == pytest.approx(4 * math.log2(6) + float(rate.mean()) / BIT, rel=1e-5)
    assert math.isnan(length.per_code.mean)  # it is not of codes alone
    assert length.dimensions == 8
    assert set(length.use) == {"top", "bottom"}


# ---- usage
@pytest.mark.parametrize("kind", BOOKS)
def test_use_is_its_formulas_averaged_over_codebooks(kind):
    program, x = vqvae(kind).eval(), pictures(50)
    indices = code_indices(program, x)["z"].reshape(-1, 1 if kind == "one" else 2)
    shares = [torch.bincount(column, minlength=6) / len(column) for column in indices.T]
    use = code_use(program, x, batch_size=7)["z"]
    assert use.codes == 6
    assert use.places == indices.numel() / 50
    assert use.usage == pytest.approx(sum(int((p > 0).sum()) for p in shares) / (6 * len(shares)))
    assert use.perplexity == pytest.approx(sum(math.exp(entropy(p)) for p in shares) / len(shares), rel=1e-5)
    assert str(use) == f"{use.usage:.1%} of 6 codes in use, perplexity {use.perplexity:.1f}; {use.places} places"


@pytest.mark.parametrize("judge", [code_use, code_length])
def test_a_collapsed_codebook_is_warned_of(judge):
    with pytest.warns(UserWarning, match=re.escape("usage: 1 of 6 codes are in use, with a perplexity of 1.0")):
        judge(collapsed(), pictures())


def test_no_warning_where_none_is_wanted_or_due():
    use = code_use(collapsed(), pictures(), warn=False)["z"]
    assert (use.usage, use.perplexity) == (pytest.approx(1 / 6), pytest.approx(1.0))
    assert code_use(vqvae().eval(), pictures(50))["z"].perplexity > 2


def test_of_several_codebooks_one_that_collapsed_is_warned_of():
    program = vqvae("product").eval()
    program.posterior.codebook.each[1].place(torch.cat([torch.zeros(1, 3), torch.full((5, 3), 1e4)]))
    with pytest.warns(UserWarning, match="usage: 1 of 6"):
        use = code_use(program, pictures(50))["z"]
    assert 1 / 6 < use.usage < 1


# ---- the hook
def train(program, x, *hooks):
    objective = pv.ELBO(penalties=[pv.Commitment()])
    return fit(program, x, objective=objective, epochs=3, batch_size=20, hooks=hooks, compile="off")


def test_the_hook_adds_columns_and_changes_nothing_else(tmp_path):
    x, file = pictures(60), tmp_path / "metrics.csv"
    watched, plain = vqvae(), vqvae()
    run = train(watched, x, WatchCodes(x), pv.LogCSV(file))
    other = train(plain, x)
    assert same(weights(watched), weights(plain))
    assert [row["train"] for row in run.history] == [row["train"] for row in other.history]
    use = code_use(watched, x)["z"]
    assert (run.history[-1]["perplexity"], run.history[-1]["usage"]) == (use.perplexity, use.usage)
    with file.open() as rows:
        logged = [float(row["perplexity"]) for row in csv.DictReader(rows)]
    assert logged == pytest.approx([row["perplexity"] for row in run.history], rel=1e-3)


def test_the_hook_names_the_latent_where_there_are_several():
    x = 3 * torch.randn(40, 8)
    program = TwoLatents()
    run = train(program, x, WatchCodes(x))
    use = code_use(program, x)
    for name in ("top", "bottom"):
        assert run.history[-1][f"perplexity {name}"] == use[name].perplexity
        assert run.history[-1][f"usage {name}"] == use[name].usage


def test_the_hook_warns_at_the_end_and_only_there():
    program, x = collapsed(), pictures(40)
    program.posterior.codebook.revive = None
    with pytest.warns(UserWarning, match="usage: 1 of 6") as caught:
        run = train(program, x, WatchCodes(x))
    assert len(caught) == 1
    assert [row["usage"] for row in run.history] == [pytest.approx(1 / 6)] * 3


# ---- refusals
@pytest.mark.parametrize("judge", [code_indices, code_use, code_length])
def test_a_program_without_codes_is_refused(judge):
    program = pv.VAE(pv.StandardNormal(2), pv.Normal(pv.MLP(2, 4), 0.3), pv.mean_field(pv.MLP(4, 4)))
    with pytest.raises(ValueError, match="no latent of its guide is quantised; draw one from `Quantised`"):
        judge(program, torch.randn(5, 4))


@pytest.mark.parametrize("judge", [code_indices, code_use, code_length])
def test_data_that_do_not_suit_the_program_are_refused(judge):
    with pytest.raises(ValueError, match=re.escape("expected inputs of shape (..., 1, 4, 4), got (5, 16)")):
        judge(vqvae(), torch.randn(5, 16))
