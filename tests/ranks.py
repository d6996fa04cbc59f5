"""Processes that train together; as a script, so many of them, forked when all is imported.

    python ranks.py FOLDER RANKS CASE ...

What a case finds is written to FOLDER, by each process.
"""

import os
import sys
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from kills import end
from pyro.infer import Trace_ELBO
from small import LATENT, WIDTH, pixels, vae
from torch import distributed, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import ppl_vae as pv
from ppl_vae import capture, graphs
from ppl_vae.faults import Faults
from ppl_vae.ranks import RankError, alone, check_equal, count_ranks, gathered, joint_mean, own_rank, share
from ppl_vae.resuming import Checkpoints
from ppl_vae.rng import seeded

ROWS, SIZE, EPOCHS = 41, 8, 3  # the last batch of an epoch has one row
X, HELD_OUT = pixels(ROWS), pixels(14, seed=1)
fit = partial(pv.fit, device="cpu", progress=False)


def trained(rank, ranks, revive):
    """The state of a codebook after some batches, of which this rank sees its part."""
    torch.manual_seed(0)
    book = pv.Codebook(6, 3, ema=0.7, revive=revive)
    batches = torch.randn(5, 40, 3)
    torch.manual_seed(rank)  # what is drawn to revive codes differs
    for batch in batches:
        book(batch.chunk(ranks)[rank])
    return book.state_dict()


def codebook():
    return [trained(own_rank(), count_ranks(), revive) for revive in (None, 1)]


# ---- programs without draws, whose gradients are those of the joined batches
def density():
    """A mixture in double precision; each process starts it elsewhere."""
    with seeded(own_rank()):
        return pv.Density(pv.MixturePrior(WIDTH, 5)).double()


class Watch(pv.Hook):
    """The parameters after every epoch, on every process."""

    everywhere = True

    def __init__(self):
        self.seen = []

    def on_epoch(self, run):
        self.seen.append([p.detach().clone() for p in run.pair.parameters()])


def exact(data=None, **settings):
    watch = Watch()
    sgd = partial(torch.optim.SGD, lr=0.3)
    settings = {
        "epochs": EPOCHS,
        "batch_size": SIZE,
        "compile": "off",
        "clip_norm": 0.7,
        "optimizer": sgd,
    } | settings
    run = fit(density(), X if data is None else data, hooks=[watch], **settings)
    return {"seen": watch.seen, "history": run.history, "step": run.step, "engine": run.engine.describe()}


def dataset():
    return exact(TensorDataset(X))


def away():
    return exact(pv.Data(X, transform=lambda x: 2 * x))  # gathered outside the step


def unequal():
    """Batches of each process's own; the first has one more."""
    batches = [X[:10], X[10:14], X[14:30], X[30:]]
    if count_ranks() == 1:
        joined = [torch.cat(batches[:2]), torch.cat([batches[2], batches[3]]), X[:7]]
        return exact(joined)
    return exact([batches[0], batches[2], X[:7]] if own_rank() == 0 else [batches[1], batches[3]])


# ---- programs that draw
def normalised():
    """A net with running statistics."""
    with seeded(0):
        program = vae()
        layers = (nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2 * LATENT))
        program.posterior = pv.mean_field(nn.Sequential(*layers))
    return program


def drawing(folder=None, resume="off", at=None, **settings):
    kept = None if folder is None else Checkpoints(folder / "kept", resume)
    settings = {"epochs": EPOCHS, "batch_size": 10, "compile": "off", "seed": 3, "checkpoints": kept} | settings
    settings["hooks"] = [*settings.get("hooks", ()), *([] if at is None else [Cut(at)])]
    return fit(normalised(), X[:40], HELD_OUT, **settings)


class Cut(pv.Hook):
    """Ends every process at a step."""

    everywhere = True

    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            raise KeyboardInterrupt


def validated():
    drawn = []

    class Draw(pv.Hook):
        everywhere = True

        def on_epoch(self, run):
            drawn.append(torch.rand(2))

    run = drawing(epochs=4, hooks=[Draw()])
    return {"end": end(run), "history": run.history, "drawn": drawn}


def resumed(folder):
    whole, cut = end(drawing(epochs=4)), drawing(folder, epochs=4, at=6)
    again = end(drawing(folder, "last", epochs=4))
    return {"whole": whole, "cut": cut.interrupted, "again": again}


def other_number(folder):
    """Two processes begin, one goes on."""
    drawing(folder, epochs=4, at=6)


