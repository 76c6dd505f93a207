"""Faces: three formats give the same people; EB1, EB2 and the test set do not overlap."""

from __future__ import annotations

import datetime
import os
import pickle

import numpy as np
import pytest
import torch
from face_data import write_image, write_utkface
from scipy.io import savemat

from lnl_ext.data import UnsafePickleError
from lnl_ext.paper.face_files import FEMALE, MALE, list_faces
from lnl_ext.paper.faces import age_bins, binary_age, select_faces


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep parsed labels out of the home directory."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("cache")))


def datenum(year: int, month: int, day: int) -> float:
    """Matlab's number of a date: days since year 0, which Python's ordinals begin 366 after."""
    return datetime.date(year, month, day).toordinal() + 366.0


def write_mat(root, people) -> None:
    """``imdb.mat`` as IMDB-WIKI has it: rows (path, dob, photo_taken, gender, score, second)."""
    paths, born, taken, gender, score, second = zip(*people, strict=True)
    cells = np.empty((1, len(paths)), dtype=object)
    cells[0, :] = [np.array([path]) for path in paths]
    numbers = {
        "dob": np.array([born], dtype=np.int32),
        "photo_taken": np.array([taken], dtype=np.uint16),
        "gender": np.array([gender], dtype=np.float64),
        "face_score": np.array([score], dtype=np.float64),
        "second_face_score": np.array([second], dtype=np.float64),
    }
    savemat(root / "imdb.mat", {"imdb": {**numbers, "full_path": cells}})


NAN, INF = float("nan"), float("inf")


def test_imdb_mat(tmp_path):
    early, late = datenum(1960, 6, 30), datenum(1960, 7, 1)
    write_mat(
        tmp_path,
        [
            ("01/b.jpg", early, 2000, 1.0, 3.5, NAN),
            ("01/a.jpg", late, 2000, 0.0, 3.5, NAN),
            ("02/no_gender.jpg", early, 2000, NAN, 3.5, NAN),
            ("02/no_face.jpg", early, 2000, 1.0, -INF, NAN),
            ("02/two_faces.jpg", early, 2000, 1.0, 3.5, 2.0),
            ("02/unborn.jpg", early, 1950, 1.0, 3.5, NAN),
            ("02/no_date.jpg", 100, 2000, 1.0, 3.5, NAN),
        ],
    )
    (tmp_path / "imdb_crop").mkdir()
    faces = list_faces(tmp_path)
    assert faces.paths == [(tmp_path / "imdb_crop" / "01" / n) for n in ("a.jpg", "b.jpg")]
    # In the middle of 2000 the one born on the last day of June is 40, the other one still 39.
    assert faces.age.tolist() == [39, 40]
    assert faces.gender.tolist() == [FEMALE, MALE]
    assert faces.test is None


def test_a_damaged_mat_is_named(tmp_path):
    (tmp_path / "imdb.mat").write_bytes(b"nothing of Matlab" * 20)
    with pytest.raises(ValueError, match=r"imdb\.mat: not a Matlab file"):
        list_faces(tmp_path)
    (tmp_path / "other").mkdir()
    savemat(tmp_path / "other" / "imdb.mat", {"imdb": {"dob": [1.0], "gender": [1.0]}})
    with pytest.raises(ValueError, match="imdb has no field photo_taken, face_score"):
        list_faces(tmp_path / "other")


def write_authors(root, people, train, test) -> None:
    np.save(root / "imdb_age_gender.npy", people, allow_pickle=True)
    np.save(root / "imdb_split.npy", {"train_list": train, "test_list": test}, allow_pickle=True)


