"""Data sources: the same splits everywhere, pixels in [0, 1], and a clear refusal of anything else."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import shutil
import struct
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

import ppl_vae as pv
from ppl_vae import data
from ppl_vae.plots import latent_scatter

IDX = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


def parts(images: data.Images) -> tuple[data.Split, data.Split, data.Split]:
    return images.train, images.valid, images.test


def sizes(images: data.Images) -> tuple[int, ...]:
    return tuple(map(len, parts(images)))


def rows(*splits: data.Split) -> Counter:
    """The pictures as a multiset: equal ones hold the same pictures, each as often."""
    return Counter(row.tobytes() for split in splits for row in split.x.numpy())


def unit(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).astype(np.float32) / np.float32(255)


def refused(match, load, *args) -> None:
    with pytest.raises(ValueError, match=match):
        load(*args)


def test_digits_are_dealt_completely_without_overlap_and_with_their_labels():
    images, bunch = data.digits(), load_digits()
    assert sizes(images) == (1297, 200, 300)
    whole = data.Split(torch.tensor(bunch.data / 16, dtype=torch.float32))
    assert rows(*parts(images)) == rows(whole)
    labels = dict(zip((row.tobytes() for row in whole.x.numpy()), bunch.target, strict=True))
    for split in parts(images):
        assert [labels[row.tobytes()] for row in split.x.numpy()] == split.y.tolist()


def test_digits_are_the_same_whatever_the_global_seeds():
    first = data.digits()
    state = torch.manual_seed(2).get_state()
    for a, b in zip(parts(first), parts(data.digits()), strict=True):
        assert all(map(torch.equal, a.columns, b.columns))
    assert torch.equal(torch.get_rng_state(), state)  # nor does loading consume a training run's stream


def test_digits_are_stratified_and_shuffled():
    bunch, images = load_digits(), data.digits()
    share = np.bincount(bunch.target) / 1797
    for split in parts(images):
        assert np.abs(np.bincount(split.y) - len(split) * share).max() <= 2
    source = {x.astype(np.float32).tobytes(): i for i, x in enumerate(bunch.data / 16)}
    order = [source[row.tobytes()] for row in images.train.x.numpy()]
    assert abs(np.corrcoef(order, np.arange(1297))[0, 1]) < 5 / np.sqrt(1297)


def test_types_names_and_subset():
    images = data.digits()
    assert (images.shape, images.classes) == ((8, 8), tuple("0123456789"))
    assert (images.train.x.dtype, images.train.y.dtype) == (torch.float32, torch.int64)
    assert (images.train.x.min(), images.train.x.max()) == (0, 1)
    assert [column.shape for column in images.test.columns] == [(300, 64), (300,)]
    assert [repr(images)[:17], repr(images.test)] == ["Images('digits', ", "Split(300 x 64, labelled)"]
    few = data.subset(images, 250)
    assert sizes(few) == (250, 200, 250)
    assert all(map(torch.equal, few.test.columns, images.test[:250].columns))
    refused("n must be at least 1", data.subset, images, 0)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 4, 6), dtype=np.uint8)


def save(tmp_path: Path, **arrays: np.ndarray) -> Path:
    np.savez(tmp_path / "set.npz", **arrays)
    return tmp_path / "set.npz"


def test_npz_is_split_in_80_10_10_with_labels(tmp_path, pixels):
    labels = np.repeat(["cat", "ant"], 25)
    images, other = (data.from_npz(save(tmp_path, x=pixels, y=labels), seed) for seed in (0, 1))
    assert sizes(images) == (40, 5, 5)
    assert (images.name, images.shape, images.classes) == ("set", (4, 6), ("ant", "cat"))
    label = dict(zip((row.tobytes() for row in unit(pixels)), labels, strict=True))
    assert rows(*parts(images)) == Counter(list(label))
    for split in parts(images):
        assert [images.classes[i] for i in split.y] == [label[row.tobytes()] for row in split.x.numpy()]
        assert abs(2 * int(split.y.sum()) - len(split)) <= 1  # both classes in equal shares
    assert rows(images.test) != rows(other.test)  # the seed decides


def test_npz_with_its_own_splits_keeps_them_in_order(tmp_path, pixels):
    cut = {"train": slice(0, 30), "valid": slice(30, 40), "test": slice(40, 50)}
    columns = {"x": pixels, "y": np.arange(50) % 5 + 3}
    arrays = {f"{key}_{part}": columns[key][at] for key in columns for part, at in cut.items()}
    images = data.from_npz(save(tmp_path, **arrays))
    assert images.classes == ("3", "4", "5", "6", "7")
    for split, at in zip(parts(images), cut.values(), strict=True):
        assert np.array_equal(split.x, unit(pixels[at]))
        assert [int(images.classes[i]) for i in split.y] == columns["y"][at].tolist()


def test_npz_without_validation_draws_it_from_training_only(tmp_path, pixels):
    images = data.from_npz(save(tmp_path, x_train=pixels[:40], x_test=pixels[40:]))
    assert sizes(images) == (36, 4, 10)
    assert np.array_equal(images.test.x, unit(pixels[40:]))
    assert rows(images.train, images.valid) == Counter(row.tobytes() for row in unit(pixels[:40]))
    assert images.train.columns == (images.train.x,)


def test_npy_shapes(tmp_path):
    shapes = {(9,): (3, 3), (6,): (1, 6), (2, 3): (2, 3), (2, 3, 1): (2, 3), (2, 4, 3): (3, 2, 4)}
    for saved, shape in shapes.items():
        x = np.random.default_rng(0).random((10, *saved)).astype(np.float32)
        np.save(tmp_path / "x.npy", x)
        images = data.from_npy(tmp_path / "x.npy")
        assert images.shape == shape
        channels_first = np.moveaxis(x, 3, 1) if len(shape) == 3 else x
        assert rows(*parts(images)) == Counter(row.tobytes() for row in channels_first)


def test_npy_keeps_what_is_in_0_1(tmp_path):
    for dtype in (bool, np.float16, np.float64, np.int64):
        np.save(tmp_path / "x.npy", np.array([[0, 1, 1, 0]] * 10).astype(dtype))
        assert torch.equal(data.from_npy(tmp_path / "x.npy").valid.x, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))


def grey(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5)


def spoilt(value: float) -> np.ndarray:
    return np.where(np.arange(40).reshape(10, 4) == 30, value, 0.5)  # row 7, pixel 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": spoilt(np.nan)}, "x of train: row 7, pixel 2 .nan. is NaN"),
        ({"x": spoilt(np.inf)}, "row 7, pixel 2 .inf. is outside"),
        ({"x": spoilt(1.5)}, "row 7.*1.5.* is outside .0, 1.: rescale"),
        ({"x": spoilt(-0.5)}, "row 7.*-0.5.* is outside"),
        ({"x": np.arange(40).reshape(10, 4)}, "save 0..255 as uint8"),
        ({"x": np.eye(10, dtype=np.uint8)}, "save 0/1 pixels as bool"),
        ({"x": grey(10)}, r"must be \(N, D\).*got shape \(10,\)"),
        ({"x": grey(10, 3, 4, 4)}, r"must be \(N, D\).*got shape \(10, 3, 4, 4\)"),
        ({"x": grey(0, 4)}, "empty"),
        ({"x": grey(10, 0)}, "empty"),
        ({"x": grey(2, 4)}, "2 training images are too few to draw test and valid"),
        ({"x": np.full((10, 4), "a")}, "must be numbers"),
        ({"x": np.full((10, 4), None)}, "pickles are never loaded"),
        ({"z": grey(10, 4)}, "either an array `x` or an array `x_train`, found z"),
        ({}, "found nothing"),
        ({"x": grey(10, 4), "x_train": grey(10, 4)}, "either an array `x` or"),
        ({"x_train": grey(10, 4), "x_test": grey(10, 5)}, "must have one shape"),
        ({"x_train": grey(10, 4), "x_test": spoilt(np.nan)}, "x of test: row 7"),
        ({"x": grey(10, 4), "y": np.arange(9)}, r"labels of train must be \(10,\).*\(9,\)"),
        ({"x": grey(10, 4), "y": np.zeros((10, 1), int)}, r"labels of train.*\(10, 1\)"),
        ({"x": grey(10, 4), "y": np.zeros(10)}, "labels of train.*float64"),
        ({"x_train": grey(9, 4), "x_test": grey(9, 4), "y_train": np.arange(9)}, "labels of test"),
    ],
)
def test_bad_npz_is_refused(tmp_path, arrays, message):
    refused(message, data.from_npz, save(tmp_path, **arrays))


@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
def test_damaged_and_pickled_arrays_are_refused(tmp_path, name):
    path = tmp_path / name
    np.savez(path, x=grey(50, 40)) if path.suffix == ".npz" else np.save(path, grey(50, 40))
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], b"", b"garbage", good[:400] + b"\xff" * 50 + good[450:]):
        path.write_bytes(bad)
        refused(name, data.from_path, path)
    np.save(tmp_path / "x.npy", np.full((10, 4), None), allow_pickle=True)
    refused("pickles are never loaded", data.from_npy, tmp_path / "x.npy")


def paint(path: Path, value: int, mode: str = "L", size: tuple[int, int] = (3, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value, 255 - value, 0) if mode == "RGB" else value).save(path)


def test_folder_of_grey_pictures(tmp_path, monkeypatch):
    for i in range(10):
        paint(tmp_path / f"{i}.png", 20 * i, "L" if i else "1")
    (tmp_path / "notes.txt").write_text("passed over")
    (tmp_path / ".hidden.png").write_text("passed over")
    images = data.from_folder(tmp_path)
    assert (images.shape, images.classes, sizes(images)) == ((2, 3), (), (8, 1, 1))
    levels = torch.cat([split.x for split in parts(images)]).sort(0).values * 255
    assert torch.allclose(levels, 20.0 * torch.arange(10)[:, None].expand(10, 6))
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listing(path), reverse=True))
    assert torch.equal(data.from_folder(tmp_path).train.x, images.train.x)  # whatever order the disk lists in
    paint(tmp_path / "9.png", 180, "RGB")
    assert data.from_folder(tmp_path).shape == (3, 2, 3)  # one picture in colour makes all RGB


def test_folder_of_classes_in_colour(tmp_path):
    for i in range(20):
        paint(tmp_path / ("red" if i >= 10 else "green") / f"{i:02}.png", 255 if i >= 10 else i, "RGB")
    images = data.from_folder(tmp_path)
    assert (images.shape, images.classes) == ((3, 2, 3), ("green", "red"))
    for split in parts(images):
        channels = split.x.reshape(-1, 3, 2, 3)
        assert torch.equal(channels[:, 0, 0, 0] == 1, split.y == 1)  # red is the first channel, and the label
        assert (channels[:, 2] == 0).all()
        assert len(split.y.unique()) == 2


def test_bad_pictures_are_named(tmp_path, monkeypatch):
    for i in range(5):
        paint(tmp_path / f"{i}.png", 100)
    odd = tmp_path / "3.png"
    paint(odd, 100, size=(4, 2))
    refused(r"3\.png is \(4, 2\), not \(3, 2\)", data.from_folder, tmp_path)
    odd.write_bytes((tmp_path / "0.png").read_bytes()[:50])
    refused(r"cannot read the picture .*3\.png", data.from_folder, tmp_path)
    odd.write_text("not a picture")
    refused(r"cannot read the picture .*3\.png", data.from_folder, tmp_path)
    paint(odd, 60_000, "I;16")
    refused(r"3\.png has more than 8 bits", data.from_folder, tmp_path)
    for limit in (4, 2):  # of 6 pixels: Pillow warns above the limit and raises above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refused(r"0\.png: .*decompression bomb", data.from_folder, tmp_path)
    paint(tmp_path / "cats" / "1.png", 100)
    refused(r"0\.png lies beside the sub-folder cats", data.from_folder, tmp_path)


def test_folders_without_pictures_or_classes_are_refused(tmp_path):
    refused("no such folder", data.from_folder, tmp_path / "nowhere")
    refused("holds no pictures", data.from_folder, tmp_path)
    paint(tmp_path / "train" / "1.png", 100)
    (tmp_path / "empty").mkdir()
    refused("empty holds no pictures", data.from_folder, tmp_path)
    (tmp_path / "empty").rename(tmp_path / "test")
    refused("sub-folders are labels", data.from_folder, tmp_path)


def test_from_path_chooses_by_what_is_there(tmp_path, pixels):
    assert len(data.from_path(str(save(tmp_path, x=pixels, y=np.arange(50)))).classes) == 50
    np.save(tmp_path / "x.npy", pixels)
    assert data.from_path((tmp_path / "x.npy").rename(tmp_path / "x.NPY")).shape == (4, 6)
    for i in range(4):
        paint(tmp_path / "pictures" / f"{i}.png", 100)
    assert data.from_path(tmp_path / "pictures").name == "pictures"
    refused("nowhere does not exist", data.from_path, tmp_path / "nowhere")
    refused(r"none\.npz: .*No such file", data.from_path, tmp_path / "none.npz")
    (tmp_path / "x.csv").write_text("1,2")
    refused(r"x\.csv is no \.npz or \.npy file", data.from_path, tmp_path / "x.csv")


def write_idx(raw: Path, packed: bool, train: int = 60_000) -> None:
    """The four files in MNIST's format, with pictures of 2 x 1 pixels that spell their row."""
    raw.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", train), ("t10k", 10_000)):
        row = np.arange(n)
        x, y = np.stack([row % 256, row // 256], 1).astype(np.uint8), (row % 10).astype(np.uint8)
        images = struct.pack(">4i", 2051, n, 2, 1) + x.tobytes()
        labels = struct.pack(">2i", 2049, n) + y.tobytes()
        for what, content in (("images-idx3", images), ("labels-idx1", labels)):
            path = raw / f"{part}-{what}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content, 1) if packed else content)


def snapshot(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("load", [data.mnist, data.fashion_mnist])
def test_existing_files_are_read_and_nothing_is_written_beside_them(tmp_path, monkeypatch, packed, load):
    folder, first = ("MNIST", "0") if load is data.mnist else ("FashionMNIST", "T-shirt/top")
    write_idx(tmp_path / folder / "raw", packed)
    before = snapshot(tmp_path)
    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", None)  # nor is anything downloaded
    (tmp_path / folder / "raw").chmod(0o555)
    images, again = load(tmp_path, download=False), load(tmp_path)
    (tmp_path / folder / "raw").chmod(0o755)
    assert snapshot(tmp_path) == before
    assert sizes(images) == sizes(again) == (50_000, 10_000, 10_000)
    spelt = (images.valid.x * 255).round() @ torch.tensor([1.0, 256.0])
    assert torch.equal(spelt, torch.arange(50_000, 60_000.0))  # the last of training, in order
    assert torch.equal(images.valid.y, torch.arange(50_000, 60_000) % 10)
    assert (images.shape, images.classes[0], len(images.classes)) == ((2, 1), first, 10)


def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    for error in (RuntimeError("a mirror,\ngot: nothing"), URLError("no route"), PermissionError(13, "no")):

        def broken(self, error: Exception = error) -> None:
            write_idx(Path(self.raw_folder), packed=True)
            raise error

        monkeypatch.setattr(datasets.MNIST, "download", broken)
        with pytest.raises(data.DataUnavailable, match="cannot get MNIST") as caught:
            data.mnist(tmp_path)
        text = str(caught.value)
        assert "\n" not in text
        assert all(hint in text for hint in ("--data-dir", *(f"{name}.gz" for name in IDX)))
        assert not list(tmp_path.rglob("*"))


def test_a_download_is_kept_in_the_cache_for_the_next_time(tmp_path, monkeypatch):
    def works(self) -> None:
        write_idx(Path(self.raw_folder), packed=True)
        write_idx(Path(self.raw_folder), packed=False)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(datasets.MNIST, "download", works)
    first = data.mnist()
    kept = (tmp_path / "ppl_vae" / "MNIST" / "raw").iterdir()
    assert sorted(path.name for path in kept) == sorted(f"{name}.gz" for name in IDX)
    assert torch.equal(data.mnist(download=False).train.x, first.train.x)


def test_damaged_and_missing_files_are_refused(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", packed=True)
    packed = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    good = packed.read_bytes()
    for bad in (good[:1000], b"not gzip", good[:500] + b"\x00" * 100 + good[600:]):
        packed.write_bytes(bad)
        refused(r"cannot read \S*train-images-idx3-ubyte\.gz", data.mnist, tmp_path, False)
    packed.write_bytes(gzip.compress(b"no header of this format"))
    refused("cannot get MNIST", data.mnist, tmp_path, False)
    packed.unlink()
    refused("cannot get MNIST.*not found", data.mnist, tmp_path, False)
    write_idx(tmp_path / "MNIST" / "raw", packed=True, train=59_999)
    refused("found .59999, 59999", data.mnist, tmp_path, False)


def write_cifar(folder: Path, monkeypatch, marked: tuple[str, ...] = ()) -> np.ndarray:
    """CIFAR-10's files with twenty pictures each, whose MD5 sums torchvision takes for the right ones."""
    folder.mkdir(parents=True)
    rng, sums, pictures = np.random.default_rng(0), {}, []
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        held: dict = {"label_names": list("abcdefghij")}
        if name != "batches.meta":
            held = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [*range(10)] * 2}
            pictures.append(held["data"])
        (folder / name).write_bytes(pickle.dumps(held))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, s] for n, s in sums.items() if n.startswith("data")])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return np.concatenate(pictures)


