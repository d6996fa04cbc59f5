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

from ppl_vae.adversaries import Adversary
from ppl_vae.alternating import PIWAE, RWS, Alternating, Wake
from ppl_vae.amortisation import Gaps, gaps
from ppl_vae.annealing import annealed, sandwich
from ppl_vae.arviz_export import to_arviz
from ppl_vae.autoregressive import (
    CodeGrid,
    GatedPixelCNN,
    LevelGrid,
    LogisticGrid,
    PixelCNN,
    PixelCNNPlusPlus,
)
from ppl_vae.batches import Data, Stream
from ppl_vae.belief import sigmoid_belief_network
from ppl_vae.bounds import Bound, Grouped, Mixed, Renyi, Thermodynamic
from ppl_vae.calibration import Calibration, sbc
from ppl_vae.checkpoint import Save, load_weights, save_weights
from ppl_vae.codebooks import Codebook, ProductCodebook, ResidualCodebook, Summed
from ppl_vae.codes import CodePrior, Quantised, check_usage, perplexity, usage
from ppl_vae.coding import CodeLength, CodeUse, WatchCodes, code_indices, code_length, code_use
from ppl_vae.conditionals import (
    Conditional,
    FixedScale,
    LearnedScale,
    NetScale,
    Normal,
    OptimalScale,
    Scale,
    bounded,
)
from ppl_vae.config import Config, build
from ppl_vae.convolutions import ConvDecoder, ConvEncoder
from ppl_vae.counts import NegativeBinomial, Poisson
from ppl_vae.criticism import PredictiveCheck, predictive_check
from ppl_vae.data import Images, cifar10, digits, fashion_mnist, from_path, mnist
from ppl_vae.decomposition import Decomposition, RateDistortion, RatePoint, decompose, rate_distortion
from ppl_vae.densities import LogJoint
from ppl_vae.discrete import Bits, Constant, OneHotCategorical, RelaxedBernoulli, RelaxedCategorical, Simplex
from ppl_vae.disentangling import factor_score, mutual_information, mutual_information_gap
from ppl_vae.enumeration import enumerated
from ppl_vae.estimates import Average, IncompleteError, Sandwich, average
from ppl_vae.estimators import Estimator, doubly, pathwise, sticking
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
from ppl_vae.faults import Faults, SavedFault, load_fault
from ppl_vae.film import Film
from ppl_vae.flows import Flow, Flowed, planar, radial
from ppl_vae.generators import FittedScale, Generator, fit_scale
from ppl_vae.hamiltonian import Hamiltonian, Joint
from ppl_vae.hierarchies import HierarchicalVAE, LadderVAE
from ppl_vae.hooks import Anneal, EarlyStop, Hook, LogCSV, LogTensorBoard, Progress, WholeProgram, cyclical, linear
from ppl_vae.likelihoods import Bernoulli, Beta, ContinuousBernoulli, StudentT
from ppl_vae.models import CVAE, VAE, Density
from ppl_vae.nets import MLP, Batched, Concat, Modulated, OneHot, Residual
from ppl_vae.objectives import ELBO, IWAE, BoundObjective, Objective, Part, PyroObjective
from ppl_vae.overfitting import Generalisation, generalisation
from ppl_vae.pairs import Pair, Program, as_pair, prior_guided
from ppl_vae.penalties import (
    MMD,
    Capacity,
    DecoderL2,
    FreeBits,
    GradientPenalty,
    Penalty,
    TotalCorrelation,
    squared_mmd,
)
from ppl_vae.pixels import Categorical, DiscretisedLogistic, LogisticMixture, bits_per_dimension
from ppl_vae.posteriors import FullCovariance, LowRank, MixtureOfNormals, Point, mean_field
from ppl_vae.priors import (
    LearnedNormal,
    MixturePrior,
    StandardNormal,
    UniformCodes,
    VampPrior,
    conditional_normal,
    flow_prior,
)
from ppl_vae.proposals import widened
from ppl_vae.quantising import Commitment
from ppl_vae.ranks import RankError, alone, process_group
from ppl_vae.refining import (
    Local,
    LocalFamily,
    Refined,
    local_flow,
    local_full_covariance,
    local_mean_field,
    refine,
)
from ppl_vae.resuming import Checkpoints
from ppl_vae.running import Fault
from ppl_vae.runs import RunFolder, load_run, train_run
from ppl_vae.scalars import AffineMap, ScalarMap, SplineMap
from ppl_vae.schedules import Annealing
from ppl_vae.scores import NVIL, Score, leave_one_out, score, vimco
from ppl_vae.semiamortised import SemiAmortised
from ppl_vae.semisupervised import SemiSupervisedVAE, hide_labels
from ppl_vae.sequences import BackwardGRU, DeepMarkovModel, combiner, gated_transition
from ppl_vae.tails import khat_threshold, pareto
from ppl_vae.traces import LogTerms, log_joint, log_terms
from ppl_vae.train import NonFiniteError, Run, Update, fit
from ppl_vae.transforms import Transform, dequantise, redraw, threshold
from ppl_vae.triangular import coupling, inverse_autoregressive, masked_autoregressive
from ppl_vae.weighing import importance

