"""Training steps run by the engine: gather a batch, compute and clip gradients, step, as one where that can be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ppl_vae.batches import Data, Source
from ppl_vae.capture import Captured, Compile, Engine
from ppl_vae.graphs import CudaGraph, first_line, kind
from ppl_vae.holding import Key
from ppl_vae.pairs import Batch
from ppl_vae.ranks import connected, count_ranks, idle, joint_mean, over_ranks, own_count
from ppl_vae.transforms import Transform
from ppl_vae.updates import UntakenError, Update, all_finite, clipped, gradients

__all__ = ["Feed", "Given", "Share", "Stepper"]

WARM_UP = 3  # steps of one shape before it is recorded on CUDA
OFTEN = 50  # times that a stream has given a shape, before it is expected to go on


class Given:
    """Items of a step that are batches made by the caller."""

    columns: Batch = ()

    def present(self, *arguments: Tensor) -> Batch:
        """The batch of an item."""
        return arguments

    def uses(self, *arguments: Tensor) -> float:
        """How often items of such shapes are expected."""
        return math.inf


class Share(NamedTuple):
    """What of a step's batch is this process's.

    Attributes:
        item: for the feed to present.
        rows: how many data of it count; none where another's keep this process in step.
        joined: how many data the batch has, in all processes together.
    """

    item: Batch
    rows: int
    joined: int


class Feed(Given):
    """A source's batches as items of a step.

    Data that lie on the device are gathered inside the graph: an item is then (row numbers,), and the columns are
    arguments of the graph before it. An item of any other source, or under a transform that is not known to be
    made of tensor operations alone, is the batch itself.

    Args:
        source: the data.
        size: batch size.
        epochs: how often the data will be gone through.
    """

    def __init__(self, source: Source, size: int, epochs: int) -> None:
        self.source, self.size, self.epochs = source, size, epochs
        self.seen: Counter[Any] = Counter()
        self.rows = source if isinstance(source, Data) and _gathered_inside(source) else None
        self.columns = () if self.rows is None else self.rows.columns

    def shares(self, seed: int, epoch: int) -> Iterator[Share]:
        """The steps of an epoch; all processes have as many."""
        items = self.epoch(seed, epoch)
        if not isinstance(self.source, Data):
            yield from _in_step(items)
            return
        several, rows = count_ranks() > 1, len(self.source)
        for item, start in zip(items, range(0, rows, self.size), strict=True):
            joined = min(self.size, rows - start)
            yield Share(item, own_count(joined) if several else joined, joined)

    def epoch(self, seed: int, epoch: int) -> Iterator[Batch]:
        """This process's data in an order that depends on the seed and the epoch's number."""
        if self.rows is None:
            return self.source.epoch(self.size, seed, epoch)
        return ((rows,) for rows in self.rows.rows(self.size, seed, epoch))

    def ordered(self) -> Iterator[Batch]:
        """This process's data in their own order."""
        if self.rows is None:
            return self.source.own_batches(self.size)
        order = torch.arange(len(self.rows), device=self.columns[0].device)
        return ((order[own],) for own in self.rows.own_slices(self.size))

    def present(self, *arguments: Tensor) -> Batch:
        """The batch of the columns and an item."""
        if self.rows is None:
            return arguments
        return self.rows.presented(arguments[:-1], arguments[-1])

    def uses(self, *arguments: Tensor) -> float:
        """How often items of such shapes are expected: known of data in memory, seen of a stream."""
        if isinstance(self.source, Data):
            full, rest = divmod(len(self.source), self.size)
            return self.epochs * (full if len(arguments[-1]) == own_count(self.size) else bool(rest))
        shapes = tuple(map(kind, arguments))
        self.seen[shapes] += 1
        steps = self.source.steps(self.size)
        expected = math.inf if steps is None else self.epochs * steps
        return expected if self.seen[shapes] >= OFTEN else 0


def _in_step(items: Iterator[Batch]) -> Iterator[Share]:
    """A stream's batches; a process that has no more of them stays in step with those that have."""
    if count_ranks() == 1:
        for item in items:
            yield Share(item, len(item[0]), len(item[0]))
        return
    kept: Batch = ()
    while True:
        found = next(items, ())
        own = len(found[0]) if found else 0
        going, joined = over_ranks(torch.tensor([int(found != ()), own])).tolist()
        if not going:
            return
        kept = found or kept
        yield Share(kept, own, joined)


def _gathered_inside(data: Data) -> bool:
    return data.resident and (data.transform is None or isinstance(data.transform, Transform))


