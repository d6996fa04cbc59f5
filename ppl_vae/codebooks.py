"""Codebooks: feature vectors quantised to the nearest of K codes (van den Oord et al. 2017).

One codebook, several for groups of entries, or several each for what the one before leaves: all are used alike.
What makes a posterior and a prior of them is in `ppl_vae.codes`, the losses in `ppl_vae.quantising`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from torch import Tensor, nn

from ppl_vae.conditionals import at_least_one
from ppl_vae.ranks import first_rank, over_ranks

__all__ = [
    "Codebook",
    "ProductCodebook",
    "Quantisation",
    "Quantiser",
    "ResidualCodebook",
    "Summed",
]

SMOOTHING = 1e-6  # features added to each code's count, at the place where the code is


class Quantisation(NamedTuple):
    """What features were quantised to.

    Attributes:
        features: what each code vector stands for, (..., parts), with its gradient.
        vectors: the codes, (..., parts); with gradients where they are learned.
        indices: which codes, (...), or (..., books) where there are several codebooks.
    """

    features: Tensor
    vectors: Tensor
    indices: Tensor


class Quantiser(nn.Module, ABC):
    """Maps features (..., width) to code vectors (..., parts).

    Attributes:
        codes: how many codes there are in each codebook.
        width: entries of a feature.
        parts: entries of the code vectors of one feature.
        learned: whether codes are parameters, moved by gradients.
        share: of the straight-through gradient that each entry of the vectors takes.
        books: how many codebooks, where indices have a last dimension of them.
    """

    codes: int
    width: int
    parts: int
    learned: bool
    share: float = 1.0
    books: int | None = None

    @abstractmethod
    def forward(self, features: Tensor) -> Quantisation:
        """Quantise features (..., width); in training mode, their statistics are taken."""

    @abstractmethod
    def embed(self, indices: Tensor) -> Tensor:
        """The vectors (..., parts) of indices."""

    @abstractmethod
    def find(self, vectors: Tensor) -> Tensor:
        """The indices of code vectors (..., parts), which may be off by rounding."""

    @abstractmethod
    def start_from(self, features: Tensor) -> None:
        """Put the codes at the k-means of features (..., width)."""

    def check(self, features: Tensor) -> None:
        """Raise ValueError unless the last dimension is that of features."""
        if features.dim() < 1 or features.shape[-1] != self.width:
            raise ValueError(f"features: expected shape (..., {self.width}), got {tuple(features.shape)}")


class Codebook(Quantiser):
    """K vectors of D entries, by default the exponential moving average of what is quantised to them.

    In training mode each pass takes the number n and the sum m of the features nearest to each code, averages them
    as N ← γ N + (1 - γ) n and M ← γ M + (1 - γ) m, and makes M / N the code (van den Oord et al. 2017, appendix
    A.1). It moves when the next pass begins, so that the model finds the codes that the guide used. A tiny count
    is added at the code's own place (Laplace smoothing): without features it stays where it is. N and M start at
    zero, so that early batches count fully; with γ = 0 a pass is a step of Lloyd's k-means.

    A code that no feature of the last ``revive`` batches was nearest to is put onto a random feature of the batch.
    Before training none has been used, so that the first batch places them all; or see `start_from`.

    Where `torch.distributed` is at work, statistics are those of all ranks, and so all have the same codes.

    Like every running statistic, this happens whenever a guide runs in training mode. An estimator that runs it
    twice on a batch, as `ppl_vae.doubly` does, finds other codes the second time: train by `ppl_vae.pathwise`.

    Args:
        codes: K.
        width: D.
        ema: γ, from 0 and below 1; None makes the codes parameters, moved by the codebook loss of
            `ppl_vae.quantising.Commitment`.
        revive: batches after which an unused code is put elsewhere; None never does, and starts near the origin.
        chunk: rows of features whose distances to all codes are held at once.

    Raises:
        ValueError: sizes below one, ``ema`` out of range.

    >>> book = Codebook(512, 64).eval()
    >>> book(torch.randn(5, 7, 7, 64)).indices.shape
    torch.Size([5, 7, 7])
    """

    vectors: Tensor
    counts: Tensor
    sums: Tensor
    unused: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        ema: float | None = 0.99,
        revive: int | None = 100,
        chunk: int = 4096,
    ) -> None:
        super().__init__()
        at_least_one(codes=codes, width=width, chunk=chunk, **({} if revive is None else {"revive": revive}))
        if ema is not None and not 0 <= ema < 1:
            raise ValueError(f"ema must lie in [0, 1), or be None for learned codes, got {ema}")
        self.codes, self.width, self.parts = codes, width, width
        self.ema, self.revive, self.chunk, self.learned = ema, revive, chunk, ema is None
        start = (2 * torch.rand(codes, width) - 1) / codes
        if self.learned:
            self.vectors = nn.Parameter(start)
        else:
            self.register_buffer("vectors", start)
            self.register_buffer("counts", torch.zeros(codes))
            self.register_buffer("sums", torch.zeros(codes, width))
        self.register_buffer("unused", torch.full((codes,), revive or 0))

    def forward(self, features: Tensor) -> Quantisation:
        """Quantise features (..., D): the nearest code of each.

        Raises:
            ValueError: features of another width.
        """
        self.check(features)
        if self.training:
            self._move(features)
        indices = self.nearest(features)
        if self.training:
            self._count(features, indices)
        return Quantisation(features, self.embed(indices), indices)

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """The index of the nearest code, the lowest of several: (..., D) -> (...).

        In double precision, so that codes of a common value are told apart as well as their entries allow.

        Raises:
            ValueError: features of another width.
        """
        self.check(features)
        vectors = self.vectors.double()
        half = vectors.square().sum(-1) / 2  # |f - e|² = |f|² + 2 (|e|² / 2 - f·e)
        rows = torch.split(features.reshape(-1, self.width), self.chunk)
        found = [torch.addmm(half, part.double(), vectors.T, alpha=-1).argmin(-1) for part in rows]
        return torch.cat(found).reshape(features.shape[:-1])

    def embed(self, indices: Tensor) -> Tensor:
        """The vectors (..., D) of indices (...)."""
        return F.embedding(indices, self.vectors)

    def find(self, vectors: Tensor) -> Tensor:
        """The indices (...) of code vectors (..., D)."""
        return self.nearest(vectors)

    @torch.no_grad()
    def place(self, vectors: Tensor) -> None:
        """Put the codes at ``vectors`` (K, D), as if no batch had been seen.

        Raises:
            ValueError: another shape, or numbers that are not finite.
        """
        if vectors.shape != self.vectors.shape:
            raise ValueError(f"vectors: expected shape {tuple(self.vectors.shape)}, got {tuple(vectors.shape)}")
        if not bool(vectors.isfinite().all()):
            raise ValueError("vectors: expected finite numbers")
        self.vectors.copy_(vectors)
        self._forget(torch.ones_like(self.unused, dtype=torch.bool))

    def start_from(self, features: Tensor) -> None:
        """Put the codes at the k-means of features (..., D), found from minibatches and torch's own stream.

        Raises:
            ValueError: features of another width, or fewer of them than codes.
        """
        from sklearn.cluster import MiniBatchKMeans  # here, because importing it takes a second

        self.check(features)
        rows = features.detach().reshape(-1, self.width)
        if len(rows) < self.codes:
            raise ValueError(f"features: expected at least {self.codes}, one for each code, got {len(rows)}")
        means = MiniBatchKMeans(
            self.codes, batch_size=self.chunk, n_init=3, random_state=int(torch.randint(2**31, ()))
        )
        means.fit(rows.cpu().numpy())
        self.place(torch.as_tensor(means.cluster_centers_))

    @torch.no_grad()
    def _move(self, features: Tensor) -> None:
        """Averages of past batches become the codes; those long unused are put onto features of this batch."""
        if not self.learned:
            counts = self.counts.unsqueeze(-1)
            self.vectors.add_((self.sums - counts * self.vectors) / (counts + SMOOTHING))
        if self.revive is not None:
            rows = features.reshape(-1, self.width)
            drawn = first_rank(rows[torch.randint(len(rows), (self.codes,), device=rows.device)])
            dead = self.unused >= self.revive
            self.vectors.copy_(torch.where(dead.unsqueeze(-1), drawn.to(self.vectors), self.vectors))
            self._forget(dead)

    def _forget(self, which: Tensor) -> None:
        """Codes (K,) whose past is not to count any more."""
        self.unused.masked_fill_(which, 0)
        if not self.learned:
            self.counts.masked_fill_(which, 0.0)
            self.sums.masked_fill_(which.unsqueeze(-1), 0.0)

    @torch.no_grad()
    def _count(self, features: Tensor, indices: Tensor) -> None:
        """Take a batch's statistics."""
        counts, sums = self._moments(features, indices)
        self.unused.copy_(torch.where(counts > 0, 0, self.unused + 1))
        if self.ema is not None:
            self.counts.lerp_(counts.to(self.counts), 1 - self.ema)
            self.sums.lerp_(sums.to(self.sums), 1 - self.ema)

    def _moments(self, features: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How many features went to each code, (K,), and their sums, (K, D): all that a batch tells the codes.

        Both add up over parts of a batch. Features are sorted by code, since scattered additions have no order of
        their own on several threads, and their rounding would differ from run to run.
        """
        ordered, order = indices.flatten().sort(stable=True)
        bounds = torch.searchsorted(ordered, torch.arange(self.codes + 1, device=ordered.device))
        rows = features.reshape(-1, self.width)[order].double()
        sums = torch.segment_reduce(rows, "sum", offsets=bounds, axis=0, unsafe=True, initial=0.0)
        return over_ranks(bounds.diff()), over_ranks(sums)

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"codes={self.codes}, width={self.width}, ema={self.ema}, revive={self.revive}"


class _Several(Quantiser):
    """Codebooks whose vectors stand side by side; indices have a last dimension of codebooks."""

    def __init__(self, *books: Codebook) -> None:
        super().__init__()
        if not books:
            raise ValueError("books: expected one or more codebooks")
        if len({(book.codes, book.learned) for book in books}) > 1:
            raise ValueError("books: all must have equally many codes, and be learned or averaged alike")
        self.each = nn.ModuleList(books)
        self.books, self.codes, self.learned = len(books), books[0].codes, books[0].learned
        self.widths = [book.width for book in books]
        self.parts = sum(self.widths)

    def embed(self, indices: Tensor) -> Tensor:
        """The vectors (..., parts) of indices (..., books)."""
        found = [book.embed(i) for book, i in zip(self._books(), indices.unbind(-1), strict=True)]
        return torch.cat(found, -1)

    def find(self, vectors: Tensor) -> Tensor:
        """The indices (..., books) of code vectors (..., parts)."""
        parts = torch.split(vectors, self.widths, -1)
        return torch.stack([book.find(v) for book, v in zip(self._books(), parts, strict=True)], -1)

    def _books(self) -> list[Codebook]:
        return cast(list[Codebook], [*self.each])


class ProductCodebook(_Several):
    """Features split into groups, each quantised by a codebook of its own: K^books vectors (Jégou et al. 2011).

    Args:
        *books: codebooks, each as wide as its group.

    Raises:
        ValueError: no codebooks, or of different kinds.

    >>> book = ProductCodebook(Codebook(16, 4), Codebook(16, 4)).eval()
    >>> book(torch.randn(5, 8)).indices.shape
    torch.Size([5, 2])
    """

    def __init__(self, *books: Codebook) -> None:
        super().__init__(*books)
        self.width = self.parts

    def forward(self, features: Tensor) -> Quantisation:
        """Quantise features (..., width), group by group.

        Raises:
            ValueError: features of another width.
        """
        self.check(features)
        return _joined(
            [book(f) for book, f in zip(self._books(), torch.split(features, self.widths, -1), strict=True)]
        )

    def start_from(self, features: Tensor) -> None:
        """Put each group's codes at the k-means of that group."""
        self.check(features)
        for book, group in zip(self._books(), torch.split(features, self.widths, -1), strict=True):
            book.start_from(group)


class ResidualCodebook(_Several):
    """What one codebook leaves of a feature is quantised by the next (Lee et al. 2022, section 3.1).

    The latent holds the vectors of all codebooks side by side, (..., books * D), because their sum does not tell
    which they were, and the prior must know; a decoder begins with `Summed`. The sum's straight-through gradient
    is the identity, each part taking its share.

    Args:
        *books: codebooks of the same width, coarsest first.

    Raises:
        ValueError: no codebooks, or of different kinds or widths.

    >>> book = ResidualCodebook(Codebook(16, 4), Codebook(16, 4)).eval()
    >>> found = book(torch.randn(5, 4))
    >>> found.vectors.shape, found.indices.shape
    (torch.Size([5, 8]), torch.Size([5, 2]))
    """

    def __init__(self, *books: Codebook) -> None:
        super().__init__(*books)
        if len(set(self.widths)) > 1:
            raise ValueError(f"books: residual codebooks must be equally wide, got widths {self.widths}")
        self.width, self.share = self.widths[0], 1 / len(books)

    def forward(self, features: Tensor) -> Quantisation:
        """Quantise features (..., D), each codebook what is left.

        Raises:
            ValueError: features of another width.
        """
        found = list[Quantisation]()
        for book in self._books():
            found.append(book(features))
            features = features - found[-1].vectors.detach()
        return _joined(found)

    @torch.no_grad()
    def start_from(self, features: Tensor) -> None:
        """Put each codebook's codes at the k-means of what those before it leave."""
        for book in self._books():
            book.start_from(features)
            features = features - book.embed(book.nearest(features))


def _joined(found: Sequence[Quantisation]) -> Quantisation:
    features, vectors, indices = zip(*found, strict=True)
    return Quantisation(torch.cat(features, -1), torch.cat(vectors, -1), torch.stack(indices, -1))


class Summed(nn.Module):
    """What a decoder takes of residual codes, as its first layer: (..., books * D, *grid) -> (..., D, *grid).

    Args:
        books: how many codebooks.
        event_dim: how many rightmost dimensions make one latent; 3 for a grid of height and width.

    >>> Summed(2)(torch.tensor([1.0, 2.0, 10.0, 20.0]))
    tensor([11., 22.])
    """

    def __init__(self, books: int, event_dim: int = 1) -> None:
        super().__init__()
        at_least_one(books=books, event_dim=event_dim)
        self.books, self.event_dim = books, event_dim

    def forward(self, z: Tensor) -> Tensor:
        """Return the sums."""
        width = z.shape[-self.event_dim] // self.books
        return z.unflatten(-self.event_dim, (self.books, width)).sum(-self.event_dim - 1)  # type: ignore[no-untyped-call, no-any-return]