def critic():
    """Two steps a batch, and parameters beside the pair's."""
    from ppl_vae.adversaries import Adversary

    with seeded(own_rank()):
        goal = pv.ELBO(penalties=[Adversary(0.5, pv.MLP(LATENT, 8, 1))])
    run = drawing(objective=goal)
    return end(run)


def quantised(how="require", data=X, revive=2):
    """A codebook within captured steps."""
    with seeded(0):
        book = pv.Codebook(6, LATENT, ema=0.9, revive=revive)
        program = pv.VAE(
            pv.CodePrior(pv.UniformCodes(6, ()), book),
            pv.Normal(pv.MLP(LATENT, 8, WIDTH), 0.3),
            pv.Quantised(pv.MLP(WIDTH, 8, LATENT), book),
        )
    goal = pv.ELBO(penalties=[pv.Commitment()])
    run = fit(program, data, objective=goal, epochs=2, batch_size=SIZE, compile=how)
    return end(run) | {"engine": run.engine.describe()}


# ---- what goes wrong
class Moved(pv.Hook):
    """Changes parameters, of the first process alone."""

    def on_step(self, run):
        if run.step == 2:
            with torch.no_grad():
                next(run.pair.parameters()).add_(1e-3)


class Stop(pv.Hook):
    def on_epoch(self, run):
        if run.epoch == 2:
            run.stop("enough")


class Alone(pv.Hook):
    """Judges, on the first process alone."""

    def __init__(self):
        self.seen = []

    def on_epoch(self, run):
        self.seen.append((own_rank(), count_ranks(), float(pv.elbo(run.pair, HELD_OUT, seed=0).value.mean())))


def refused(call):
    try:
        call()
    except (RankError, ValueError) as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return ["", " ".join(str(warning.message) for warning in caught)]


def wrong():
    other = X if own_rank() == 0 else X + 0.1
    kept = pv.Checkpoints("kept") if own_rank() else None
    return {
        "moved": refused(lambda: drawing(hooks=[Moved()])),
        "data": refused(lambda: fit(vae(), other, epochs=1)),
        "seed": refused(lambda: fit(vae(), X, epochs=1, seed=own_rank())),
        "batch": refused(lambda: fit(vae(), X, epochs=1, batch_size=1)),
        "rows": refused(lambda: fit(vae(), X[:1], epochs=1)),
        "kept": refused(lambda: fit(vae(), X, epochs=1, checkpoints=kept)),
        "epochs": refused(lambda: fit(vae(), X, epochs=1 + own_rank())),
        "whole": warned(lambda: fit(vae(), DataLoader(TensorDataset(X), SIZE, shuffle=True), epochs=1)),
    }


def judged_alone(run):
    with alone():
        return float(pv.elbo(run.pair, HELD_OUT, seed=0).value.mean())


def hooked():
    judging, stop = Alone(), drawing(hooks=[Stop()])
    run = drawing(epochs=1, hooks=[judging])
    return {
        "stop": [stop.epoch, stop.reason],
        "judged": judging.seen,
        "alone": judged_alone(run),
    }


def primitives():
    rank = own_rank()
    like = [torch.zeros(2), torch.zeros(3, 2, dtype=torch.float64), torch.zeros(())]
    values = [torch.full((2,), 1.0 + rank), None if rank == 0 else torch.ones(3, 2, dtype=torch.float64), None]
    means, there = joint_mean(values, like, rows=1 + 2 * rank)
    idle, _ = joint_mean([torch.full((2,), torch.nan if rank else 5.0)], like[:1], rows=1 - rank)
    held = [
        torch.tensor([True, rank == 0]),
        torch.full((3,), rank),
        torch.full((2, 2), float(rank)),
        torch.zeros(0),
    ]
    share(held)
    same = refused(lambda: check_equal([torch.tensor([1.0, 2.0]), torch.tensor([rank < 5])], "here"))
    minus = refused(lambda: check_equal([torch.tensor([0.0 if rank else -0.0])], "here"))
    kinds = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float64, torch.complex64)
    rows = [gathered(torch.tensor([[rank, 1]] * (1 + rank)).to(kind)) for kind in kinds]
    found = {"means": means, "there": there(), "idle": idle, "held": held, "same": same, "minus": minus}
    return found | {"gathered": rows}


