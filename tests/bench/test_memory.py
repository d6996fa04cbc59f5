"""Memory of the importance-weighted bound: bounded by the chunk, whatever the number of particles."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The network of the MNIST bench, 784-200-200-50; prints the peak memory of a fresh process in MiB, and seconds.
SCRIPT = """
import resource, sys, time
import torch
import ppl_vae as pv

particles, chunk = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
vae = pv.VAE(
    pv.StandardNormal(50), pv.Bernoulli(pv.MLP(50, 200, 200, 784)), pv.mean_field(pv.MLP(784, 200, 200, 100))
)
images = torch.rand(20, 784).bernoulli()
pv.log_likelihood(vae, images, 10)  # what is loaded once
start = time.perf_counter()
estimate = pv.log_likelihood(vae, images, particles, chunk=chunk)
assert estimate.value.isfinite().all()
unit = 2**20 if sys.platform == "darwin" else 2**10
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, time.perf_counter() - start)
"""


def peak(particles: int, chunk: int) -> float:
    """Peak memory in MiB of judging one batch of 20 images."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(particles), str(chunk)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    memory, seconds = map(float, done.stdout.split())
    print(f"K = {particles:>7,}, chunk = {chunk:>5,}: peak {memory:7.1f} MiB, {seconds:6.1f} s")
    return memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_particles() -> None:
    """A hundred times the particles of one batch, the same peak; ten times the chunk, a higher one."""
    few, many, wide = peak(1000, 100), peak(100_000, 100), peak(1000, 1000)
    assert many < few + 8, f"{few:.1f} MiB with 1,000 particles, {many:.1f} MiB with 100,000"
    assert wide > few + 30, "the measurement does not see memory that is there"
