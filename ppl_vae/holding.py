"""What modules hold: tensors, which a graph takes as arguments, and the rest, which it holds fixed."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Holder", "Key"]

Key = tuple[Any, ...]
Store = dict[str, Any]

STANDARD = frozenset(vars(nn.Module())) - {"training"}  # torch's own attributes of every module
VALUES = (bool, int, float, complex, str, bytes, type(None), np.generic, Enum, torch.dtype, torch.device)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


class _Kinds(dict[type, bool]):
    """Whether attributes of a type are compared: numbers, words, flags, functions; not tensors or containers."""

    def __missing__(self, kind: type) -> bool:
        self[kind] = issubclass(kind, (*VALUES, *FUNCTIONS))
        return self[kind]


KINDS = _Kinds()


class _Part(NamedTuple):
    """A module, or another object that owns a program, its dictionaries, and what was found in them."""

    owner: Any
    values: Store
    parameters: Store
    buffers: Store
    children: Store
    known: tuple[Any, ...]  # the children
    size: int  # how many attributes
    names: tuple[str, ...]  # of those that count

    def changed(self) -> bool:
        """Whether attributes or children have come, gone or been exchanged."""
        children = self.children
        return len(self.values) != self.size or (bool(children) and (*children.values(),) != self.known)


class Holder:
    """Several modules, with all modules inside them and the objects that their programs belong to.

    Args:
        modules: their attribute ``owners``, where there is one, names objects besides modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = [*modules]
        self.found: list[_Part] = []
        self.version = 0
        self.ignored: set[tuple[int, str]] = set()  # attributes that do not count: owner's id, name

    def parts(self) -> list[_Part]:
        """All of them, each once; looked for anew where one has changed in kind."""
        if not self.found or any(part.changed() for part in self.found):
            self.version += 1
            self.found = [*self._look()]
        return self.found

    def _look(self) -> Iterator[_Part]:
        waiting: list[Any] = [*self.modules]
        seen: set[int] = set()
        for owner in waiting:  # it grows
            if owner is None or id(owner) in seen:
                continue
            seen.add(id(owner))
            values, module = vars(owner), isinstance(owner, nn.Module)
            parameters: Store = owner._parameters if module else {}
            buffers: Store = owner._buffers if module else {}
            inner: Store = owner._modules if module else {}
            names = [n for n in values if n not in STANDARD and (id(owner), n) not in self.ignored]
            children = (*inner.values(),)
            yield _Part(owner, values, parameters, buffers, inner, children, len(values), (*names,))
            waiting += [*children, *(getattr(owner, "owners", ()) if module else ())]

    def ignore(self, names: Iterable[tuple[int, str]]) -> None:
        """Leave attributes, by owner's id and name, out of account from now on."""
        self.ignored.update(names)
        self.found = []

    def key(self) -> Key:
        """What a graph holds fixed: attributes, modes, which parameters are trained, which modules there are."""
        key: list[Any] = [self.version]
        for part in self.parts():
            values = part.values
            for name in part.names:
                value: Any = values.get(name)
                kind = type(value)
                plain = KINDS[kind] or (kind is tuple and all(KINDS[type(v)] for v in value))
                key.append(value if plain else kind)
            for parameter in part.parameters.values():
                key.append(parameter is not None and parameter.requires_grad)
        key[0] = self.version
        return tuple(key)

    def held(self) -> dict[tuple[int, str], tuple[Any, Any]]:
        """The same with names: (owner's id, name) -> (owner, value)."""
        found: dict[tuple[int, str], tuple[Any, Any]] = {}
        for part in self.parts():
            for name, value in part.values.items():
                if (KINDS[type(value)] or type(value) is tuple) and name not in STANDARD:
                    found[id(part.owner), name] = part.owner, value
            for name, p in part.parameters.items():
                found[id(part.owner), name] = part.owner, p is not None and p.requires_grad
        return found

    def slots(self) -> list[tuple[Store, str]]:
        """Where parameters and buffers are kept, a place for each; of shared ones the first."""
        found: dict[int, tuple[Store, str]] = {}
        for part in self.parts():
            for store in (part.parameters, part.buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        found.setdefault(id(tensor), (store, name))
        return [*found.values()]

    @contextmanager
    def standing_in(self, own: Sequence[Tensor], given: Sequence[Tensor]) -> Iterator[None]:
        """Other tensors in place of the modules' own, wherever these are kept.

        What modules put in a buffer's place meanwhile is written into the tensor that stood there.
        """
        stand_ins = {id(mine): other for mine, other in zip(own, given, strict=True)}
        stores = [store for part in self.parts() for store in (part.parameters, part.buffers)]
        before = [dict(store) for store in stores]
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = stand_ins[id(tensor)]
        try:
            yield
            for store, kept in zip(stores, before, strict=True):
                for name, tensor in kept.items():
                    now = store.get(name)
                    if tensor is not None and now is not None and now is not stand_ins[id(tensor)]:
                        stand_ins[id(tensor)].copy_(now.detach())
        finally:
            for store, kept in zip(stores, before, strict=True):
                store.clear()
                store.update(kept)

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Take back what modules have kept meanwhile, if it is a stand-in: caches that tracing filled."""
        before = [(part.values, dict(part.values)) for part in self.parts()]
        copies: list[tuple[Any, Any]] = [
            (value, value.copy())
            for values, _ in before
            for name, value in values.items()
            if isinstance(value, dict | list) and name not in STANDARD
        ]
        try:
            yield
        finally:
            for values, kept in before:
                for name in [n for n, v in values.items() if isinstance(v, FakeTensor)]:
                    values.pop(name)
                    values |= {name: kept[name]} if name in kept else {}
            for container, copied in copies:
                inside = container.values() if isinstance(container, dict) else container
                if any(isinstance(v, FakeTensor) for v in inside):
                    container.clear()
                    container.update(copied) if isinstance(container, dict) else container.extend(copied)
