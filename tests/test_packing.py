"""States as files: every value comes back, every damage is told, and nothing in a file is ever executed."""

import errno
import json
import math
import pickle
import random
import struct
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from ppl_vae import packing
from ppl_vae.packing import DamagedError, pack, unpack

LINE = torch.arange(6.0)
SMALL = {
    "weights": torch.tensor([[1.5, -0.0], [math.nan, math.inf]]),
    "steps": torch.tensor(3),
    "groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}],
    "best": -math.inf,
    7: None,
}


def identical(first, second):
    """Whether two states are of the same types and bits, NaN and the sign of zero included."""
    if isinstance(first, torch.Tensor):
        if not isinstance(second, torch.Tensor) or (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (first, second)))
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(identical(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(identical, first, second))
    if isinstance(first, float):
        return math.isnan(first) == math.isnan(second) and (math.isnan(first) or repr(first) == repr(second))
    return first == second


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


@pytest.fixture
def good(path):
    """The bytes of a whole file, which is there."""
    return pack(path, "trial", SMALL).read_bytes()


def crafted(path, plain, tensors=None, **changed):
    """A file with any text as its state, and the checksum that belongs to it."""
    tensors = tensors or {}
    about = {"whose": "ppl_vae", "version": "1", "kind": "trial", "state": plain}
    about["sha256"] = packing._checksum("trial", plain, tensors)
    path.write_bytes(save(tensors, about | changed))
    return path


# ---- what comes back
@pytest.mark.parametrize(
    "state",
    [
        None,
        True,
        0,
        -(2**70),
        "",
        'ä 😀 \x00 " \\ {}',
        [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308, 0.1, 1e22, 1.0],
        (),
        [],
        {},
        ((), [], {}, ({},), [[]], (1,), [(1, [2, (3,)])]),
        {"1": "text", 1: "number", -1: None, "": 0, "a/b": 1, "tensor": "tensor", "dict": {"tuple": ("number",)}},
        {"tensor": LINE, "number": {"number": "nan"}},
        [[1, 1.0, True], [0, 0.0, False]],
    ],
    ids=repr,
)
def test_plain_values_come_back_with_their_types(state, path):
    pack(path, "trial", state)
    assert identical(unpack(path, "trial"), state)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(1.5),
        torch.tensor(True),
        torch.empty(0),
        torch.empty(3, 0, 2, dtype=torch.int64),
        torch.tensor([True, False]),
        torch.tensor([1.5, -0.0, math.nan, math.inf, 1e-45]),
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.tensor([1 / 3], dtype=torch.float64),
        torch.tensor([65504.0, 6e-8]).half(),
        torch.arange(256).to(torch.uint8),
        torch.tensor([-(2**63), 2**63 - 1]),
        torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(12).reshape(3, 4)[:, 1::2],
        torch.ones(1).expand(4, 3),
        torch.arange(8.0).reshape(1, 2, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.get_rng_state(),
    ],
    ids=lambda v: f"{v.dtype} {tuple(v.shape)}",
)
def test_tensors_come_back_to_the_bit(value, path):
    pack(path, "trial", value)
    assert identical(unpack(path, "trial"), value)


def test_tensors_that_share_storage_come_back_as_tensors_of_their_own(path):
    pack(path, "trial", {"whole": LINE, "again": LINE, "part": LINE[2:4], "turned": LINE.view(2, 3).T})
    found = unpack(path, "trial")
    assert identical(found, {"whole": LINE, "again": LINE, "part": LINE[2:4], "turned": LINE.view(2, 3).T})
    found["whole"].zero_()
    assert torch.equal(found["again"], LINE)


def test_tensors_under_paths_that_read_alike_are_kept_apart(path):
    state = {"a/b": LINE, "a": {"b": LINE + 1}, 1: LINE + 2, "1": LINE + 3, "1 4": LINE + 4}
    pack(path, "trial", state)
    assert identical(unpack(path, "trial"), state)


def test_names_that_keys_make_by_chance_are_no_others(path):
    state = {"1 2": LINE, 1: LINE + 1, "1": LINE + 2}
    pack(path, "trial", state)
    assert identical(unpack(path, "trial"), state)


def test_what_is_written_neither_changes_nor_holds_what_was_given(path):
    given = {"p": nn.Parameter(LINE.clone()), "ordered": OrderedDict(b=1, a=2)}
    pack(path, "trial", given)
    found = unpack(path, "trial")
    assert type(found["p"]) is torch.Tensor
    assert not found["p"].requires_grad
    assert given["p"].requires_grad
    assert list(found["ordered"].items()) == [("b", 1), ("a", 2)]
    given["p"].data.zero_()
    assert torch.equal(found["p"], LINE)


