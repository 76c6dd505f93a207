"""Pickled ``.npy`` files read as untrusted input: arrays and plain containers, never code.

``numpy.load(allow_pickle=True)`` executes whatever a file says. Here the unpickler admits the few
names that NumPy writes, and even those stand for inert records: no state of the pickle ever
reaches NumPy's own ``__setstate__``, whose crafted dtypes and buffers can corrupt memory.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

__all__ = ["UnsafePickleError", "load_npy"]


class UnsafePickleError(ValueError):
    """A pickle asks for something other than NumPy arrays and plain containers."""


class _Dtype:
    """A dtype as the pickle describes it."""

    def __init__(self, code: object = None, *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        self.order = "="

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) >= 2 and isinstance(state[1], str | bytes)):
            raise UnsafePickleError("a dtype of unknown form")
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("=", "|", "<", ">") or any(part is not None for part in state[2:5]):
            raise UnsafePickleError("a structured dtype")
        self.order = order

    def build(self) -> np.dtype[Any]:
        code = self.code
        # bool, integers, floats, complex, bytes, text and object references; nothing structured.
        if not isinstance(code, str) or code[:1] not in "biufcSUO" or not code[1:].isdigit():
            raise UnsafePickleError(f"a dtype {code!r}")
        try:
            # Byte order and type in one string: dtype("<i4").
            return np.dtype(self.order + code)
        except TypeError as error:
            raise UnsafePickleError(f"a dtype {code!r}") from error


class _Array:
    """An array as the pickle describes it."""

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] | None = None

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise UnsafePickleError("an array of unknown form")
        self.state = state


class _Scalar:
    """A NumPy scalar as the pickle describes it."""

    def __init__(self, dtype: object = None, data: object = None) -> None:
        self.dtype, self.data = dtype, data


class _NdarrayType:
    """Stands for the class ``numpy.ndarray``, which pickles name but must not call."""

    def __init__(self, *_: object) -> None:
        raise UnsafePickleError("numpy.ndarray called directly")


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Stand in for ``_codecs.encode``, through which Python 3 writes bytes in protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"an encoding {encoding!r}")
    return text.encode("latin1")


def _empty_bytes(*arguments: object) -> bytes:
    """Stand in for ``bytes()``, the empty string of protocol 2; ``bytes(n)`` would take memory."""
    if arguments:
        raise UnsafePickleError("bytes called with arguments")
    return b""


def _from_buffer(data: object, dtype: object, shape: object, order: object = "C") -> _Array:
    """Stand in for ``numpy._core.numeric._frombuffer``, which protocol 5 uses."""
    array = _Array()
    raw = bytes(data) if isinstance(data, bytes | bytearray) else data
    array.state = (1, shape, dtype, order == "F", raw)
    return array


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NdarrayType,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "bytes"): _empty_bytes,
    ("builtins", "complex"): complex,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED[_core + ".multiarray", "_reconstruct"] = _Array
    _ADMITTED[_core + ".multiarray", "scalar"] = _Scalar
    _ADMITTED[_core + ".numeric", "_frombuffer"] = _from_buffer


class _Admitted:
    """Stands for a name of `_ADMITTED`: it may be called, and nothing of it changed."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise UnsafePickleError("a changed class or function")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Protocols 0 to 2 use Python 2's name of the module.
        module = "builtins" if module == "__builtin__" else module
        try:
            return _Admitted(_ADMITTED[module, name])
        except KeyError:
            raise UnsafePickleError(f"{module}.{name}") from None

    def persistent_load(self, pid: object) -> NoReturn:
        raise UnsafePickleError(f"a persistent object {pid!r}")


def _raw_bytes(data: object) -> bytes:
    # Python 2 wrote the raw data as str, which the latin1 encoding turns into text byte by byte.
    if isinstance(data, str):
        return data.encode("latin1")
    if isinstance(data, bytes | bytearray):
        return bytes(data)
    raise UnsafePickleError(f"array data of type {type(data).__name__}")


