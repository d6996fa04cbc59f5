"""What checkpoints cost: the time of each, as a share of an epoch of as many data as MNIST trains on.

    python checkpoints.py [EPOCHS]

A VAE of 784-400-20, batches of 128, two threads. The first epoch, in which the step is compiled, is left out.
"""

import sys
import tempfile
import time
from statistics import median

import torch

import ppl_vae as pv


class Timed(pv.Checkpoints):
    """Checkpoints that know how long it took to write each."""

    seconds: list[float]

    def write(self, epoch, state):
        """Write, and note the time; that of taking the state is a hundredth of it."""
        start = time.perf_counter()
        super().write(epoch, state)
        self.seconds.append(time.perf_counter() - start)


def main(epochs):
    """Train, and print the times."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    x = torch.rand(50_000, 784).gt(0.5).float()
    nets = pv.MLP(20, 400, 784), pv.MLP(784, 400, 40)
    vae = pv.VAE(pv.StandardNormal(20), pv.Bernoulli(nets[0]), pv.mean_field(nets[1]))
    with tempfile.TemporaryDirectory() as folder:
        kept = Timed(f"{folder}/kept")
        kept.seconds = []
        run = pv.fit(vae, x, x[:10_000], batch_size=128, epochs=epochs, progress=False, checkpoints=kept)
        size = kept.found()[-1].stat().st_size
    epoch, written = median(row["seconds"] for row in run.history[1:]), median(kept.seconds[3:])
    print(f"{size / 1e6:.1f} MB in {written * 1e3:.1f} ms, an epoch {epoch:.2f} s: {written / epoch:.2%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
