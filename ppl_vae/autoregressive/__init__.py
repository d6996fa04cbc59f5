"""Autoregressive distributions over grids of codes or pixels, by convolutions that see earlier positions alone.

Each is a `Conditional`: a prior over codes, a density of pictures by itself, or a decoder p(x | z). Its density
costs one pass of the net over the whole grid; a draw goes position by position, in raster order, and computes
every feature once.
"""

from ppl_vae.autoregressive.gated import GatedPixelCNN
from ppl_vae.autoregressive.grids import CodeGrid, Grid, LevelGrid, LogisticGrid
from ppl_vae.autoregressive.laws import Autoregressive, GridLaw, RasterNet
from ppl_vae.autoregressive.pixelcnn import PixelCNN
from ppl_vae.autoregressive.plusplus import PixelCNNPlusPlus

__all__ = [
    "Autoregressive",
    "CodeGrid",
    "GatedPixelCNN",
    "Grid",
    "GridLaw",
    "LevelGrid",
    "LogisticGrid",
    "PixelCNN",
    "PixelCNNPlusPlus",
    "RasterNet",
]
