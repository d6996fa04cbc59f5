"""Flows made of nets: Pyro's transforms of the same nets, which coordinate depends on which, and their costs."""

import pytest
import torch
from pyro.distributions import transforms
from test_flows import disturbed, through

import ppl_vae as pv
from ppl_vae.flows import Flowed
from ppl_vae.rng import seeded
from ppl_vae.scalars import AffineMap, SplineMap
from ppl_vae.triangular import coupling, inverse_autoregressive, masked_autoregressive

X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def one(make, seed=0, **options):
    with seeded(seed):
        flows = make(4, hidden=(8,), depth=1, **options)
        return disturbed(Flowed(pv.StandardNormal(4), *flows))


def test_the_affine_autoregressive_map_is_pyros():
    conditional = one(inverse_autoregressive, scalar=AffineMap(1e6))  # Pyro cuts log-scales off at -5 and 3
    net = conditional.flows[0].net

    class Pyros(torch.nn.Module):
        permutation = torch.arange(4)

        def forward(self, x):
            return net(x).unbind(-2)

    theirs = transforms.AffineAutoregressive(Pyros())
    (ours,) = conditional().transforms
    y = theirs(X)
    torch.testing.assert_close(ours(X), y)
    torch.testing.assert_close(ours.log_abs_det_jacobian(X, y), theirs.log_abs_det_jacobian(X, y))
    torch.testing.assert_close(ours.inv(y.clone()), X)


def test_the_affine_coupling_is_pyros():
    conditional = one(coupling, scalar=AffineMap(1e6))
    net = conditional.flows[0].net
    with torch.no_grad():
        net.first.zero_()
    theirs = transforms.AffineCoupling(2, lambda x: net.net(x).unflatten(-1, (2, 2)).unbind(-2))
    (ours,) = conditional().transforms
    y = theirs(X)
    torch.testing.assert_close(ours(X), y)
    torch.testing.assert_close(ours.log_abs_det_jacobian(X, ours(X)), theirs.log_abs_det_jacobian(X, y))
    torch.testing.assert_close(ours.inv(y.clone()), X)


@pytest.mark.parametrize("scalar", [AffineMap(), SplineMap(bins=3)], ids=repr)
def test_masked_is_the_inverse_of_inverse(scalar):
    forward, backward = (one(make, scalar=scalar) for make in (inverse_autoregressive, masked_autoregressive))
    torch.testing.assert_close(through(backward, through(forward, X)), X)
    torch.testing.assert_close(through(forward, through(backward, X)), X)


@pytest.mark.parametrize("make", [inverse_autoregressive, masked_autoregressive, coupling])
def test_which_coordinate_depends_on_which(make):
    with seeded(0):
        flows = disturbed(Flowed(pv.StandardNormal(4), *make(4, hidden=(50,), depth=2)))
    for i, transform in enumerate(flows().transforms):
        jacobian = torch.autograd.functional.jacobian(transform, X[0])
        jacobian = jacobian.flip(0, 1) if i else jacobian
        assert (jacobian.triu(1) == 0).all()
        below = jacobian[2:, :2] if make is coupling else jacobian[torch.tril_indices(4, 4, -1).unbind()]
        assert (below != 0).all()
        assert make is not coupling or (jacobian[3, 2] == 0 and jacobian[1, 0] == 0)


@pytest.mark.parametrize(
    ("make", "drawing", "scoring"),
    [(inverse_autoregressive, 1, 4), (masked_autoregressive, 4, 1), (coupling, 1, 2)],
)
def test_what_directions_cost_in_passes(make, drawing, scoring):
    conditional, passes = one(make), []
    conditional.flows[0].net.register_forward_hook(lambda *_: passes.append(1))
    law = conditional()
    z = law.sample((3,))
    law.log_prob(z)
    assert len(passes) == drawing  # scoring a draw costs nothing more
    conditional().log_prob(z.clone())
    assert len(passes) == drawing + scoring


@pytest.mark.parametrize("make", [inverse_autoregressive, masked_autoregressive, coupling])
def test_inverses_in_many_dimensions_and_single_precision(make):
    with seeded(0):
        conditional = Flowed(pv.StandardNormal(40), *make(40, hidden=(64,), depth=2))
    disturbed(conditional, size=0.1).float()
    with seeded(0):
        law = conditional()
        z = law.sample((50,))
    torch.testing.assert_close(conditional().log_prob(z.clone()), law.log_prob(z), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("make", [inverse_autoregressive, masked_autoregressive, coupling])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": 1}, "latent must be at least 2, got 1"),
        ({"latent": 4, "depth": 0}, "depth must be at least 1, got 0"),
        ({"latent": 4, "context": -2}, "context must be at least 0, got -2"),
    ],
)
def test_bad_sizes(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("hidden", [(), (3,), (8, 2)])
def test_autoregressive_nets_are_no_narrower_than_the_latents(hidden):
    with pytest.raises(ValueError, match=r"hidden must be one or more widths of at least latent \(4\)"):
        inverse_autoregressive(4, hidden)
