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

from ppl_vae.pairs import unregistered

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


def _plain(value: Any) -> bool:
    """Whether an attribute is compared by value."""
    kind = type(value)
    return KINDS[kind] or (kind is tuple and all(KINDS[type(v)] for v in value))


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
        parts = self.parts()
        key: list[Any] = [self.version]
        for part in parts:
            values = part.values
            for name in part.names:
                value: Any = values.get(name)
                key.append(value if _plain(value) else type(value))
            for parameter in part.parameters.values():
                key.append(parameter is not None and parameter.requires_grad)
            for buffer in part.buffers.values():
                key.append(buffer is None)
        return tuple(key)

    def held(self) -> dict[tuple[int, str], tuple[Any, Any]]:
        """The same with names: (owner's id, name) -> (owner, value)."""
        found: dict[tuple[int, str], tuple[Any, Any]] = {}
        for part in self.parts():
            for name, value in part.values.items():
                if name not in STANDARD and _plain(value):
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
            with unregistered():
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
    def untouched(self, blank: Iterable[tuple[int, str]] = ()) -> Iterator[set[tuple[int, str]]]:
        """Take back whatever running a program changes in attributes, lists and dictionaries; say what that was.

        Args:
            blank: attributes to fill meanwhile with a thing that nothing can be computed from.

        Yields:
            A set, filled at the end with the owner's id and the name of each. Classes of torch, Pyro and this
            library are left out: they keep nothing that matters.
        """
        before = [(part, dict(part.values), dict(part.buffers)) for part in self.parts()]
        copies = {
            id(value): (value, value.copy())
            for _, values, _ in before
            for name, value in values.items()
            if type(value) in (dict, list) and name not in STANDARD
        }
        changed: set[tuple[int, str]] = set()
        for part, _, _ in before:
            part.values.update({name: BLANK for name in part.values if (id(part.owner), name) in blank})
        try:
            yield changed
        finally:
            for part, values, buffers in before:
                now = dict(part.values)
                part.values.clear()
                part.values.update(values)
                names = {*now, *values} - STANDARD if _of_users(part.owner) else set()
                for name in (n for n in names if not n.startswith("_pyro")):
                    old, new = values.get(name, BLANK), now.get(name, BLANK)
                    held = copies.get(id(old))
                    if not _equal(old, new) or (held is not None and not _equal_inside(*held)):
                        changed.add((id(part.owner), name))
                changed |= {
                    (id(part.owner), n)
                    for n, b in part.buffers.items()
                    if b is not None and buffers.get(n) is None
                }
            for container, copied in copies.values():
                container.clear()
                container.update(copied) if isinstance(container, dict) else container.extend(copied)


class _Blank:
    """A thing that no program can do anything with but keep it."""

    def __bool__(self) -> bool:
        raise TypeError("this attribute is blank")

    def __eq__(self, other: object) -> bool:
        raise TypeError("this attribute is blank")

    __hash__ = None  # type: ignore[assignment]


BLANK: Any = _Blank()


def _of_users(owner: Any) -> bool:
    return not type(owner).__module__.startswith(("torch.", "pyro.", "ppl_vae."))


def _equal(old: Any, new: Any) -> bool:
    """Whether an attribute is what it was: the same thing, or a number or word of the same value."""
    return old is new or (KINDS[type(old)] and type(old) is type(new) and bool(old == new))


def _equal_inside(now: Any, then: Any) -> bool:
    """Whether a list or dictionary holds what it held."""
    pairs = (
        zip(now, then, strict=False)
        if isinstance(now, list)
        else ((v, then.get(k, BLANK)) for k, v in now.items())
    )
    return len(now) == len(then) and all(_equal(a, b) for a, b in pairs)
