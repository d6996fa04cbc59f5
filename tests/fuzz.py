"""Files that were meant well and then changed, and the loaders that have to bear them.

`python tests/fuzz.py NAME COUNT` gives one loader so many, and prints what became of them as JSON.
"""

import copy
import faulthandler
import gzip
import io
import json
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from small import fit, pixels, vae

import ppl_vae as pv
from ppl_vae import data, figures, packing
from ppl_vae.config import Config, settings_in
from ppl_vae.files import write_whole
from ppl_vae.folders import load_run, made_of, settings_of, shape_and_classes
from ppl_vae.packing import pack, unpack
from ppl_vae.resuming import Checkpoints

MOST_MEMORY, MOST_SECONDS = 2**31, 60
EXTREMES = [0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
TOKENS = [
    b"-1", b"0", b"1e999", b"-0.0", b"NaN", b"Infinity", b"null", b"true", b"{}", b"[]", b'""', b"inf", b"\0",
    b"9" * 25, b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 3000, b'{"a":' * 3000, b"a." * 1500, b"\xff\xfe",
    b'"\\u001b[2J"', b'"\\ud800"', b"'|O'", b"'<U999999999'", b"'V8'", b"[('a', '<f8')]", b"(2, 2)f4",
    b"../../x", b"a\x1b[31mb", b'"tensor"',
]  # fmt: skip
NUMBER = re.compile(rb"-?\d+(\.\d+)?")

count = st.integers(0, 2**32)


@st.composite
def changes(draw):
    """What to do to a file: a few changes, each a kind and numbers that say where and how."""
    kinds = ["flip", "cut", "drop", "repeat", "insert", "extreme", "number", "token", "splice"]
    one = st.tuples(st.sampled_from(kinds), count, count, st.binary(max_size=12))
    return draw(count), draw(st.lists(one, min_size=1, max_size=4)), draw(st.booleans())


def changed(raw, kind, where, how, extra, other):
    """The bytes after one change."""
    at = where % (len(raw) + 1)
    end = min(len(raw), at + 1 + how % 64)
    if kind == "flip":
        return raw[:at] + bytes([raw[at] ^ (1 + how % 255)]) + raw[at + 1 :] if at < len(raw) else raw
    if kind == "cut":
        return raw[:at]
    if kind == "drop":
        return raw[:at] + raw[end:]
    if kind == "repeat":
        return raw[:end] + raw[at:end] * (how % 9) + raw[end:]
    if kind == "insert":
        return raw[:at] + extra + raw[at:]
    if kind == "extreme":
        code = ["<H", ">H", "<I", ">I", "<Q", ">Q"][how % 6]
        size = struct.calcsize(code)
        return (
            raw[:at] + struct.pack(code, EXTREMES[how // 6 % len(EXTREMES)] % 2 ** (8 * size)) + raw[at + size :]
        )
    if kind == "splice":
        return raw[:at] + other[how % (len(other) + 1) :]
    token = TOKENS[how % len(TOKENS)]
    if kind == "number" and (found := [*NUMBER.finditer(raw)]):
        start, stop = found[where % len(found)].span()
        return raw[:start] + (token if how % 2 else str(EXTREMES[how // 2 % len(EXTREMES)]).encode()) + raw[stop:]
    return raw[:at] + token + raw[at:]


# ---- files that are whole: bytes to change, and what makes a file of them; changed bytes may thus get a right sum
def plain(raw):
    return raw


def text(*values):
    return [(value.encode(), plain) for value in values]


def array(x, save=np.save):
    file = io.BytesIO()
    save(file, x)
    return file.getvalue()


def zipped(raw, packed=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packed) as archive:
        archive.writestr("x.npy", raw)
        archive.writestr("y.npy", array(np.arange(40) % 2))
    return file.getvalue()


def arrays():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 2, 3), dtype=np.uint8)
    return [
        *map(array, (grey, rng.random((40, 4)), np.asfortranarray(grey > 99), rng.random((40, 2, 2, 3)) > 0.5))
    ]


def npz():
    raw = arrays()
    labels = array({"x": np.zeros((40, 4)), "y": np.array(["a", "b"] * 20)}, lambda f, held: np.savez(f, **held))
    return [(r, zipped) for r in raw] + [
        (zipped(raw[0]), plain),
        (zipped(raw[1], zipfile.ZIP_STORED), plain),
        (labels, plain),
    ]


def painted(kind, **options):
    file = io.BytesIO()
    x = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(x)
    (picture.convert(options.pop("mode")) if "mode" in options else picture).save(file, kind, **options)
    return file.getvalue()


def summed(raw):
    """A PNG whose chunks have the right sums."""
    done, at = raw[:8], 8
    while at + 12 <= len(raw):
        (size,) = struct.unpack(">I", raw[at : at + 4])
        part = raw[at + 4 : at + 8 + min(size, len(raw))]
        done += raw[at : at + 4] + part + struct.pack(">I", zlib.crc32(part))
        at += 12 + size
    return done


def pictures():
    kinds = [("PNG", {}), ("PNG", {"mode": "P"}), ("PNG", {"mode": "1"}), ("GIF", {}), ("JPEG", {}), ("BMP", {})]
    kinds += [
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ]
    kinds += [("TIFF", {"compression": "jpeg"}), ("TIFF", {"compression": "tiff_deflate", "mode": "L"})]
    return [(painted(kind, **o), plain) for kind, o in kinds] + [(painted("PNG"), summed)]


def idx():
    x = struct.pack(">4i", 2051, 10, 2, 1) + bytes(range(20))
    return [(x, plain), (x, gzip.compress), (gzip.compress(x), plain)]


def file_of(write):
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder) / "file").read_bytes()


def weights():
    return [
        (file_of(partial(pv.save_weights, vae())), plain),
        (save({"a": torch.ones(3), "b": torch.zeros(2, 0)}), plain),
    ]


STATE = {"w": torch.arange(6.0), "n": [1, 2.5, None, ("a", {"b": -1, 7: True})], "inf": float("inf")}


def checked(raw):
    """A checkpoint that says so of itself, whatever is in it."""
    try:
        tensors = {"checkpoint/w": STATE["w"]}
        about = {"whose": packing.WHOSE, "version": "1", "kind": "checkpoint", "state": raw.decode()}
        return save(tensors, about | {"sha256": packing._checksum("checkpoint", about["state"], tensors)})
    except UnicodeDecodeError:
        return raw


def checkpoints():
    whole = file_of(lambda path: pack(path, "checkpoint", STATE))
    held = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    return [(whole, plain), (held["__metadata__"]["state"].encode(), checked), *weights()]


# ---- checkpoints whose sums are right and whose parts are not
UNTOUCHED = b"as it is"
VALUES = [
    None, True, False, 0, 1, -1, 7, 10**30, -(10**30), 0.0, -0.5, 1e308, float("nan"), float("inf"), -float("inf"),
    "", "x", "0 EarlyStop", [], [1], ["x"], [{}], {}, {"x": 1}, {0: {}}, (), (2.0, 0.9), (0.9, "x"),
]  # fmt: skip


@cache
def trained():
    """The checkpoint of a small run."""
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder, "kept"), "off", epochs=1)
        return Path(folder, "kept", "epoch-000001.safetensors").read_bytes()


