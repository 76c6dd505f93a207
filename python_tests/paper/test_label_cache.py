"""Parsed labels are kept on disk, until their source changes."""

from __future__ import annotations

import os

import numpy as np
import pytest
from test_faces import datenum, write_mat

from lnl_ext.paper import face_files
from lnl_ext.paper.face_files import list_faces
from lnl_ext.paper.label_cache import cache_folder, cached_arrays


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "lnl_ext"


def counted(tmp_path):
    """A source, and a parser that counts its calls."""
    source = tmp_path / "labels"
    source.write_text("3 4")
    calls = []

    def parse():
        calls.append(1)
        values = np.array([int(word) for word in source.read_text().split()])
        return {"values": values, "names": np.array(["ä.jpg", "b.jpg"])}

    return source, parse, calls


def test_parsed_once_until_the_source_changes(tmp_path):
    source, parse, calls = counted(tmp_path)
    for _ in range(3):
        stored = cached_arrays([source], parse)
        assert stored["values"].tolist() == [3, 4]
        assert stored["names"].tolist() == ["ä.jpg", "b.jpg"]
    assert len(calls) == 1
    source.write_text("3 5")  # the same size: the time tells
    status = source.stat()
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert cached_arrays([source], parse)["values"].tolist() == [3, 5]
    assert len(calls) == 2


def one_byte_changed(content: bytes) -> bytes:
    """Damage the compressed part, where zlib finds it (`zlib.error`)."""
    place = content.index(b".npy") + 4 + 20  # behind the name and the sizes of 64 bits
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [lambda content: content[:50], one_byte_changed, lambda _: b""])
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    source, parse, calls = counted(tmp_path)
    cached_arrays([source], parse)
    (path,) = cache_folder().iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged and will be made anew"):
        assert cached_arrays([source], parse)["values"].tolist() == [3, 4]
    cached_arrays([source], parse)
    assert len(calls) == 2


def test_a_folder_that_cannot_be_written(tmp_path):
    source, parse, _ = counted(tmp_path)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert cached_arrays([source], parse)["values"].tolist() == [3, 4]


def test_objects_are_refused(tmp_path):
    source, _, _ = counted(tmp_path)
    with pytest.raises(TypeError, match="Python objects: values"):
        cached_arrays([source], lambda: {"values": np.array([{}], dtype=object)})


def test_imdb_mat_is_parsed_once(tmp_path, monkeypatch):
    root = tmp_path / "imdb"
    root.mkdir()
    person = (datenum(1960, 1, 1), 2000, 1.0, 3.5, float("nan"))
    write_mat(root, [("01/b.jpg", *person), ("01/a.jpg", *person)])
    first = list_faces(root)
    face_files._read.cache_clear()  # as another process would find it

    def parsed_again(path):
        raise AssertionError("parsed again")

    monkeypatch.setattr(face_files, "_matlab", parsed_again)
    second = list_faces(root)
    assert second.paths == first.paths == [root / "01" / "a.jpg", root / "01" / "b.jpg"]
    assert second.age.tolist() == first.age.tolist() == [40, 40]
    assert second.test is None
    face_files._read.cache_clear()
    write_mat(root, [("01/c.jpg", *person)])
    with pytest.raises(AssertionError, match="parsed again"):
        list_faces(root)