# ---- what is not written
class Opaque:
    pass


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (Opaque(), "trial: a Opaque cannot be kept"),
        ({"a": [1, {"b": Opaque()}]}, "trial/a/1/b: a Opaque cannot be kept"),
        ({"f": (len,)}, "trial/f/0: a builtin_function_or_method cannot"),
        ({"s": {1, 2}}, "trial/s: a set cannot"),
        ({"b": b"bytes"}, "trial/b: a bytes cannot"),
        ({"z": 1j}, "trial/z: a complex cannot"),
        ({"array": torch.ones(2).numpy()}, "trial/array: a ndarray cannot"),
        ({"keys": {1.5: 0}}, "trial/keys: a dict cannot"),
        ({"keys": {True: 0}}, "trial/keys: a dict cannot"),
        ({"keys": {(1, 2): 0}}, "trial/keys: a dict cannot"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_other_types_are_refused_by_where_they_are_and_the_old_file_stays(state, message, path, good):
    with pytest.raises(ValueError, match=message):
        pack(path, "trial", state)
    assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def cycle():
    state = []
    state.append(state)
    return state


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(2, dtype=torch.complex128),
        lambda: torch.empty(2, device="meta"),
        cycle,
    ],
    ids=["sparse", "complex128", "meta", "cycle"],
)
def test_tensors_and_lists_that_no_file_can_hold_are_refused(make, path):
    with pytest.raises(ValueError, match="trial/here"):
        pack(path, "trial", {"here": make()})


def test_a_write_that_fails_midway_leaves_the_old_file(path, good, monkeypatch):
    def full(file, header, tensors):
        file.write_bytes(header)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing, "_write", full)
    with pytest.raises(ValueError, match=r"cannot write .*state.safetensors \(No space left on device\)"):
        pack(path, "trial", {"other": LINE})
    monkeypatch.undo()
    assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def test_a_move_that_fails_leaves_the_old_file(path, good, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ValueError, match="Input/output error"):
        pack(path, "trial", {"other": LINE})
    monkeypatch.undo()
    assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def test_places_that_cannot_be_written(tmp_path):
    for place in (tmp_path, tmp_path / "none" / "state.safetensors"):
        with pytest.raises(ValueError, match="cannot write"):
            pack(place, "trial", SMALL)
    assert list(tmp_path.iterdir()) == []


# ---- what is not read
def told(path, changed):
    """Whether damage was told; what is read all the same must be what was written."""
    path.write_bytes(changed)
    try:
        found = unpack(path, "trial")
    except ValueError:
        return True
    assert identical(found, SMALL), "other values came back, and nothing was said"
    return False


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_every_single_byte_that_changes_is_told(mask, path, good):
    told_at = []
    for i in range(len(good)):
        changed = bytearray(good)
        changed[i] ^= mask
        told_at.append(told(path, changed))
    size = 8 + struct.unpack("<Q", good[:8])[0]
    assert all(told_at[size:])  # tensors
    assert all(told_at[:8])  # the header's length
    blank = len(good[8:size]) - len(good[8:size].rstrip())
    assert told_at.count(False) <= blank  # all but the blanks that fill the header up


def test_every_length_that_a_file_is_cut_to_is_told(path, good):
    assert all(told(path, good[:i]) for i in range(len(good)))
    assert told(path, good + b"\0")
    assert told(path, good + good)


def test_damage_says_which_file_and_is_a_value_error(path, good):
    path.write_bytes(good[:-1])
    with pytest.raises(DamagedError, match=r"state\.safetensors is damaged"):
        unpack(path, "trial")
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DamagedError, match="does not match its checksum"):
        unpack(path, "trial")
    assert issubclass(DamagedError, ValueError)


def test_files_of_others(path, good, tmp_path):
    with pytest.raises(DamagedError, match="is a 'trial', no checkpoint"):
        unpack(path, "checkpoint")
    path.write_bytes(save({"a": LINE}))
    with pytest.raises(DamagedError, match="is a safetensors file, but no trial of ppl_vae"):
        unpack(path, "trial")
    path.write_bytes(save({"a": LINE}, {"whose": "ppl_vae", "version": "1"}))
    with pytest.raises(DamagedError, match="but no trial of ppl_vae"):
        unpack(path, "trial")
    with pytest.raises(ValueError, match="is of version '2', this one reads 1; upgrade") as caught:
        unpack(crafted(path, "null", version="2"), "trial")
    assert not isinstance(caught.value, DamagedError)  # it may be whole
    for missing, message in ((tmp_path, "Is a directory"), (tmp_path / "none", "there is no file")):
        with pytest.raises(ValueError, match=message):
            unpack(missing, "trial")


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickles_are_not_executed(path, tmp_path):
    mark = tmp_path / "executed"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(DamagedError):
        unpack(path, "trial")
    torch.save({"state": Payload(mark)}, path)
    with pytest.raises(DamagedError):
        unpack(path, "trial")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # the payload is one


