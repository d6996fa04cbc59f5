"""The bench itself: the same work for all peers, timed in turn, told in one table. No time is asserted."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from annealing import anneal, sigmoid
from crew import Peer, Settings, timed_in_turn
from ours import objective, program
from peers import Hand
from report import curves, notes, table
from run import matching
from torch_nets import networks
from workloads import LEAPFROG, STEP, WORKLOADS, Workload, batches, binary, digits

import ppl_vae as pv
from ppl_vae.annealing import _walk
from ppl_vae.capture import Engine
from ppl_vae.layout import inspect
from ppl_vae.paths import Path as AnnealingPath
from ppl_vae.schedules import schedule

RUN = Path(__file__).with_name("run.py")
SMALL = Workload("small", hidden=(16,), latent=3, activation="tanh", batch=4)

# A worker without work: it logs who measures, takes as many milliseconds as its script is told, and may fail.
FAKE = """
import json, sys, time
milliseconds, trouble = {milliseconds}, {trouble!r}
name, measured = sys.argv[sys.argv.index("--peer") + 1], 0
print("a library says hello")
print(json.dumps({{"fake": "1"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "prepare" in request:
        reply = {{"skipped": "not mine"}} if trouble == "skip" else {{"first_s": 0.5}}
    else:
        measured += 1
        if trouble == "die" and measured == 2:
            raise SystemExit("out of memory")
        if trouble == "hang":
            time.sleep(60)
        open({log!r}, "a").write(name + " ")
        reply = {{"ms": milliseconds[measured - 1], "count": 1, "peak_mib": 100.0}}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def fake(tmp_path):
    """Make a peer without work."""

    def make(name: str, milliseconds: list[float], trouble: str = "") -> Peer:
        script = tmp_path / f"{name}.py"
        script.write_text(FAKE.format(milliseconds=milliseconds, trouble=trouble, log=str(tmp_path / "log")))
        return Peer(name, str(script))

    return make


def test_peers_take_turns_and_ratios_are_those_of_rounds(fake, tmp_path):
    """A slow round hits all: medians of times would say 3 / 2, rounds say 2."""
    peers = [fake("ours", [1, 2, 10]), fake("a", [2, 3, 20]), fake("b", [3, 6, 30])]
    versions = {}
    results = timed_in_turn(peers, SMALL, Settings(rounds=3), versions)
    assert (tmp_path / "log").read_text().split() == ["ours", "a", "b", "a", "b", "ours", "b", "ours", "a"]
    assert [r.ratio for r in results.values()] == [1, 2, 3]
    assert results["a"].row()["median"] == 3
    assert (results["a"].row()["min"], results["a"].row()["max"]) == (2, 20)
    assert results["b"].first_s == 0.5
    assert versions == {"fake": "1"}


def test_a_peer_that_fails_leaves_the_others_alone(fake):
    """What died, hung or declined is told with its reason; no ratio comes from half of the rounds."""
    peers = [
        fake("ours", [1, 1, 1]),
        fake("dead", [1, 1, 1], "die"),
        fake("slow", [1, 1, 1], "hang"),
        fake("idle", [], "skip"),
        fake("fine", [2, 2, 2]),
    ]
    results = timed_in_turn(peers, SMALL, Settings(rounds=3, timeout=2), {})
    assert results["fine"].ratio == 2
    assert results["dead"].failed
    assert "out of memory" in results["dead"].reason
    assert results["dead"].ratio is None
    assert "no answer within 2 s" in results["slow"].reason
    assert (results["idle"].failed, results["idle"].reason) == (False, "not mine")
    rows = [(SMALL, results)]
    shown = table(rows).splitlines()
    assert cells(shown[0])[1:6] == ["ours", "dead", "slow", "fine", "peak MiB"]
    assert cells(shown[2])[1:5] == ["1 ms", "failed", "failed", "2 ms (2.00x)"]
    assert notes(rows)[-1] == "n/a, idle: not mine (small)"
    assert len(notes(rows)) == 3


def cells(line: str) -> list[str]:
    """The cells of a row of a Markdown table."""
    return [c.strip() for c in line.strip("|").split("|")]


def test_amounts_have_the_unit_of_their_work():
    epoch, evaluation = replace(SMALL, kind="epoch"), replace(SMALL, kind="evaluation", images=200)
    annealing = replace(SMALL, kind="annealing", distributions=5)
    amounts = [w.amount(4000.0) for w in (SMALL, epoch, evaluation, annealing)]
    assert amounts == ["4e+03 ms", "4.00 s", "50 images/s", "100 ms per leapfrog step"]


@pytest.mark.parametrize("particles", [1, 5])
def test_ours_and_by_hand_maximise_the_same(particles):
    """The same weights and the same draws: the same objective and the same gradients, far from the prior."""
    work = replace(SMALL, particles=particles)
    x = torch.from_numpy(batches(work)[0])
    hand, vae, goal = Hand(work), program(work, "cpu"), objective(work)
    for encoder in (hand.encoder, vae.posterior.net):
        torch.nn.init.constant_(encoder[-1].bias, -0.8)
    torch.manual_seed(1)
    theirs = -hand(x)
    torch.manual_seed(1)
    ours = goal(pv.as_pair(vae), x).mean()
    torch.testing.assert_close(
        ours, theirs, rtol=1e-5, atol=0.01
    )  # our log-scale is softly bounded: 0.4% off here
    gradients = torch.autograd.grad(theirs, hand.decoder.parameters())
    for mine, gradient in zip(torch.autograd.grad(ours, vae.likelihood.parameters()), gradients, strict=True):
        torch.testing.assert_close(mine, gradient, rtol=0.01, atol=0.01)


def test_ours_and_by_hand_anneal_the_same():
    """The same weights and the same draws: the same log weights, of moves that are not all accepted."""
    x, vae, hand = torch.from_numpy(binary(4, (784,))), program(SMALL, "cpu"), Hand(SMALL)
    for decoder in (hand.decoder, vae.likelihood.net):
        with torch.no_grad():
            decoder[-1].weight.mul_(5)
    pair, betas = pv.as_pair(vae).eval(), sigmoid(6)
    inspect(pair, (x,))
    path = AnnealingPath(pair, (x,), "prior", Engine("off"))
    z = path.draw((x,), 5)
    torch.manual_seed(1)
    ours, accepted = _walk(path, z, betas, torch.full((7, 4, 1), STEP), LEAPFROG, (x,))
    torch.manual_seed(1)
    theirs = anneal(lambda z: hand.log_likelihood(z, x), z, betas)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)
    assert 0 < accepted.mean() < 1
    assert torch.allclose(torch.tensor(betas).double(), schedule("sigmoid", 6))


def test_ours_and_by_hand_have_the_same_networks():
    """Weights included, so that no peer starts from an easier place; the convolutional one takes particles."""
    for work in (SMALL, replace(SMALL, hidden=())):
        vae, (encoder, decoder) = program(work, "cpu"), networks(work)
        x = torch.from_numpy(binary(2, work.event))
        z = torch.randn(5, 2, work.latent)
        assert torch.equal(vae.likelihood(z).base_dist.logits, decoder(z))
        assert vae.posterior(x).base_dist.loc.equal(encoder(x)[..., : work.latent])
        assert decoder(z).shape == (5, 2, *work.event)


def test_digits_come_from_the_folder(tmp_path, monkeypatch):
    """Packed or not; without a folder they are made up, of the same size and type."""
    images = np.arange(3 * 784, dtype=np.uint8).reshape(3, 784)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path))
    assert np.array_equal(digits(2), images[:2])
    (raw / "train-images-idx3-ubyte").write_bytes(bytes(16) + images[::-1].tobytes())
    assert np.array_equal(digits(2), images[:0:-1])
    monkeypatch.delenv("PPL_VAE_DATA")
    made_up = digits(5)
    assert (made_up.shape, made_up.dtype) == ((5, 784), np.uint8)


def test_workloads_have_names_of_their_own():
    names = [work.name for work in WORKLOADS]
    assert len(set(names)) == len(names)
    assert matching(names, ["ELBO", "l_5000"]) == [n for n in names if "ELBO" in n or "L_5000" in n]
    assert matching(names, ["no such work"]) == []


def test_curves(tmp_path):
    """One panel for each size, on logarithmic axes, in a picture that can be read."""
    points = {1: [1.0, 1.1, 1.4], 8: [2.0, 2.2, 2.1]}
    measured = {
        title: {"ours": points, "torch eager": points} for title in ("batch size", "particles K", "latents")
    }
    curves(measured, tmp_path / "new" / "curves.png", "on a machine")
    with (tmp_path / "new" / "curves.png").open("rb") as picture:
        header = picture.read(24)
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") > 1500


@pytest.mark.slow
def test_the_whole_bench_runs(tmp_path):
    """Two workloads, all peers that this interpreter has: a table with a ratio for each, and the same in JSON."""
    out = tmp_path / "bench.json"
    done = subprocess.run(
        [sys.executable, RUN, "--quick", "--only", "ELBO, batch 20", "K = 5, batch 20", "--json", out],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    header, _, *rows = [cells(line) for line in done.stdout.splitlines() if line.startswith("|")]
    torch_peers = ["torch eager", "torch compile", "pyro svi"]
    assert header[:5] == ["workload", "ours", *torch_peers]
    assert len(rows) == 2
    for row in rows:
        assert len(row) == len(header)
        assert re.fullmatch(r"[\d.e+]+ ms", row[1])
        assert all(re.fullmatch(r"[\d.e+]+ ms \(\d+\.\d\dx\)", cell) for cell in row[2:5]), row
    report = json.loads(out.read_text())
    assert [row["workload"]["name"] for row in report["rows"]] == [row[0] for row in rows]
    for row in report["rows"]:
        for name in ["ours", *torch_peers]:
            peer = row["peers"][name]
            assert len(peer["ms"]) == report["settings"]["rounds"] == 2
            assert 0 < peer["min"] <= peer["median"] <= peer["max"]
            assert peer["peak_mib"] > 100
            assert peer["first_s"] > 0
    assert report["machine"]["torch"] == torch.__version__


def test_what_is_not_there_is_refused(tmp_path):
    """A text that no workload has, and an interpreter without the package: exit code 2, before anything is run."""
    for asked in (["--only", "no such work"], ["--numpyro-python", str(tmp_path / "python")], ["--rounds", "0"]):
        done = subprocess.run([sys.executable, RUN, *asked], capture_output=True, text=True, check=False)
        assert done.returncode == 2, asked
        assert done.stdout or done.stderr
