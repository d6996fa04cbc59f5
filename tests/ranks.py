"""Two processes that train a codebook together, each on half of every batch."""

import sys

import torch
from torch import distributed

import ppl_vae as pv


def trained(rank, ranks, revive):
    """The state of a codebook after some batches, of which this rank sees its part."""
    torch.manual_seed(0)
    book = pv.Codebook(6, 3, ema=0.7, revive=revive)
    batches = torch.randn(5, 40, 3)
    torch.manual_seed(rank)  # what is drawn to revive codes differs
    for batch in batches:
        book(batch.chunk(ranks)[rank])
    return book.state_dict()


if __name__ == "__main__":
    rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save([trained(rank, 2, revive) for revive in (None, 1)], out)
    distributed.destroy_process_group()
