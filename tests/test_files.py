"""Files appear whole or not at all."""

import os

import pytest

from ppl_vae.files import require_folder, write_whole


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.txt"


def listing(path):
    return sorted(p.name for p in path.parent.iterdir())


@pytest.mark.parametrize("kind", [str, os.fspath, lambda p: p])
@pytest.mark.parametrize("before", [None, "old"])
def test_what_was_written_is_there_and_nothing_else(path, kind, before):
    if before is not None:
        path.write_text(before)
        os.link(path, path.with_name("link"))
    assert write_whole(kind(path), lambda file: file.write_text("new")) == path
    assert path.read_text() == "new"
    assert listing(path) == (["file.txt"] if before is None else ["file.txt", "link"])
    assert before is None or path.with_name("link").read_text() == "old"  # it was moved there, not rewritten


def test_nobody_sees_half_of_it(path):
    path.write_text("old")

    def slowly(file):
        assert file.parent == path.parent  # on the same disk, so that it can be moved at once
        with file.open("w") as stream:
            for part in ("ne", "w"):
                stream.write(part)
                stream.flush()
                assert path.read_text() == "old"

    write_whole(path, slowly)
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [None, "old"])
def test_an_error_while_writing_leaves_the_old_file(path, error, before):
    if before is not None:
        path.write_text(before)

    def half(file):
        file.write_text("ha")
        raise error

    with pytest.raises(type(error)):
        write_whole(path, half)
    assert listing(path) == ([] if before is None else ["file.txt"])
    assert before is None or path.read_text() == before


def test_a_full_disk_is_a_value_error_that_names_the_file(path):
    path.write_text("old")

    def full(file):
        file.write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=f"path: cannot write {path} .No space left on device."):
        write_whole(path, full)
    assert listing(path) == ["file.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("place", ["missing/file.txt", "plain/file.txt", "folder"])
def test_where_nothing_can_be_written(tmp_path, place):
    (tmp_path / "plain").write_text("a file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"path: cannot write {tmp_path / place}"):
        write_whole(tmp_path / place, lambda file: file.write_text("new"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "plain"]


def test_a_writer_that_writes_nothing_is_noticed(path):
    path.write_text("old")
    with pytest.raises(ValueError, match="cannot write"):
        write_whole(path, lambda file: None)
    assert path.read_text() == "old"


def test_a_folder_is_looked_for_before_the_work(tmp_path):
    require_folder(tmp_path / "file.txt")
    (tmp_path / "plain").write_text("a file")
    for place in ("missing/file.txt", "plain/file.txt"):
        with pytest.raises(ValueError, match=f"path: cannot write {tmp_path / place} .there is no folder"):
            require_folder(tmp_path / place)
