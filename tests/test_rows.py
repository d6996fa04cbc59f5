"""Columns in memory: the rows of each batch, presented inside a captured step, wherever the columns lie."""

import pytest
import torch
from small import WIDTH, conditions, cvae, pixels
from torch.fx.experimental.proxy_tensor import make_fx

import ppl_vae as pv
from ppl_vae import batches
from ppl_vae.batches import Data, fits, prepare
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded

X = pixels(50)
Y = torch.arange(50)


def test_rows_are_the_order_of_an_epoch():
    data = Data((X.clamp(0, 1) * 255).byte(), Y)
    rows = list(data.rows(16, seed=3, epoch=2))
    assert [len(r) for r in rows] == [16, 16, 16, 2]
    assert {r.dtype for r in rows} == {torch.int64}
    assert torch.equal(torch.cat(rows).sort().values, Y)
    for r, (x, y) in zip(rows, data.epoch(16, 3, 2), strict=True):
        assert torch.equal(y, r)
        assert torch.equal(x, data.columns[0][r] / 255.0)
    assert not torch.equal(torch.cat(rows), torch.cat(list(data.rows(16, 3, 3))))


@pytest.mark.parametrize("size", [1, 16, 25, 50, 51])
def test_steps_are_the_number_of_batches(size):
    data = Data(X)
    assert data.steps(size) == len(list(data.batches(size))) == len(list(data.rows(size, 0, 0)))


def test_presenting_is_a_pure_function_of_columns_and_rows_that_can_be_captured():
    raw = (X.clamp(0, 1) * 255).byte()
    data = prepare(as_pair(cvae(kind="bernoulli")), Data(raw, conditions(X), transform=pv.redraw), 16)
    rows = torch.tensor([4, 2, 4])
    graph = make_fx(lambda *given: data.presented(*given), tracing_mode="fake")(
        data.columns, rows
    )  # fake: no value can be read
    other = (raw.flip(0).contiguous(), conditions(X).flip(0).contiguous())
    for columns in (data.columns, other):
        drawn = []
        for function in (graph, data.presented):
            with seeded(5):
                drawn.append(function(columns, rows))
        assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
        assert torch.equal(drawn[0][1], columns[1][rows])
    with seeded(5):
        present = data.present(rows)
    with seeded(5):
        assert torch.equal(present[0], data.presented(data.columns, rows)[0])


def test_data_fit_on_a_gpu_if_they_take_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)  # by torch, of which it uses 100
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert fits(500, "cuda")
    assert not fits(501, torch.device("cuda:0"))
    assert fits(10**15, "cpu")


@pytest.mark.parametrize("resident", [True, False])
def test_preparing_asks_whether_what_the_model_takes_fits(monkeypatch, resident):
    asked = []
    monkeypatch.setattr(batches, "fits", lambda size, device: asked.append((size, device)) or resident)
    pair, raw = as_pair(cvae()), (X.clamp(0, 1) * 255).byte()
    for x, entry in ((X.double(), 4), (raw, 1)):  # floats in the precision of the pair, bytes as bytes; no Y
        source = prepare(pair, (x, conditions(X), Y))
        assert asked.pop() == (50 * WIDTH * entry + 50 * 8, pair.device)
        assert (source.resident, source[:7].resident, source.to("cpu").resident) == (resident, resident, True)


def test_columns_that_do_not_fit_stay_where_they_are_and_look_the_same():
    raw = (X.clamp(0, 1) * 255).byte()
    data = Data(raw, Y, transform=pv.redraw)
    away = data.to("meta", resident=False)
    assert away.columns[0] is raw
    assert [t.device.type for b in away.batches(16) for t in b] == ["meta"] * 8
    assert away.present(slice(3))[0].device.type == "meta"
    assert next(away.rows(16, 0, 0)).device.type == "cpu"  # where they are gathered
    near = data.to("cpu", torch.float64, resident=False)
    for walk in (lambda d: d.batches(16), lambda d: d.epoch(16, 3, 1), lambda d: [d.present(Y[:5])]):
        drawn = []
        for source in (near, data.to("cpu", torch.float64)):
            with seeded(0):
                drawn.append([t for b in walk(source) for t in b])
        assert drawn[0][0].dtype == torch.float64
        assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
