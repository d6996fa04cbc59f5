"""Variational autoencoders as Pyro programs: declare, train, judge.

>>> import ppl_vae as pv
>>> vae = pv.VAE(
...     prior=pv.StandardNormal(2),
...     likelihood=pv.Normal(pv.MLP(2, 32, 64), scale=pv.LearnedScale()),
...     posterior=pv.mean_field(pv.MLP(64, 32, 2 * 2)),
... )
>>> images = pv.digits()
>>> run = pv.fit(vae, images.train.x, images.valid.x, epochs=1, progress=False)
>>> bound = pv.log_likelihood(vae, images.test.x, particles=10)
>>> bound.direction
'lower'
"""

from ppl_vae.arviz_export import to_arviz
from ppl_vae.batches import Data, Stream
from ppl_vae.bounds import Bound
from ppl_vae.checkpoint import Save, load_weights, save_weights
from ppl_vae.conditionals import Conditional, FixedScale, LearnedScale, NetScale, Normal, Scale, bounded
from ppl_vae.config import Config, build
from ppl_vae.data import Images, digits, fashion_mnist, from_path, mnist
from ppl_vae.densities import LogJoint
from ppl_vae.estimators import Estimator, doubly, pathwise
from ppl_vae.evaluate import (
    ActiveUnits,
    Estimate,
    active_units,
    decode,
    elbo,
    encode,
    log_likelihood,
    reconstruct,
    sample,
)
from ppl_vae.film import Film
from ppl_vae.hooks import Anneal, EarlyStop, Hook, LogCSV, LogTensorBoard, Progress, linear
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import CVAE, VAE
from ppl_vae.nets import MLP, Concat, OneHot
from ppl_vae.objectives import ELBO, IWAE, BoundObjective, Objective, PyroObjective
from ppl_vae.pairs import Pair, Program, as_pair
from ppl_vae.posteriors import mean_field
from ppl_vae.priors import StandardNormal, conditional_normal
from ppl_vae.runs import RunFolder, load_run, train_run
from ppl_vae.traces import LogTerms, log_joint, log_terms
from ppl_vae.train import NonFiniteError, Run, Update, fit
from ppl_vae.transforms import Transform, redraw, threshold

__version__ = "0.1.0"
__all__ = [
    # declare
    "CVAE",
    "VAE",
    "Bernoulli",
    "Concat",
    "Conditional",
    "FixedScale",
    "LearnedScale",
    "MLP",
    "NetScale",
    "Normal",
    "OneHot",
    "Pair",
    "Program",
    "Scale",
    "StandardNormal",
    "as_pair",
    "bounded",
    "conditional_normal",
    "mean_field",
    # data
    "Data",
    "Images",
    "Stream",
    "digits",
    "fashion_mnist",
    "from_path",
    "mnist",
    "Transform",
    "redraw",
    "threshold",
    # train
    "Anneal",
    "Bound",
    "BoundObjective",
    "ELBO",
    "EarlyStop",
    "Estimator",
    "Film",
    "Hook",
    "IWAE",
    "LogCSV",
    "LogTensorBoard",
    "NonFiniteError",
    "Objective",
    "Progress",
    "PyroObjective",
    "Run",
    "Update",
    "doubly",
    "fit",
    "linear",
    "pathwise",
    # judge
    "ActiveUnits",
    "Estimate",
    "LogJoint",
    "LogTerms",
    "active_units",
    "decode",
    "elbo",
    "encode",
    "log_joint",
    "log_likelihood",
    "log_terms",
    "reconstruct",
    "sample",
    "to_arviz",
    # keep
    "Config",
    "build",
    "Save",
    "RunFolder",
    "load_run",
    "train_run",
    "load_weights",
    "save_weights",
]