def train(folder, resume, epochs):
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max", patience=1)
    settings = {"scheduler": plateau, "hooks": [pv.EarlyStop()], "checkpoints": Checkpoints(folder, resume)}
    return fit(vae(), pixels(32), pixels(8, seed=1), epochs=epochs, batch_size=16, compile="off", **settings)


def resume_run(path):
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of rates and processes that differ
        try:
            train(path.parent, "last", epochs=2)
        except pv.NonFiniteError:  # as parameters may be what they like
            return


def places(value, found):
    """All containers in a state, with each of their keys."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            found.append((value, key))
            places(part, found)
    return found


def altered(raw):
    """The checkpoint with one or two of its parts changed, as the bytes have it."""
    if raw == UNTOUCHED:
        return trained()
    choose = random.Random(raw)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(trained())
        state = unpack(path, "checkpoint")
        for _ in range(choose.randint(1, 2)):
            alter(state, choose)
        return pack(path, "checkpoint", state).read_bytes()


def alter(state, choose):
    part = choose.choice([*state.values()])  # each as often, however much is in it
    within = places(part, []) or places(state, [])
    holder, key = choose.choice(within if choose.random() < 0.9 else places(state, []))
    kind, value = choose.random(), holder[key]
    if kind < 0.15:
        del holder[key]
    elif kind < 0.3 and isinstance(holder, dict):
        holder[choose.choice(["x", 3])] = copy.deepcopy(choose.choice(VALUES))
    elif kind < 0.6 and isinstance(value, torch.Tensor):
        others = [value.flatten()[:0], value[None], value.long(), value.double() * -1, torch.zeros(()), value * 0]
        holder[key] = choose.choice(others)
    else:
        holder[key] = copy.deepcopy(choose.choice(VALUES))


@cache
def run():
    """The files of a small run, by name."""
    folder = Path(tempfile.mkdtemp())
    config = Config(hidden=(4,), epochs=1, limit=40, film=False)
    program = pv.build(config, (8, 8), 2)
    held = {
        "format": 1,
        "config": config.to_dict(),
        "shape": [8, 8],
        "classes": ["a", "b"],
        "engine": "",
        "made": {},
    }
    pv.save_weights(program, folder / "weights.safetensors")
    write_whole(folder / "run.json", lambda file: file.write_text(json.dumps(held)))
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return found


def record():
    return [(run()["run.json"], plain)]


def settings_files(text_of):
    values = Config(data="x.npz", hidden=(8, 4)).to_dict()
    return text(text_of({n: v for n, v in values.items() if v is not None}), text_of({"latent": 3, "beta": 0.5}))


def toml(values):
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def history():
    return text("epoch,step,train\n1.0,10,-3.5\n2.0,20,-3.25\n")


# ---- what reads them: a function of the bytes and of an empty folder
def at(name, read, **others):
    def load(raw, folder):
        for place, content in {**others, name: raw}.items():
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return read(folder / name)

    return load


def settle(path):
    return Config(**settings_in(path))


def load_folder(path):
    folder = path.parent
    settings_of(folder), made_of(folder), shape_and_classes(folder)
    return load_run(folder)


def load_checkpoints(path):
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it goes on from an earlier one
        Checkpoints(path.parent, "auto").read()
    return unpack(path, "checkpoint")


def load_idx(path):
    return data.mnist(path.parents[2], download=False)


IDX = {f"MNIST/raw/{n}": idx()[0][0] for n in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
OTHERS = {f"{i}.png": painted("PNG") for i in range(4)}
OTHER = {"checkpoints/epoch-000001.safetensors": checkpoints()[0][0]}

LOADERS = {
    "toml": (partial(settings_files, toml), at("settings.toml", settle)),
    "json": (partial(settings_files, json.dumps), at("settings.json", settle)),
    "run.json": (record, at("run.json", load_folder, **{"weights.safetensors": run()["weights.safetensors"]})),
    "weights of a run": (
        lambda: [(run()["weights.safetensors"], plain)],
        at("weights.safetensors", load_folder, **{"run.json": run()["run.json"]}),
    ),
    "weights": (weights, at("w.safetensors", lambda path: pv.load_weights(vae(), path))),
    "checkpoint": (checkpoints, at("checkpoints/epoch-000002.safetensors", load_checkpoints, **OTHER)),
    "resume": (lambda: [(UNTOUCHED, altered)], at("kept/epoch-000001.safetensors", resume_run)),
    "npz": (npz, at("set.npz", data.from_path)),
    "npy": (lambda: [(raw, plain) for raw in arrays()], at("set.npy", data.from_path)),
    "counts": (
        lambda: [(array(np.arange(80).reshape(40, 2)), plain)],
        at("set.npz", partial(data.from_npz, counts=True)),
    ),
    "pictures": (pictures, at("9.png", lambda path: data.from_folder(path.parent), **OTHERS)),
    "idx": (idx, at("MNIST/raw/train-images-idx3-ubyte", load_idx, **IDX)),
    "idx.gz": (idx, at("MNIST/raw/train-images-idx3-ubyte.gz", load_idx, **IDX)),
    "cifar": (
        lambda: text("pickle"),
        at("cifar-10-batches-py/data_batch_1", lambda p: data.cifar10(p.parents[1], False)),
    ),
    "metrics.csv": (history, at("metrics.csv", figures._history)),
}
NEVER_WHOLE = {"idx", "idx.gz", "cifar"}  # the real ones have 60,000 pictures, and known sums


def attempt(name, raw):
    """Whether a loader takes a file; anything but its documented error comes out."""
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)  # or it never ends
    try:
        with tempfile.TemporaryDirectory() as folder:
            LOADERS[name][1](raw, Path(folder))
    except ValueError:
        return False
    finally:
        faulthandler.cancel_dump_traceback_later()
    return True


def fuzz(name, examples):
    """Give a loader changed files; return how many it took and how many it refused."""
    whole, result = LOADERS[name][0](), [0, 0]

    @seed(0)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(changes())
    def once(plan):
        which, steps, wild = plan
        raw, finish = whole[which % len(whole)]
        for kind, where, how, extra in steps:
            raw = changed(raw, kind, where, how, extra, whole[where % len(whole)][0])
        if wild and which % 50 == 0:
            raw = b"".join(extra for *_, extra in steps)
        result[attempt(name, finish(raw))] += 1

    once()
    return {"refused": result[0], "taken": result[1]}


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = fuzz(sys.argv[1], int(sys.argv[2]))
    found["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(found | {"seconds": round(time.perf_counter() - start)}))
