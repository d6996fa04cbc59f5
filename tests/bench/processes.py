"""What it costs a step that several processes take it together: time and bytes, of 1, 2 and 4 on one machine.

    python processes.py [STEPS]

A VAE of 784-400-20, captured steps, Adam. The joined batch has 128 data in every row of the table, so that on as
many cores as processes a step would take a part of one process's time, and the sum what is printed beside it.
With fewer cores, processes wait for each other, and the sum alone tells the overhead.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import distributed

import ppl_vae as pv
from ppl_vae.batches import Data, prepare
from ppl_vae.ranks import joint_mean, own_rank
from ppl_vae.rng import seeded
from ppl_vae.steps import Feed, Stepper

BATCH = 128


def update():
    """One step of a VAE."""
    with seeded(0):
        mlp = pv.MLP
        program = pv.VAE(
            pv.StandardNormal(20), pv.Bernoulli(mlp(20, 400, 784)), pv.mean_field(mlp(784, 400, 2 * 20))
        )
    pair = pv.as_pair(program)
    adam = torch.optim.Adam(pair.parameters(), lr=1e-3, fused=True)
    return pv.Update("objective", pair, pv.ELBO(kl="analytic"), adam)


def timed(call, steps):
    """The median time of a call in ms."""
    found = []
    for _ in range(steps):
        begun = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - begun))
    return median(found)


def measured(steps):
    """ms of a step, ms of its sum alone, bytes that it sums."""
    made = update()
    with seeded(1):
        x = (torch.rand(10 * BATCH, 784) < 0.2).float()
    feed = Feed(prepare(made.pair, Data(x), BATCH), BATCH, epochs=1000)
    stepper = Stepper(made, "require", feed)
    share = next(feed.shares(0, 0))
    for _ in range(5):
        stepper(share.item, share.rows)
    sent = []
    summed = distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return summed(tensor, *args, **kwargs)

    distributed.all_reduce = counted
    step = timed(lambda: stepper(share.item, share.rows), steps)
    sizes = set(sent)
    gradients = [torch.randn_like(p) for p in made.parameters]
    alone = timed(lambda: joint_mean(gradients, made.parameters, 1), steps) if sizes else 0.0
    count = sum(p.numel() for p in made.parameters)
    return step, alone, max(sizes, default=0), 4 * count


def main(folder, rank, ranks, steps):
    """One process of so many."""
    torch.set_num_threads(1)
    if ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    step, alone, sent, least = measured(steps)
    if own_rank() == 0:
        print(f"{ranks:>9} {step:>9.2f} {alone:>9.2f} {sent:>12,} {sent - least if sent else 0:>8,}", flush=True)
    if ranks > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    print(f"{'processes':>9} {'step, ms':>9} {'sum, ms':>9} {'bytes':>12} {'beside':>8}   {os.cpu_count()} cores")
    for ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(ranks):
                sys.stdout.flush()
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        main(Path(folder), rank, ranks, count)
                        code = 0
                    finally:
                        os._exit(code)
                children.append(child)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            if any(codes):
                sys.exit(f"{ranks} processes failed: {codes}")
