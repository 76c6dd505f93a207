"""A user's CSV file: what is read, and what each mistake is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lnl_ext.data.split import stratified_split
from lnl_ext.data.table import (
    BiasColumn,
    Table,
    class_names,
    encode,
    read_folder,
    read_table,
)
from lnl_ext.errors import UserError
from lnl_ext.ops.types import IGNORE_INDEX

AGE = BiasColumn.parse("age:bins=0,20,40,60")
HOSPITAL = BiasColumn.parse("hospital")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a CSV file, and an empty file for every name it may mention."""
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).touch()

    def write(*lines: str, encoding: str = "utf-8") -> Path:
        path = tmp_path / "data.csv"
        path.write_text("\n".join(lines) + "\n", encoding=encoding)
        return path

    return write


def read(path: Path, **changes: object) -> Table:
    """Read with the columns that the tests write."""
    options = {"image_column": "path", "label_column": "disease", "bias_columns": [HOSPITAL, AGE]}
    return read_table(path, **(options | changes))  # type: ignore[arg-type]


def test_reads_labels_categories_bins_and_missing_values(write: Callable[..., Path]) -> None:
    path = write(
        "path,disease,hospital,age",
        "a.jpg,yes,North,19",
        'b.jpg,no,"South, east",20',
        "c.jpg,yes,NaN,",
        encoding="utf-8-sig",
    )
    table = read(path)
    assert table.paths == tuple(path.parent / name for name in ("a.jpg", "b.jpg", "c.jpg"))
    assert table.labels == ("yes", "no", "yes")
    assert table.bias == {
        "hospital": ("North", "South, east", None),
        "age": ("[0, 20)", "[20, 40)", None),
    }
    hospitals = class_names(table.bias["hospital"], HOSPITAL)
    expected = [0, 1, IGNORE_INDEX]
    assert encode(table, table.bias["hospital"], hospitals, "hospital").tolist() == expected
    # A bin without a sample is a class all the same.
    assert class_names(table.bias["age"], AGE) == ["[0, 20)", "[20, 40)", "[40, 60]"]
    assert encode(table, table.bias["age"], AGE.bins, "age").tolist() == expected