def test_the_authors_files(tmp_path):
    people = {
        b"01/girl.jpg": {"age": 12, "gender": 0},
        b"01/man.jpg": {"age": 40, "gender": 1},
        b"02/boy.jpg": {"age": 29, "gender": 1},
        b"02/woman.jpg": {"age": 40, "gender": 0},
        b"03/old.jpg": {"age": 70, "gender": 0},
    }
    train = ["01/girl.jpg", "01/man.jpg", "02/boy.jpg", "02/woman.jpg"]
    write_authors(tmp_path, people, train, ["03/old.jpg"])
    names = {s: [p.name for p in select_faces(tmp_path, s).paths] for s in ("EB1", "EB2", "test")}
    assert names == {
        "EB1": ["girl.jpg", "man.jpg"],
        "EB2": ["boy.jpg", "woman.jpg"],
        "test": ["old.jpg"],
    }


def test_the_authors_files_must_belong_together(tmp_path):
    write_authors(tmp_path, {b"a.jpg": {"age": 12, "gender": 0}}, ["a.jpg", "b.jpg"], [])
    with pytest.raises(ValueError, match=r"1 names of imdb_split\.npy are not in it, .*'b\.jpg'"):
        list_faces(tmp_path)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("name", ["imdb_age_gender.npy", "imdb_split.npy"])
def test_code_in_the_authors_files_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_authors(tmp_path, {b"a.jpg": {"age": 12, "gender": 0}}, ["a.jpg"], [])
    np.save(tmp_path / name, np.array(Malicious(), dtype=object), allow_pickle=True)
    assert b"touch executed" in (tmp_path / name).read_bytes()
    with pytest.raises(UnsafePickleError, match=name):
        list_faces(tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Malicious()))  # what would have happened
    assert (tmp_path / "executed").exists()


def test_utkface_counts_genders_the_other_way_and_names_the_malformed(tmp_path):
    names = [
        "30_0_2_20170116174525125.jpg.chip.jpg",
        "8_1_0_20170109203412328.jpg",
        "39_1_20170116174525125.jpg.chip.jpg",  # without the race, as three of UTKFace are
        "61_3_20170109142408075.jpg.chip.jpg",
        "a_1_0_20170109142408075.jpg",
        "200_1_0_20170109142408075.jpg",
    ]
    for name in names:
        write_image(tmp_path / name, 0)
    (tmp_path / "readme.txt").touch()
    with pytest.warns(UserWarning, match="4 of 6 names") as caught:
        faces = list_faces(tmp_path)
    assert [path.name for path in faces.paths] == names[:2]
    assert faces.age.tolist() == [30, 8]
    assert faces.gender.tolist() == [MALE, FEMALE]
    for name in names[2:]:
        assert name in str(caught[0].message)


def test_splits_share_no_face_and_repeat(tmp_path):
    write_utkface(tmp_path, 8)
    splits = {name: select_faces(tmp_path, name) for name in ("EB1", "EB2", "test")}
    assert len(splits["test"].paths) == 16  # a fifth of 80
    paths = [path for faces in splits.values() for path in faces.paths]
    assert len(set(paths)) == len(paths)
    for name, young in (("EB1", FEMALE), ("EB2", MALE)):
        faces = splits[name]
        assert set(faces.age.tolist()) == {5, 25, 45, 70}
        assert ((faces.age < 30) == (faces.gender == young)).all()
    assert select_faces(tmp_path, "test").paths == splits["test"].paths
    assert select_faces(tmp_path, "test", seed=1).paths != splits["test"].paths


def test_ages():
    age = torch.tensor([0, 19, 20, 29, 30, 39, 40, 69, 70, 120, 121])
    assert age_bins(age).tolist() == [0, 0, 1, 2, 3, 4, 5, 10, 11, 11, -100]
    assert binary_age(age).tolist() == [0, 0, 0, 0, -100, -100, 1, 1, 1, 1, 1]


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_faces(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds none of imdb_age_gender\.npy, imdb\.mat"):
        list_faces(tmp_path)
    with pytest.raises(ValueError, match="split is 'train', expected one of EB1, EB2, test"):
        select_faces(tmp_path, "train")
