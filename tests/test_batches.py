"""Data in every form that users have them: the same rows, each once an epoch, checked before any use."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from small import WIDTH, conditions, cvae, fit, pixels, vae, weights
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ppl_vae as pv
import ppl_vae.batches
from ppl_vae.batches import Data, Stream, as_data, prepare
from ppl_vae.pairs import as_pair

X = pixels(50)
Y = torch.arange(50)


def rows(batches):
    """The rows of an epoch, one after the other, and the sizes of its batches."""
    batches = [b[0] for b in batches]
    return torch.cat(batches), [len(b) for b in batches]


class Again:
    """Batches from a generator that starts anew with every iteration."""

    def __iter__(self):
        yield from X.split(16)


class Iterated(IterableDataset):
    def __iter__(self):
        return iter(X)


class Pairs(Dataset):
    """A map-style dataset of (array, int), as torchvision's are."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i].numpy(), i % 3


FORMS = {
    "tensor": lambda: X,
    "float64 array": lambda: X.double().numpy(),
    "tuple": lambda: (X, Y),
    "tuple of arrays": lambda: (X.numpy(), Y.numpy()),
    "Data": lambda: Data(X, Y),
    "TensorDataset": lambda: TensorDataset(X, Y),
    "Dataset of arrays": Pairs,
    "IterableDataset": Iterated,
    "DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=16),
    "shuffled DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True),
    "list of batches": lambda: list(X.split(16)),
    "list of tuples": lambda: list(zip(X.split(16), Y.split(16), strict=True)),
    "object": Again,
    "Stream": lambda: Stream(Again()),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_epoch_holds_every_row_once_however_the_data_come(form):
    with torch.random.fork_rng():
        source = prepare(as_pair(vae()), FORMS[form](), batch_size=16)
        seen, sizes = rows(source.epoch(16, seed=0, epoch=0))
        plain, plain_sizes = rows(source.batches(16))
    assert sizes == plain_sizes == [16, 16, 16, 2]
    assert seen.dtype == torch.float32
    assert torch.equal(seen.sort(0).values, X.sort(0).values)
    if form != "shuffled DataLoader":  # which shuffles itself
        assert torch.equal(plain, X)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: [x], lambda x: TensorDataset(x)])
def test_data_come_in_the_precision_of_the_pair(precision, form):
    program = vae().to(precision)
    for data in (form(X), form(X.double())):
        (batch,) = prepare(as_pair(program), data, 50).batches(50)
        assert batch[0].dtype == precision
        fit(program, data, epochs=1)


@pytest.mark.parametrize("form", FORMS)
def test_fit_takes_them_all(form):
    run = fit(vae(), FORMS[form](), FORMS[form](), epochs=2, batch_size=16)
    assert [row["step"] for row in run.history] == [4, 8]
    assert all(np.isfinite(row["valid"]) for row in run.history)


@pytest.mark.parametrize("form", ["tensor", "tuple", "TensorDataset", "Dataset of arrays"])
def test_the_order_is_new_each_epoch_and_depends_on_seed_and_epoch_alone(form):
    def order(seed, epoch, size=16):
        return rows(as_data(FORMS[form](), size).epoch(size, seed, epoch))[0]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = order(0, 0)
        torch.manual_seed(1)
        assert torch.equal(first, order(0, 0))
        assert torch.equal(first, order(0, 0, size=7))
        others = [order(0, 1), order(1, 0), X]
    assert not any(torch.equal(first, other) for other in others)
    assert not torch.equal(others[0], others[1])


def test_columns_stay_together():
    for x, y in Data(X, Y).epoch(16, 0, 0):
        assert torch.equal(x, X[y])
    for x, y in as_data(TensorDataset(X, Y), 16).epoch(16, 0, 0):
        assert torch.equal(x, X[y])


@pytest.mark.parametrize("form", ["list of tuples", "TensorDataset", "tuple"])
def test_columns_beyond_the_models_arguments_are_left_out(form):
    assert all(len(batch) == 1 for batch in prepare(as_pair(vae()), FORMS[form](), 16).batches(16))
    labelled = prepare(as_pair(cvae()), (X, conditions(X), Y), 16)
    assert all(len(batch) == 2 for batch in labelled.batches(16))


