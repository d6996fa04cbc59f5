"""Training steps run by the engine: gather a batch, compute and clip gradients, step, as one where that can be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ppl_vae.batches import Data, Source
from ppl_vae.capture import Captured, Compile, Engine
from ppl_vae.graphs import CudaGraph, first_line, kind
from ppl_vae.holding import Key
from ppl_vae.pairs import Batch
from ppl_vae.transforms import Transform
from ppl_vae.updates import Update, gradients

__all__ = ["Feed", "Given", "Stepper"]

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

    def epoch(self, seed: int, epoch: int) -> Iterator[Batch]:
        """All data in an order that depends on the seed and the epoch's number."""
        if self.rows is None:
            return self.source.epoch(self.size, seed, epoch)
        return ((rows,) for rows in self.rows.rows(self.size, seed, epoch))

    def ordered(self) -> Iterator[Batch]:
        """All data in their own order."""
        if self.rows is None:
            return self.source.batches(self.size)
        order = torch.arange(len(self.rows), device=self.columns[0].device)
        return ((order[i : i + self.size],) for i in range(0, len(order), self.size))

    def present(self, *arguments: Tensor) -> Batch:
        """The batch of the columns and an item."""
        if self.rows is None:
            return arguments
        return self.rows.presented(arguments[:-1], arguments[-1])

    def uses(self, *arguments: Tensor) -> float:
        """How often items of such shapes are expected: known of data in memory, seen of a stream."""
        if isinstance(self.source, Data):
            full, rest = divmod(len(self.source), self.size)
            return self.epochs * (full if len(arguments[-1]) == self.size else bool(rest))
        shapes = tuple(map(kind, arguments))
        self.seen[shapes] += 1
        steps = self.source.steps(self.size)
        expected = math.inf if steps is None else self.epochs * steps
        return expected if self.seen[shapes] >= OFTEN else 0


def _gathered_inside(data: Data) -> bool:
    return data.resident and (data.transform is None or isinstance(data.transform, Transform))


class _Gradients(Captured):
    """The value of an update's objective, and the gradients of its parameters.

    Results are the value and those gradients there are; ``used`` tells of which parameters, for each shape.
    """

    def __init__(self, engine: Engine, update: Update, feed: Given) -> None:
        def value(*arguments: Tensor) -> Sequence[Tensor]:
            return (update.value(*feed.present(*arguments)),)

        obstacle = update.objective.obstacle(update.pair)
        super().__init__(engine, [update.pair, update.objective], value, feed.uses, obstacle)
        self.update = update
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
        detached, found = gradients(value, places, self.update.clip_norm)
        self.seen.append([g is not None for g in found])
        return [detached, *(g for g in found if g is not None)]

    def run(self, key: Key, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run on arguments that have this key."""
        self.seen.clear()
        results = super().run(key, arguments)
        if self.seen:  # it has run as it is, or was traced
            self.used[self.running] = self.seen[-1]
        return results

    def step(self, *arguments: Tensor) -> Tensor:
        """Take the update's step; return the value."""
        value, *found = self(*arguments)
        rest = iter(found)
        self.update.apply([next(rest) if used else None for used in self.used[self.running]])
        return value

    def device_only(self, arguments: Sequence[Tensor]) -> bool:
        """Whether such arguments have a graph all of whose tensors lie on the GPU, so that it can be recorded."""
        found = self.graphs.get(self.key(arguments))
        return found is not None and all(
            t.is_cuda for t in (*arguments, *found.state.read(), *found.graph.constants)
        )


class Stepper:
    """An `Update` run by an engine: the batch gathered, gradients computed and clipped in one captured graph.

    On CUDA, the optimizer's step joins them, where it can, and all is replayed as one launch.

    Args:
        update: the step.
        engine: how to run, or one of "auto", "require", "off".
        feed: where batches come from; without it, a step takes the batch itself.
    """

    def __init__(
        self,
        update: Update,
        engine: Engine | Compile = "require",
        feed: Given | None = None,
    ) -> None:
        self.update = update
        self.engine = engine if isinstance(engine, Engine) else Engine(engine)
        self.feed = Given() if feed is None else feed
        self.gradients = _Gradients(self.engine, update, self.feed)
        self.replays: dict[tuple[Any, ...], int | CudaGraph] = {}
        self.rates = _Rates(update.optimizer) if self.engine.compile != "off" else None

    def __call__(self, item: Batch) -> Tensor:
        """Take the step on an item of the feed; return the mean objective, a scalar."""
        if self.rates is None or not item[0].is_cuda:
            return self.step(*item)
        return self.replayed(self.rates, item)

    def step(self, *item: Tensor) -> Tensor:
        """Take the step without replaying it."""
        return self.gradients.step(*self.feed.columns, *item)

    def recheck(self, item: Batch) -> None:
        """Give up a graph whose program has come to compute other things meanwhile, with a warning.

        Raises:
            ValueError: there is such a one, under "require".
        """
        if not self.gradients.recheck((*self.feed.columns, *item)):
            self.replays.clear()

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