def test_paths_may_be_absolute_or_start_elsewhere(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    inner = tmp_path / "images"
    inner.mkdir()
    (inner / "d.jpg").touch()
    path = write("path,disease", f"{tmp_path}/a.jpg,1", "d.jpg,0")
    table = read(path, bias_columns=[], root=inner)
    assert table.paths == (tmp_path / "a.jpg", inner / "d.jpg")


def test_classes_that_are_numbers_are_in_order_of_size() -> None:
    assert class_names(["10", "9", None, "9"], "grade") == ["9", "10"]
    assert class_names(["10", "9", "x"], "grade") == ["10", "9", "x"]


@pytest.mark.parametrize("value", ["0", "19.5", "20", "59.9", "60"])
def test_every_bin_has_its_lower_edge_and_the_last_one_both(value: str) -> None:
    name = AGE.value(value)
    assert name == AGE.bins[min(int(float(value) // 20), 2)]


@pytest.mark.parametrize(
    ("edges", "names"),
    [
        (
            "20230101,20230103,20230106,20230110",
            ["[20230101, 20230103)", "[20230103, 20230106)", "[20230106, 20230110]"],
        ),
        ("0.1,0.1000001,1e22,inf", ["[0.1, 0.1000001)", "[0.1000001, 1e+22)", "[1e+22, inf]"]),
        ("-0.5,0,1.0", ["[-0.5, 0)", "[0, 1]"]),
    ],
)
def test_bins_are_named_exactly(edges: str, names: list[str]) -> None:
    column = BiasColumn.parse(f"date:bins={edges}")
    assert column.bins == names
    lower = edges.split(",")[:-1]
    assert [column.value(edge) for edge in lower] == names
    with pytest.raises(ValueError, match=f"from {names[0][1:].split(',')[0]} to "):
        column.value("-1")


@pytest.mark.parametrize("text", ["age:bins=", "age:bins=1", "age:bins=3,2", "age:bins=1,x"])
def test_bins_must_be_rising_numbers(text: str) -> None:
    with pytest.raises(UserError, match="two or more rising edges"):
        BiasColumn.parse(text)


HEADER = "path,disease,hospital,age"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty, expected a header line"),
        ([HEADER], "has a header and no row"),
        (["path,disease,age", "a.jpg,1,2"], "has no column 'hospital'; it has 'path', 'disease'"),
        (["path;disease;age", "a.jpg;1;2"], "has no column 'hospital'; it has 'path', 'disease'"),
        ([HEADER, "a.jpg,None,N,3"], r"column 'disease': no label in line 2 \('None'\)"),
        (["sep=;", HEADER.replace(",", ";"), "a.jpg;1;N;old"], "line 3 has 'old'"),
        ([HEADER + ",age", "a.jpg,1,N,3,4"], "has 2 columns called 'age'"),
        ([HEADER, "a.jpg,1,N"], "line 2: 3 cells, expected 4"),
        ([HEADER, "a.jpg,1,N,3", "b.jpg,,N,3"], "column 'disease': no label in line 3"),
        ([HEADER, ",1,N,3"], "column 'path': no path of an image in line 2"),
        ([HEADER, "a.jpg,1,N,old"], "column 'age': line 2 has 'old', expected a number"),
        ([HEADER, "a.jpg,1,N,61"], "line 2 has '61', expected a number from 0 to 60"),
        ([HEADER, "a.jpg,1,N,", "b.jpg,0,S,NA"], "column 'age': every value is missing"),
        ([HEADER, "a.jpg,1,N,3", "./a.jpg,1,N,3"], r"may come once: .*a\.jpg in lines 2 and 3"),
        ([HEADER, "a.jpg,1,N,3", "x.jpg,1,N,3"], r"1 of 2 images are not there \(line 3: .*x.jpg"),
    ],
)
def test_what_cannot_be_used_is_named(
    write: Callable[..., Path], lines: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(write(*lines) if lines else _emptied(write()))


def _emptied(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"path,disease,hospital,age\n\xff\xfe,1,2,3\n")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read(path)
    with pytest.raises(UserError, match="no CSV file at"):
        read(tmp_path / "none.csv")


# What is one value, and what is none


@pytest.mark.parametrize(
    ("cells", "read_as", "note"),
    [
        (["1", "1.0", "2"], ["1", "1", "2"], "'1' and '1.0' are one class, '1'"),
        (["1.0", "01", "1e0"], ["01", "01", "01"], "'01', '1.0' and '1e0' are one class, '01'"),
        (["True", "true", "FALSE"], ["True", "True", "FALSE"], "'True' and 'true' are one class"),
        (["1", "1.0", "x"], ["1", "1.0", "x"], None),  # text, as one cell is
        (["12345678901234567890", "12345678901234567891", "7"], None, None),
        (
            ["inf", "Infinity", "1"],
            ["inf", "inf", "1"],
            "'Infinity' and 'inf' are one class, 'inf'",
        ),
        (["0.1", "0.10", "-0"], ["0.1", "0.1", "-0"], "'0.1' and '0.10' are one class"),
        (["True", "1", "1.0"], ["True", "1", "1.0"], None),
        (["3e99", "3e99999999999999999999", "1"], None, None),
        (["None", "#N/A", "x"], [None, None, "x"], "'#N/A' (1) and 'None' (1) are missing"),
        (["<NA>", "-nan", "NULL"], [None, None, None], None),
        (["none", "na", "x"], None, "'na' and 'none' are classes, not missing"),
        (["", "N/A", "x"], [None, None, "x"], "'N/A' (1) is missing"),
    ],
)
def test_cells_are_one_value_or_none_as_pandas_has_it(
    write: Callable[..., Path], cells: list[str], read_as: list[str | None] | None, note: str | None
) -> None:
    rows = [f"{name}.jpg,{cell}" for name, cell in zip("abc", cells, strict=True)]
    path = write("path,hospital", *rows)
    if read_as == [None] * 3:
        with pytest.raises(UserError, match="every value is missing"):
            read(path, label_column=None, bias_columns=[HOSPITAL])
        return
    table = read(path, label_column=None, bias_columns=[HOSPITAL])
    assert list(table.bias["hospital"]) == (read_as or cells)
    assert bool(table.notes) == bool(note)
    assert (note or "") in "\n".join(table.notes)
    if None in table.bias["hospital"]:
        return
    labels = read(path, label_column="hospital", bias_columns=[])
    assert list(labels.labels or ()) == (read_as or cells)
    assert labels.notes == table.notes


def test_values_of_another_table_are_compared_as_numbers(write: Callable[..., Path]) -> None:
    table = read(write("path,disease", "a.jpg,1.0", "b.jpg,0"), bias_columns=[])
    assert table.labels is not None
    assert encode(table, table.labels, ["0", "1"], "disease").tolist() == [1, 0]
    with pytest.raises(UserError, match=r"does not know \(.*line 2: '1.0'\)"):
        encode(table, table.labels, ["0", "one"], "disease")
    table = read(write("path,disease", "a.jpg,1.0", "b.jpg,x"), bias_columns=[])
    assert table.labels is not None
    with pytest.raises(UserError, match=r"does not know \(.*line 3: 'x'\)"):
        encode(table, table.labels, ["0", "1"], "disease")


def test_a_file_that_a_program_wrote_is_read_as_it_is(write: Callable[..., Path]) -> None:
    path = write("path,disease", "a.jpg,1", "b.jpg,1.0", "c.jpg,None")
    table = read(path, bias_columns=[], exact=True)
    assert (table.labels, table.notes) == (("1", "1.0", "None"), ())


@pytest.mark.parametrize("first", [[], ["sep={}"], ['"sep={}"'], ["SEP={}\r"]])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_byte_order_marks_of_spreadsheets_are_understood(
    write: Callable[..., Path], first: list[str], separator: str, encoding: str
) -> None:
    lines = ["path,disease,hospital,age", "a.jpg,yes,N,19", "b.jpg,no,S,20"]
    lines = [line.replace(",", separator) for line in lines]
    path = write(*(line.format(separator) for line in first), *lines, encoding=encoding)
    table = read(path)
    assert table.labels == ("yes", "no")
    assert table.bias == {"hospital": ("N", "S"), "age": ("[0, 20)", "[20, 40)")}
    assert table.lines == ((2, 3) if not first else (3, 4))
    assert any(f"separated by {separator!r}" in note for note in table.notes) == (separator != ",")


def test_a_column_serves_one_purpose(write: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="column 'disease' is named for two purposes"):
        read(write(HEADER, "a.jpg,1,N,3"), bias_columns=[BiasColumn("disease")])


def test_many_numbers_ask_for_bins() -> None:
    with pytest.raises(UserError, match=r"1001 different values.*age:bins="):
        class_names([str(n) for n in range(1001)], BiasColumn("age"))


def test_an_unknown_value_is_an_error(write: Callable[..., Path]) -> None:
    table = read(write(HEADER, "a.jpg,1,North,3", "b.jpg,1,West,3"))
    values = table.bias["hospital"]
    with pytest.raises(UserError, match=r"data.csv, line 3: 'West'\); it knows 'North'"):
        encode(table, values, ["North"], "hospital")


def test_split_column(write: Callable[..., Path]) -> None:
    lines = ["path,disease,part", "a.jpg,1,train", "b.jpg,0,Val", "c.jpg,0,test"]
    table = read(write(*lines), bias_columns=[], split_column="part")
    assert table.split == ("train", "validation", "test")
    with pytest.raises(UserError, match="line 3 has 'fold2', expected train, validation or test"):
        read(write(*lines[:2], "b.jpg,0,fold2"), bias_columns=[], split_column="part")


# A folder of classes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_folder_names_are_labels_and_bias_comes_from_the_csv(
    write: Callable[..., Path], folder: Path
) -> None:
    path = write("path,hospital", "dog/1.jpg,N", f"{folder}/cat/2.jpg,S")
    table = read_folder(folder, csv_file=path, bias_columns=[HOSPITAL])
    assert table.names == ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg")
    assert table.labels == ("cat", "cat", "dog")
    assert table.bias == {"hospital": (None, "S", "N")}
    assert table.lines == (0, 3, 2)


def test_mistakes_with_a_folder_are_named(write: Callable[..., Path], folder: Path) -> None:
    with pytest.raises(UserError, match="is not an image in a class of"):
        read_folder(folder, csv_file=write("path,hospital", "../a.jpg,N"), bias_columns=[HOSPITAL])
    with pytest.raises(UserError, match="need a CSV file"):
        read_folder(folder, bias_columns=[HOSPITAL])
    with pytest.raises(UserError, match="no image in its subfolders"):
        read_folder(folder / "cat")
    with pytest.raises(UserError, match="no such folder"):
        read_folder(folder / "bird")
    for image in folder.glob("*/*.jpg"):
        image.unlink()
    with pytest.raises(UserError, match="no image in its subfolders"):
        read_folder(folder)


def test_hidden_files_are_no_data(write: Callable[..., Path], folder: Path) -> None:
    hidden = [
        ".ipynb_checkpoints/1-checkpoint.jpg",
        ".Trash-1000/files/1.jpg",
        "__MACOSX/cat/._1.jpg",
        "@eaDir/1.jpg",
        "cat/._1.jpg",
        "cat/.ipynb_checkpoints/1-checkpoint.jpg",
        "dog/.DS_Store",
        "dog/Thumbs.db",
    ]
    plain = read_folder(folder)
    assert plain.notes == ()
    for name in [*hidden, "dog/notes.txt"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"Mac OS X")
    table = read_folder(folder)
    assert (table.names, table.labels) == (plain.names, plain.labels)
    assert "Left out: 8 hidden files (.DS_Store, .Trash-1000, ._1.jpg, " in table.notes[0]
    assert "Left out: 1 file without an image extension" in table.notes[1]
    # A table of all files that a program has listed.
    path = write("path,hospital", "cat/1.jpg,N", f"{hidden[0]},N", f"{hidden[4]},S", "dog/1.jpg,S")
    table = read_folder(folder, csv_file=path, bias_columns=[HOSPITAL])
    assert table.bias == {"hospital": ("N", None, "S")}
    assert any("2 lines of hidden files" in note for note in table.notes)
    for name in plain.names:
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"no image in its subfolders.*8 hidden files"):
        read_folder(folder)


def test_a_folder_of_images_may_itself_be_hidden(folder: Path) -> None:
    moved = folder.with_name(".cache")
    folder.rename(moved)
    assert len(read_folder(moved)) == 3


# The held-out part


def test_split_is_stratified_seeded_and_complete() -> None:
    labels = ["a"] * 400 + ["b"] * 100
    bias = (["x"] * 360 + ["y"] * 40) + (["x"] * 10 + ["y"] * 90)
    train, held = stratified_split(labels, [bias], 0.2, seed=0)
    assert sorted(train + held) == list(range(500))
    assert (train, held) == stratified_split(labels, [bias], 0.2, seed=0)
    assert held != stratified_split(labels, [bias], 0.2, seed=1)[1]
    for label, value, size in [("a", "x", 72), ("a", "y", 8), ("b", "x", 2), ("b", "y", 18)]:
        inside = [row for row in held if (labels[row], bias[row]) == (label, value)]
        assert abs(len(inside) - size) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_small_groups_are_in_both_parts_and_single_samples_in_training(seed: int) -> None:
    labels = ["a"] * 40 + ["b"] * 4 + ["c"] + ["d"] * 3
    bias = ["x"] * 38 + ["y"] * 2 + ["x"] * 2 + ["y"] * 2 + ["x"] + ["x", "y", "z"]
    train, held = stratified_split(labels, [bias], 0.1, seed)

    def kinds(rows: list[int]) -> set[tuple[str, str]]:
        return {(labels[row], bias[row]) for row in rows}

    groups = {("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")}
    assert groups <= kinds(train)
    assert groups <= kinds(held)
    assert ("c", "x") in kinds(train)
    # No group of d can be in both parts, but the label can.
    assert {labels[row] for row in held} == {"a", "b", "d"}
    assert "d" in {labels[row] for row in train}


def test_a_missing_value_is_not_its_name() -> None:
    labels = ["a"] * 4
    for seed in range(20):
        train, held = stratified_split(labels, [["None", "None", None, None]], 0.5, seed)
        assert len({0, 1} & set(train)) == len({2, 3} & set(held)) == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_the_fraction_is_checked(fraction: float) -> None:
    with pytest.raises(UserError, match="expected a fraction between 0 and 1"):
        stratified_split(["a", "a"], [], fraction, 0)
    with pytest.raises(UserError, match="cannot be split"):
        stratified_split(["a", "b"], [], 0.1, 0)
