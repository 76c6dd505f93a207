"""Pickled .npy files: arrays and plain containers load, code is refused and never runs."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from lnl_ext.data import UnsafePickleError, load_npy


def write_pickled(path, payload: bytes) -> None:
    """Write a .npy file of object dtype whose pickle is ``payload``."""
    stream = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(stream, header)
    path.write_bytes(stream.getvalue() + payload)


def assert_same(left, right) -> None:
    """Compare nested containers of arrays."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, np.ndarray) and left.dtype.hasobject:
        assert_same(left.tolist(), right.tolist())
    else:
        np.testing.assert_array_equal(left, right)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            assert left.flags.f_contiguous == right.flags.f_contiguous


CONTENT = {
    "train_image": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">i4"),
    "text": np.array(["a", "bcd"]),
    "bytes": np.array([b"a", b"bc"]),
    "empty": np.empty((0, 3), np.float32),
    "scalar": np.float64(0.25),
    "complex": np.array([1 + 2j]),
    "truth": np.array([True, False]),
    "objects": np.array([None, "x", [np.arange(2), {"k": 1}]], dtype=object),
    "plain": [1, 2.5, "three", b"four", None, True, (5, {6})],
    "ordered": OrderedDict(b=1, a=2),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_content_survives_every_protocol(tmp_path, protocol):
    path = tmp_path / "content.npy"
    write_pickled(path, pickle.dumps(np.array(CONTENT, dtype=object), protocol=protocol))
    assert_same(load_npy(path), CONTENT)


def test_numpy_save_of_a_dictionary(tmp_path):
    path = tmp_path / "content.npy"
    np.save(path, CONTENT, allow_pickle=True)
    assert_same(load_npy(path), CONTENT)


def test_plain_array(tmp_path):
    path = tmp_path / "plain.npy"
    np.save(path, np.arange(5))
    np.testing.assert_array_equal(load_npy(path), np.arange(5))


def test_python_2_pickle(tmp_path):
    # What Python 2 wrote for {'a': array([1, 200], uint8)}: raw data is a byte string.
    payload = (
        b"(dp0\nS'a'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\n"
        b"S'b'\np5\ntp6\nRp7\n(I1\n(I2\ntp8\ncnumpy\ndtype\np9\n(S'u1'\np10\nI0\nI1\ntp11\nRp12\n"
        b"(I3\nS'|'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\nS'\\x01\\xc8'\np15\ntp16\nbs."
    )
    path = tmp_path / "python2.npy"
    write_pickled(path, payload)
    loaded = load_npy(path)
    np.testing.assert_array_equal(loaded["a"], np.array([1, 200], np.uint8))


class Attack:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, r"(posix|nt)\.mkdir"), (eval, "eval"), (exec, "exec"), (getattr, "getattr")],
)
def test_code_is_refused_and_not_executed(tmp_path, function, name, protocol):
    mark, path = tmp_path / "executed", tmp_path / "attack.npy"
    argument = str(mark) if function is os.mkdir else f"__import__('os').mkdir({str(mark)!r})"
    content = {"train_image": np.zeros(3), "attack": Attack(function, argument)}
    write_pickled(path, pickle.dumps(np.array(content, dtype=object), protocol=protocol))
    with pytest.raises(UnsafePickleError, match=rf"attack\.npy: refused: .*{name}"):
        load_npy(path)
    assert not mark.exists()


def test_the_attack_of_the_test_above_works_on_numpy(tmp_path):
    # Else that test would prove nothing.
    mark, path = tmp_path / "executed", tmp_path / "attack.npy"
    write_pickled(path, pickle.dumps(np.array(Attack(os.mkdir, str(mark)), dtype=object)))
    np.load(path, allow_pickle=True)
    assert mark.exists()


@pytest.mark.parametrize(
    "name", ["cnumpy.core.multiarray\nscalar\n", "c_codecs\nencode\n"], ids=["class", "function"]
)
@pytest.mark.parametrize(
    "state",
    ["(N(dS'__init__'\nccollections\nOrderedDict\nst", "(dS'a'\nI1\ns"],
    ids=["slots", "attributes"],
)
def test_a_refused_file_leaves_nothing_behind(tmp_path, name, state):
    good, bad = tmp_path / "good.npy", tmp_path / "bad.npy"
    np.save(good, {"a": np.float32(2.5), "b": b"bytes"})
    write_pickled(bad, (name + state + "b.").encode())
    with pytest.raises(UnsafePickleError, match="a changed class or function"):
        load_npy(bad)
    assert load_npy(good) == {"a": np.float32(2.5), "b": b"bytes"}


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        # numpy.ndarray called with a shape: gigabytes from 60 bytes.
        (b"cnumpy\nndarray\n((L1000000000000L\nttR.", "numpy.ndarray called directly"),
        (b"cnumpy.core.multiarray\nfromfile\n(S'/etc/passwd'\ntR.", "fromfile"),
        # A dtype with hand-made fields, which NumPy's own __setstate__ would take.
        (
            b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR(I3\nS'|'\nN(S'f'\nt(dI8\nI1\nI0\ntb.",
            "structured dtype",
        ),
        (b"Pid\n.", "persistent object"),
        (b"c_codecs\nencode\n(Va\nVrot13\ntR.", "encoding 'rot13'"),
    ],
)
def test_crafted_pickles_are_refused(tmp_path, payload, message):
    path = tmp_path / "crafted.npy"
    write_pickled(path, payload)
    with pytest.raises(UnsafePickleError, match=message):
        load_npy(path)


def test_shared_containers_do_not_multiply(tmp_path):
    # 2^60 leaves if every reference were copied.
    value: list = []
    for _ in range(60):
        value = [value, value]
    path = tmp_path / "shared.npy"
    write_pickled(path, pickle.dumps(value))
    loaded = load_npy(path)
    assert loaded[0] is loaded[1]


def test_a_container_in_itself_is_refused(tmp_path):
    value: list = []
    value.append(value)
    path = tmp_path / "self.npy"
    write_pickled(path, pickle.dumps(value))
    with pytest.raises(UnsafePickleError, match="contains itself"):
        load_npy(path)


def test_damage_is_named_with_the_file(tmp_path):
    path = tmp_path / "content.npy"
    np.save(path, CONTENT, allow_pickle=True)
    whole = path.read_bytes()
    for cut in (0, 5, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"content\.npy: "):
            load_npy(path)
    path.write_bytes(b"PK\x03\x04" + whole)
    with pytest.raises(ValueError, match=r"content\.npy: not a readable \.npy file"):
        load_npy(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.npy: no such file"):
        load_npy(tmp_path / "absent.npy")


def test_array_data_must_fit_its_shape(tmp_path):
    payload = pickle.dumps(np.arange(4, dtype=np.int64), protocol=2)
    # The shape (4,) becomes (5,).
    damaged = payload.replace(b"K\x01K\x04\x85", b"K\x01K\x05\x85")
    assert damaged != payload
    path = tmp_path / "short.npy"
    write_pickled(path, damaged)
    with pytest.raises(ValueError, match="needs 40 bytes of data, 32 are there"):
        load_npy(path)