def with_header(header, data=b"", length=None):
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(shape, offsets, dtype="F32"):
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        with_header(b"{}", length=2**63),
        with_header(b"{}", length=2**64 - 1),
        with_header(b"{}", length=10**8),
        with_header(b"[" * 100_000),
        with_header(b'{"a":' * 100_000),
        with_header(b'{"__metadata__":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        with_header(b'{"__metadata__": {"state": 1}}'),
        with_header(b'{"__metadata__": null}'),
        with_header(b"\xff\xfe{}"),
        with_header(tensor([2**40], [0, 2**42])),
        with_header(tensor([2**62, 4], [0, 0])),
        with_header(tensor([2**63, 2], [0, 8]), b"\0" * 8),
        with_header(tensor([1], [0, 8]), b"\0" * 8),
        with_header(tensor([1], [4, 8]), b"\0" * 8),
        with_header(tensor([-1], [0, 4]), b"\0" * 4),
        with_header(tensor([1], [4, 0]), b"\0" * 4),
        with_header(tensor([1], [0, 4], "Q7"), b"\0" * 4),
    ],
    ids=range(19),
)
def test_crafted_headers(content, path):
    path.write_bytes(content)
    with pytest.raises(DamagedError):
        unpack(path, "trial")


@pytest.mark.parametrize(
    "plain",
    [
        "",
        "{",
        "nul",
        '{"tensor": "b"}',
        '{"tensor": ["a"]}',
        '{"tensor": null}',
        '{"number": "one"}',
        '{"number": null}',
        '{"number": []}',
        '{"tuple": 3}',
        '{"dict": 3}',
        '{"dict": [3]}',
        '{"dict": [[1]]}',
        '{"dict": [[1, 2, 3]]}',
        '{"dict": [[[], 2]]}',
        '{"dict": {"a": 1}}',
        '{"call": "os.system"}',
        '{"py/object": ["a"]}',
        "{}",
        '{"tuple": [], "dict": []}',
        "9" * 5000,
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"tuple": [' * 50_000 + "]}" * 50_000,
        "[" * 900 + "]" * 900,
    ],
    ids=lambda p: p[:25],
)
def test_crafted_states_with_the_right_checksum(plain, path):
    try:
        found = unpack(crafted(path, plain, {"a": LINE}), "trial")
    except DamagedError:
        return
    assert plain.startswith("[" * 900)  # deep, and legal as far as the stack goes
    assert len(plain) == 1800
    assert found != []


def test_a_state_within_the_same_rules_is_read_from_a_crafted_file(path):
    """So that the refusals above are those of what is wrong, and not of all that is crafted."""
    assert identical(unpack(crafted(path, '{"tuple": [{"tensor": "a"}]}', {"a": LINE}), "trial"), (LINE,))


def mutated(random, good):
    """A file after one to four random changes."""
    changed = bytearray(good)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(changed) or 1)
        to = min(len(changed), at + random.choice([1, 1, 2, 8, 64]))
        kind = random.choice(["flip", "write", "cut", "insert", "copy", "end"])
        if kind == "flip":
            changed[at : at + 1] = bytes(byte ^ 1 << random.randrange(8) for byte in changed[at : at + 1])
        elif kind == "write":
            changed[at:to] = random.randbytes(to - at)
        elif kind == "cut":
            del changed[at:to]
        elif kind == "insert":
            changed[at:at] = random.choice([random.randbytes(to - at), b'{"tensor":"', b"[[[[", b"\0" * 8, b'"'])
        elif kind == "copy":
            start = random.randrange(len(changed) or 1)
            changed[at:to] = changed[start : start + to - at]
        else:
            del changed[at + 1 :]
    return bytes(changed)


def scrambled(random, depth=0):
    """A random state as JSON, made of what is legal and what is not."""
    leaves = ["a", "b", 0, -1, 1.5, None, True, "nan", [], {}]
    if depth > 4 or random.random() < 0.3:
        return random.choice(leaves)
    inside = [scrambled(random, depth + 1) for _ in range(random.randint(0, 3))]
    tag = random.choice(["tensor", "number", "tuple", "dict", "list", "pairs", "odd"])
    if tag == "list":
        return inside
    if tag == "pairs":
        return {"dict": [[random.choice(leaves), part] for part in inside]}
    return {tag: random.choice([inside, *leaves])} | ({"more": 1} if random.random() < 0.1 else {})


def fuzz(seed, count, path, good):
    choose = random.Random(seed)
    damaged = sum(told(path, mutated(choose, good)) for _ in range(count))
    assert damaged > 0.95 * count
    outcomes = set()
    for _ in range(count):
        crafted(path, json.dumps(scrambled(choose)), {"a": LINE})
        try:
            unpack(path, "trial")
            outcomes.add("read")
        except DamagedError:
            outcomes.add("told")
    assert outcomes == {"read", "told"}


def test_random_damage_and_random_states_end_in_errors_that_are_told(path, good):
    fuzz(0, 300, path, good)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_much_random_damage(seed, path, good):
    fuzz(seed, 5000, path, good)