class Sharp(nn.Module):
    """A conditional that is not defined where a pixel is large."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        found = self.inner(x).base_dist
        return dist.Normal(found.loc, found.scale.masked_fill(x[:, :1] > 100, torch.nan)).to_event(1)


def faulty(folder):
    """One datum on which numbers go wrong, of the training or the held-out data; in the part of one process."""
    found = {}
    for policy in ("skip", "back", "stop"):
        program, x, held_out = normalised(), X[:40].clone(), HELD_OUT.clone()
        program.posterior = Sharp(program.posterior)
        (held_out if policy == "stop" else x)[9, 0] = 1000.0
        faults = Faults(policy, most=2 if policy == "back" else 9, folder=folder / policy)
        try:
            run = fit(program, x, held_out, epochs=2, batch_size=10, compile="off", faults=faults)
        except pv.NonFiniteError as error:
            run = error.run
        told = [[f.step, f.datum, f.site, f.action] for f in run.faults]
        found[policy] = {"end": end(run), "told": told, "files": [f.file for f in run.faults]}
    return found


class Category(nn.Module):
    """Draws categories, which torch refuses to do from NaN."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails
        self.logits, self.loc = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def model(self, x):
        pyro.module("category", self)
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(self.loc[k], 1.0), obs=x)

    def guide(self, x):
        pyro.module("category", self)
        logits = self.logits if self.fails else self.logits.nan_to_num()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("k", dist.Categorical(logits=logits.expand(len(x), 3)))


def gone():
    """Parameters become NaN by a rate that becomes infinite; then steps fail in both processes, or in one."""
    found = {}
    rates = partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0 if step < 2 else torch.inf)
    for policy in ("stop", "back", "skip"):
        for all_fail in (True, False):
            program = Category(all_fail or own_rank() == 1)
            how = {"objective": Trace_ELBO(), "scheduler": rates, "scheduler_every": "step", "compile": "off"}
            try:
                fit(program, X[:40, 0], epochs=3, batch_size=8, faults=Faults(policy, most=2), **how)
            except pv.NonFiniteError as error:
                found[f"{policy} {all_fail}"] = (str(error), error.run.pair.state_dict())
    return found


def streamed(folder):
    """Each process has a stream of its own; one has the datum, and what went wrong cannot be saved."""

    class InTheWay(pv.Hook):
        def on_start(self, run):
            (folder / "faults").write_text("a file")

    warnings.simplefilter("ignore", UserWarning)
    batches = [X[:8].clone(), X[8:16].clone(), X[16:24].clone()]
    batches[1][3, 0] = 1000.0 if own_rank() == 1 else 0.0
    program = normalised()
    program.posterior = Sharp(program.posterior)
    how = {"epochs": 1, "batch_size": 16, "compile": "off", "hooks": [InTheWay()]}
    run = fit(program, batches, faults=Faults("skip", folder=folder / "faults"), **how)
    return [[fault.where, fault.cause, fault.rank, fault.file] for fault in run.faults]


def dead(folder, how="off"):
    """The last process ends in the middle of an epoch."""

    class Die(pv.Hook):
        everywhere = True

        def on_step(self, run):
            if run.step == 7 and own_rank() == count_ranks() - 1:
                os._exit(0)

    return refused(lambda: drawing(folder, epochs=4, hooks=[Die()], compile=how))


CASES = {
    "codebook": codebook,
    "exact": exact,
    "exact, captured": partial(exact, compile="require"),
    "exact, not clipped": partial(exact, clip_norm=None),
    "exact, Adam": partial(exact, optimizer=partial(torch.optim.Adam, lr=1e-2, fused=True), clip_norm=None),
    "dataset": dataset,
    "away": away,
    "unequal": unequal,
    "validated": validated,
    "resumed": resumed,
    "other number": other_number,
    "critic": critic,
    "quantised": quantised,
    "idle": partial(quantised, data=X[: SIZE + 1], revive=None),
    "wrong": wrong,
    "hooked": hooked,
    "primitives": primitives,
    "faulty": faulty,
    "gone": gone,
    "streamed": streamed,
    "dead": dead,
    "dead, captured": partial(dead, how="require"),
}
FOLDERS = {"faulty", "streamed", "resumed", "other number", "dead", "dead, captured"}


def find(case, folder):
    """What a case finds in this process."""
    return CASES[case](folder / case) if case in FOLDERS else CASES[case]()


def main(folder, rank, ranks, cases):
    """One process of so many."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    if not os.environ.get("COMPILED"):
        interpret = partial(graphs.capture, compile=False)
        capture.capture = lambda function, tensors, compile=True: interpret(function, tensors)
    where = f"file://{folder}/meet"
    distributed.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    for case in cases:
        if rank == 0:
            (folder / case).mkdir()
        distributed.barrier()
        torch.save(find(case, folder), folder / f"{case}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    out, count, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    children = {}
    for number in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                main(out, number, count, names)
                code = 0
            except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on as the other one
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children[child] = number
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(codes, key=abs))
