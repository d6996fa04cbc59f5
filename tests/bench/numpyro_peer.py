"""NumPyro, as a worker: its SVI in a jitted loop over the steps; the work it has no function for, in plain jax.

The loop is that of its VAE example. As there, the epoch leaves out the last, short batch: 0.2% of MNIST.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from jax.example_libraries import stax
from jax.scipy.special import logsumexp
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from worker import Job, Skip, clocked, resident_peak, serve
from workloads import Workload, batches, binary, digits

ACTIVATIONS = {"softplus": stax.Softplus, "tanh": stax.Tanh}
CHUNK = 100  # particles held at once

Net = tuple[Callable[..., Any], Callable[..., Any]]


def networks(work: Workload) -> tuple[Net, Net]:
    """Encoder and decoder."""
    if not work.hidden:
        raise Skip("the convolutional network is written for torch alone")

    def layers(widths: tuple[int, ...], last: int) -> Net:
        body = [layer for width in widths for layer in (stax.Dense(width), ACTIVATIONS[work.activation])]
        return stax.serial(*body, stax.Dense(last))

    return layers(work.hidden, 2 * work.latent), layers(work.hidden[::-1], *work.event)


def training(work: Workload) -> tuple[SVI, Any]:
    """NumPyro's SVI of the workload, and its first state."""
    encoder, decoder = networks(work)

    def model(x: jax.Array) -> None:
        decode = numpyro.module("decoder", decoder, (len(x), work.latent))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([work.latent]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        loc, log_scale = jnp.split(numpyro.module("encoder", encoder, x.shape)(x), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    elbo = Trace_ELBO() if work.particles == 1 else RenyiELBO(alpha=0, num_particles=work.particles)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), elbo)
    return svi, svi.init(random.PRNGKey(0), jnp.zeros((work.batch, *work.event)))


def step(work: Workload) -> Job:
    """Training steps in one jitted loop."""
    svi, state = training(work)
    data = jnp.asarray(batches(work))

    @jax.jit
    def loop(state: Any, data: jax.Array, count: int) -> Any:
        def body(i: int, carry: Any) -> Any:
            state, loss = svi.update(carry[0], data[i % len(data)])
            return state, carry[1] + loss

        return lax.fori_loop(0, count, body, (state, 0.0))

    held = [state]

    def job(count: int) -> float:
        start = time.perf_counter()
        held[0], _ = jax.block_until_ready(loop(held[0], data, count))
        return time.perf_counter() - start

    return job


def epoch(work: Workload) -> Job:
    """All images once, shuffled, gathered and binarised inside one jitted loop."""
    svi, state = training(work)
    images = jnp.asarray(digits(work.images))
    count = len(images) // work.batch

    @jax.jit
    def loop(state: Any, images: jax.Array, key: jax.Array) -> Any:
        order = random.permutation(key, len(images))

        def body(i: int, carry: Any) -> Any:
            rows = lax.dynamic_slice_in_dim(order, i * work.batch, work.batch)
            x = random.bernoulli(random.fold_in(key, i), images[rows] / 255.0).astype(jnp.float32)
            state, loss = svi.update(carry[0], x)
            return state, carry[1] + loss

        return lax.fori_loop(0, count, body, (state, 0.0))

    held, keys = [state], iter(random.split(random.PRNGKey(1), 1000))

    def once() -> None:
        held[0], _ = jax.block_until_ready(loop(held[0], images, next(keys)))

    return clocked(once)


def functions(work: Workload) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Encoder and log joint, less constants, at some weights."""
    (init_encoder, encode), (init_decoder, decode) = networks(work)
    _, encoder = init_encoder(random.PRNGKey(0), (1, *work.event))
    _, decoder = init_decoder(random.PRNGKey(1), (1, work.latent))

    def log_joint(z: jax.Array, x: jax.Array) -> jax.Array:
        logits = decode(decoder, z)
        return (x * logits - jax.nn.softplus(logits)).sum(-1) - 0.5 * (z**2).sum(-1)

    return partial(encode, encoder), log_joint


def evaluation(work: Workload) -> Job:
    """Bounds on log p(x), the data in batches, particles in chunks scanned over."""
    encode, log_joint = functions(work)
    images = jnp.asarray(binary(work.images, work.event))

    @jax.jit
    def bound(key: jax.Array, x: jax.Array) -> jax.Array:
        loc, log_scale = jnp.split(encode(x), 2, -1)

        def body(total: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            noise = random.normal(key, (CHUNK, *loc.shape))
            weight = log_joint(loc + jnp.exp(log_scale) * noise, x) + (0.5 * noise**2 + log_scale).sum(-1)
            return jnp.logaddexp(total, logsumexp(weight, 0)), None

        keys = random.split(key, work.particles // CHUNK)
        total, _ = lax.scan(body, jnp.full(len(x), -jnp.inf), keys)
        return total - math.log(work.particles)

    def evaluate() -> None:
        for start in range(0, work.images, work.batch):
            jax.block_until_ready(bound(random.PRNGKey(start), images[start : start + work.batch]))

    return clocked(evaluate)


def gradient(work: Workload) -> Job:
    """The gradient in z of the log joint, chains times images."""
    _, log_joint = functions(work)
    x = jnp.asarray(binary(work.batch, work.event))
    latents = random.normal(random.PRNGKey(2), (work.particles, work.batch, work.latent))
    run = jax.jit(jax.value_and_grad(lambda z: log_joint(z, x).sum()))
    return clocked(lambda: jax.block_until_ready(run(latents)))


def build(work: Workload) -> Job:
    """Any workload but annealing, which NumPyro has not."""
    if work.kind == "annealing":
        raise Skip("no annealed importance sampling")
    return {"step": step, "epoch": epoch, "evaluation": evaluation, "gradient": gradient}[work.kind](work)


def device_peak() -> float:
    """The most memory that arrays have held on the GPU, in MiB."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", math.nan) / 2**20


def main() -> None:
    """Serve; where the device asked for is not jax's, say so at every request."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=["numpyro"], required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)  # jax takes the cores that the process may run on
    chosen = parser.parse_args()
    about = {"jax": jax.__version__, "numpyro": numpyro.__version__}
    if chosen.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        serve(build, about)
    elif jax.default_backend() == "gpu":
        serve(build, about, device_peak)
    else:
        serve(lambda work: _refuse(), about, resident_peak)


def _refuse() -> Job:
    raise Skip("jax sees no GPU")


if __name__ == "__main__":
    main()
