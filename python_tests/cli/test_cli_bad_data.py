"""What ``lnl`` does with data as it comes: odd, damaged, hostile, or not what was meant."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_data import IMAGES, SIZE, train_flags, write_images
from PIL import Image

from lnl_ext.cli.main import main

pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("bad_data") / "images")


@pytest.fixture(scope="module")
def run(table: Path) -> Path:
    """A finished run, in bfloat16."""
    output = table.parent.parent / "run"
    assert main(train_flags(table, output, "--amp=bfloat16", "--warm-up=0")) == 0
    return output


def changed(table: Path, **columns: list[str]) -> Path:
    """Write the table with other columns, beside the first one."""
    rows = list(csv.DictReader(table.open()))
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    path = table.with_name("changed.csv")
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type[Path.touch], tuple[Path]]:  # type: ignore[valid-type]
        return Path.touch, (self.path,)


# ------------------------------------------------------------------ images


def test_images_of_every_kind_are_predicted(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    image.save(folder / "plain.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(values[..., 0].astype(np.uint16) * 257).save(folder / "16bit.png")
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(180)])
    # Stored on its side, with the note to turn it back: the same picture as plain.png.
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    names = sorted(path.name for path in folder.iterdir())
    listed, output = folder / "data.csv", tmp_path / "predictions.csv"
    listed.write_text("\n".join(["path", *names]) + "\n")
    command = ["predict", f"{run}", f"--csv={listed}", f"--output={output}", "--workers=0"]
    assert main([*command, "--batch-size=2"]) == 0
    rows = {row.pop("path"): row for row in csv.DictReader(output.open())}
    assert sorted(rows) == names
    assert len(rows) == 5
    ill = {name: float(row["probability:ill"]) for name, row in rows.items()}
    assert all(0 <= value <= 1 for value in ill.values())
    assert ill["turned.png"] == pytest.approx(ill["plain.png"], abs=2e-5)  # of other batches


def _chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def test_a_bomb_and_damaged_images_are_named(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(csv.DictReader(table.open()))
    whole = (table.parent / rows[3]["path"]).read_bytes()
    bomb = b"\x89PNG\r\n\x1a\n"
    bomb += _chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb += _chunk(b"IDAT", b"") + _chunk(b"IEND", b"")
    bad = {
        "bomb.png": (bomb, "Image size (3600000000 pixels) exceeds limit"),
        "empty.jpg": (b"", "the file is empty"),
        "cut.jpg": (whole[:-60], "image file is truncated"),
        "text.jpg": (b"no image", "not an image in a format that Pillow knows"),
        "code.npy.jpg": (
            pickle.dumps(_Touch(tmp_path / "executed")),
            "not an image in a format that Pillow knows",
        ),
    }
    folder = tmp_path / "bad"
    folder.mkdir()
    names = [row["path"] for row in rows]
    for number, (name, (content, _)) in enumerate(bad.items()):
        (folder / name).write_bytes(content)
        names[number] = str(folder / name)
    assert main(train_flags(changed(table, path=names), tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert f"{len(bad)} of {IMAGES} images cannot be read" in error
    for name, (_, reason) in bad.items():
        assert f"{folder / name}: {reason}" in error
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["npy", "pt"])
def test_code_in_weights_is_refused_and_not_run(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    code = _Touch(tmp_path / "executed")
    path = tmp_path / f"weights.{kind}"
    if kind == "npy":
        np.save(path, np.array([code], dtype=object), allow_pickle=True)
    else:
        torch.save({"weight": code}, path)
    assert main(train_flags(table, tmp_path / "run", f"--weights={path}")) == 2
    error = capsys.readouterr().err
    assert f"{path} cannot be loaded as a state_dict" in error
    assert "weights_only" not in error  # no advice to run it
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------ labels and bias


def test_a_bias_class_that_training_lacks_and_empty_groups_are_told(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(csv.DictReader(table.open()))
    part = ["validation" if number >= 32 else "train" for number in range(IMAGES)]
    # West is in validation only, and there with one label.
    sites = [row["hospital"] for row in rows]
    for number in range(32, IMAGES):
        if rows[number]["disease"] == "ill":
            sites[number] = "west"
    path = changed(table, hospital=sites, fold=part)
    more = ["--split-column=fold", "--epochs=0.5", "--warm-up=0"]
    assert main(train_flags(path, tmp_path / "run", *more)) == 0
    text = capsys.readouterr().out
    assert "Note: no training image has hospital 'west'; the heads cannot learn it" in text
    assert "groups without an image: 3" in text  # west and healthy, and ill in both others
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    groups = {(g["label"], g["bias"]) for g in report["bias"]["hospital"]["groups"]}
    assert groups == {("healthy", "north"), ("healthy", "south"), ("ill", "west")}


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("disease", ["ill"] * IMAGES, "only label 'ill' occurs, expected two or more"),
        ("disease", [str(n / 7) for n in range(IMAGES)], "48 different labels of as many images"),
        ("path", ["x" * 300 + ".jpg"] * IMAGES, "an image may come once"),
        ("path", [f"{n:0300}.jpg" for n in range(IMAGES)], "48 of 48 images are not there"),
        ("disease", ["", *["ill", "healthy"] * 23, "ill"], "column 'disease': no label in line 2"),
        ("age", [""] * IMAGES, "column 'age': every value is missing"),
        ("hospital", ["nan"] * IMAGES, "column 'hospital': every value is missing"),
        ("hospital", ["north"] * IMAGES, "only 'north' occurs, expected two bias classes"),
        ("age", ["old"] * IMAGES, "line 2 has 'old', expected a number"),
        ("age", ["-1"] * IMAGES, "line 2 has '-1', expected a number from 0 to 60: widen"),
    ],
)
def test_labels_and_bias_that_cannot_be_used_are_named(
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    column: str,
    values: list[str],
    message: str,
) -> None:
    path = changed(table, **{column: values})
    assert main(train_flags(path, tmp_path / "run")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nan_bias_is_missing(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(csv.DictReader(table.open()))
    ages = ["NaN" if number % 3 else row["age"] for number, row in enumerate(rows)]
    missing = sum(age in ("NaN", "") for age in ages)
    more = ["--epochs=0.5", "--warm-up=0"]
    assert main(train_flags(changed(table, age=ages), tmp_path / "run", *more)) == 0
    assert f"missing {missing}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["numbers", "names in other letters"])
def test_labels_of_any_text_in_folders_of_any_name(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """From another folder than that of the images, with a relative path."""
    folder = tmp_path / "mit Leerzeichen und 写真"
    shutil.copytree(table.parent, folder)
    labels = {"numbers": ("0", "1.5"), "names in other letters": ("gesund ü", "病")}[kind]
    rows = list(csv.DictReader(table.open()))
    values = [labels[row["disease"] == "ill"] for row in rows]
    listed = changed(folder / table.name, disease=values)
    monkeypatch.chdir(tmp_path)
    more = ["--epochs=0.2", "--warm-up=0"]
    assert main(train_flags(listed.relative_to(tmp_path), Path("läuft hier"), *more)) == 0
    monkeypatch.chdir("/")
    run, output = tmp_path / "läuft hier", tmp_path / "vorher gesagt.csv"
    images = ["--workers=0", f"--images={folder}", f"--output={output}"]
    assert main(["predict", f"{run}", *images]) == 0
    assert {row["prediction"] for row in csv.DictReader(output.open())} <= set(labels)
    assert json.loads((run / "model.json").read_text())["classes"] == list(labels)


def test_spreadsheets_and_other_spellings_are_read_and_told(
    table: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(csv.DictReader(table.open()))
    labels = [
        ("0", "1.0" if n % 4 == 1 else "1")[r["disease"] == "ill"] for n, r in enumerate(rows)
    ]
    sites = ["#N/A" if n == 3 else row["hospital"] for n, row in enumerate(rows)]
    path = changed(table, disease=labels, hospital=sites)
    path.write_text("sep=;\n" + path.read_text().replace(",", ";"), encoding="utf-8-sig")
    more = ["--epochs=0.2", "--warm-up=0"]
    assert main(train_flags(path, tmp_path / "run", *more)) == 0
    text = capsys.readouterr().out
    assert f"Note: {path} is separated by ';'" in text
    assert f"Note: {path}, column 'disease': '1' and '1.0' are one class, '1'" in text
    assert f"Note: {path}, column 'hospital': '#N/A' (1) is missing" in text
    assert "labels: 0 24, 1 24" in text
    assert "; missing 1\n" in text
    assert json.loads((tmp_path / "run" / "model.json").read_text())["classes"] == ["0", "1"]
    # The same labels, all of them with a point.
    other = changed(table, disease=[f"{float(label)}" for label in labels])
    assert main(["evaluate", f"{tmp_path}/run", f"--csv={other}", "--workers=0"]) == 0
    assert "does not know" not in capsys.readouterr().err


def test_hidden_files_are_left_out_and_counted_by_every_command(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "images", tmp_path / "run"
    lines = ["path,hospital"]
    for row in csv.DictReader(table.open()):
        target = folder / row["disease"] / row["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(table.parent / row["path"], target)
        lines.append(f"{row['disease']}/{row['path']},{row['hospital']}")
    for name in (".ipynb_checkpoints/00.jpg", "__MACOSX/ill/._01.jpg", ".Trash-1000/00.jpg"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(table.parent / "00.jpg", folder / name)
    for row in csv.DictReader(table.open()):
        (folder / row["disease"] / f"._{row['path']}").write_bytes(b"Mac OS X")
    listed = tmp_path / "bias.csv"
    listed.write_text("\n".join(lines) + "\n")
    images, one = [f"--images={folder}", "--workers=0"], "--bias-column=hospital"
    small = ["--arch=small", f"--image-size={SIZE}", "--epochs=0.2", "--warm-up=0"]
    train = ["train", *images, f"--csv={listed}", one, f"--output={output}", *small]
    others = [*images, f"--csv={listed}", "--weights", f"{output}/model.pt", *small[:2], one]
    for command in (
        train,
        ["evaluate", *others],
        ["probe", *others],
        ["predict", f"{output}", *images, f"--output={tmp_path}/predictions.csv"],
    ):
        assert main(command) == 0
        text = capsys.readouterr().out
        assert f"Left out: {IMAGES + 3} hidden files (.Trash-1000, ._00.jpg, " in text
    assert json.loads((output / "model.json").read_text())["classes"] == ["healthy", "ill"]
    assert len((output / "split.csv").read_text().splitlines()) == 1 + IMAGES
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + IMAGES


# ------------------------------------------------------------------ places and numbers


def test_predict_takes_images_of_every_suffix_and_counts_what_it_leaves_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "images", tmp_path / "predictions.csv"
    command = ["predict", f"{run}", f"--images={folder}", f"--output={output}", "--workers=0"]
    assert main(command) == 2
    assert f"images {folder}: no such folder" in capsys.readouterr().err
    folder.mkdir()
    (folder / "notes.txt").touch()
    assert main(command) == 2
    assert f"images {folder}: no image file in this folder" in capsys.readouterr().err
    picture = Image.new("RGB", (SIZE, SIZE), "red")
    picture.save(folder / "moves.GIF", save_all=True, append_images=[picture.rotate(90)])
    picture.save(folder / "still.jpeg")
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    assert main(command) == 0
    assert "Left out: 1 file without an image extension" in capsys.readouterr().out
    names = [row["path"] for row in csv.DictReader(output.open())]
    assert names == ["moves.GIF", "still.jpeg", "tiny.png"]


@pytest.mark.parametrize("output", ["file", "file/run", "/proc/run"])
def test_an_output_that_cannot_be_a_folder_is_one_line(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    (tmp_path / "file").touch()
    assert main(train_flags(table, tmp_path / output)) == 2
    error = capsys.readouterr().err
    assert "lnl: error: cannot read or write: [Errno" in error
    assert str(tmp_path / output) in error


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--epochs=inf", "epochs is inf, expected a finite number"),
        ("--reversal=inf", "reversal is inf, expected a finite number"),
        ("--learning-rate=nan", "learning-rate is nan, expected more than 0"),
        ("--seed=4294967296", "seed is 4294967296, expected at most 4294967295"),
        ("--method=blindeye --update=two_step", "method blindeye has a confusion loss"),
        ("--bias-column=label", "bias-column is 'label', which is the task's name in the results"),
    ],
)
def test_numbers_out_of_range_are_named(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, message: str
) -> None:
    assert main(train_flags(table, tmp_path / "run", *flag.split())) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_no_model_is_named(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.pt2").write_text("no program")
    grey = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SIZE * SIZE, 2))
    program = torch.export.export(grey, (torch.zeros(2, 1, SIZE, SIZE),))
    torch.export.save(program, tmp_path / "grey.pt2")
    images = [f"--csv={table}", "--bias-column=hospital"]
    for command, message in [
        (["evaluate", f"{table}"], f"{table} is not a run folder"),
        (["probe", f"--weights={tmp_path}/text.pt2", *images], "is not a torch.export program"),
        (
            ["probe", f"--weights={tmp_path}/grey.pt2", *images],
            f"takes inputs of shapes [(2, 1, {SIZE}, {SIZE})], expected (N, 3, H, W)",
        ),
    ]:
        assert main(command) == 2
        errors = capsys.readouterr().err.splitlines()
        assert message in errors[-1]
        assert len(errors) == 1
