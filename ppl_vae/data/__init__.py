"""Images for training and judging: bundled digits, some of torchvision's, arrays and folders of pictures.

Every source ends in an `Images`: three splits of flat pixels, float32 (N, D) in [0, 1], with the shape of one
picture kept beside them. Pixels are checked here, once, so that no batch is checked again. Binarisation is
not stored but applied as batches are presented: `Data(x, transform=redraw)`.
Reading never writes beside files that are already there, and unpickles none but those of CIFAR-10, which are
known by their sums.
"""

from ppl_vae.data.images import DataUnavailable, Images, Split, subset
from ppl_vae.data.known import cifar10, digits, fashion_mnist, mnist
from ppl_vae.data.reading import from_folder, from_npy, from_npz, from_path

__all__ = ["DataUnavailable", "Images", "Split", "cifar10", "digits", "fashion_mnist", "from_folder", "from_npy"]
__all__ += ["from_npz", "from_path", "mnist", "subset"]
