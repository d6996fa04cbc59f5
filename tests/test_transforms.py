"""Transforms: binary pixels with the right means, dequantised ones, independent, the same captured and eager."""

import copy
import shutil

import pytest
import torch
from torch._inductor import config, standalone_compile
from torch.fx.experimental.proxy_tensor import make_fx

import ppl_vae.transforms
from ppl_vae.rng import seeded
from ppl_vae.transforms import Transform, dequantise, redraw, threshold


def test_redraw_is_binary_with_the_grey_level_as_its_mean():
    torch.manual_seed(0)
    grey, n = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]), 40_000
    drawn = redraw(grey.expand(n, 5))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.dtype == torch.float32
    error = (drawn.double().mean(0) - grey).abs()
    assert (error <= 5 * (grey * (1 - grey) / n).sqrt() + 1e-8).all()  # levels 0 and 1 are exact
    assert torch.cov(drawn[:, 1:4].T).fill_diagonal_(0).abs().max() < 5 * 0.25 / n**0.5  # independent pixels


def test_redraw_repeats_under_a_seed_and_differs_at_the_next_presentation():
    x = torch.full((20, 30), 0.5)
    torch.manual_seed(3)
    first, second = redraw(x), copy.deepcopy(redraw)(x)
    torch.manual_seed(3)
    assert torch.equal(redraw(x), first)
    assert not torch.equal(first, second)


def test_threshold_splits_at_its_level():
    x = torch.tensor([[0.0, 0.3, 0.5, 0.51, 1.0]])
    assert torch.equal(threshold()(x), torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]]))
    assert torch.equal(copy.deepcopy(threshold(0.3))(x), torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]]))
    assert [repr(f) for f in (threshold(0.3), redraw)] == ["threshold(0.3)", "redraw"]
    for level in (1.0, -0.1, float("nan")):  # every picture would become blank
        with pytest.raises(ValueError, match=r"level must be in \[0, 1\)"):
            threshold(level)


def every_word(low, high, size, device):
    """In place of random words: each of the 65,536 pieces of 16 bits once."""
    assert (low, high, size) == (-(2**63), 2**63 - 1, (2**14,))
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.int64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_redraw_rounds_probabilities_to_the_nearest_of_16_bits(monkeypatch, dtype):
    monkeypatch.setattr(ppl_vae.transforms.torch, "randint", every_word)
    small = 2.0 ** -torch.arange(8, 40).double()
    grey = torch.arange(256).double() / 255
    levels = torch.cat([grey, small, 1 - small, torch.rand(50, dtype=torch.float64, generator=torch.Generator())])
    for level in levels.to(dtype):
        drawn = redraw(level.expand(2**16))
        assert drawn.dtype == dtype
        error = abs(drawn.double().mean() - level.double())
        assert error <= 2**-17 + 2**-25  # float32 cannot tell a tie from its neighbours
        assert error == 0 or level not in (0, 1)


@pytest.mark.parametrize("level", [1 / 255, 0.1, 0.5, 0.9])
def test_the_four_pieces_of_a_word_are_uniform_and_independent(level):
    n = 200_000
    with seeded(0):
        drawn = redraw(torch.full((2, n, 2), level)).double()  # (half of an int32, word, int32 of the word)
    pieces = drawn.permute(0, 2, 1).reshape(4, n)
    assert ((pieces.mean(1) - level).abs() < 5 * (level * (1 - level) / n) ** 0.5).all()
    assert torch.corrcoef(pieces).fill_diagonal_(0).abs().max() < 5 / n**0.5
    flat = drawn.flatten()
    for lag in (1, 2, 3, 28):  # and of neighbours, in rows and columns
        assert torch.corrcoef(torch.stack([flat[lag:], flat[:-lag]]))[0, 1].abs() < 5 / len(flat) ** 0.5


@pytest.mark.parametrize("shape", [(), (0, 5), (1,), (3, 7), (5, 2, 1, 3)])
def test_redraw_keeps_any_shape(shape):
    ones = torch.ones(shape).expand(2, *shape).transpose(0, -1)
    assert torch.equal(redraw(ones), ones)
    assert torch.equal(redraw(0 * ones), 0 * ones)
    assert redraw(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(128, 64), (3, 7)])
def test_redraw_captured_and_compiled_draws_the_same(shape, dtype):
    x = torch.rand(shape, dtype=dtype, generator=torch.Generator())
    graph = make_fx(redraw, tracing_mode="fake")(x)
    results = []
    functions = [redraw, graph]
    if shutil.which("c++") or shutil.which("g++"):
        with config.patch(fallback_random=True):
            functions.append(standalone_compile(graph, [x], dynamic_shapes="from_example_inputs"))
    for function in functions:
        with seeded(0):
            drawn = function(x)
            results.append(drawn[0] if isinstance(drawn, tuple | list) else drawn)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.gpu
def test_redraw_on_a_gpu():
    grey, n = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]), 40_000
    with seeded(0, "cuda"):
        drawn = redraw(grey.cuda().expand(n, 5)).cpu()
    assert ((drawn.double().mean(0) - grey).abs() <= 5 * (grey * (1 - grey) / n).sqrt() + 1e-8).all()


def test_transforms_say_what_they_take():
    assert redraw.support.check(torch.tensor([0.0, 0.5, 1.0, 1.5])).tolist() == [True, True, True, False]
    assert threshold().support is None
    assert Transform("twice", lambda x: 2 * x)(torch.ones(1)) == 2


# ---- dequantised pixels


def test_dequantised_pixels_are_uniform_within_their_level():
    n = 20_000
    levels = torch.tensor([0, 1, 127, 254, 255])
    with seeded(0):
        drawn = dequantise((levels / 255.0).expand(n, 5)).double()
    within = 256 * drawn - levels
    assert ((within >= 0) & (within <= 1)).all()
    assert ((within.mean(0) - 0.5).abs() < 5 * (1 / 12 / n) ** 0.5).all()
    assert ((within.var(0) - 1 / 12).abs() < 5 * (1 / 180 / n) ** 0.5).all()
    assert torch.corrcoef(within.T).fill_diagonal_(0).abs().max() < 5 / n**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_dequantised_pixels_stay_inside_the_interval(monkeypatch, dtype, u):
    monkeypatch.setattr(ppl_vae.transforms.torch, "rand_like", lambda x: torch.full_like(x, u))
    drawn = dequantise(torch.tensor([0.0, 1.0], dtype=dtype))
    assert drawn.dtype == dtype
    assert ((drawn > 0) & (drawn < 1)).all()


def test_dequantising_undoes_the_rounding_of_bytes_and_takes_nothing_else():
    x = torch.arange(256) / 255
    assert torch.equal((256 * dequantise(x)).long(), torch.arange(256))
    assert dequantise.support.check(torch.cat([x, x.double()])).all()
    wrong = torch.tensor([-1 / 255, 0.5, 256 / 255, 10.0, float("nan")])
    assert not dequantise.support.check(wrong).any()
    assert repr(dequantise) == "dequantise"


def test_dequantised_captured_draws_the_same():
    x = (torch.arange(21) / 255).reshape(3, 7)
    graph = make_fx(dequantise, tracing_mode="fake")(x)
    with seeded(0):
        ours = dequantise(x)
    with seeded(0):
        assert torch.equal(graph(x), ours)
    assert not torch.equal(dequantise(x), ours)
