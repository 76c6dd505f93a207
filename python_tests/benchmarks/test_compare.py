"""The comparison of ways: its data sets, its runs, its table and its figure."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path

import compare
import numpy as np
import pytest
import torch
from comparison import data_sets, figure, protocol, runs, ways
from comparison.erasure import LinearErasure, refitted
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor

FIELDS = {
    *("data", "alignment", "method", "seed", "accuracy", "worst_group", "conflicting", "nats"),
    *("nats_low", "nats_high", "probe_accuracy", "chance", "steps", "minutes"),
}


def biased_table(samples: int, seed: int, agreement: float) -> data_sets.Part:
    """Make rows of which one column is the label, another the bias, both with noise."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (samples,), generator=draw)
    agrees = torch.rand(samples, generator=draw) < agreement
    bias = torch.where(agrees, labels, 1 - labels)
    noise = torch.randn(samples, 6, generator=draw)
    signal = torch.stack([2.0 * labels, 4.0 * bias], 1)
    return data_sets.Part(noise + torch.cat([signal, signal * 0, signal * 0], 1), labels, bias)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> data_sets.Data:
    """Make the data set "adult" one of a few rows, trained for a moment."""
    data = data_sets.Data(
        "adult", biased_table(256, 0, 0.9), biased_table(160, 1, 0.5), biased_table(160, 2, 0.5)
    )
    monkeypatch.setitem(data_sets.READERS, "adult", lambda file: data)
    monkeypatch.setitem(protocol.DATA_SETS, "adult", protocol.Length(epochs=2, batch_size=32))
    ways.train_by_trainer.cache_clear()
    return data


def command(folder: Path, *more: str) -> list[str]:
    files = [f"--results={folder / 'compare.jsonl'}", f"--figure={folder / 'figure.png'}"]
    return ["--data", "adult", "--no-progress", "--threads=1", *files, *more]


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "compare.jsonl").read_text().splitlines()]


