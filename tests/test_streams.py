"""Streams: every batch checked, in order and ahead of its use, and no thread left when nobody reads on."""

import gc
import threading
import time
from functools import partial

import pytest
import torch
from small import conditions, cvae, fit, pixels, same, vae, weights
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ppl_vae as pv
from ppl_vae import batches, streams
from ppl_vae.batches import Data, prepare
from ppl_vae.pairs import as_pair
from ppl_vae.rng import seeded
from ppl_vae.streams import Stream, prefetched

X = pixels(50)
Y = torch.arange(50)


@pytest.fixture(params=["as they come", "ahead"])
def reading(request, monkeypatch):
    """Batches as they are brought to the CPU, and as they are brought to a GPU."""
    if request.param == "ahead":
        for module in (batches, streams):
            monkeypatch.setattr(module, "delivered", prefetched)
    yield request.param
    assert not threads()


def threads():
    """The threads that read ahead."""
    return [t for t in threading.enumerate() if t.name.startswith("ppl_vae prefetch")]


def jobs(count, log=None, wrong=None):
    """Jobs that make one batch each; they log when they are drawn and run, and by which thread."""
    log = [] if log is None else log

    def made(i):
        log.append(("run", i, threading.get_ident()))
        if i == wrong:
            raise ValueError(f"job {i}")
        return (torch.full((2,), i),)

    for i in range(count):
        log.append(("drawn", i, threading.get_ident()))
        yield lambda i=i: made(i)


# ---- every batch is checked


def broken(values):
    """Batches (x, c) of binary pixels and labels, the third of which holds a row that does not suit."""
    x = pixels(50, "bernoulli")
    c = conditions(x)
    x[36, 2], c[36] = values
    return list(zip(x.split(16), c.split(16), strict=True))


STREAMS = {
    "list": lambda b: b,
    "DataLoader": lambda b: DataLoader(b, batch_size=None),
    "Stream": Stream,
    "Dataset": lambda b: TensorDataset(*(torch.cat(column) for column in zip(*b, strict=True))),
}


@pytest.mark.parametrize("form", STREAMS)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.25, 0), "site 'x': Bernoulli takes .*, got 0.25 in row 4; binarise the data"),
        ((torch.nan, 0), "tensor 0: row 4 holds NaN or infinity"),
        ((torch.inf, 0), "tensor 0: row 4 holds NaN or infinity"),
        ((1.0, 7), "unknown label 7 in row 4"),
    ],
)
def test_every_batch_of_a_stream_is_checked_and_not_the_first_alone(form, values, message):
    program, stream = cvae(kind="bernoulli"), STREAMS[form](broken(values))
    source = prepare(as_pair(program), stream, batch_size=16)
    batches = source.to("cpu").batches(16)
    assert [len(next(batches)[0]) for _ in range(2)] == [16, 16]
    with pytest.raises(ValueError, match=f"^data batch 2: {message}"):
        next(batches)
    with pytest.raises(ValueError, match=message.replace("row 4", r"row \d+")):
        fit(program, stream, epochs=1, batch_size=16)
    with pytest.raises(ValueError, match=f"^data batch 2: {message}"):
        pv.elbo(program, stream, batch_size=16)


def test_in_a_shuffled_epoch_the_batch_is_named_as_one():
    x = pixels(50, "bernoulli")
    x[36] = 0.25
    source = prepare(as_pair(vae("bernoulli")), TensorDataset(x), 16)
    with pytest.raises(ValueError, match=r"^shuffled data batch \d: site 'x'"):
        list(source.epoch(16, 0, 0))


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (
            (X[:0], Y[:0]),
            r"data batch 1: batch: tensors must share a first dimension of at least 1, got \(0, 12\)",
        ),
        ((torch.tensor(1.0), Y), "data batch 1: batch: tensors must share a first dimension"),
        ((X, Y[:3]), "data batch 1: batch: tensors must share a first dimension"),
        ((X,), "data batch 1: data: the model takes 2 tensors, got 1"),
    ],
)
def test_later_batches_have_the_columns_of_the_first(later, message):
    with pytest.raises(ValueError, match=message):
        fit(cvae(), [(X, conditions(X)), later], epochs=1)