def test_cifar10_is_split_in_order_with_channels_first(tmp_path, monkeypatch):
    raw = write_cifar(tmp_path / "cifar-10-batches-py", monkeypatch)
    before = snapshot(tmp_path)
    images = data.cifar10(tmp_path)
    assert snapshot(tmp_path) == before
    assert (images.name, images.shape, images.classes) == ("cifar10", (3, 32, 32), tuple("abcdefghij"))
    assert sizes(images) == (90, 10, 20)  # the last tenth of training is for validation
    assert torch.equal(torch.cat([split.x for split in parts(images)]), torch.from_numpy(unit(raw)))
    assert images.valid.y.tolist() == [*range(10)]


def test_cifar10_of_other_sums_is_never_unpickled(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder, monkeypatch)
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: pytest.fail("what is there is not replaced"))
    for name in ("data_batch_3", "test_batch", "batches.meta"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        refused("cannot get CIFAR10 into .*corrupted.*--data-dir DIR", data.cifar10, tmp_path)
        (folder / name).unlink()
        refused("cannot get CIFAR10", data.cifar10, tmp_path)
        (folder / name).write_bytes(good)
    assert not (tmp_path / "exploded").exists()
    assert len(data.cifar10(tmp_path).train) == 90


class Bomb:
    """Pickled, it makes a folder where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_download_of_cifar10_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    write_cifar(tmp_path / "there" / "cifar-10-batches-py", monkeypatch)

    def works(self) -> None:
        shutil.copytree(tmp_path / "there", self.root, dirs_exist_ok=True)

    def breaks(self) -> None:
        works(self)
        raise URLError("no route")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.CIFAR10, "download", breaks)
    refused("cannot get CIFAR10.*no route", data.cifar10)
    refused("cannot get CIFAR10.*not found", data.cifar10, None, False)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(datasets.CIFAR10, "download", works)
    first = data.cifar10()
    monkeypatch.setattr(datasets.CIFAR10, "download", breaks)
    assert torch.equal(data.cifar10().test.x, first.test.x)


@pytest.mark.data
def test_pictures_of_cifar10_in_an_npz_file(real_data):
    images = data.from_path(real_data / "CIFAR10" / "cifar10_train_first4000.npz")
    assert images.shape == (3, 32, 32)
    assert sum(sizes(images)) == 4000
    assert torch.equal((images.train.x * 255).round() / 255, images.train.x)
    assert len(images.classes) == 10


@pytest.mark.data
@pytest.mark.parametrize(("load", "mean"), [(data.mnist, 0.1307), (data.fashion_mnist, 0.2860)])
def test_real_data(load, mean, real_data):
    root = real_data
    before = snapshot(root)
    images = load(root, download=False)
    assert snapshot(root) == before  # it holds packed files only, and may be read-only
    assert (images.shape, sizes(images)) == ((28, 28), (50_000, 10_000, 10_000))
    assert all(split.x.min() == 0 and split.x.max() == 1 for split in parts(images))
    training = torch.cat([images.train.x, images.valid.x])
    assert training.double().mean().item() == pytest.approx(mean, abs=5e-5)  # the usual normalising constants
    assert len(images.classes) == len(images.test.y.unique()) == 10


def test_a_label_of_minus_one_is_missing(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).random((40, 4)), np.arange(40) % 4 - 1
    np.savez(tmp_path / "some.npz", x=x, y=y)
    images = data.from_npz(tmp_path / "some.npz")
    assert images.classes == ("0", "1", "2")
    known = {tuple(row): label for row, label in zip(x.astype(np.float32).tolist(), y.tolist(), strict=True)}
    for split in parts(images):
        assert split.y is not None
        assert [known[tuple(row)] for row in split.x.tolist()] == split.y.tolist()
    cvae = pv.build(pv.Config(model="cvae"), (2, 2), 3)
    with pytest.raises(ValueError, match="unknown label -1"):
        pv.elbo(cvae, images.train.columns)
    legend = latent_scatter(images.train.x, images.train.y, images.classes).axes[0].get_legend()
    assert legend is not None
    assert "no label" in [text.get_text() for text in legend.get_texts()]
