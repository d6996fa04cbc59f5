"""What a program with quantised latents makes of data: which codes, how many bits, how much of the codebook.

These codes are the data of a second stage, in which a prior over them is learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae.capture import Compile
from ppl_vae.codebooks import Quantiser
from ppl_vae.codes import QuantisedPoint, check_usage, perplexity, usage
from ppl_vae.estimates import Average, Estimate, average
from ppl_vae.evaluate import elbo, judging
from ppl_vae.hooks import Hook
from ppl_vae.pairs import Batch, Pair, Program
from ppl_vae.running import Run
from ppl_vae.sharding import presented
from ppl_vae.sites import base, statements
from ppl_vae.traces import by_datum, run_guide

__all__ = ["CodeLength", "CodeUse", "WatchCodes", "code_indices", "code_length", "code_use"]

BIT = math.log(2)  # nats


def code_indices(program: Program | Pair, data: Any, *, batch_size: int = 100, seed: int = 0) -> dict[str, Tensor]:
    """Which codes the guide gives to each datum: what a prior over codes is trained on.

    ``fit(Density(prior), code_indices(vae, x)["z"])`` learns a prior, and ``vae.prior.prior = prior`` puts it in.

    Args:
        program: the pair.
        data: data in any form that ``fit`` takes.
        batch_size: data encoded at once.
        seed: fixes redrawn pixels, and what else the guide draws.

    Returns:
        Quantised latent site -> its indices, int64 (N, *grid), or (N, *grid, books) of several codebooks.

    Raises:
        ValueError: data that do not suit the pair; no latent of the guide is quantised.
    """
    found = _quantised(program, data, batch_size, seed)
    return {name: i if book.books is not None else i.squeeze(-1) for name, (i, book) in found.items()}


@torch.no_grad()
def _quantised(program: Program | Pair, data: Any, size: int, seed: int) -> dict[str, tuple[Tensor, Quantiser]]:
    """Quantised latent site -> the indices of all data, (N, *grid, books), and the codebook."""
    books: dict[str, Quantiser] = {}
    with judging(program, seed, "codes") as pair:

        def codes(_: int, batch: Batch) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for name, site in statements(run_guide(pair, batch, 1)).items():
                point = base(site["fn"])
                if not isinstance(point, QuantisedPoint):
                    continue
                books[name] = point.codebook
                # With a dimension of codebooks they have as many as the latent itself.
                indices = point.indices if point.codebook.books is not None else point.indices.unsqueeze(-1)
                found[name] = by_datum(site, indices)[0]
            return found

        columns = presented(pair, data, size, seed).collect(codes)
    if not columns:
        raise ValueError("program: no latent of its guide is quantised; draw one from `Quantised`")
    return {name: (indices, books[name]) for name, indices in columns.items()}


@dataclass(frozen=True)
class CodeUse:
    """How much of its codebook a quantised latent uses; means over codebooks, where there are several.

    Attributes:
        codes: K, of a codebook.
        places: how many codes one datum has.
        usage: the share of the K codes that occur.
        perplexity: exp(-Σ p log p) of the shares p of codes, from 1 to K.
    """

    codes: int
    places: int
    usage: float
    perplexity: float

    def __str__(self) -> str:
        return (
            f"{self.usage:.1%} of {self.codes} codes in use, perplexity {self.perplexity:.1f}; "
            f"{self.places} places"
        )


def code_use(
    program: Program | Pair, data: Any, *, batch_size: int = 100, seed: int = 0, warn: bool = True
) -> dict[str, CodeUse]:
    """How much of each codebook the guide uses for data.

    Args:
        program: the pair.
        data: data in any form that ``fit`` takes.
        batch_size: data encoded at once.
        seed: as for `code_indices`.
        warn: whether to warn of a collapsed codebook, as `ppl_vae.check_usage` does.

    Returns:
        Quantised latent site -> its use.

    Raises:
        ValueError: as for `code_indices`.
    """
    found = {}
    for name, (indices, codebook) in _quantised(program, data, batch_size, seed).items():
        codes, each = codebook.codes, indices.unbind(-1)
        used, effective = (sum(f(i, codes) for i in each) / len(each) for f in (usage, perplexity))
        found[name] = CodeUse(codes, math.prod(indices.shape[1:]), used, effective)
        for one in each if warn else ():
            check_usage(one, codes)
    return found


class WatchCodes(Hook):
    """Add perplexity and usage of each codebook to the history, and warn at the end of one that has collapsed.

    Give it before hooks that write the history, such as `ppl_vae.LogCSV`.

    Args:
        data: what to encode after every epoch, in any form that ``fit`` takes: some hundred rows tell.

    >>> import ppl_vae as pv
    >>> hooks = [WatchCodes(torch.rand(200, 784)), pv.LogCSV("metrics.csv")]
    """

    everywhere = True

    def __init__(self, data: Any) -> None:
        self.data = data

    def on_epoch(self, run: Run) -> None:
        """Add two columns for each quantised latent."""
        found = code_use(run.pair, self.data, warn=False)
        for name, use in found.items():
            of = "" if len(found) == 1 else f" {name}"
            run.history[-1] |= {f"perplexity{of}": use.perplexity, f"usage{of}": use.usage}

    def on_end(self, run: Run) -> None:
        """Warn where it is called for."""
        if run.epoch:
            code_use(run.pair, self.data)


@dataclass(frozen=True)
class CodeLength:
    """How many bits a datum takes when it is sent as its codes, and then as its pixels given these.

    Attributes:
        bound: log p(x | z) + log p(z), a lower bound on log p(x), in nats per datum.
        codes: -log2 p(z), bits per datum; of latents that are not quantised, their KL.
        pixels: -log2 p(x | z), bits per datum; of a density they are relative, and may be negative.
        use: quantised latent site -> how much of its codebook is used.
        dimensions: entries of one datum.
        alone: whether all latents are quantised.
    """

    bound: Estimate
    codes: Average
    pixels: Average
    use: dict[str, CodeUse]
    dimensions: int
    alone: bool = True

    @property
    def per_code(self) -> Average:
        """Bits for each code of a datum, log2 K under a uniform prior; NaN where some latents have none."""
        places = sum(use.places for use in self.use.values()) if self.alone else math.nan
        return Average(self.codes.mean / places, self.codes.stderr / places)

    @property
    def per_dimension(self) -> Average:
        """Bits for each entry of x, codes included: an upper bound where the likelihood is of levels."""
        return average(-self.bound.value / (self.dimensions * BIT))

    def __str__(self) -> str:
        used = "\n".join(f"  {name}: {use}" for name, use in self.use.items())
        return (
            f"{self.bound}\n  bits per datum: {self.codes:.1f} for codes, {self.pixels:.1f} for pixels given "
            f"these\n  bits per code {self.per_code:.3f}, per dimension {self.per_dimension:.4f}\n{used}"
        )


def code_length(
    program: Program | Pair,
    data: Any,
    *,
    batch_size: int = 100,
    seed: int = 0,
    compile: Compile = "auto",
) -> CodeLength:
    """Bits spent on codes and on pixels. The guide gives one code for certain, so nothing is lost by sampling.

    Latents that are not quantised count by their KL, which is what bits-back coding spends on them.

    Args:
        program: the pair.
        data: data in any form that ``fit`` takes.
        batch_size: data per batch.
        seed: fixes redrawn pixels, and what else is drawn.
        compile: as in `ppl_vae.fit`.

    Raises:
        ValueError: as for `ppl_vae.elbo` and `code_indices`; data that hold NaN.
        IncompleteError: as for `ppl_vae.elbo`, of other data.
    """
    use = code_use(program, data, batch_size=batch_size, seed=seed)
    bound = elbo(program, data, batch_size=batch_size, seed=seed, compile=compile)
    codes, pixels = (average(bound.diagnostics[name] / BIT) for name in ("rate", "distortion"))
    with judging(program, seed) as pair:
        first = next(iter(presented(pair, data, batch_size, seed)))[1][0]
        latents = pair.layout.latents if pair.layout is not None else ()
    return CodeLength(bound, codes, pixels, use, first[0].numel(), {*latents} == use.keys())