def test_batches_are_checked_as_the_model_sees_them_and_before_they_move():
    """Bytes as fractions, in the pair's precision; on the host, whatever the device."""
    raw = (pixels(48, "bernoulli") * 255).byte()
    raw[40, 3] = 51
    source = prepare(as_pair(vae("bernoulli")), list(raw.split(16)), 16).to("meta")
    with pytest.raises(ValueError, match=r"data batch 2: site 'x': Bernoulli .* got 0.2 in row 8"):
        list(source.batches())
    with pytest.raises(ValueError, match="data batch 1: tensor 0: row 0 holds NaN or infinity"):
        fit(vae(), [X, X.double() + 1e300], epochs=1)  # infinite as float32
    assert len(list(Stream([X, X * torch.nan]).batches())) == 2  # nobody prepared it for a pair


# ---- ahead of their use


@pytest.mark.parametrize("depth", [0, 1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_batches_come_in_order_and_so_many_ahead(count, depth):
    log = []
    for i, (batch,) in enumerate(prefetched(jobs(count, log), "cpu", depth)):
        assert batch.tolist() == [i, i]
        assert max(n for what, n, _ in log if what == "drawn") == min(i + depth, count - 1)
    assert [n for what, n, _ in log if what == "run"] == list(range(count))
    assert not threads()
    ran = {who for what, _, who in log if what == "run"}
    assert len(ran) <= 1
    assert threading.get_ident() not in ran
    assert {who for what, _, who in log if what == "drawn"} <= {threading.get_ident()}


def test_work_goes_on_while_a_batch_is_in_use():
    started = threading.Event()

    def both():
        yield lambda: (X,)
        yield lambda: started.set() or (X,)

    ahead = prefetched(both(), "cpu")
    next(ahead)
    assert started.wait(10)
    ahead.close()


def test_an_error_in_the_thread_is_raised_in_its_turn():
    seen = []
    with pytest.raises(ValueError, match="job 3"):
        seen.extend(batch for (batch,) in prefetched(jobs(9, wrong=3), "cpu"))
    assert not threads()
    ahead = prefetched(jobs(9, wrong=3), "cpu")
    assert [int(next(ahead)[0][0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="job 3"):
        next(ahead)
    assert list(ahead) == []


def leave_by_break(ahead):
    for _ in ahead:
        break


def leave_by_close(ahead):
    next(ahead)
    ahead.close()


def use(error, ahead):
    for _ in ahead:
        raise error


def leave_by_error(ahead):
    with pytest.raises(ZeroDivisionError):
        use(ZeroDivisionError, ahead)


def leave_by_interrupt(ahead):
    with pytest.raises(KeyboardInterrupt):
        use(KeyboardInterrupt, ahead)


def interrupt_while_waiting(ahead):
    def interrupted(self):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams.Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(ahead)


LEAVE = [leave_by_break, leave_by_close, leave_by_error, leave_by_interrupt, interrupt_while_waiting]


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("form", ["jobs", "Stream", "Data"])
def test_the_thread_ends_when_its_reader_stops(monkeypatch, form, leave):
    def slow(i):
        time.sleep(0.01)
        return (X[i : i + 1],)

    for module in (batches, streams):
        monkeypatch.setattr(module, "delivered", prefetched)
    ahead = {
        "jobs": lambda: prefetched((lambda i=i: slow(i) for i in range(50)), "cpu"),
        "Stream": lambda: Stream(list(X.split(1))).batches(),
        "Data": lambda: Data(X, transform=pv.threshold()).to("cpu", resident=False).epoch(1, 0, 0),
    }[form]()
    leave(ahead)
    del ahead
    gc.collect()
    assert not threads()


def test_what_is_queued_when_the_reader_stops_is_dropped():
    begun, closing, ran = threading.Event(), threading.Event(), []

    def batch(number):
        if number:
            begun.set()
            closing.wait(10)
        ran.append(number)
        return (X,)

    ahead = prefetched((partial(batch, number) for number in range(9)), "cpu")
    next(ahead)
    begun.wait(10)
    timer = threading.Timer(0.3, closing.set)
    timer.start()
    ahead.close()
    timer.join()
    assert ran == [0, 1]


def test_an_error_of_the_iterable_is_raised_and_the_thread_ends(reading):
    def source():
        yield X
        raise OSError("the disk is gone")

    class Breaks:
        def __iter__(self):
            return source()

    with pytest.raises(OSError, match="the disk is gone"):
        list(Stream(Breaks()).batches())
    with pytest.raises(ValueError, match="the iterable gave no batch"):
        list(Stream([]).batches())


class Noisy:
    """Batches with noise of the default stream, as a Dataset's augmentation draws it."""

    def __iter__(self):
        return (x + torch.randn(len(x), 1) for x in X.split(16))


@pytest.mark.parametrize("idle", [0.0, 0.01])
def test_what_is_drawn_does_not_depend_on_timing(reading, idle):
    def drawn(source):
        seen = []
        with seeded(0):
            for (x,) in source.epoch(16, 1, 2):
                seen.append(x)
                time.sleep(idle)
        return seen

    once, again = (drawn(Stream(Noisy())) for _ in range(2))
    assert all(map(torch.equal, once, again))
    data = Data(X.clamp(0, 1), transform=pv.redraw)  # its draws are made when a batch is used, wherever it lies
    assert all(map(torch.equal, drawn(data), drawn(data.to("cpu", resident=False))))


def test_training_and_judging_do_not_depend_on_where_the_columns_lie(monkeypatch, reading):
    data = Data((X.clamp(0, 1) * 255).byte(), Y, transform=pv.redraw)
    results = []
    for resident in (True, False):
        monkeypatch.setattr(batches, "fits", lambda size, device, resident=resident: resident)
        program = vae("bernoulli")
        run = fit(program, data, data, epochs=2, batch_size=16)
        results.append(
            (weights(program), [r["valid"] for r in run.history], pv.elbo(program, data, batch_size=16))
        )
    (one, history, bound), (two, other, judged) = results
    assert same(one, two)
    assert history == other
    assert torch.equal(bound.value, judged.value)


def test_preparing_reads_one_batch_alone(monkeypatch):
    read, plain = [], streams.delivered
    ahead = {"cpu:0": prefetched}  # another name of the CPU, in the place of a GPU
    monkeypatch.setattr(streams, "delivered", lambda jobs, device: ahead.get(device, plain)(jobs, device))

    class Counted:
        def __iter__(self):
            for x in X.split(16):
                read.append(len(x))
                yield x

    source = prepare(as_pair(vae()), Counted(), device="cpu:0")
    assert read == [16]
    next(source.batches())
    assert read == [16, 16, 16, 16]


class Unsized(IterableDataset):
    def __iter__(self):
        return iter(X)


def test_steps_are_known_where_the_source_has_a_length():
    class Again:
        def __iter__(self):
            return iter(X.split(16))

    assert Stream(list(X.split(16))).steps() == 4
    assert Stream(Again()).steps() is None
    assert Stream(DataLoader(TensorDataset(X), batch_size=16, drop_last=True)).steps() == 3
    assert Stream(DataLoader(Unsized(), batch_size=16)).steps() is None
    assert batches.as_data(TensorDataset(X), 16).steps(16) == 4


def test_a_loader_with_workers_serves_as_one_without():
    loaders = [DataLoader(TensorDataset(X, Y), batch_size=16, num_workers=n) for n in (0, 1)]
    results = [[t for b in prefetched(_made(loader), "cpu") for t in b] for loader in loaders]
    assert all(map(torch.equal, *results))


def _made(loader):
    return Stream(loader)._jobs(loader, "data")


# ---- onto a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_streams_onto_a_gpu_bring_the_same_batches(pinned):
    x = torch.rand(64, 4, 1000)
    source = [(b.pin_memory() if pinned else b, b[:, 0, 0].long()) for b in x.split(4)]
    total = torch.zeros((), device="cuda", dtype=torch.float64)
    for i, (batch, _) in enumerate(Stream(source).to("cuda").batches()):
        assert batch.is_cuda
        torch.cuda._sleep(10_000_000)  # the copies run ahead of the kernels that read them
        total += (batch.double() * (i + 1)).sum()
    expected = sum((b.double() * (i + 1)).sum() for i, b in enumerate(x.split(4)))
    torch.testing.assert_close(total.cpu(), expected)
    assert not threads()


@pytest.mark.gpu
def test_batches_that_are_on_the_gpu_already_stay_there():
    batches_there = [X.double().cuda() + i for i in range(6)]
    for i, (batch,) in enumerate(Stream(batches_there).to("cuda", torch.float32).batches()):
        torch.testing.assert_close(batch.cpu(), X + i)


@pytest.mark.gpu
def test_columns_left_on_the_host_train_as_those_on_the_gpu(monkeypatch):
    data, results = Data((X.clamp(0, 1) * 255).byte(), transform=pv.redraw), []
    for resident in (True, False):
        monkeypatch.setattr(batches, "fits", lambda size, device, resident=resident: resident)
        pair = as_pair(vae("bernoulli")).to("cuda")
        source = prepare(pair, data, 16)
        assert source.columns[0].is_cuda == resident
        with seeded(0, "cuda"):
            results.append([x.cpu() for e in range(3) for (x,) in source.epoch(16, 0, e)])
    assert all(map(torch.equal, *results))
