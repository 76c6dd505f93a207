"""The networks of the coloured-MNIST benchmark."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lnl_ext.paper.networks import (
    DigitNetwork,
    GlobalColorHead,
    PixelColorHead,
    SeparatePixelColorHeads,
)


class AuthorsNetwork(nn.Module):
    """The network as one forward, layer by layer from the paper's description."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 32, 5, 1, 2)
        self.conv2 = nn.Conv2d(32, 32, 3, 1, 1)
        self.conv3 = nn.Conv2d(32, 64, 3, 2, 1)
        self.conv4 = nn.Conv2d(64, 64, 3, 1, 1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        """Give (hidden, logits)."""
        pool = nn.functional.max_pool2d
        x = pool(torch.relu(self.conv1(self.bn0(x))), 3, 2, 1)
        hidden = torch.relu(self.conv2(x))
        x = torch.relu(self.conv4(torch.relu(self.conv3(hidden))))
        return hidden, self.fc(nn.functional.avg_pool2d(x, 7, 1).flatten(1))


def test_the_split_network_is_the_authors_network():
    torch.manual_seed(0)
    network, whole = DigitNetwork(), AuthorsNetwork()
    state = {name.split(".", 1)[1]: value for name, value in network.state_dict().items()}
    whole.load_state_dict(state)
    images = torch.randn(4, 3, 28, 28)
    hidden, logits = whole(images)
    assert hidden.shape == (4, 32, 14, 14)
    torch.testing.assert_close(network.features(images), hidden)
    torch.testing.assert_close(network(images), logits)


def test_convolutions_start_as_the_authors_do():
    torch.manual_seed(0)
    for module in DigitNetwork().modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            samples = module.weight.numel()
            # Five standard errors of a standard deviation.
            tolerance = 5 * expected / math.sqrt(2 * samples)
            assert module.weight.std().item() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("training", [True, False])
def test_the_grouped_pixel_head_is_the_three_separate_heads(training):
    torch.manual_seed(1)
    separate, grouped = SeparatePixelColorHeads(), PixelColorHead()
    for layer, position in (("conv1", 0), ("bn", 1), ("conv2", 3)):
        parts = [head[position].state_dict() for head in separate.channels]
        target = getattr(grouped, layer)
        target.load_state_dict(
            {
                name: value if value.dim() == 0 else torch.cat([part[name] for part in parts])
                for name, value in parts[0].items()
            }
        )
    separate.train(training)
    grouped.train(training)
    features = torch.randn(4, 32, 14, 14)
    logits = grouped(features)
    assert logits.shape == (4, 24, 14, 14)
    # Two orders of summation over 288 products.
    torch.testing.assert_close(logits, separate(features), rtol=1e-4, atol=1e-5)


def test_one_channels_logits_depend_on_its_own_head_only():
    grouped = PixelColorHead().eval()
    features = torch.randn(2, 32, 14, 14)
    before = grouped(features)
    with torch.no_grad():
        grouped.conv1.weight[32:64].add_(1.0)
    changed = (grouped(features) - before).abs().amax((0, 2, 3)) > 0
    assert changed.tolist() == [False] * 8 + [True] * 8 + [False] * 8


def test_global_head_gives_bins_per_head():
    head = GlobalColorHead(heads=5)
    assert head(torch.randn(3, 32, 14, 14)).shape == (3, 40)


def test_networks_keep_channels_last():
    network = DigitNetwork().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 28, 28).contiguous(memory_format=torch.channels_last)
    hidden = network.features(images)
    assert hidden.is_contiguous(memory_format=torch.channels_last)
    head = PixelColorHead().to(memory_format=torch.channels_last)
    assert head(hidden).is_contiguous(memory_format=torch.channels_last)
