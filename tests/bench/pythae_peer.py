"""Pythae, as a worker: its VAE and IWAE on our networks, a pass of its trainer, with its own DataLoader."""

from __future__ import annotations

import tempfile
from importlib.metadata import version

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import Tensor, nn
from torch_nets import networks, torch_worker
from worker import Job, Skip, clocked
from workloads import Workload, batches

FOLDER = tempfile.TemporaryDirectory()  # Pythae wants one


class Encoder(BaseEncoder):
    """Our encoder, its result as Pythae wants it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> ModelOutput:
        loc, log_scale = self.net(x).chunk(2, -1)
        return ModelOutput(embedding=loc, log_covariance=2 * log_scale)


class Decoder(BaseDecoder):
    """Our decoder, giving probabilities."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.net(z).sigmoid())


def trainer(work: Workload, device: str) -> BaseTrainer:
    """Pythae's trainer of the workload, ready to train; as many batches make one pass as the others go round."""
    settings = {"input_dim": work.event, "latent_dim": work.latent, "reconstruction_loss": "bce"}
    encoder, decoder = networks(work)
    nets = {"encoder": Encoder(encoder), "decoder": Decoder(decoder)}
    if work.particles == 1:
        model = VAE(VAEConfig(**settings), **nets)
    else:
        model = IWAE(IWAEConfig(number_samples=work.particles, **settings), **nets)
    rows = torch.from_numpy(batches(work)).flatten(0, 1)
    config = BaseTrainerConfig(
        output_dir=FOLDER.name,
        per_device_train_batch_size=work.batch,
        per_device_eval_batch_size=work.batch,
        optimizer_cls="Adam",
        learning_rate=1e-3,
        no_cuda=device == "cpu",
    )
    made = BaseTrainer(model, BaseDataset(rows, torch.zeros(len(rows))), training_config=config)
    made.prepare_training()
    return made


def build(work: Workload, device: str) -> Job:
    """Training steps; the seconds of whole passes, shared among the steps asked for."""
    if work.kind != "step":
        raise Skip("only training steps are comparable")
    made = trainer(work, device)
    passes = clocked(lambda: made.train_step(1))  # its loss is read at every step: nothing is left to wait for

    def job(count: int) -> float:
        steps = len(made.train_loader)
        whole = -(-count // steps)
        return passes(whole) * count / (whole * steps)

    return job


if __name__ == "__main__":
    torch_worker({"pythae": build}, pythae=version("pythae"))
