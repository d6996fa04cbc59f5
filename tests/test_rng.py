"""Seeded blocks: the same draws for the same seed, and the caller's stream as if nothing had happened."""

import pytest
import torch

from ppl_vae.rng import seeded


@pytest.fixture(autouse=True)
def own_stream():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        yield


def after(block):
    """What the caller draws after a block."""
    torch.manual_seed(5)
    block()
    return torch.rand(3)


@pytest.mark.parametrize("seed", [0, 7, -1, 2**62, None])
def test_the_callers_stream_is_left_alone(seed):
    def block():
        with seeded(seed):
            torch.randn(100)
            torch.manual_seed(3)

    assert torch.equal(after(block), after(lambda: None))


def test_also_when_the_block_fails():
    def block():
        with pytest.raises(KeyError), seeded(0):
            {}[torch.rand(1)]

    assert torch.equal(after(block), after(lambda: None))


def test_a_seed_fixes_the_draws_and_another_one_changes_them():
    draws = {}
    for start, seed in [(1, 0), (2, 0), (1, 1)]:
        torch.manual_seed(start)
        with seeded(seed):
            draws[start, seed] = torch.randn(8)
    assert torch.equal(draws[1, 0], draws[2, 0])
    assert not torch.equal(draws[1, 0], draws[1, 1])


def test_a_blocks_stream_is_the_one_that_torch_seeds():
    torch.manual_seed(3)
    plain = torch.randn(8)
    with seeded(3):
        assert torch.equal(plain, torch.randn(8))


def test_without_a_seed_the_block_goes_on_from_the_callers_stream():
    with seeded(None):
        inside = torch.rand(4)
    assert torch.equal(inside, torch.rand(4))  # and the caller draws the same again


def test_blocks_nest():
    with seeded(0):
        plain = torch.rand(2), torch.rand(2)
    with seeded(0):
        first = torch.rand(2)
        with seeded(1):
            torch.rand(50)
        nested = first, torch.rand(2)
    assert all(torch.equal(a, b) for a, b in zip(plain, nested, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpus_stream_is_seeded_and_left_alone(device):
    torch.cuda.manual_seed(5)
    plain = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(5)
    draws = []
    for _ in range(2):
        with seeded(0, device):
            draws.append(torch.rand(3, device="cuda"))
    assert torch.equal(*draws)
    assert torch.equal(plain, torch.rand(3, device="cuda"))


@pytest.mark.gpu
def test_a_block_on_the_cpu_does_not_touch_the_gpus_stream():
    torch.cuda.manual_seed(5)
    plain = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(5)
    with seeded(0):
        torch.rand(3)
    assert torch.equal(plain, torch.rand(3, device="cuda"))
