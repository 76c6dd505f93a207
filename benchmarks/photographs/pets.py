"""Dogs and cats: bias heads for the colour of the coat, and the sets."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.paper.dogs_and_cats import COLOR_BINS, color_map, list_pets
from lnl_ext.paper.image_networks import GlobalHead, MapHead, SplitNetwork, photo_network
from photographs.runs import (
    Adversary,
    Images,
    Probe,
    Sets,
    Task,
)

MapTarget = Callable[[int, Tensor, Tensor], Tensor]


def mean_color(images: Tensor, labels: Tensor) -> Tensor:
    """Return the bins ``(N, 3)`` of the images' mean red, green and blue."""
    bins = images.float().mean((2, 3)) // (256 // COLOR_BINS)
    return bins.long()


def with_label(bins: Tensor, labels: Tensor) -> Tensor:
    """Return bins ``(N, 3, ...)`` as ``(N, 9, ...)``: for three heads of all, of cats, of dogs.

    The last six are ignored for the other label: features of the species do not help a head of
    one species only, so that its gradient concerns the colour alone.
    """
    own = (labels[:, None] == torch.arange(2)).reshape(-1, 2, *(1 for _ in bins.shape[1:]))
    by_label = torch.where(own, bins[:, None], IGNORE_INDEX)
    return torch.cat([bins, by_label.flatten(1, 2)], dim=1)


def mean_color_and_label(images: Tensor, labels: Tensor) -> Tensor:
    """Return `mean_color` ``(N, 9)``, once for all images and once by label."""
    return with_label(mean_color(images, labels), labels)


def colors(step: int, images: Tensor, labels: Tensor) -> Tensor:
    """Return the paper's target: colour bins ``(N, 3, H / step, W / step)``."""
    return color_map(images, step)


def colors_and_label(step: int, images: Tensor, labels: Tensor) -> Tensor:
    """Return `colors` ``(N, 9, H / step, W / step)``, once for all images and once by label."""
    return with_label(colors(step, images, labels), labels)


def adversaries(options: argparse.Namespace) -> list[Adversary]:
    """Return the bias heads asked for."""
    stride = photo_network(options.arch, 2, feature_layer=options.feature_layer).stride

    def global_head(network: SplitNetwork) -> GlobalHead:
        return GlobalHead(network.channels, COLOR_BINS, heads=9)

    def tone_head(network: SplitNetwork) -> GlobalHead:
        return GlobalHead(network.channels, 2)

    def map_of(name: str, heads: int, weight: float, target: MapTarget) -> Adversary:
        # One target a position of the features: their stride apart. Summed over positions;
        # per position and channel a part of a prediction's weight.
        reversal, entropy_weight = (
            weight * whole / 3 / positions(options, stride) for whole in (1.0, 0.1)
        )

        def head(network: SplitNetwork) -> MapHead:
            return MapHead(network.channels, COLOR_BINS, heads=heads)

        seen = functools.partial(target, stride)
        return Adversary(name, head, heads, reversal, entropy_weight, seen)

    known = {
        "map_and_label": map_of("map_and_label", 9, 0.5, colors_and_label),
        "map": map_of("map", 3, 1.0, colors),
        "global": Adversary("global", global_head, 9, 1 / 3, 0.1 / 3, mean_color_and_label),
        "tone": Adversary("tone", tone_head, 1, 1.0, 0.1),
    }
    return [known[name] for name in options.heads]


def positions(options: argparse.Namespace, stride: int) -> int:
    """Return the number of positions of the features."""
    side: int = max(1, options.image_size * 5 // 6 // stride)
    return side * side


def read(options: argparse.Namespace) -> Sets:
    """Decode the images of all splits."""

    def split(name: str) -> Images:
        files = list_pets(options.data, name)
        tone = {"tone": files.tone}
        return Images.read(files.paths, files.labels, tone, options.image_size, options.workers)

    opposite = "TB2" if options.train_split == "TB1" else "TB1"
    return Sets.halved(split(options.train_split), split(opposite), split("test"))


def task(options: argparse.Namespace, sets: Sets | None = None) -> Task:
    """Return what the command is about; the sets are read if they are not given."""
    name = "mean colour (8 bins a channel)"
    probe = Probe(name, "mean_color", COLOR_BINS, heads=3, image_target=mean_color)
    tones = {"tone": ("dark", "bright")}
    heads = adversaries(options)
    return Task("species", ("cat", "dog"), tones, sets or read(options), heads, probe)