class Loose(nn.Module):
    """A model of any number of tensors, and a guide."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x, *more):
        self.got = len(more)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, WIDTH), 1.0).to_event(1), obs=x)

    def guide(self, x, *more):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


class Optional(Loose):
    def model(self, x, c=None):
        super().model(x, *([] if c is None else [c]))

    def guide(self, x, c=None):
        super().guide(x)


@pytest.mark.parametrize(
    ("program", "columns", "got"), [(Loose, 3, 2), (Loose, 1, 0), (Optional, 3, 1), (Optional, 1, 0)]
)
def test_a_model_gets_as_many_as_it_can_take(program, columns, got):
    program = program()
    fit(program, (X, Y, Y)[:columns], epochs=1)
    assert program.got == got


# ---- pixels as bytes, transforms


def test_bytes_are_presented_as_pixels_in_the_unit_interval():
    raw = torch.arange(256, dtype=torch.uint8).reshape(-1, 1)
    data = Data(raw, raw)
    (x, y), *_ = data.batches(256)
    assert data.columns[0].dtype == torch.uint8  # kept small in memory
    torch.testing.assert_close(x, torch.linspace(0, 1, 256)[:, None])
    assert torch.equal(y, raw)  # only the first column holds pixels


@pytest.mark.parametrize("form", [lambda x: x, lambda x: x.numpy(), TensorDataset, lambda x: list(x.split(16))])
def test_training_on_bytes_is_training_on_their_fractions(form):
    raw = (pixels(48).clamp(0, 1) * 255).byte()
    trained = []
    for data in (raw, raw / 255.0):
        program = vae()
        fit(program, form(data), epochs=1, batch_size=16)
        trained.append(torch.cat([p.flatten() for p in weights(program).values()]))
    torch.testing.assert_close(*trained)


def test_black_and_white_bytes_suit_a_bernoulli_and_grey_ones_do_not():
    raw = (pixels(48, "bernoulli") * 255).byte()
    fit(vae("bernoulli"), raw, epochs=1)
    raw[40, 3] = 51
    with pytest.raises(ValueError, match=r"site 'x': Bernoulli takes .* got 0.2 in row 40; binarise the data"):
        fit(vae("bernoulli"), raw, epochs=1)


def test_a_transform_sees_the_first_column_of_each_batch_whenever_it_is_presented():
    data = Data(X, Y, transform=lambda x: x + 100)
    assert all(torch.equal(x, X[y] + 100) for x, y in data.epoch(16, 0, 0))
    assert all(torch.equal(x, X[y] + 100) for x, y in data[10:20].to("cpu").batches(3))
    assert torch.equal(data.columns[0], X)


def test_redrawn_pixels_are_new_each_epoch_and_the_same_for_the_same_seed():
    data = Data(X.clamp(0, 1), transform=pv.redraw)
    seen = []

    class Program(pv.VAE):
        def guide(self, x):
            seen.append(x)
            super().guide(x)

    plain = vae("bernoulli")
    for _ in range(2):
        program = Program(plain.prior, plain.likelihood, plain.posterior)
        fit(program, data, epochs=2, batch_size=len(X), seed=3)
    a, b = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    first, second = a[-2:]
    assert not torch.equal(first.sum(0), second.sum(0))
    assert set(first.unique().tolist()) == {0.0, 1.0}


# ---- data that do not suit


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "numbers",
            "expected a tensor, an array, a tuple of them, a torch Dataset or an iterable of batches, got str",
        ),
        (None, "got NoneType"),
        ({"x": X}, "got dict"),
        (3.0, "got float"),
        (iter(X.split(16)), "an iterator is used up after one epoch"),
        ((b for b in X.split(16)), "an iterator is used up after one epoch"),
        (torch.empty(0, WIDTH), "column 0 is empty; at least one row is needed"),
        (torch.tensor(1.0), "column 0 is empty"),
        ((), "at least one column is needed"),
        ((X, Y[:3]), re.escape("columns must have the same number of rows, got [50, 3]")),
        ([], "the iterable gave no batch"),
        ([[]], "a batch holds no tensors"),
        ([["a", "b"]], "batch item 0: expected a tensor or an array, got str"),
        (np.array([["a"]]), "column 0: an array of <U1 cannot become a tensor"),
        (np.array([[object()]]), "column 0: an array of object cannot become a tensor"),
        ((X, np.array(["2020"] * 50, "datetime64[D]")), "column 1: an array of datetime64"),
        (torch.cat([X, torch.full((1, WIDTH), torch.nan)]), "data column 0: row 50 holds NaN or infinity"),
        (torch.cat([X, torch.full((1, WIDTH), torch.inf)]), "data column 0: row 50 holds NaN or infinity"),
        ([X[:4] * torch.inf, X], "data batch 0: tensor 0: row 0 holds NaN or infinity"),
        ([X, Y], re.escape("differ in rank, shapes [(50, 12), (50,)]; give columns as a tuple, (x, y)")),
        ([X.numpy(), Y], "differ in rank"),
        (X[:, 1:], re.escape("cannot take a batch of (50, 11) float32")),
        (X.reshape(-1, 3, 4), re.escape("cannot take a batch of (50, 3, 4) float32")),
        (X.long(), re.escape("cannot take a batch of (50, 12) int64")),
        ([X[:, 1:]], re.escape("cannot take a batch of (50, 11) float32")),
        ([torch.tensor(1.0)], "tensors must share a first dimension"),
    ],
)
def test_what_does_not_suit_is_refused_before_training(data, message):
    program = vae()
    kept = weights(program)
    with pytest.raises(ValueError, match=message):
        fit(program, data)
    assert all(torch.equal(kept[name], value) for name, value in weights(program).items())


@pytest.mark.parametrize("form", ["column", "stream"])
def test_grey_pixels_under_a_bernoulli_are_refused_with_their_row(form):
    x = pixels(50, "bernoulli")
    x[4, 2] = 0.25
    x[9, 1] = -1
    with pytest.raises(ValueError, match=r"site 'x': Bernoulli takes .* got 0.25 in row 4; binarise the data"):
        fit(vae("bernoulli"), x if form == "column" else [x])


def test_all_rows_in_memory_are_checked_and_not_the_first_batch_alone():
    x = pixels(50, "bernoulli")
    x[49, 2] = 0.25
    with pytest.raises(ValueError, match="row 49"):
        fit(vae("bernoulli"), x, batch_size=4)
    with pytest.raises(ValueError, match="row 49"):
        fit(vae("bernoulli"), x[:40], x, batch_size=4)


@pytest.mark.parametrize(
    ("x", "transform", "message"),
    [
        (X, pv.redraw, r"data column 0: redraw takes .*, got -?\d\S* in row \d+; rescale the data"),
        (torch.tensor([[0.5] * 12, [1.5] * 12]), pv.redraw, "got 1.5 in row 1"),
        (torch.tensor([[0.5] * 12, [-0.5] * 12]), pv.redraw, "got -0.5 in row 1"),
    ],
)
def test_levels_that_a_transform_does_not_take_are_refused(x, transform, message):
    with pytest.raises(ValueError, match=message):
        fit(vae("bernoulli"), Data(x, transform=transform))
    prepare(as_pair(vae("bernoulli")), Data(x, transform=pv.threshold()))  # which takes any
    prepare(as_pair(vae("bernoulli")), Data((x > 0).byte() * 255, transform=transform))


def test_supports_are_checked_in_parts_of_bounded_size(monkeypatch):
    x = pixels(50, "bernoulli")
    seen = []
    check = ppl_vae.batches.check_supports
    monkeypatch.setattr(ppl_vae.batches, "_CHUNK", 10 * WIDTH)
    monkeypatch.setattr(
        ppl_vae.batches, "check_supports", lambda layout, c: (seen.append(len(c[0])), check(layout, c))
    )
    prepare(as_pair(vae("bernoulli")), x)
    assert seen == [10] * 5
    for row, message in ((49, "^data from row 40 on: site 'x': .* in row 9;"), (3, "^site 'x': .* in row 3;")):
        broken = x.clone()
        broken[row, 2] = 0.25
        with pytest.raises(ValueError, match=message):
            prepare(as_pair(vae("bernoulli")), broken, batch_size=8)


def test_equal_batches_in_a_list_stay_batches():
    assert [len(b[0]) for b in as_data([X, X.numpy()]).batches()] == [50, 50]
    assert [len(b[0]) for b in as_data([X, X[:3]]).batches()] == [50, 3]


@pytest.mark.parametrize("size", [0, -3, 2.5, 16.0, True, "16"])
def test_batches_have_a_size(size):
    what = "at least 1" if type(size) is int else "an int"
    with pytest.raises(ValueError, match=re.escape(f"batch_size must be {what}, got {size!r}")):
        fit(vae(), X, batch_size=size)
    prepare(as_pair(vae()), X, np.int64(16))


def test_arrays_that_torch_does_not_take_are_copied():
    flipped, locked = X.numpy()[::-1, ::-1], X.numpy().copy()
    locked.setflags(write=False)
    assert np.array_equal(Data(flipped).columns[0].numpy(), flipped)
    assert torch.equal(Data(locked).columns[0], X)


def test_some_rows_a_name_and_a_length():
    data = Data(X, Y)
    assert len(data) == 50
    assert torch.equal(data[5:9].columns[0], X[5:9])
    assert torch.equal(data[torch.tensor([4, 2])].columns[1], torch.tensor([4, 2]))
    assert repr(data) == "Data((50, 12), (50,), transform=None)"
    assert repr(Stream([X])) == "Stream(list)"
    assert as_data(data) is data


def test_preparing_does_not_change_what_it_is_given():
    data, stream = Data(X, Y, transform=lambda x: x + torch.rand(1)), Stream([(X, Y)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for source in (data, stream):
            prepare(as_pair(vae()), source, 16)
        drawn = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.rand(1))  # nor the caller's stream
    assert len(data.columns) == 2
    assert [len(b) for b in stream.batches()] == [2]
