"""The log joint density with its gradient in the latents: what Hamiltonian moves and annealing are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ppl_vae.capture import Captured, Compile, Engine
from ppl_vae.layout import inspect
from ppl_vae.pairs import Pair, Program, as_pair, evaluating
from ppl_vae.traces import log_joint

__all__ = ["LogJoint"]


class LogJoint:
    """Log p(x, z) of a program and its gradient in z, captured as one graph for each shape.

    Args:
        program: the pair; its guide is not run, but once to check the first batch.
        compile: as in `ppl_vae.fit`; "auto" compiles, for such a function is called thousands of times.

    >>> import ppl_vae as pv
    >>> vae = pv.VAE(pv.StandardNormal(2), pv.Bernoulli(pv.MLP(2, 9)), pv.mean_field(pv.MLP(9, 4)))
    >>> value, gradient = LogJoint(vae, compile="off")({"z": torch.zeros(16, 3, 2)}, torch.zeros(3, 9))
    >>> value.shape, gradient["z"].shape
    (torch.Size([16, 3]), torch.Size([16, 3, 2]))
    """

    def __init__(self, program: Program | Pair, *, compile: Compile = "auto") -> None:
        self.pair, self.engine = as_pair(program), Engine(compile)
        self.captured: dict[tuple[str, ...], Captured] = {}
        self.held: list[int] = []

    def __call__(self, latents: Mapping[str, Tensor], *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the density and its gradient.

        Args:
            latents: every latent site of the model -> floating-point (K, B, *event), with inner plates between
                B and event.
            *batch: tensors as the model takes them, first dimension B.

        Returns:
            Log p(x, z) in nats, (K, B), and site -> its gradient, of the latent's shape.

        Raises:
            ValueError: a latent that is discrete, and what `log_joint` refuses.
        """
        for name, value in latents.items():
            if not value.is_floating_point():
                raise ValueError(f"latents {name!r}: {value.dtype} has no gradient; enumerate or sum it out")
        if self.pair.layout is None:
            inspect(self.pair, batch)  # it looks at values, which a captured function cannot
        held = [id(t) for t in (*self.pair.parameters(), *self.pair.buffers())]
        if held != self.held:  # loaded or moved since
            self.captured, self.held = {}, held
        names = tuple(latents)
        if names not in self.captured:
            self.captured[names] = Captured(self.engine, [self.pair], partial(self.both, names))
        with evaluating(self.pair):
            value, *gradients = self.captured[names](*latents.values(), *batch)
        return value, dict(zip(names, gradients, strict=True))

    def both(self, names: tuple[str, ...], *tensors: Tensor) -> Sequence[Tensor]:
        """The density, then its gradients."""
        with torch.enable_grad():
            values = [z.detach().requires_grad_() for z in tensors[: len(names)]]
            density = log_joint(self.pair, dict(zip(names, values, strict=True)), *tensors[len(names) :])
            gradients = torch.autograd.grad(density.sum(), values)
        return density.detach(), *gradients
