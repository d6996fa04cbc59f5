"""Semi-supervised learning: labels where they are known, latents where they are not (Kingma et al. 2014, M2).

One program takes data with and without labels in one batch: a missing label is -1. The label is a latent, y; a
known one is a latent whose posterior is known, a point at the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from ppl_vae.conditionals import Conditional
from ppl_vae.nets import OneHot

__all__ = ["Labels", "SemiSupervisedVAE", "hide_labels"]

Labels = Literal["enumerated", "relaxed"]

_NEVER = -1e4  # a log-probability whose exponential is 0 exactly, and which, unlike -inf, times 0 is 0


class SemiSupervisedVAE(nn.Module):
    """The model M2: y ~ p(y), z ~ p(z | y), x ~ p(x | z, y), guide q(y | x) q(z | x, y) (Kingma et al. 2014).

    In the paper p(z | y) is p(z): a prior such as ``StandardNormal(20)`` ignores the label. Conditionals get the
    label as an indicator vector (..., classes), so put `Concat` around their nets.

    What is bounded: for a labelled datum, log p(x, y) (eq. 6); for one without, log p(x) (eq. 7). How the sum
    over y in eq. 7 is taken is the objective's choice:

    - ``labels="enumerated"``: y is a category, an indicator vector. The estimator ``enumerated`` sums over it
      exactly, which is eq. 7; ``pyro.infer.TraceEnum_ELBO()`` does so too, but cannot be captured. Estimators by
      scores, such as ``Score(paths=True)``, draw it: the mean is the same. Pathwise ones refuse it.
    - ``labels="relaxed"``: y is a point in the simplex, in the guide and in the prior (Maddison et al. 2017,
      section 3.3), so that ``ELBO()`` and every other pathwise objective take it. Site "y" holds the logarithm
      of that point, in which nothing underflows. For data without labels this bounds log p(x) of the relaxed
      model, and not of M2; for labelled data the two are the same. ``TraceEnum_ELBO`` does not apply.

    The classifier's own term (eq. 9), α log q(y | x) of labelled data, is added in training mode alone. It is
    never positive, so what is trained stays a lower bound, a looser one. Evaluation leaves it out.

    Args:
        classes: how many labels: 0 to classes - 1.
        classifier: net of x giving logits of q(y | x), (B, classes).
        prior: p(z | y).
        likelihood: p(x | z, y).
        posterior: q(z | x, y).
        labels: how y is represented.
        alpha: weight of the classifier's term per labelled datum; a buffer, so that a hook may anneal it.
        temperature: of relaxed labels, in guide and prior; a buffer as well.
        label_probs: p(y), one per class, normalised here; uniform by default.

    Shapes: x is (B, *event); labels are (B,) of integers, -1 where missing; under K particles site "y" is
    (K, B, classes) and site "z" (K, B, d).

    Raises:
        ValueError: fewer than two classes, unknown ``labels``, negative alpha, temperature not positive,
            label_probs that are not one positive number per class.

    >>> from ppl_vae.likelihoods import Bernoulli
    >>> from ppl_vae.nets import MLP, Concat
    >>> from ppl_vae.posteriors import mean_field
    >>> from ppl_vae.priors import StandardNormal
    >>> m2 = SemiSupervisedVAE(
    ...     3,
    ...     classifier=MLP(16, 8, 3),
    ...     prior=StandardNormal(2),
    ...     likelihood=Bernoulli(Concat(MLP(2 + 3, 8, 16), None, None)),
    ...     posterior=mean_field(Concat(MLP(16 + 3, 8, 2 * 2), None, None)),
    ... )
    >>> m2.classify(torch.zeros(4, 16)).shape
    torch.Size([4, 3])
    """

    def __init__(
        self,
        classes: int,
        classifier: nn.Module,
        prior: Conditional,
        likelihood: Conditional,
        posterior: Conditional,
        *,
        labels: Labels = "enumerated",
        alpha: float = 0.0,
        temperature: float = 0.5,
        label_probs: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_settings(classes, labels, alpha, temperature)
        self.classes, self.labels = classes, labels
        self.classifier = classifier
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior
        self.one_hot = OneHot(classes)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.register_buffer("label_logits", _log_probs(classes, label_probs))
        self.alpha: Tensor
        self.temperature: Tensor
        self.label_logits: Tensor

    def model(self, x: Tensor, y: Tensor) -> None:
        """Declare y ~ p(y), z ~ p(z | y), x ~ p(x | z, y) for ``x`` (B, *event) with labels ``y`` (B,)."""
        for name in ("prior", "likelihood", "classifier"):
            pyro.module(name, getattr(self, name))
        known, label = y >= 0, y.clamp(min=0)
        with pyro.plate("data", len(x), dim=-1):
            law = self._label_law(self.label_logits, y, self.label_logits[label])
            indicator = self._indicator(pyro.sample("y", law))
            z = pyro.sample("z", self.prior(indicator))
            pyro.sample("x", self.likelihood(z, indicator), obs=x)
            if self.training:
                found = self.classifier(x).log_softmax(-1).gather(-1, label[:, None])[:, 0]
                pyro.factor("classification", torch.where(known, self.alpha * found, 0.0))

    def guide(self, x: Tensor, y: Tensor) -> None:
        """Declare y ~ q(y | x), or a point at a known label, and z ~ q(z | x, y)."""
        for name in ("classifier", "posterior"):
            pyro.module(name, getattr(self, name))
        infer = {"enumerate": "parallel"} if self.labels == "enumerated" else {}
        with pyro.plate("data", len(x), dim=-1):
            logits = self.classifier(x)
            law = self._label_law(logits, y, logits.new_zeros(()))
            indicator = self._indicator(pyro.sample("y", law, infer=infer))
            pyro.sample("z", self.posterior(x, indicator))

    def _label_law(self, logits: Tensor, y: Tensor, log_mass: Tensor) -> TorchDistribution:
        """The distribution of y with these logits; where it is known, a point of log-density ``log_mass``."""
        corner = self.one_hot(y)
        if self.labels == "enumerated":
            return _Pinned(dist.OneHotCategorical(logits=logits), corner, y >= 0, log_mass)
        law = ExpRelaxedCategorical(self.temperature, logits=logits)
        return _Pinned(law, torch.where(corner > 0, 0.0, _NEVER), y >= 0, log_mass)

    def _indicator(self, value: Tensor) -> Tensor:
        """A value of site "y" as weights of the classes, (..., classes)."""
        return value if self.labels == "enumerated" else value.exp()

    @torch.no_grad()
    def blank(self, size: int, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """A batch of the right shapes, for sampling: given labels ``y`` (size,), or labels drawn from p(y)."""
        if y is not None and len(y) != size:
            raise ValueError(f"y: expected {size} labels, one per sample, got {len(y)}")
        label = torch.zeros_like(self.label_logits)  # only its shape is used
        z = self.prior(label).sample()
        x = z.new_zeros(size, *self.likelihood(z, label).event_shape)
        return x, torch.full((size,), -1, device=x.device) if y is None else y

    def check(self, x: Tensor, y: Tensor) -> None:
        """Raise ValueError unless ``y`` holds one integer per datum: a known label, or -1."""
        if y.dim() != 1:
            raise ValueError(f"y: expected one label per datum, (B,), got shape {tuple(y.shape)}")
        self.one_hot.check(torch.where(y == -1, 0, y))

    @torch.no_grad()
    def classify(self, x: Tensor) -> Tensor:
        """The probabilities q(y | x), (B, classes), with dropout and the like off."""
        training = [module for module in self.classifier.modules() if module.training]
        self.classifier.eval()
        try:
            probabilities: Tensor = self.classifier(x).softmax(-1)
        finally:
            for module in training:
                module.training = True
        return probabilities

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """The share of data whose most probable label is ``y``, among those that have one.

        Raises:
            ValueError: no datum has a label.
        """
        self.check(x, y)
        known = y >= 0
        if not bool(known.any()):
            raise ValueError("y: every label is missing, so there is nothing to compare with")
        return float((self.classify(x).argmax(-1) == y)[known].double().mean())


def hide_labels(y: Tensor, keep: int, seed: int = 0) -> Tensor:
    """Labels of which ``keep`` are left, as evenly over the classes as can be, and the others are -1.

    Args:
        y: labels (N,), integers; -1 where one is missing already.
        keep: how many to leave.
        seed: decides which; the caller's random stream is left alone.

    Returns:
        A new tensor (N,).

    Raises:
        ValueError: fewer labels than are to be left, or a negative number of them.

    >>> hide_labels(torch.tensor([0, 1, 0, 1, 1, 0]), keep=2).sort().values
    tensor([-1, -1, -1, -1,  0,  1])
    """
    known = int((y >= 0).sum())
    if not 0 <= keep <= known:
        raise ValueError(f"keep must be from 0 to {known}, the labels that there are, got {keep}")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    turn = torch.full_like(y, len(y))  # the how manieth of its class each is, in that order
    for label in y[y >= 0].unique():  # type: ignore[no-untyped-call]
        rows = order[y[order] == label]
        turn[rows] = torch.arange(len(rows), device=y.device)
    rows = order[turn[order].argsort(stable=True)][:keep]
    kept = torch.full_like(y, -1)
    kept[rows] = y[rows]
    return kept


def _check_settings(classes: int, labels: str, alpha: float, temperature: float) -> None:
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
    if labels not in ("enumerated", "relaxed"):
        raise ValueError(f"labels must be 'enumerated' or 'relaxed', got {labels!r}")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be finite and not negative, got {alpha}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _log_probs(classes: int, probs: Sequence[float] | None) -> Tensor:
    given = torch.ones(classes) if probs is None else torch.as_tensor(probs, dtype=torch.get_default_dtype())
    if given.shape != (classes,) or not bool(((given > 0) & given.isfinite()).all()):
        raise ValueError(f"label_probs: expected {classes} positive numbers, one per class, got {probs}")
    return (given / given.sum()).log()


class _Pinned(TorchDistribution):  # type: ignore[misc]
    """A distribution, but for the data whose value is known: there a point of a given log-density.

    Args:
        law: the distribution where the value is not known.
        value: the values that are known, (B, classes).
        known: where they are, (B,).
        log_mass: the log-density at them, (B,) or (): as a Delta's, it need not be 0.
    """

    arg_constraints: ClassVar[dict[str, object]] = {}

    def __init__(self, law: Distribution, value: Tensor, known: Tensor, log_mass: Tensor) -> None:
        shape = torch.broadcast_shapes(law.batch_shape, known.shape)  # type: ignore[no-untyped-call]
        self.law, self.value, self.known, self.log_mass = law.expand(shape), value, known, log_mass
        super().__init__(shape, law.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return bool(self.law.has_rsample)

    @property
    def has_enumerate_support(self) -> bool:
        return bool(self.law.has_enumerate_support)

    @property
    def support(self) -> object:
        return self.law.support

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> _Pinned:
        return _Pinned(self.law.expand(batch_shape), self.value, self.known, self.log_mass)

    @property
    def mean(self) -> Tensor:
        return self._pinned(self.law.mean)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._pinned(self.law.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._pinned(self.law.rsample(torch.Size(sample_shape)))

    def _pinned(self, drawn: Tensor) -> Tensor:
        return torch.where(self.known[:, None], self.value, drawn)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        support: Tensor = self.law.enumerate_support(expand)
        return support

    def log_prob(self, value: Tensor) -> Tensor:
        free: Tensor = self.law.log_prob(value)
        pinned = torch.where((value == self.value).all(-1), self.log_mass, _NEVER)
        return torch.where(self.known, pinned, free)
