"""A (model, guide) pair as one torch module that owns every parameter of both programs.

Pyro keeps parameters in a global store. Here each pair is its own store: parameters of modules are used where
they live, those of bare ``pyro.param`` statements become parameters of the pair, and the global store is never
touched. Training, saving and moving a pair is then training, saving and moving a module.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from ppl_vae.graphs import capturing

__all__ = ["Batch", "Pair", "Program", "as_pair", "evaluating", "prior_guided", "unregistered"]

Batch = tuple[Tensor, ...]


@runtime_checkable
class Program(Protocol):
    """Anything with a Pyro ``model`` and a Pyro ``guide`` of the same batch of tensors.

    Two optional methods make it nicer to use: ``check(*columns)`` raises ValueError for data that the program
    cannot take; ``blank(size, *context)`` gives a batch of the right shapes, for sampling from the model.
    """

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """Declare p(x, z | c)."""

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """Declare q(z | x, c)."""


class _OwnParams(Messenger):  # type: ignore[misc]
    """Answer ``pyro.param`` from a pair instead of from the global store."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        if msg["done"]:  # answered by another pair, whose program this one runs
            return
        name: str = msg["name"]
        init = msg["args"][1] if len(msg["args"]) > 1 else None
        constraint = msg["kwargs"].get("constraint", constraints.real)
        live = isinstance(init, nn.Parameter) or (torch.is_tensor(init) and self.stands_in(name, init))
        if live and constraint is constraints.real:
            # A module's own parameter, used where it lives; under functional_call, what stands in for it.
            if isinstance(init, nn.Parameter):
                self.pair.adopt(name, init)
            msg["value"] = init
        elif init is not None or name in self.pair.constraints:
            msg["value"] = self.pair.own(name, init, constraint)
        else:
            return  # a PyroModule's constrained parameter: Pyro answers, `_pyro_post_param` adopts
        msg["done"] = True

    def stands_in(self, name: str, init: Tensor) -> bool:
        """Whether a tensor stands in for a parameter of a module, perhaps one that was frozen up to now."""
        thawed = capturing() and init.requires_grad and name not in self.pair.constraints
        return name in self.pair.known or thawed

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        unconstrained = getattr(msg["value"], "unconstrained", None)
        if unconstrained is not None and msg["name"] not in self.pair.constraints:
            self.pair.adopt(msg["name"], unconstrained())


