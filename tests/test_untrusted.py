"""What came from others: nothing in it is executed, written through or given more memory than it may have."""

import gzip
import io
import json
import os
import pickle
import shutil
import socket
import struct
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from safetensors.torch import save
from small import fit, pixels, same, vae, weights
from test_data import IDX, write_cifar, write_idx
from torchvision import datasets

import ppl_vae as pv
from ppl_vae import data, limits, packing
from ppl_vae.cli import main
from ppl_vae.config import Config, build, images_of, settings_in
from ppl_vae.data import pictures
from ppl_vae.data.arrays import read_arrays
from ppl_vae.figures import draw_figures
from ppl_vae.files import open_regular, resolved, write_whole
from ppl_vae.folders import RunFolder, load_run, record_of, refuse_links, settings_of, write_json
from ppl_vae.limits import BeyondError, Bounded, memory_limit
from ppl_vae.packing import DamagedError, pack, unpack
from ppl_vae.resuming import Checkpoints
from ppl_vae.runs import train_run

SMALL = {"hidden": (8,), "epochs": 1, "limit": 40, "film": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_run(Config(**SMALL), folder, progress=False)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture
def mark(tmp_path):
    """A file that code which is executed would make."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def refused(message, load, *args, kind=ValueError):
    with pytest.raises(kind, match=message) as caught:
        load(*args)
    return caught.value


def edit(folder, **values):
    held = json.loads((folder / "run.json").read_text()) | values
    (folder / "run.json").write_text(json.dumps(held))


def settle(folder, **values):
    edit(folder, config=json.loads((folder / "run.json").read_text())["config"] | values)


# ---- made to run code on load
def test_pickles_in_the_place_of_weights_and_checkpoints_are_not_loaded(mark, copy, tmp_path):
    plain = pickle.dumps(Payload(mark))
    buffer = io.BytesIO()
    torch.save({"weights": Payload(mark)}, buffer)
    record = (copy / "run.json").read_bytes()
    for raw in (plain, buffer.getvalue(), b"\x80\x04" + plain, gzip.compress(plain)):
        (copy / "run.json").write_bytes(record)
        (tmp_path / "w.safetensors").write_bytes(raw)
        refused(
            "damaged, or no safetensors file",
            pv.load_weights,
            vae(),
            tmp_path / "w.safetensors",
            kind=DamagedError,
        )
        refused(
            "damaged, or no safetensors file", unpack, tmp_path / "w.safetensors", "checkpoint", kind=DamagedError
        )
        (copy / "weights.safetensors").write_bytes(raw)
        refused("run: .*no safetensors file", load_run, copy)
        for path in (copy / "checkpoints").iterdir():
            path.write_bytes(raw)
        for resume in ("last", "auto"):
            refused("no safetensors file", Checkpoints(copy / "checkpoints", resume).read, kind=DamagedError)
        (copy / "run.json").write_bytes(raw)
        refused(r"run\.json is damaged", settings_of, copy)
        (tmp_path / "set.npz").write_bytes(raw)
        refused(r"set\.npz", data.from_npz, tmp_path / "set.npz")
        shutil.copy(copy / "run.json", tmp_path / "settings.toml")
        refused("no valid TOML", settings_in, tmp_path / "settings.toml")


def test_a_checkpoint_with_a_pickle_inside_gives_back_its_bytes_and_no_more(mark, tmp_path):
    raw = torch.frombuffer(bytearray(pickle.dumps(Payload(mark))), dtype=torch.uint8)
    pack(tmp_path / "state", "trial", {"state": raw, "__reduce__": ["os.system", "touch"]})
    assert torch.equal(unpack(tmp_path / "state", "trial")["state"], raw)


def test_object_arrays_are_not_unpickled(mark, tmp_path):
    x = np.empty((10, 4), object)
    x[:] = Payload(mark)
    np.save(tmp_path / "x.npy", x, allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=x, allow_pickle=True)
    structured = np.zeros(10, [("a", "f8"), ("b", "O")])
    np.savez(tmp_path / "s.npz", x_train=np.zeros((9, 4)), y_train=structured)
    for name in ("x.npy", "x.npz", "s.npz"):
        refused("pickles are never loaded", data.from_path, tmp_path / name)


def test_pickles_of_cifar_are_checked_and_read_from_a_copy_of_their_own(mark, tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder, monkeypatch)
    load = pickle.load

    def swapped(file, **options):  # as somebody else might between the check of the sums and the reading
        for path in folder.iterdir():
            path.write_bytes(pickle.dumps(Payload(mark)))
        return load(file, **options)

    monkeypatch.setattr(datasets.cifar.pickle, "load", swapped)
    assert len(data.cifar10(tmp_path).train) == 90
    refused("corrupted", data.cifar10, tmp_path, False)


def test_pictures_are_of_known_formats_whatever_they_are_called(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program was run"))
    for i in range(4):
        Image.new("L", (3, 2), i).save(tmp_path / f"{i}.png")
    Image.new("L", (3, 2)).save(tmp_path / "4.eps")
    (tmp_path / "4.eps").rename(tmp_path / "4.png")
    refused(r"4\.png: cannot identify", data.from_folder, tmp_path)


# ---- crafted headers of safetensors
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def framed(header, body=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


CRAFTED = {
    "no bytes": b"",
    "a header beyond the file": framed({}, b"", length=100),
    "a header of all the memory": framed({}, b"", length=2**64 - 1),
    "a header of nothing": struct.pack("<Q", 0),
    "no table": framed([1, 2]),
    "nested": framed(b'{"a":' * 20_000),
    "a number of many digits": framed(b'{"a":' + b"9" * 5000 + b"}"),
    "a name twice": framed(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2)),
    "sayings of another type": framed({"__metadata__": {"whose": 1}, "a": F32}),
    "overlapping": framed({"a": F32, "b": F32}),
    "a gap": framed({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, b"\0" * 20),
    "before the start": framed({"a": F32 | {"data_offsets": [-8, 0]}}),
    "backwards": framed({"a": F32 | {"data_offsets": [8, 0]}}),
    "beyond the end": framed({"a": F32 | {"shape": [20], "data_offsets": [0, 80]}}),
    "bytes left over": framed({"a": F32}, b"\0" * 9),
    "more than its place": framed({"a": F32 | {"shape": [3]}}),
    "a shape that overflows": framed({"a": F32 | {"shape": [2**32, 2**32, 2**32]}}),
    "empty, of a shape that overflows": framed({"a": F32 | {"shape": [0, 2**62, 2], "data_offsets": [0, 0]}}, b""),
    "a negative shape": framed({"a": F32 | {"shape": [-1, -2]}}),
    "a shape of fractions": framed({"a": F32 | {"shape": [2.0]}}),
    "a shape of truths": framed({"a": F32 | {"shape": [True, 2]}}),
    "dimensions without end": framed({"a": F32 | {"shape": [1] * 65 + [2]}}),
    "no shape": framed({"a": F32 | {"shape": None}}),
    "three offsets": framed({"a": F32 | {"data_offsets": [0, 8, 8]}}),
    "an unknown type": framed({"a": F32 | {"dtype": "O"}}),
    "a type that is a list": framed({"a": F32 | {"dtype": ["F32"]}}),
    "a key too many": framed({"a": F32 | {"code": "import os"}}),
    "neither true nor false": framed({"a": {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]}}, b"\2" * 8),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_headers_are_refused(case, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(CRAFTED[case])
    before = pv.save_weights(program := vae(), tmp_path / "before").read_bytes()
    refused(
        r"w\.safetensors is damaged, or no safetensors file",
        packing.read_tensors,
        path,
        lambda *_: None,
        kind=DamagedError,
    )
    refused("w.safetensors", pv.load_weights, program, path)
    refused("w.safetensors", unpack, path, "checkpoint", kind=DamagedError)
    assert pv.save_weights(program, tmp_path / "after").read_bytes() == before


def test_a_file_as_the_library_writes_it_comes_back_whole(tmp_path):
    kinds = [*packing.TYPES.values()]
    tensors = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds} | {"none": torch.empty(2, 0)}
    (tmp_path / "w").write_bytes(save(tensors, {"say": "ü"}))
    about, held = packing.read_tensors(tmp_path / "w", lambda *_: None)
    assert about == {"say": "ü"}
    assert held.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (held[name].dtype, held[name].shape) == (value.dtype, value.shape)
        assert torch.equal(held[name].view(torch.uint8), value.view(torch.uint8))
    entries = packing.read_entries(tmp_path / "w")
    assert {name: entry.shape for name, entry in entries.items()} == {
        n: tuple(v.shape) for n, v in tensors.items()
    }


def test_numbers_of_tensors_and_bytes_have_limits(tmp_path, monkeypatch):
    many = {str(i): torch.ones(1) for i in range(5)}
    (tmp_path / "w").write_bytes(save(many))
    monkeypatch.setattr(packing, "MOST_TENSORS", 4)
    refused("5 tensors, more than 4", packing.read_entries, tmp_path / "w", kind=DamagedError)
    refused("5 tensors are more than a file is read back with", pack, tmp_path / "new", "trial", many)
    monkeypatch.setattr(packing, "MOST_HEADER", 100)
    refused("a header of", packing.read_entries, tmp_path / "w", kind=DamagedError)
    refused("bytes beside its tensors are more", pack, tmp_path / "new", "trial", "x" * 100)
    assert not (tmp_path / "new").exists()


def test_memory_for_a_file_is_limited_and_the_limit_can_be_moved(tmp_path, monkeypatch):
    pv.save_weights(vae(), tmp_path / "w")
    np.savez(tmp_path / "x.npz", x=np.zeros((40, 4)))
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("L", (9, 9), i).save(tmp_path / "pictures" / f"{i}.png")
    assert memory_limit() == 8 * 2**30
    monkeypatch.setenv(limits.MEMORY, str(1000 / 2**30))
    assert memory_limit() == 1000
    for load in (
        lambda: pv.load_weights(vae(), tmp_path / "w"),
        lambda: data.from_npz(tmp_path / "x.npz"),
        lambda: data.from_folder(tmp_path / "pictures"),
    ):
        refused("more than may be read; .*PPL_VAE_READ_GIB", load)
    refused(
        "trial: .*more than a file is read back with; set PPL_VAE_READ_GIB",
        pack,
        tmp_path / "new",
        "trial",
        [torch.ones(126), torch.ones(125)],
    )
    assert not (tmp_path / "new").exists()
    pack(tmp_path / "new", "trial", torch.ones(250))
    assert torch.equal(unpack(tmp_path / "new", "trial"), torch.ones(250))
    for text in ("much", "0", "-1", "inf", "nan", ""):
        monkeypatch.setenv(limits.MEMORY, text)
        refused("PPL_VAE_READ_GIB must be a positive number of GiB, got", memory_limit)
    monkeypatch.setenv(limits.MEMORY, "0.5")
    assert len(data.from_npz(tmp_path / "x.npz").train) == 32


# ---- what is no regular file
def places(folder):
    """Something to read at each of the places where a loader looks, and the loader."""
    return {
        "w.safetensors": lambda path: pv.load_weights(vae(), path),
        "state": lambda path: unpack(path, "checkpoint"),
        "settings.toml": settings_in,
        "settings.json": settings_in,
        "run.json": lambda path: settings_of(path.parent),
        "x.npz": data.from_path,
        "x.npy": data.from_path,
        "x.png": lambda path: data.from_folder(path.parent),
    }


@pytest.mark.parametrize("name", places(None))
def test_pipes_sockets_devices_and_folders_are_refused_and_not_waited_for(name, tmp_path):
    path, load = tmp_path / name, places(tmp_path)[name]
    os.mkfifo(path)
    refused(".", load, path)
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(".", load, path)
    path.unlink()
    path.symlink_to(path)  # to itself
    refused(".", load, path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as end:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's path must be short
        end.bind(name)
        os.chdir(here)
        refused(".", load, path)
    path.unlink()
    path.mkdir()
    refused(".", load, path)


def test_names_that_no_file_can_have_are_refused_and_shortened(tmp_path):
    long = "a" * 5000
    for load in (
        lambda: data.from_path(f"{long}.npz"),
        lambda: data.from_npz(f"{long}.npz"),
        lambda: data.from_folder(long),
        lambda: images_of(Config(data=long)),
        lambda: pv.load_weights(vae(), long),
        lambda: unpack(long, "trial"),
        lambda: load_run(long),
        Checkpoints(long, "last").read,
    ):
        assert len(str(refused("File name too long", load))) < 700


def test_folders_that_cannot_be_read_are_refused_by_name(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()
    (tmp_path / "link").symlink_to(closed / "x")

    def shut(call):  # as a mode of 0 does for all but the superuser
        def asked(path, *args, **options):
            if str(path).startswith(f"{closed}/") or (call in lists and str(path) == str(closed)):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **options)

        return asked

    lists = os.listdir, os.scandir
    for name in ("stat", "lstat", "scandir", "listdir"):
        monkeypatch.setattr(os, name, shut(getattr(os, name)))
    for load, argument in (
        (lambda: data.from_folder(closed), "path"),
        (lambda: data.from_path(closed), "path"),
        (lambda: images_of(Config(data=str(closed))), "path"),
        (lambda: data.from_path(closed / "x.npz"), "path"),
        (lambda: images_of(Config(data=str(closed / "x.npz"))), "data"),
        (lambda: pv.load_weights(vae(), closed / "w"), "path"),
        (Checkpoints(closed, "last").read, "checkpoints"),
        (Checkpoints(closed / "kept", "auto").read, "checkpoints"),
        (lambda: refuse_links(closed), "run"),
    ):
        refused(f"^{argument}: cannot .*closed.*Permission denied.*make it readable", load)


def test_links_to_themselves_are_refused(tmp_path):
    (tmp_path / "figures").symlink_to("figures")
    refused("run: cannot follow .*figures .*remove the link|figures is a link", refuse_links, tmp_path)
    refused("codes: cannot follow .*figures", resolved, tmp_path / "figures" / "x", "codes")
    assert main(["plot", str(tmp_path)]) == 2


def test_memory_that_a_machine_has_not_is_told(tmp_path, monkeypatch):
    pack(tmp_path / "w", "trial", torch.ones(9))

    def empty(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", empty)
    refused("path: .*w: 'trial' takes 0.0 GiB, which this machine has not; free", unpack, tmp_path / "w", "trial")


def test_a_pipe_that_took_the_place_of_a_file_is_refused(tmp_path, monkeypatch):
    regular, pipe = tmp_path / "file", tmp_path / "pipe"
    regular.write_text("")
    os.mkfifo(pipe)
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: stat(regular if path == pipe else path, **k))
    refused("no regular file", open_regular, pipe, kind=OSError)


def test_a_file_that_is_cut_or_grows_while_it_is_read_is_damaged(tmp_path):
    path, whole = tmp_path / "w", save({"a": torch.zeros(2**16)})

    def grow(*_):
        with path.open("ab") as file:
            file.write(b"x")

    for change, message in (
        (lambda *_: os.truncate(path, len(whole) - 9), "ends too early"),
        (grow, "more bytes than"),
    ):
        path.write_bytes(whole)
        refused(message, packing.read_tensors, path, change, kind=DamagedError)


# ---- arrays
def npy(text, body=b"", version=b"\x01\x00"):
    raw = text.encode("latin1")
    return b"\x93NUMPY" + version + len(raw).to_bytes(2 if version[0] == 1 else 4, "little") + raw + body


def described(kind="<f8", shape="(10, 4)", order="False"):
    return f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}, }}"


ARRAYS = {
    "more than follows": (npy(described(shape=f"({2**31}, {2**20})"), b"\0" * 99), "takes more bytes than the 99"),
    "a product that overflows": (npy(described(shape=f"({2**32}, {2**32})")), "shape"),
    "an empty one that overflows": (npy(described(shape=f"(0, {2**62}, {2**62})")), "shape"),
    "dimensions without end": (npy(described(shape="(" + "1," * 33 + ")")), "shape"),
    "negative": (npy(described(shape="(-10, 4)")), "more than plain numbers"),
    "objects": (npy(described("|O")), "pickles are never loaded"),
    "raw": (npy(described("|V8")), "numbers or text"),
    "times": (npy(described("<M8[s]")), "numbers or text"),
    "complex": (npy(described("<c16")), "numbers or text"),
    "long labels": (npy(described("<U99999", "(1,)"), b"\0" * 399996), "labels of more than 1000"),
    "no text": (npy(described("<U1", "(1,)"), b"\xff" * 4), "label is no text"),
    "structured": (npy("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (1,), }"), "more than plain"),
    "an expression": (npy("__import__('os').abort()"), "more than plain"),
    "a key twice": (npy("{'descr': '<f8', 'descr': '<f8', 'shape': (1,), }"), "other than numbers"),
    "a long description": (npy(described() + " " * 5000), "a description of"),
    "bytes": (npy(described("|S3", "(4,)"), b"abc" * 4), r"holds bytes \(\|S3\); save y as text \(dtype U\)"),
    "a description of 4 GiB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "a description of 4294967295"),
    "another version": (npy(described(), version=b"\x09\x00"), "no array"),
    "neither true nor false": (npy(described("|b1", "(4, 4)"), b"\2" * 16), "neither true nor false"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_crafted_arrays_are_refused(case, tmp_path):
    raw, message = ARRAYS[case]
    (tmp_path / "x.npy").write_bytes(raw)
    refused(message, data.from_npy, tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", raw)
    refused(message, data.from_npz, tmp_path / "x.npz")


@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00", b"\x03\x00"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_plain_kind_are_read_as_numpy_reads_them(version, order, tmp_path):
    for kind in ("|b1", "<i8", ">i2", "|u1", "<f2", ">f8", "<U3"):
        x = np.arange(24).reshape(2, 3, 4).astype(kind).copy(order)
        with (tmp_path / "x.npy").open("wb") as file:
            np.lib.format.write_array(file, x, (version[0], 0))
        read = read_arrays(tmp_path / "x.npy", ["x"])[0]["x"]
        assert read.dtype == x.dtype
        assert np.array_equal(read, x)


def test_headers_of_python_2_and_arrays_of_few_values_are_read(tmp_path):
    (tmp_path / "x.npy").write_bytes(npy(described("<i8", "(40L, 4L)"), np.arange(160).tobytes()))
    assert np.array_equal(read_arrays(tmp_path / "x.npy", ["x"])[0]["x"], np.arange(160).reshape(40, 4))
    counts = np.zeros((3000, 2000), np.int64)
    counts[::50, ::40] = 3
    np.savez_compressed(tmp_path / "x.npz", x=counts)
    assert (tmp_path / "x.npz").stat().st_size * 400 < counts.nbytes
    assert data.from_npz(tmp_path / "x.npz", counts=True).train.x.sum() > 0


def test_bombs_and_crafted_archives_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.zeros((5000, 5000)))
    assert path.stat().st_size < 2**18
    monkeypatch.setenv(limits.MEMORY, "0.1")
    refused(r"takes 0\.2 GiB, more than may be read; if it is yours, set PPL_VAE_READ_GIB", data.from_npz, path)
    monkeypatch.delenv(limits.MEMORY)
    np.savez(path, x=np.zeros((40, 4)))
    good = path.read_bytes()
    for size in (0, 100, 2**31):  # what the directory says that x takes unpacked
        at = good.index(b"PK\x01\x02") + 24
        path.write_bytes(good[:at] + struct.pack("<I", size) + good[at + 4 :])
        refused("cannot read", data.from_npz, path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", npy(described(), b"\0" * 320))
    refused("a method that numpy does not use", data.from_npz, path)
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        for _ in range(2):
            archive.writestr("x.npy", npy(described(), b"\0" * 320))
    refused("same name", data.from_npz, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy(described(), b"\0" * 321))
    refused("goes on after its array", data.from_npz, path)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i:040}", b"")
    refused("its list of members is longer", data.from_npz, path)
    with zipfile.ZipFile(path, "w") as archive:  # names that lead elsewhere lead nowhere
        archive.writestr("../x.npy", npy(described(), b"\0" * 320))
    refused("found ../x", data.from_npz, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npz"]


def test_labels_that_would_steer_a_terminal_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.full((20, 4), 0.5), y=np.array(["a", "\x1b[2J"] * 10))
    refused(r"labels must be text without control characters, got '\\x1b\[2J'", data.from_npz, tmp_path / "x.npz")


# ---- pictures and the files of MNIST
def test_pictures_without_bounds_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    header = struct.pack(">4sIIBBBBB", b"IHDR", 8000, 8000, 8, 0, 0, 0, 0)
    rest = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + rest + struct.pack(">I", 0) + b"IDAT\0\0\0\0")
    refused("has 64000000 pixels, more than 16777216: resize it", data.from_folder, tmp_path)
    Image.new("L", (3, 2)).save(tmp_path / "0.png")
    Image.new("L", (3, 2)).save(tmp_path / "1.png")
    before = warnings.filters.copy(), Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(pictures, "MOST_FILES", 1)
    refused("more than 1 files", data.from_folder, tmp_path)
    assert before == (warnings.filters, Image.MAX_IMAGE_PIXELS)


def test_folders_that_lead_back_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (3, 2)).save(tmp_path / "a" / "0.png")
    (tmp_path / "b").symlink_to(tmp_path)
    refused("leads back to a folder that it is in", data.from_folder, tmp_path)
    (tmp_path / "b").unlink()
    deep = tmp_path.joinpath("c", *["d"] * 20)
    deep.mkdir(parents=True)
    refused("lies more than 16 folders deep", data.from_folder, tmp_path)


def test_packed_files_of_mnist_are_unpacked_so_far_and_no_further(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, packed=True)
    bomb = gzip.compress(b"\0" * 2**27)
    assert len(bomb) < 2**18
    (raw / f"{IDX[0]}.gz").write_bytes(bomb)
    refused("longer than 64 MiB, unlike any such file", data.mnist, tmp_path, False, kind=data.DataUnavailable)
    for count, width, label, message in (
        (60_000, 0, 0, "cannot get"),
        (60_000, 1, 0, "two shapes"),
        (60_000, 2, 10, "ten"),
    ):
        pixels = struct.pack(">4i", 2051, count, width, 1) + bytes(count * width)
        (raw / f"{IDX[0]}.gz").write_bytes(gzip.compress(pixels, 1))
        (raw / f"{IDX[1]}.gz").write_bytes(
            gzip.compress(struct.pack(">2i", 2049, count) + bytes([label]) * count, 1)
        )
        refused(message, data.mnist, tmp_path, False, kind=data.DataUnavailable)


# ---- settings
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.toml", "latnt = 3", "unknown key 'latnt'; did you mean 'latent'"),
        ("s.toml", "a = " + "[" * 2000, "no valid TOML"),
        ("s.json", '{"a":' * 9000, "no valid JSON: it is nested too deep"),
        ("s.toml", "[" + "a." * 3000 + "a]", "longer than 4096 characters"),
        ("s.toml", "#" * 100_000, "larger than 64 KiB"),
        ("s.json", " " * 100_000, "larger than 64 KiB"),
        ("s.json", '{"latent": 1, "latent": 2}', "the key 'latent' stands twice"),
        ("s.toml", "latent = 1\nlatent = 2", "no valid TOML"),
        ("s.json", '{"beta": 1' + "0" * 400 + "}", "beta must be finite"),
        ("s.toml", "beta = 0x" + "f" * 4000, "beta must be finite, got a number of thousands of digits"),
        ("s.toml", "hidden = [0x" + "f" * 4000 + "]", r"hidden must be below 2\*\*63, got a number"),
        ("s.json", '{"latent": 1' + "0" * 5000 + "}", "no valid JSON"),
        ("s.json", '{"data": "a\\u001b[31m"}', "data must be text without control characters"),
        ("s.json", '{"data": "safe\\u202egnp.exe"}', "data must be text without control characters"),
        ("s.toml", 'data = "a\\u0000b"', "data must be text without control characters"),
        ("s.json", '{"' + "k" * 50_000 + '": 1}', r"unknown key 'k{79}\.\.\.; known are"),
        ("s.toml", "levels = 100000000", "levels must be at most 1000"),
    ],
)
def test_files_of_settings_are_bounded_and_refused_by_name(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    error = refused(message, settings_in, tmp_path / name)
    assert len(str(error)) < 2000


# ---- run folders
@pytest.mark.parametrize(
    "settings",
    [
        {"hidden": [10**9, 10**9]},
        {"hidden": [2**62]},
        {"hidden": [9] * 5000},
        {"latent": 10**12},
        {"prior": "mixture", "components": 10**11},
        {"posterior": "iaf", "latent": 10**5, "hidden": [10**6]},
        {"posterior": "planar", "depth": 10_000},
        {"model": "hierarchical", "levels": 1000, "latent": 10**9},
        {"nets": "conv", "channels": [10**9, 10**9]},
        {"likelihood": "logistic-mixture", "components": 10**10},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_a_program_larger_than_its_weights_is_refused_before_it_is_built(settings, copy, monkeypatch):
    made = []
    check = Bounded._check

    def checked(self, more):
        check(self, more)
        made.append(self.taken)

    monkeypatch.setattr(Bounded, "_check", checked)
    settle(copy, **settings)
    larger = r"a program far larger than the weights in weights\.safetensors \(.*copy both again"
    refused(rf"run: .*run\.json describes ({larger}|no program that can be built)", load_run, copy)
    assert max(made, default=0) < 2**25


@pytest.mark.parametrize(
    "settings",
    [
        {"posterior": "iaf", "latent": 400, "depth": 3},
        {"prior": "flow", "latent": 400, "depth": 3},
        {"posterior": "iaf", "latent": 800},
        {"posterior": "iaf", "hidden": (16,), "latent": 1000},
        {"prior": "vamp", "components": 9000},
        {"posterior": "full-covariance", "hidden": (1,), "latent": 1500},
        {"posterior": "planar", "depth": 100},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_a_run_whose_program_takes_more_while_it_is_built_is_read_back(settings, tmp_path):
    config = Config(**settings)
    program = build(config, (8, 8))
    pv.save_weights(program, tmp_path / "weights.safetensors")
    write_json(tmp_path / "run.json", record_of(RunFolder(tmp_path, config, (8, 8), (), program)))
    assert same(weights(load_run(tmp_path).program), weights(program))


def test_what_passes_counts_as_long_as_it_is_there():
    with Bounded(4000, 100):
        for _ in range(20):
            torch.ones(500)
        kept = torch.nn.Parameter(torch.ones(500))
        held = [torch.ones(250)]
        refused("it takes more than 4000 bytes", torch.ones, 251, kind=BeyondError)
        held[0] = kept.detach()
        assert torch.ones(500).numel() == 500
    with Bounded(4000, 3):
        refused("it makes more than 3 tensors", lambda: [torch.ones(1) for _ in range(4)], kind=BeyondError)


def test_a_shape_without_bounds_is_refused(copy):
    edit(copy, shape=[2**31, 2**31])
    refused("describes (a program far larger|no program that can be built)", load_run, copy)
    edit(copy, shape=[8, 8], classes="0123456789")
    refused(r"run\.json is damaged", load_run, copy)
    edit(copy, classes=["a\x1b]0;title\x07"])
    refused(r"run\.json is damaged \(TypeError: classes", load_run, copy)
    (copy / "run.json").write_text(" " * (16 * 2**20 + 1))
    refused("larger than 16384 KiB", load_run, copy)


def test_a_sparse_file_of_weights_gets_no_memory(copy):
    with (copy / "weights.safetensors").open("wb") as file:
        size = 2**40
        file.write(framed({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, b""))
        file.truncate(file.tell() + size)
    refused(r"run: .* holds 1024\.0 GiB, more than may be read", load_run, copy)


def test_free_text_of_a_run_is_shown_without_its_control_characters(copy, capsys):
    edit(
        copy,
        engine="eager\x1b[31m",
        made={"command": "a\x1b[2Jb", "machine": "c\u202ed", "list": [{"x\x9b": "\r"}]},
    )
    assert main(["info", str(copy)]) == 0
    out = capsys.readouterr().out
    assert r"eager\x1b[31m" in out
    assert not {"\x1b", "\x9b", "\r", "\u202e"} & {*out}
    edit(copy, format="\x1b[2J")
    assert main(["info", str(copy)]) == 2
    assert "\x1b" not in capsys.readouterr().err


# ---- where is written
OUTSIDE = {
    "figures": "folder",
    "metrics.csv": "file",
    "results.json": "file",
    "checkpoints": "folder",
    "tensorboard": "folder",
    "weights.safetensors": "file",
}
COMMANDS = {
    "evaluate": "evaluate {} --limit 4 --particles 2",
    "plot": "plot {}",
    "sample": "sample {}",
    "force": "train --quiet --hidden 8 --epochs 1 --limit 40 --no-film --force --out {}",
    "resume": "train --quiet --resume last --epochs 1 --out {}",
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_written_through_a_link_that_leaves_the_run_folder(command, name, copy, tmp_path, capsys):
    outside = tmp_path / "home"
    (copy / name).rename(outside) if (copy / name).exists() else outside.touch()
    (copy / name).symlink_to(outside)

    def there():
        held = {p: p.read_bytes() for p in [outside, *outside.glob("**/*")] if p.is_file()}
        return held, (copy / name).readlink()

    before = there()
    assert main(COMMANDS[command].format(copy).split()) == 2
    assert f"{name} is a link that leads out of the folder; remove it first" in capsys.readouterr().err
    assert there() == before


def test_links_within_the_run_folder_and_for_reading_are_followed(copy, tmp_path):
    (copy / "figures").rename(copy / "pictures")
    (copy / "figures").symlink_to("pictures")
    run = load_run(copy)
    assert {path.parent for path in draw_figures(run, run.images())} == {copy / "figures"}
    (copy / "weights.safetensors").rename(tmp_path / "w")
    (copy / "weights.safetensors").symlink_to(tmp_path / "w")
    assert same(weights(load_run(copy).program), weights(run.program))


def test_a_link_in_the_place_of_the_temporary_file_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".results.json.{os.getpid()}.part").symlink_to(victim)
    write_whole(tmp_path / "results.json", lambda file: file.write_text("{}"))
    assert (victim.read_text(), (tmp_path / "results.json").read_text()) == ("mine", "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "victim"]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_a_setting_does_not_say_where_data_are_fetched_to(name, copy, tmp_path, monkeypatch):
    for kind in (datasets.MNIST, datasets.FashionMNIST, datasets.CIFAR10):
        monkeypatch.setattr(kind, "download", lambda self: pytest.fail("something was fetched"))
    settle(copy, data=name, data_dir=str(tmp_path / "elsewhere"))
    run = load_run(copy)
    error = refused("cannot get .*put|unpack .* or leave data_dir out to fetch them", run.images)
    assert "download=True" not in str(error)
    refused("cannot get", images_of, Config(data=name, data_dir=str(tmp_path / "elsewhere")))
    assert not (tmp_path / "elsewhere").exists()


def test_a_home_that_does_not_exist_is_a_file_that_is_not_there():
    refused("no such file", images_of, Config(data="~nobody-at-all/x.npz"))
    refused("No such file", data.from_path, "~nobody-at-all/x.npz")


# ---- a state of values that are allowed, and do not fit
def put_in(*path):
    *above, last = path

    def change(state, value):
        for key in above:
            state = state[key]
        state[last] = value

    return change


MISFITS = {
    "no parameters": (put_in("pair"), None),
    "an average shorter than its parameter": (put_in("optimizers", 0, "state", 0, "exp_avg"), torch.zeros(1)),
    "an average that is a number": (put_in("optimizers", 0, "state", 0, "exp_avg_sq"), 1.0),
    "no optimizer": (put_in("optimizers"), []),
    "an optimizer that is a list": (put_in("optimizers", 0), [1, 2]),
    "groups without parameters": (put_in("optimizers", 0, "param_groups"), []),
    "a schedule with a method": (put_in("schedules", 0, "step"), "os.system"),
    "no schedules": (put_in("schedules"), None),
    "streams of another length": (put_in("random", "cpu"), torch.zeros(3, dtype=torch.uint8)),
    "no streams": (put_in("random"), {}),
    "an epoch that is text": (put_in("run", "epoch"), "1"),
    "no history": (put_in("run"), {}),
    "hooks that are a number": (put_in("hooks"), 3),
    "best parameters that are text": (put_in("best"), {"a": "text"}),
    "best parameters of another pair": (put_in("best"), {"x": torch.zeros(1)}),
    "a rate that is text": (put_in("optimizers", 0, "param_groups", 0, "lr"), "x"),
    "a rate that is a list": (put_in("optimizers", 0, "param_groups", 0, "lr"), [1]),
    "betas that are a number": (put_in("optimizers", 0, "param_groups", 0, "betas"), 3),
    "another kind of Adam": (put_in("optimizers", 0, "param_groups", 0, "amsgrad"), True),
    "another kernel": (put_in("optimizers", 0, "param_groups", 0, "fused"), False),
    "no second average": (put_in("optimizers", 0, "state", 0), {"step": torch.tensor(1.0), "exp_avg": None}),
    "a step without a number": (put_in("optimizers", 0, "state", 0, "step"), torch.zeros(0)),
    "a step below 0": (put_in("optimizers", 0, "state", 0, "step"), torch.tensor(-1.0)),
    "a schedule of text": (put_in("schedules", 0, "last_epoch"), "x"),
    "a schedule without a step size": (put_in("schedules", 0, "step_size"), 0),
    "an epoch that never comes to its end": (put_in("run", "epoch"), -(10**30)),
    "a step that is no number of one": (put_in("run", "step"), 1.5),
    "a history of text": (put_in("run", "history"), ["x", "y"]),
    "a history of empty rows": (put_in("run", "history"), [{}, {}]),
    "a best epoch that is not there": (put_in("run", "best_epoch"), 9),
    "a fault without a place": (put_in("faults"), [{"what": "x"}]),
    "a bound that is text": (put_in("hooks", "0 EarlyStop", "best"), "x"),
    "of another version, by what it has": (put_in("news"), 1),
    "settings that are a list": (put_in("settings"), ["a"]),
}


@pytest.mark.parametrize("case", MISFITS)
def test_crafted_states_are_refused_when_they_are_put_into_a_run(case, tmp_path):
    def go(resume="off"):
        kept = Checkpoints(tmp_path / "kept", resume)
        how = {"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1), "checkpoints": kept}
        how["hooks"] = [pv.EarlyStop()]
        return fit(vae(), pixels(64), pixels(32, seed=1), epochs=2, batch_size=32, compile="off", **how)

    go()
    *_, path = sorted((tmp_path / "kept").iterdir())
    state = unpack(path, "checkpoint")
    change, value = MISFITS[case]
    change(state, value)
    pack(path, "checkpoint", state)
    refused("^resume: ", go, "last")