class _Gradients(Captured):
    """The value of an update's objective, and the gradients of its parameters.

    Results are the value and those gradients there are; ``used`` tells of which parameters, for each shape.
    """

    guarded = False  # whether a step that is not finite is refused

    def __init__(self, engine: Engine, update: Update, feed: Given) -> None:
        def value(*arguments: Tensor) -> Sequence[Tensor]:
            return (update.value(*feed.present(*arguments)),)

        obstacle = update.objective.obstacle(update.pair)
        super().__init__(engine, [update.pair, update.objective], value, feed.uses, obstacle)
        self.update, self.several = update, count_ranks() > 1
        self.used: dict[Key, list[bool]] = {}
        self.seen: list[list[bool]] = []  # the same, while it runs as it is or is traced

    def key(self, arguments: Sequence[Tensor]) -> tuple[Any, ...]:
        """What a graph is made for; groups of parameters may come to an optimizer later."""
        return (*super().key(arguments), *map(id, self.update.parameters))

    def plain(self, *arguments: Tensor) -> Sequence[Tensor]:
        """The value and the gradients at the parameters themselves."""
        with self.update.products():
            (value,) = self.function(*arguments)
            return self.found(value, self.update.parameters)

    def outputs(
        self, own: Sequence[Tensor], given: Sequence[Tensor], arguments: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The value and the gradients at other tensors than the parameters."""
        parameters = self.update.parameters
        state = [
            g.detach().requires_grad_(p.requires_grad) if isinstance(p, nn.Parameter) else g
            for p, g in zip(own, given, strict=True)
        ]
        places = {id(p): leaf for p, leaf in zip(own, state, strict=True)}
        leaves = [
            places[id(p)] if id(p) in places else torch.empty_like(p, requires_grad=True) for p in parameters
        ]
        with self.update.products():
            (value,) = super().outputs(own, state, arguments)
            # A net that a plain function closes over is out of reach: it goes on using its own parameters, which
            # the graph has as constants where they live.
            return self.found(value, leaves, parameters)

    def found(self, value: Tensor, *places: Sequence[Tensor]) -> Sequence[Tensor]:
        """The value and its gradients, each parameter's at the one of its places that the value depends on."""
        # Of several processes, gradients are clipped when they are put together.
        detached, found = gradients(value, places, None if self.several else self.update.clip_norm)
        self.seen.append([g is not None for g in found])
        return [detached, *(g for g in found if g is not None)]

    def run(self, key: Key, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run on arguments that have this key."""
        self.seen.clear()
        results = super().run(key, arguments)
        if self.seen:  # it has run as it is, or was traced
            self.used[self.running] = self.seen[-1]
        return results

    def step(self, arguments: Sequence[Tensor], rows: int) -> Tensor:
        """Take the update's step along the gradient of a batch that has so many rows here; return the value."""
        value, found = self.joined(arguments, rows) if self.several else self.computed(arguments)
        if self.guarded and not all_finite([value, *(g for g in found if g is not None)]):
            raise UntakenError(self.update, value, found)
        self.update.apply(found)
        return value

    def computed(self, arguments: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Value and gradients, one for each parameter, over this process's rows."""
        value, *found = self(*arguments)
        rest = iter(found)
        return value, [next(rest) if used else None for used in self.used[self.running]]

    def joined(self, arguments: Sequence[Tensor], rows: int) -> tuple[Tensor, list[Tensor | None]]:
        """The same over the rows of all processes."""
        with connected():  # a codebook speaks to the others within
            value, found = self.computed(arguments) if rows else self.idling(arguments)
        means, there = joint_mean([value, *found], [value, *self.update.parameters], rows)
        # Another process may have run into another branch of the program, but not within a graph.
        fixed = self.graphs.get(self.running) is not None
        used = [g is not None for g in found] if fixed else there()[1:]
        by_parameter = [g if has else None for g, has in zip(means[1:], used, strict=True)]
        return means[0], clipped(by_parameter, self.update.clip_norm)

    def idling(self, arguments: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """The same of data that do not count; as it is, for a graph would hold that for good."""
        with idle():
            value, *_ = self.plain(*arguments)
        self.running = ()
        return value, [None for _ in self.update.parameters]

    def device_only(self, arguments: Sequence[Tensor]) -> bool:
        """Whether such arguments have a graph all of whose tensors lie on the GPU, so that it can be recorded."""
        found = self.graphs.get(self.key(arguments))
        return found is not None and all(
            t.is_cuda for t in (*arguments, *found.state.read(), *found.graph.constants)
        )


class Stepper:
    """An `Update` run by an engine: the batch gathered, gradients computed and clipped in one captured graph.

    On CUDA, the optimizer's step joins them, where it can, and all is replayed as one launch. Of several processes
    each computes the gradient of its rows; between graph and optimizer, one call makes that of the batch of them.

    Args:
        update: the step.
        engine: how to run, or one of "auto", "require", "off".
        feed: where batches come from; without it, a step takes the batch itself.
        guarded: raise `UntakenError` instead of a step along numbers that are not finite. These are looked at
            before each step: on CUDA the host waits for them, and steps are not replayed as one launch.
    """

    def __init__(
        self,
        update: Update,
        engine: Engine | Compile = "require",
        feed: Given | None = None,
        guarded: bool = False,
    ) -> None:
        self.update = update
        self.engine = engine if isinstance(engine, Engine) else Engine(engine)
        self.feed = Given() if feed is None else feed
        self.gradients = _Gradients(self.engine, update, self.feed)
        self.gradients.guarded = guarded
        self.replays: dict[tuple[Any, ...], int | CudaGraph] = {}
        self.rates = _Rates(update.optimizer) if self._replays(guarded) else None

    def __call__(self, item: Batch, rows: int | None = None) -> Tensor:
        """Take the step on an item of the feed; return the mean objective, a scalar.

        Args:
            item: this process's.
            rows: how many data of it count, in a batch that is shared with other processes; by default all.
        """
        if self.gradients.several:
            return self.gradients.step((*self.feed.columns, *item), len(item[0]) if rows is None else rows)
        if self.rates is None or not item[0].is_cuda:
            return self.step(*item)
        return self.replayed(self.rates, item)

    def step(self, *item: Tensor) -> Tensor:
        """Take the step without replaying it."""
        return self.gradients.step((*self.feed.columns, *item), len(item[0]))

    def _replays(self, guarded: bool) -> bool:
        """Whether steps may be replayed as one launch: not where something is looked at or sent between them."""
        return self.engine.compile != "off" and not guarded and not self.gradients.several

    def recheck(self, item: Batch) -> None:
        """Give up a graph whose program has come to compute other things meanwhile, with a warning.

        Raises:
            ValueError: there is such a one, under "require".
        """
        if not self.gradients.recheck((*self.feed.columns, *item)):
            self.replays.clear()

    def forget(self) -> None:
        """Record steps anew: an optimizer was put into another state, whose tensors are others."""
        self.replays.clear()
        if self.rates is not None:
            self.rates = _Rates(self.update.optimizer)

    def replayed(self, rates: _Rates, item: Batch) -> Tensor:
        """Take the step as one launch; the first three of a shape warm up what cannot be recorded."""
        key = self.gradients.key(item)
        seen = self.replays.get(key, 0)
        if not rates.follow():
            return self.step(*item)
        if isinstance(seen, CudaGraph):
            return seen(*item)
        if seen < WARM_UP or not self.gradients.device_only((*self.feed.columns, *item)):
            self.replays[key] = seen + 1
            return self.step(*item)
        try:
            with rates.on_device():
                replay = self.replays[key] = CudaGraph(self.step, item)
        except RuntimeError as error:
            self.engine.warn(f"the step cannot be recorded as a CUDA graph ({first_line(error)})")
            rates.capturable = False
            return self.step(*item)
        return replay(*item)


class _Rates:
    """Learning rates of an optimizer as tensors, for a recorded step to read.

    Between steps, schedulers see and set plain numbers as ever. All other settings are recorded for good: where
    a scheduler changes one of these, such as a momentum, steps are no longer replayed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.groups = optimizer, optimizer.param_groups
        on_cuda = all(p.is_cuda for g in self.groups for p in g["params"])
        plain = not any(isinstance(g["lr"], Tensor) for g in self.groups)
        self.capturable = on_cuda and plain and all("capturable" in g for g in self.groups)
        if self.capturable:
            optimizer.__dict__["_warned_capturable_if_run_uncaptured"] = True  # so are the first steps, knowingly
            for group in self.groups:
                group["capturable"] = True
            self.tensors = [torch.tensor(float(g["lr"]), device=g["params"][0].device) for g in self.groups]
            self.numbers = [float(g["lr"]) for g in self.groups]
            self.settings = self.others()

    def others(self) -> list[dict[str, Any]]:
        rates = ("params", "lr", "initial_lr")
        return [{k: v for k, v in g.items() if k not in rates} for g in self.groups]

    def follow(self) -> bool:
        """Bring the tensors up to date; whether recorded steps still do what is asked for."""
        kept = self.optimizer.param_groups is self.groups  # load_state_dict brings others, and other state
        self.capturable = self.capturable and kept and self.others() == self.settings
        for i, group in enumerate(self.groups if self.capturable else ()):
            if group["lr"] != self.numbers[i]:
                self.numbers[i] = group["lr"]
                self.tensors[i].fill_(self.numbers[i])
        return self.capturable

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The optimizer reads its learning rates from the tensors."""
        for group, tensor in zip(self.groups, self.tensors, strict=True):
            group["lr"] = tensor
        try:
            yield
        finally:
            for group, number in zip(self.groups, self.numbers, strict=True):
                group["lr"] = number
