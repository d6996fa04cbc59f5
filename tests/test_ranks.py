"""Codebooks in several processes: the statistics are those of the whole batch."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import trained
from torch import distributed

SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch has no gloo here")
def test_all_ranks_have_the_codes_of_the_joined_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    started = [subprocess.Popen([sys.executable, SCRIPT, str(r), port, str(out)]) for r, out in enumerate(outs)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    first, second = (torch.load(out, weights_only=True) for out in outs)
    for mine, others in zip(first, second, strict=True):
        for name, value in mine.items():
            assert torch.equal(value, others[name]), name
    alone = trained(0, 1, None)
    for name, value in alone.items():
        torch.testing.assert_close(first[0][name], value, rtol=1e-5, atol=1e-6)
    assert (first[1]["vectors"] - first[0]["vectors"]).abs().max() > 0.01  # codes were put elsewhere
