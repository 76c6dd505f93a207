"""Face images with the age and gender of the person, from the three formats they come in."""

from __future__ import annotations

import datetime
import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lnl_ext.paper.label_cache import cached_arrays
from lnl_ext.paper.safe_npy import load_npy

__all__ = ["FEMALE", "MALE", "FaceFiles", "list_faces"]

FEMALE, MALE = 0, 1

_UTKFACE = re.compile(r"(\d{1,3})_([01])_([0-4])_(\d+)\.jpe?g(\.chip\.jpe?g)?", re.IGNORECASE)
_LISTED = 10  # names in a message
_OLDEST = 120  # years: beyond, the date of birth or of the photograph is wrong
_FIELDS = ("dob", "photo_taken", "gender", "face_score", "second_face_score", "full_path")


class FaceFiles(NamedTuple):
    """Files and what is known of the person, in the order of the names."""

    paths: list[Path]
    age: Tensor
    """(N,) int64, years."""
    gender: Tensor
    """(N,) int64: `FEMALE` or `MALE`, whatever the source's numbers."""
    test: Tensor | None
    """(N,) bool: in the test list of the source; None: it has no such list."""


def list_faces(root: str | os.PathLike[str]) -> FaceFiles:
    """Find out what ``root`` holds and return its faces.

    A folder is read once a process. What was parsed of ``imdb.mat`` or of the ``.npy`` files is
    kept on disk (`lnl_ext.paper.label_cache`) until they change.

    Parameters
    ----------
    root
        One of

        * a folder with ``imdb_age_gender.npy`` and ``imdb_split.npy``, the paper's authors' files,
          and the images in ``imdb_crop/``;
        * a folder with ``imdb.mat`` (or ``imdb_crop/imdb.mat``) and the images in ``imdb_crop/``,
          as IMDB-WIKI distributes them. Faces without a gender or score, with a second face, or
          of an age that cannot be are left out;
        * a folder of UTKFace, ``[age]_[gender]_[race]_[date].jpg``, or one that holds it as
          ``UTKFace/``. A warning lists the names of another form, which are left out.

    Raises
    ------
    FileNotFoundError
        The folder, or all of these in it, is missing.
    UnsafePickleError
        A ``.npy`` file holds code. Nothing was executed.
    ValueError
        A file is damaged or has another content, or no face is left.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    return _read(root)


@functools.lru_cache(maxsize=4)
def _read(root: Path) -> FaceFiles:
    if (root / "imdb_age_gender.npy").is_file():
        sources = [root / "imdb_age_gender.npy", root / "imdb_split.npy"]
        faces = _cached(sources, functools.partial(_authors, root), root / "imdb_crop")
    elif (root / "imdb.mat").is_file() or (root / "imdb_crop" / "imdb.mat").is_file():
        path = root / "imdb.mat"
        path = path if path.is_file() else root / "imdb_crop" / "imdb.mat"
        folder = root / "imdb_crop" if (root / "imdb_crop").is_dir() else path.parent
        faces = _cached([path], functools.partial(_matlab, path), folder)
    else:
        folder = root / "UTKFace" if (root / "UTKFace").is_dir() else root
        faces = _utkface(folder)
    if not faces.paths:
        raise ValueError(f"{root}: no face with an age and a gender is left")
    return faces


class _Parsed(NamedTuple):
    """What a source of labels says, before it is put in order."""

    names: list[str]
    """Paths below the folder of the images."""
    age: npt.NDArray[np.int64]
    gender: npt.NDArray[np.int64]
    test: npt.NDArray[np.bool_] | None = None


def _cached(sources: list[Path], parse: Callable[[], _Parsed], folder: Path) -> FaceFiles:
    """Parse, or read what was parsed of the same files before."""

    def arrays() -> dict[str, npt.NDArray[np.generic]]:
        parsed = parse()
        test = {} if parsed.test is None else {"test": parsed.test}
        names = np.array(parsed.names, dtype=np.str_)
        return {"names": names, "age": parsed.age, "gender": parsed.gender, **test}

    stored = cached_arrays(sources, arrays)
    test = stored.get("test")
    return _sorted(
        [folder / str(name) for name in stored["names"]],
        stored["age"].astype(np.int64),
        stored["gender"].astype(np.int64),
        None if test is None else test.astype(np.bool_),
    )


def _sorted(
    paths: list[Path],
    age: npt.NDArray[np.int64],
    gender: npt.NDArray[np.int64],
    test: npt.NDArray[np.bool_] | None = None,
) -> FaceFiles:
    order = sorted(range(len(paths)), key=lambda row: str(paths[row]))
    rows = torch.tensor(order, dtype=torch.int64)
    return FaceFiles(
        [paths[row] for row in order],
        torch.from_numpy(age)[rows],
        torch.from_numpy(gender)[rows],
        None if test is None else torch.from_numpy(test)[rows],
    )


# ------------------------------------------------------------------ UTKFace


def _utkface(folder: Path) -> FaceFiles:
    paths, ages, genders, malformed = [], [], [], []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in (".jpg", ".jpeg"):
            continue
        match = _UTKFACE.fullmatch(path.name)
        if match is None or int(match[1]) > _OLDEST:
            malformed.append(path.name)
            continue
        paths.append(path)
        ages.append(int(match[1]))
        # UTKFace counts the other way round: 0 is male.
        genders.append(FEMALE if match[2] == "1" else MALE)
    if not paths and not malformed:
        raise FileNotFoundError(
            f"{folder}: holds none of imdb_age_gender.npy, imdb.mat, imdb_crop/imdb.mat and images "
            "named [age]_[gender]_[race]_[date].jpg"
        )
    if malformed:
        listed = ", ".join(malformed[:_LISTED])
        rest = f" and {len(malformed) - _LISTED} more" if len(malformed) > _LISTED else ""
        warnings.warn(
            f"{folder}: {len(malformed)} of {len(malformed) + len(paths)} names are not of the "
            f"form [age]_[gender]_[race]_[date].jpg and are left out: {listed}{rest}",
            stacklevel=5,
        )
    return _sorted(paths, np.array(ages, np.int64), np.array(genders, np.int64))


# ------------------------------------------------------------------ the authors' files


def _text(name: object) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else str(name)


def _authors(root: Path) -> _Parsed:
    described = load_npy(root / "imdb_age_gender.npy")
    split = load_npy(root / "imdb_split.npy")
    if not isinstance(split, Mapping) or not {"train_list", "test_list"} <= set(map(_text, split)):
        raise ValueError(f"{root}/imdb_split.npy: expected train_list and test_list")
    if not isinstance(described, Mapping):
        raise ValueError(f"{root}/imdb_age_gender.npy: expected a dictionary by file name")
    people = {_text(name): person for name, person in described.items()}
    lists = {_text(key): [_text(name) for name in names] for key, names in split.items()}
    names = lists["train_list"] + lists["test_list"]
    missing = [name for name in names if name not in people]
    if missing:
        raise ValueError(
            f"{root}/imdb_age_gender.npy: {len(missing)} names of imdb_split.npy are not in it, "
            f"such as {missing[0]!r}"
        )
    values = np.array([_age_and_gender(people[name], name) for name in names], np.int64)
    test = np.arange(len(names)) >= len(lists["train_list"])
    age, gender = values.reshape(-1, 2).T.copy()
    return _Parsed(names, age, gender, test)


def _age_and_gender(person: Any, name: str) -> tuple[int, int]:
    """Read ``{"age": 31, "gender": 1}``."""
    fields = {_text(k): v for k, v in person.items()} if isinstance(person, Mapping) else {}
    try:
        age, gender = int(fields["age"]), int(fields["gender"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"imdb_age_gender.npy: {name!r} has {person!r}, expected age and gender"
        ) from error
    if not 0 <= age <= _OLDEST or gender not in (FEMALE, MALE):
        raise ValueError(f"imdb_age_gender.npy: {name!r} has age {age} and gender {gender}")
    return age, gender


# ------------------------------------------------------------------ imdb.mat


def _matlab(path: Path) -> _Parsed:
    from scipy.io import loadmat  # only here: it is not needed for the other formats

    try:
        record = loadmat(path, squeeze_me=True, struct_as_record=False)["imdb"]
    except (KeyError, NotImplementedError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a Matlab file with a structure imdb: {error}") from error
    missing = [field for field in _FIELDS if not hasattr(record, field)]
    if missing:
        raise ValueError(f"{path}: imdb has no field {', '.join(missing)}")
    columns = {field: np.atleast_1d(getattr(record, field)) for field in _FIELDS}
    lengths = {field: len(column) for field, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{path}: the fields of imdb have different lengths: {lengths}")
    numbers = {name: columns[name].astype(np.float64) for name in _FIELDS[:-1]}
    born = np.array([_year(day) for day in numbers["dob"]])
    age = numbers["photo_taken"] - born
    keep = (
        np.isin(numbers["gender"], (FEMALE, MALE))
        & np.isfinite(numbers["face_score"])  # -inf: no face was found
        & np.isnan(numbers["second_face_score"])  # a number: whose age it is is not known
        & (age >= 0)
        & (age <= _OLDEST)
    )
    return _Parsed(
        [str(name) for name in columns["full_path"][keep]],
        np.floor(age[keep]).astype(np.int64),
        numbers["gender"][keep].astype(np.int64),
    )


def _year(datenum: float) -> float:
    """Age 0 in years: the date of a Matlab day number, for photographs taken in the middle of July.

    The year alone is known of the photograph; taking its middle is what the data set's authors do.
    """
    day = int(datenum) - 366 if np.isfinite(datenum) else 0  # Matlab counts from year 0
    if not 1 <= day <= datetime.date.max.toordinal():
        return float("nan")
    date = datetime.date.fromordinal(day)
    return date.year + (date.month >= 7)