__version__ = "0.1.0"
__all__ = [
    # declare
    "AffineMap",
    "as_pair",
    "BackwardGRU",
    "Batched",
    "Bernoulli",
    "Beta",
    "Bits",
    "bounded",
    "Categorical",
    "Codebook",
    "CodeGrid",
    "CodePrior",
    "combiner",
    "Concat",
    "Conditional",
    "conditional_normal",
    "Constant",
    "ContinuousBernoulli",
    "ConvDecoder",
    "ConvEncoder",
    "coupling",
    "CVAE",
    "DeepMarkovModel",
    "Density",
    "DiscretisedLogistic",
    "FixedScale",
    "Flow",
    "flow_prior",
    "Flowed",
    "FullCovariance",
    "gated_transition",
    "GatedPixelCNN",
    "Generator",
    "Hamiltonian",
    "hide_labels",
    "HierarchicalVAE",
    "inverse_autoregressive",
    "Joint",
    "LadderVAE",
    "LearnedNormal",
    "LearnedScale",
    "LevelGrid",
    "LogisticGrid",
    "LogisticMixture",
    "LowRank",
    "masked_autoregressive",
    "mean_field",
    "MixtureOfNormals",
    "MixturePrior",
    "MLP",
    "Modulated",
    "NegativeBinomial",
    "NetScale",
    "Normal",
    "OneHot",
    "OneHotCategorical",
    "OptimalScale",
    "Pair",
    "PixelCNN",
    "PixelCNNPlusPlus",
    "planar",
    "Point",
    "Poisson",
    "prior_guided",
    "ProductCodebook",
    "Program",
    "Quantised",
    "radial",
    "RelaxedBernoulli",
    "RelaxedCategorical",
    "Residual",
    "ResidualCodebook",
    "ScalarMap",
    "Scale",
    "SemiSupervisedVAE",
    "sigmoid_belief_network",
    "Simplex",
    "SplineMap",
    "StandardNormal",
    "StudentT",
    "Summed",
    "UniformCodes",
    "VAE",
    "VampPrior",
    # data
    "cifar10",
    "Data",
    "dequantise",
    "digits",
    "fashion_mnist",
    "from_path",
    "Images",
    "mnist",
    "redraw",
    "Stream",
    "threshold",
    "Transform",
    # train
    "Adversary",
    "alone",
    "Alternating",
    "Anneal",
    "Bound",
    "BoundObjective",
    "Capacity",
    "Checkpoints",
    "Commitment",
    "cyclical",
    "DecoderL2",
    "doubly",
    "EarlyStop",
    "ELBO",
    "enumerated",
    "Estimator",
    "Fault",
    "Faults",
    "Film",
    "fit",
    "FreeBits",
    "GradientPenalty",
    "Grouped",
    "Hook",
    "IWAE",
    "leave_one_out",
    "linear",
    "load_fault",
    "LogCSV",
    "LogTensorBoard",
    "Mixed",
    "MMD",
    "NonFiniteError",
    "NVIL",
    "Objective",
    "Part",
    "pathwise",
    "Penalty",
    "PIWAE",
    "process_group",
    "Progress",
    "PyroObjective",
    "RankError",
    "Renyi",
    "Run",
    "RWS",
    "SavedFault",
    "Score",
    "score",
    "SemiAmortised",
    "sticking",
    "Thermodynamic",
    "TotalCorrelation",
    "Update",
    "vimco",
    "Wake",
    "WatchCodes",
    "WholeProgram",
    # judge
    "active_units",
    "ActiveUnits",
    "annealed",
    "Annealing",
    "Average",
    "average",
    "bits_per_dimension",
    "Calibration",
    "check_usage",
    "code_indices",
    "code_length",
    "code_use",
    "CodeLength",
    "CodeUse",
    "decode",
    "decompose",
    "Decomposition",
    "elbo",
    "encode",
    "Estimate",
    "factor_score",
    "fit_scale",
    "FittedScale",
    "Gaps",
    "gaps",
    "Generalisation",
    "generalisation",
    "importance",
    "IncompleteError",
    "khat_threshold",
    "Local",
    "local_flow",
    "local_full_covariance",
    "local_mean_field",
    "LocalFamily",
    "log_joint",
    "log_likelihood",
    "log_terms",
    "LogJoint",
    "LogTerms",
    "mutual_information",
    "mutual_information_gap",
    "pareto",
    "perplexity",
    "predictive_check",
    "PredictiveCheck",
    "rate_distortion",
    "RateDistortion",
    "RatePoint",
    "reconstruct",
    "refine",
    "Refined",
    "sample",
    "Sandwich",
    "sandwich",
    "sbc",
    "squared_mmd",
    "to_arviz",
    "usage",
    "widened",
    # keep
    "build",
    "Config",
    "load_run",
    "load_weights",
    "RunFolder",
    "Save",
    "save_weights",
    "train_run",
]