def test_a_finished_run_is_not_repeated(
    small: data_sets.Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.main(command(tmp_path, "--methods", "erm", "--seeds", "0"))
    first = lines(tmp_path)
    compare.main(command(tmp_path, "--methods", "erm", "erasure", "--seeds", "0", "1"))
    found = lines(tmp_path)
    assert found[:1] == first
    assert [(run["method"], run["seed"]) for run in found] == [
        *(("erm", 0), ("erasure", 0), ("erm", 1), ("erasure", 1))
    ]
    capsys.readouterr()
    compare.main(command(tmp_path, "--methods", "erm", "erasure", "--seeds", "0", "1"))
    assert lines(tmp_path) == found
    table = capsys.readouterr().out
    for way in ("erm", "erasure"):
        accuracies = [run["accuracy"] for run in found if run["method"] == way]
        assert f"| {way} | 2 | {np.mean(accuracies):.3f} |" in table  # type: ignore[arg-type]
    with Image.open(tmp_path / "figure.png") as drawn:
        assert drawn.width > 300
        assert drawn.height > 300


def test_every_way_has_a_marker_of_its_own() -> None:
    assert len(set(figure._MARKERS)) >= len(protocol.WAYS)


@pytest.mark.parametrize("way", [way for way in protocol.WAYS if way != "fairlearn"])
def test_every_way_gives_a_whole_line_after_as_many_steps(
    small: data_sets.Data, way: str, tmp_path: Path
) -> None:
    compare.main(command(tmp_path, "--methods", way, "--seeds", "3"))
    (run,) = lines(tmp_path)
    assert run.keys() >= FIELDS
    assert None not in run.values()
    assert (run["data"], run["method"], run["seed"]) == ("adult", way, 3)
    assert run["steps"] == 2 * 256 // 32
    assert run["alignment"] == round(small.train.aligned.double().mean().item(), 4)
    assert run["nats_low"] <= run["nats"] <= run["nats_high"]  # type: ignore[operator]


def test_fairlearn_trains_the_same_network(small: data_sets.Data) -> None:
    pytest.importorskip("fairlearn")
    run = runs.measure(small, "fairlearn", 0, progress=False)
    assert run.steps == 2 * 256 // 32
    assert run.accuracy > 0.6


def test_the_bias_is_found_where_it_is_and_only_there(small: data_sets.Data) -> None:
    run = runs.measure(small, "erm", 0, progress=False)
    assert run.nats_low > 0.1
    assert run.p_value < 0.05
    assert run.chance <= 0.6
    shuffled = torch.randperm(len(small.test), generator=torch.Generator().manual_seed(1))
    test = data_sets.Part(small.test.inputs, small.test.labels, small.test.bias[shuffled])
    nothing = data_sets.Data("adult", small.train, small.validation, test)
    assert runs.measure(nothing, "erm", 0, progress=False).nats < 0.05


def test_to_choose_does_not_look_at_the_test_part(
    small: data_sets.Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = data_sets.Part(small.test.inputs * torch.nan, small.test.labels, small.test.bias)
    data = data_sets.Data("adult", small.train, small.validation, broken)
    monkeypatch.setitem(data_sets.READERS, "adult", lambda file: data)
    compare.main(command(tmp_path, "--methods", "erm", "--seeds", "0", "--choose"))
    assert "| erm | 1 |" in capsys.readouterr().out
    assert not (tmp_path / "compare.jsonl").exists()


def test_a_set_without_its_file_is_left_out_and_named(
    small: data_sets.Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--data", "faces", "adult", "--methods", "erm", "--seeds", "0"]
    compare.main([*command(tmp_path), *sets])
    assert "faces is left out" in capsys.readouterr().err
    assert [run["data"] for run in lines(tmp_path)] == ["adult"]


# ------------------------------------------------------------------ data


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def picture(number: int) -> bytes:
    """Encode an image that no other number has."""
    stream = io.BytesIO()
    pixels = np.zeros((96, 96, 3), np.uint8)
    pixels[...] = (number % 16 * 16, number // 16 % 16 * 16, number // 256 * 16)
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def groups(part: data_sets.Part) -> dict[tuple[int, int], int]:
    return dict(Counter(zip(part.labels.tolist(), part.bias.tolist(), strict=True)))


def rows_of(part: data_sets.Part) -> set[bytes]:
    found = {row.numpy().tobytes() for row in part.inputs}
    assert len(found) == len(part)
    return found


def check_balanced_parts(
    data: data_sets.Data, test: int, validation: int, aligned: int, conflicting: int
) -> None:
    everywhere = [(label, bias) for label in (0, 1) for bias in (0, 1)]
    assert groups(data.test) == dict.fromkeys(everywhere, test)
    assert groups(data.validation) == dict.fromkeys(everywhere, validation)
    assert groups(data.train) == {
        (label, bias): aligned if label == bias else conflicting for label, bias in everywhere
    }
    parts = [rows_of(part) for part in (data.train, data.validation, data.test)]
    assert not any(one & other for one, other in itertools.combinations(parts, 2))


def test_faces_are_biased_in_training_and_balanced_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_sets, "_FACES", (3, 2, 18))
    with tarfile.open(tmp_path / "faces.tar", "w") as archive:
        people = itertools.product(range(24), (20, 35, 60), (0, 1))
        for number, (_, age, gender) in enumerate(people):
            add(archive, f"UTKFace/{age}_{gender}_0_{number}.jpg.chip.jpg", picture(number))
        add(archive, "UTKFace/20_3_0_1.jpg.chip.jpg", b"not read: its gender is not known")
    data = data_sets.faces(tmp_path / "faces.tar", 0.9)
    check_balanced_parts(data, 3, 2, 18, 2)
    assert data.alignment == 0.9
    monkeypatch.setattr(data_sets, "_FACES", (3, 2, 20))
    with pytest.raises(ValueError, match="label 0 with bias 0 has 24 samples"):
        data_sets.faces(tmp_path / "faces.tar")


def test_pets_have_their_tone_from_the_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_sets, "_PETS", (2, 2, 9))
    listed: dict[str, list[str]] = {"bright": [], "dark": []}
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        for number in range(80):
            name = f"{('cat', 'dog')[number % 2]}.{number}.jpg"
            add(archive, f"train/{name}", picture(number))
            if number < 60:  # the others are in neither list
                listed[("bright", "dark")[number // 2 % 2]].append(name)
        for tone, names in listed.items():
            add(archive, f"list_{tone}.txt", "\n".join(names).encode())
    data = data_sets.pets(tmp_path / "pets.tar", 0.9)
    check_balanced_parts(data, 2, 2, 9, 1)


def test_digits_are_balanced_over_digit_and_nearest_colour() -> None:
    data = data_sets.colored_mnist(protocol.MNIST)
    assert set(groups(data.test).values()) == {60}
    assert set(groups(data.validation).values()) == {40}
    assert len(groups(data.test)) == len(groups(data.validation)) == 100
    assert 0.8 < data.alignment < 0.9


def test_adult_has_a_random_third_to_test_and_no_column_of_the_sex() -> None:
    data = data_sets.adult(protocol.ADULT)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [16282, 5426, 10853]
    together = torch.cat([part.labels for part in (data.train, data.validation, data.test)])
    assert together.sum() == 7841  # of 32,561 rows
    sex = torch.cat([data.train.bias, data.test.bias])
    columns = torch.cat([data.train.inputs, data.test.inputs])
    assert not (columns == sex[:, None]).all(0).any()
    assert not (columns == 1 - sex[:, None]).all(0).any()
    numbers = data.train.inputs[:, (data.train.inputs > 1).any(0)]
    torch.testing.assert_close(numbers.mean(0), torch.zeros(numbers.shape[1]), atol=1e-4, rtol=0)


def test_images_are_moved_and_mirrored_in_training_only() -> None:
    images = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    part = data_sets.Part(images, torch.tensor([0, 1]), torch.tensor([0, 1]))
    data = data_sets.Data("faces", part, part, part, mirror=True)
    torch.testing.assert_close(data.prepare(images), images / 127.5 - 1)
    torch.manual_seed(0)
    seen = [data.augment(images) for _ in range(40)]
    middle = [image[:, :, 2:-2, 2:-2] for image in seen]
    # Each is a part of the image or of its mirror image, moved by up to two pixels each way.
    given = data.prepare(images)
    windows = [
        source[:, :, top : top + 44, left : left + 44]
        for source in (given, given.flip(3))
        for top, left in itertools.product(range(5), range(5))
    ]
    found = [next(n for n, window in enumerate(windows) if window.equal(m)) for m in middle]
    assert len(set(found)) > 10
    assert {number // 25 for number in found} == {0, 1}


# ------------------------------------------------------------------ erasure


def test_erasure_of_a_direction_by_hand() -> None:
    # Two uncorrelated features of variances 4 and 1 (weights 1/4 each); the concept moves the
    # first only: that is replaced by its mean, the second stays.
    features = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    erasure = LinearErasure(features, torch.tensor([1, 1, 0, 0]))
    wanted = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    torch.testing.assert_close(erasure(features), wanted)


def test_erasure_is_oblique_where_features_are_correlated() -> None:
    # x1 = z, x2 = z + e with e independent of z: the covariance with z is (1, 1)/4 and that of x
    # ((1, 1), (1, 1 + 4v))/4. The smallest change that removes z leaves (mean, mean + e).
    z = torch.tensor([0, 0, 1, 1])
    e = torch.tensor([-2.0, 2.0, -2.0, 2.0])
    features = torch.stack([z.float(), z + e], 1)
    erased = LinearErasure(features, z)(features)
    torch.testing.assert_close(erased, torch.stack([torch.full((4,), 0.5), 0.5 + e], 1))


def test_erased_features_are_useless_to_a_linear_probe() -> None:
    draw = torch.Generator().manual_seed(0)
    concept = torch.randint(3, (600,), generator=draw)
    features = torch.randn(600, 5, generator=draw) @ torch.randn(5, 8, generator=draw)
    features = features + torch.randn(3, 8, generator=draw)[concept]  # of rank 7 at most

    def accuracy(given: Tensor) -> float:
        return LogisticRegression(max_iter=1000).fit(given, concept).score(given, concept)

    assert accuracy(features) > 0.7
    most_frequent = concept.bincount().max().item() / 600
    assert accuracy(LinearErasure(features, concept)(features)) <= most_frequent + 0.005


def test_weights_count_as_repeated_samples_do() -> None:
    draw = torch.Generator().manual_seed(0)
    features, concept = torch.randn(40, 4, generator=draw), torch.arange(40) % 2
    times = torch.randint(1, 4, (40,), generator=draw)
    repeated = torch.arange(40).repeat_interleave(times)
    weighted = LinearErasure(features, concept, times)(features)
    torch.testing.assert_close(
        weighted, LinearErasure(features[repeated], concept[repeated])(features)
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_the_refitted_layer_predicts_as_the_regression_does(classes: int) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % classes
    features = torch.randn(300, 4, generator=draw) + 3.0 * torch.eye(4)[labels]
    layer = refitted(features, labels, torch.ones(300))
    expected = LogisticRegression(max_iter=2000).fit(features / features.std(0), labels)
    found = layer(features).softmax(1).detach().double()
    torch.testing.assert_close(
        found,
        torch.from_numpy(expected.predict_proba(features / features.std(0))),
        atol=1e-3,
        rtol=0,
    )


def test_weights_make_the_bias_independent_and_keep_the_labels() -> None:
    labels = torch.tensor([0] * 8 + [1] * 4)
    bias = torch.tensor([0] * 6 + [1] * 2 + [0] + [1] * 3)
    weight = ways.independent_weights(labels, bias)
    total = {
        (label, value): weight[(labels == label) & (bias == value)].sum().item()
        for label in (0, 1)
        for value in (0, 1)
    }
    assert total == pytest.approx({(0, 0): 8, (0, 1): 8, (1, 0): 4, (1, 1): 4})


def test_the_page_shows_what_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.main(["--table", f"--figure={tmp_path / 'figure.png'}"])
    page = Path(compare.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
