"""Faces: bias heads for the age or the gender, and the sets."""

from __future__ import annotations

import argparse
import functools
import itertools

import torch
from torch import Tensor

from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.paper.faces import AGE_EDGES, age_bins, binary_age, select_faces
from lnl_ext.paper.image_networks import GlobalHead, MapHead, SplitNetwork, photo_network
from photographs.runs import (
    Adversary,
    Images,
    Probe,
    Sets,
    Task,
    crop_of,
)

BINS = len(AGE_EDGES) - 1
GENDERS = ("female", "male")
AGES = tuple(f"[{low}, {high})" for low, high in itertools.pairwise(AGE_EDGES))


def by_label(bias: Tensor, labels: Tensor) -> Tensor:
    """Return a bias target ``(N,)`` as ``(N, 2)``, a head for each label and ignored by the other.

    In training the bias follows the label. Features of the label do not help a
    head that sees one label only, so that its gradient concerns the bias alone.
    """
    return torch.where(labels[:, None] == torch.arange(2), bias[:, None], IGNORE_INDEX)


def head(classes: int, heads: int, linear: bool, network: SplitNetwork) -> GlobalHead:
    """Make a bias head."""
    return GlobalHead(network.channels, classes, heads, linear=linear)


def side(options: argparse.Namespace) -> int:
    """Return the number of rows of the features, which is that of their columns."""
    network = photo_network(options.arch, 2, feature_layer=options.feature_layer)
    return crop_of(options.image_size, network) // network.stride


def adversaries(options: argparse.Namespace) -> list[Adversary]:
    """Return the bias heads asked for."""
    classes = BINS if options.label == "gender" else 2
    positions = side(options) ** 2

    def map_head(network: SplitNetwork) -> MapHead:
        return MapHead(network.channels, classes, heads=1)

    known = {
        # Its predictions are summed over positions; together they weigh as one of the others does.
        "map": Adversary("bias_map", map_head, 1, 1 / positions, 0.1 / positions),
        "linear": Adversary("bias", functools.partial(head, classes, 1, True), 1, 1.0, 0.1),
        "global": Adversary("bias", functools.partial(head, classes, 1, False), 1, 1.0, 0.1),
        "by_label": Adversary(
            "bias_by_label", functools.partial(head, classes, 2, False), 2, 1.0, 0.1
        ),
    }
    return [known[name] for name in options.heads]


def read(options: argparse.Namespace) -> Sets:
    """Decode the faces of all splits."""
    rows = side(options)

    def split(name: str) -> Images:
        faces = select_faces(options.data, name)
        young_or_old = binary_age(faces.age)
        labels = faces.gender if options.label == "gender" else young_or_old
        bias = age_bins(faces.age) if options.label == "gender" else faces.gender
        known = (labels >= 0).nonzero().flatten()  # for the label age: neither young nor old
        targets = {"bias": bias, "bias_by_label": by_label(bias, labels)}
        targets["bias_map"] = bias[:, None, None].expand(-1, rows, rows)
        return Images.read(
            [faces.paths[row] for row in known.tolist()],
            labels[known],
            {target: values[known] for target, values in targets.items()},
            options.image_size,
            options.workers,
        )

    opposite = "EB2" if options.train_split == "EB1" else "EB1"
    return Sets.halved(split(options.train_split), split(opposite), split("test"))


def task(options: argparse.Namespace, sets: Sets | None = None) -> Task:
    """Return what the command is about; the sets are read if they are not given."""
    if options.label == "gender":
        classes, bias, probe = GENDERS, AGES, Probe("age (12 bins)", "bias", BINS)
    else:
        classes, bias, probe = ("young", "old"), GENDERS, Probe("gender", "bias", 2)
    heads = adversaries(options)
    return Task(options.label, classes, {"bias": bias}, sets or read(options), heads, probe)