class Pair(nn.Module):
    """A Pyro model and a Pyro guide of the same batch: what everything in this library works on.

    Args:
        model: callable of a batch of tensors declaring p(x, z | c).
        guide: callable of the same batch declaring q(z | x, c).

    Functions, modules and bound methods of modules may be given. Modules, and those whose methods are given,
    become submodules. A net that a plain function closes over must be registered with ``pyro.module``, as
    under Pyro's own SVI, to be trained; moving such a net's buffers to a device is the caller's.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     a = pyro.param("a", torch.tensor(0.3))
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         pyro.sample("z", dist.Normal(a * x, 0.7))
    >>> pair = Pair(model, guide)
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        super().__init__()
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise ValueError(f"{name}: expected a callable of a batch, got {type(program).__name__}")
        self.programs = nn.ModuleList(_modules_of(model, guide))
        self.params = nn.ParameterDict()
        self.constraints: dict[str, constraints.Constraint] = {}
        self.known: dict[str, Tensor] = {}  # adopted parameters, where they live
        self.expected: dict[str, Tensor] = {}  # loaded values of parameters not yet created
        self.__dict__["_callables"] = (model, guide)  # modules among them are registered above
        self.layout: Any = None  # set by layout.inspect

    @property
    def program(self) -> Any:
        """The object that declares the model, where there is one, else the model function."""
        model = self.raw_model
        return getattr(model, "__self__", model)

    @property
    def owners(self) -> tuple[Any, ...]:
        """Objects whose methods model and guide are, where they are no modules."""
        found = (getattr(program, "__self__", None) for program in self.callables)
        return tuple(o for o in found if not isinstance(o, nn.Module) and hasattr(o, "__dict__"))

    @property
    def device(self) -> torch.device:
        """Where the parameters are; the CPU while there are none."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the parameters; torch's default while there are none."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def callables(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The model and the guide as they were given."""
        given: tuple[Callable[..., Any], Callable[..., Any]] = self.__dict__["_callables"]
        return given

    @property
    def raw_model(self) -> Callable[..., Any]:
        """The model as it was given."""
        return self.callables[0]

    def model(self, *batch: Tensor, **options: Any) -> Any:
        """Run the model with parameters from this pair."""
        with self._own_params():
            return self.raw_model(*batch, **options)

    def guide(self, *batch: Tensor, **options: Any) -> Any:
        """Run the guide with parameters from this pair."""
        with self._own_params():
            return self.callables[1](*batch, **options)

    def declare(self) -> None:
        """State every trainable parameter to Pyro's handlers, as ``pyro.module`` does."""
        with self._own_params():
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    pyro.param(f"pair.{name}", parameter)

    @contextmanager
    def _own_params(self) -> Iterator[None]:
        # PyroModules write to Pyro's store all the same: they find an empty one, and the user's is put back.
        count = len(self.params)
        with pyro.get_param_store().scope(), _OwnParams(self):
            yield
        if len(self.params) > count:
            self._release()

    def _release(self) -> None:
        """Leave to PyroModules, such as automatic guides, the parameters they have just registered as theirs."""
        theirs = {id(p) for p in self.programs.parameters()}
        for key in [k for k, p in self.params.items() if id(p) in theirs]:
            del self.params[key]
        self.constraints = {n: c for n, c in self.constraints.items() if _key(n) in self.params}

    def adopt(self, name: str, parameter: Tensor) -> None:
        """Make a closed-over module's parameter one of the pair's, unless it is already.

        Raises:
            ValueError: another closed-over parameter has the name.
        """
        if self.known.get(name) is parameter:
            return
        self.known[name] = parameter
        if any(parameter is p for p in self.parameters()):
            return
        if _key(name) in self.params:
            raise ValueError(f"param {name!r}: two different parameters have this name; name their nets apart")
        self.params[_key(name)] = cast(nn.Parameter, parameter)
        if (stored := self._loaded(name, parameter)) is not None:
            parameter.data.copy_(stored)

    def expect(self, state: dict[str, Tensor]) -> None:
        """Take from loaded weights those of statements that have not run yet; they get them when they do."""
        for key in [k for k in state if k.startswith("params.") and k not in self.state_dict()]:
            self.expected[key.removeprefix("params.")] = state.pop(key)

    def _loaded(self, name: str, like: Tensor) -> Tensor | None:
        stored = self.expected.get(_key(name))
        if stored is not None and stored.shape != like.shape:
            raise ValueError(
                f"param {name!r}: the loaded weights have shape {tuple(stored.shape)}, "
                f"the program's {tuple(like.shape)}"
            )
        return self.expected.pop(_key(name), None)

    def own(self, name: str, init: Any, constraint: constraints.Constraint) -> Tensor:
        """The constrained value of a ``pyro.param`` statement, created from ``init`` when first met."""
        if name not in self.constraints:
            value = (init() if callable(init) else init).detach()
            if not bool(constraint.check(value).all()):  # type: ignore[no-untyped-call]
                raise ValueError(f"param {name!r}: its initial value lies outside its constraint {constraint}")
            unconstrained = transform_to(constraint).inv(value).clone().contiguous()
            stored = self._loaded(name, unconstrained)
            self.params[_key(name)] = nn.Parameter(unconstrained if stored is None else stored.to(unconstrained))
            self.constraints[name] = constraint
        parameter = self.params[_key(name)]
        constrained: Tensor = transform_to(self.constraints[name])(parameter)
        if constrained is parameter:
            constrained = parameter.view_as(parameter)  # Pyro's subsampling writes attributes on the value
        constrained.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
        return constrained


def _key(name: str) -> str:
    return name.replace(".", "/")  # torch allows no dot in a parameter's name


def _modules_of(*programs: Callable[..., Any]) -> list[nn.Module]:
    owners = [getattr(p, "__self__", p) for p in programs]
    return list(dict.fromkeys(o for o in owners if isinstance(o, nn.Module)))


def as_pair(program: Program | Pair) -> Pair:
    """The pair of a program: always the same one for the same object, so that its parameters persist.

    Raises:
        ValueError: ``program`` has no callable ``model`` and ``guide``, or cannot remember its pair.
    """
    if isinstance(program, Pair):
        return program
    model, guide = getattr(program, "model", None), getattr(program, "guide", None)
    if not callable(model) or not callable(guide):
        raise ValueError(
            f"program: expected an object with a model and a guide, got {type(program).__name__}; "
            "give Pair(model, guide) for two functions"
        )
    attributes = getattr(program, "__dict__", None)
    if not isinstance(attributes, dict):
        raise ValueError(
            "program: expected an object with attributes of its own, to which its pair is tied; "
            "give Pair(program.model, program.guide), and keep it"
        )
    pair: Pair | None = attributes.get("_ppl_vae_pair")
    if pair is None or pair.callables != (model, guide):  # none yet, or the program was given another guide
        pair = Pair(model, guide)
        attributes["_ppl_vae_pair"] = pair  # not setattr: a module would register it inside itself
    return pair


def prior_guided(model: Callable[..., Any]) -> Pair:
    """The pair of a model alone: its guide is the prior, and draws the latents as the model does.

    Bounds of it are those of drawing from the prior, loose but for few latents; `ppl_vae.annealed` needs no
    better.

    Args:
        model: callable of a batch of tensors declaring p(x, z | c).

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> pair = prior_guided(model)
    """

    def guide(*batch: Tensor) -> None:
        with poutine.block(hide_fn=_is_observed):
            model(*batch)

    return Pair(model, guide)


def paired(program: Any) -> Pair:
    """The pair of a program, or of a model alone: a callable, or an object with a model and no guide."""
    if isinstance(program, Pair) or hasattr(program, "guide"):
        return as_pair(program)
    return prior_guided(getattr(program, "model", program))


def _is_observed(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and bool(site["is_observed"])


@contextmanager
def unregistered() -> Iterator[None]:
    """A block in which tensors without a gradient stand for parameters, without Pyro's warning of each.

    Evaluation mode would silence it too, but not for a module that the program makes as it runs.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not registered in the param store because requires_grad=False")
        yield


@contextmanager
def evaluating(pair: Pair) -> Iterator[None]:
    """Dropout and the like off for a block, then every module in the mode it was in."""
    training = [module for module in pair.modules() if module.training]
    pair.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