def _build_dtype(dtype: object) -> np.dtype[Any]:
    if not isinstance(dtype, _Dtype):
        raise UnsafePickleError("an array without a dtype")
    return dtype.build()


def _build_array(array: _Array, done: dict[int, Any]) -> np.ndarray[Any, Any]:
    if array.state is None:
        raise UnsafePickleError("an array without data")
    _, shape, described, fortran, data = array.state
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise UnsafePickleError(f"an array of shape {shape!r}")
    dtype, count = _build_dtype(described), 1
    for size in shape:
        count *= size
    order: Literal["F", "C"] = "F" if fortran else "C"
    if dtype.hasobject:
        if not isinstance(data, list) or len(data) != count:
            raise UnsafePickleError("an object array whose list does not fit its shape")
        flat = np.empty(count, dtype=object)
        for position, item in enumerate(data):
            flat[position] = _build(item, done)
        return flat.reshape(shape, order=order)
    raw = _raw_bytes(data)
    if len(raw) != count * dtype.itemsize:
        raise ValueError(
            f"an array of shape {shape} and dtype {dtype} needs {count * dtype.itemsize} bytes "
            f"of data, {len(raw)} are there"
        )
    built: np.ndarray[Any, Any] = np.frombuffer(raw, dtype).reshape(shape, order=order)
    return np.array(built, order="K")


def _build(value: Any, done: dict[int, Any]) -> Any:
    """Turn the records of the pickle into arrays, shared objects staying shared."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | bytearray):
        return value
    if id(value) in done:
        built = done[id(value)]
        if built is _UNDER_WAY:
            raise UnsafePickleError("a container that contains itself")
        return built
    done[id(value)] = _UNDER_WAY
    built = _build_new(value, done)
    done[id(value)] = built
    return built


_UNDER_WAY = object()


def _build_new(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, _Array):
        return _build_array(value, done)
    if isinstance(value, _Scalar):
        dtype, raw = _build_dtype(value.dtype), _raw_bytes(value.data)
        if dtype.hasobject or len(raw) != dtype.itemsize:
            raise UnsafePickleError("a scalar whose data does not fit its dtype")
        return np.frombuffer(raw, dtype)[0]
    if isinstance(value, _Dtype):
        return value.build()
    if isinstance(value, dict):
        return type(value)((_build(k, done), _build(v, done)) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_build(item, done) for item in value)
    raise UnsafePickleError(f"an object of type {type(value).__name__}")


def load_npy(path: str | os.PathLike[str]) -> Any:
    """Load a ``.npy`` file, its pickled content included, without running any of it.

    Parameters
    ----------
    path
        A ``.npy`` file: a plain array, or one that ``numpy.save`` pickled (Python 2 files too,
        whose byte strings are read as latin1).

    Returns
    -------
    numpy.ndarray or object
        The array; for a zero-dimensional object array, as in ``numpy.save(path, dictionary)``,
        the object in it.

    Raises
    ------
    FileNotFoundError
        No such file.
    UnsafePickleError
        The pickle names anything but NumPy arrays and plain containers. Nothing was executed.
    ValueError
        Not a ``.npy`` file, or a truncated or corrupt one; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            # Version 3 differs in the field names of structured dtypes only, which are refused.
            if read_header is None:
                raise ValueError(f"version {version} of the format is not supported")
            _, _, dtype = read_header(stream)
            if not dtype.hasobject:
                stream.seek(0)
                return np.load(stream, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path}: not a readable .npy file: {error}") from error
        content = stream.read()
    done: dict[int, Any] = {}
    try:
        loaded = _build(_Unpickler(io.BytesIO(content), encoding="latin1").load(), done)
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{path}: refused: the pickle asks for {error}; only NumPy arrays and plain "
            "containers are admitted"
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path}: the pickled content is damaged: {error}") from error
    if isinstance(loaded, np.ndarray) and loaded.dtype.hasobject and loaded.shape == ():
        return loaded.item()
    return loaded
