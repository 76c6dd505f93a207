"""The scale at which a probe sees the features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NEAR = 3.0  # robust deviations; what is beyond is drawn nearer
_FARTHEST = 10.0  # of the excess beyond them
_TAIL = 0.1  # share of the samples on either side of the quantile range
_NORMAL = 2.563103131089201  # that range of the standard normal distribution
_AT_ONCE = 4_000_000  # values sorted together


class Standardized(nn.Module):
    """A probe behind a robust standardisation of its input.

    A few outliers must not make the other samples look alike, so that neither the location nor
    the scale of these depends on how far the outliers are (`robust_scale`). The excess over three
    robust deviations is divided by its own root mean square, where that is above 1: outliers end
    up near, and what they tell by how far they are can still be read. The result is brought to
    mean 0 and deviation 1. A value that is much farther off than any seen in training would decide
    everything there; the excess ends at 10.

    Parameters
    ----------
    probe
        Maps float32 features to logits.
    features
        Of the training samples, (N, D) or (N, D, *S), float32 or float64: the computation is in
        this type, the probe's input is float32.
    per_channel
        One location and scale for all positions of a channel, else for each position.
    """

    median: Tensor
    scale: Tensor
    excess: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, probe: nn.Module, features: Tensor, per_channel: bool) -> None:
        super().__init__()
        shape = [1, *features.shape[1:]]
        values = features.flatten(1)
        if per_channel:
            shape[2:] = [1] * (features.dim() - 2)
            values = features.movedim(1, -1).flatten(0, -2)
        width = max(1, _AT_ONCE // len(values))
        columns = [_columns(part) for part in torch.split(values, width, 1)]
        names = ("median", "scale", "excess", "mean", "deviation")
        for name, found in zip(names, zip(*columns, strict=True), strict=True):
            self.register_buffer(name, torch.cat(found).reshape(shape))
        self.probe = probe

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of the probe."""
        near, excess = _parts(features, self.median, self.scale)
        values = near + (excess / self.excess).clamp(-_FARTHEST, _FARTHEST)
        logits: Tensor = self.probe(((values - self.mean) / self.deviation).float())
        return logits


def _parts(values: Tensor, median: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the robust deviation up to `_NEAR`, and what exceeds it."""
    deviation = (values - median) / scale
    largest = torch.finfo(deviation.dtype).max
    deviation = deviation.clamp(-largest, largest)
    near = deviation.clamp(-_NEAR, _NEAR)
    return near, deviation - near


def _columns(values: Tensor) -> tuple[Tensor, ...]:
    median, scale = robust_scale(values)
    near, excess = _parts(values, median, scale)
    largest = excess.abs().amax(0).clamp_min(1)  # the square of a large one may be infinite
    root_mean_square = largest * (excess / largest).square().mean(0).sqrt()
    root_mean_square = root_mean_square.clamp_min(1)
    squeezed = near + (excess / root_mean_square).clamp(-_FARTHEST, _FARTHEST)
    deviation, mean = torch.std_mean(squeezed, 0, correction=0)
    return median, scale, root_mean_square, mean, torch.where(deviation > 0, deviation, 1.0)


def robust_scale(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the median and a scale of every column.

    The scale is the range from the 10 % to the 90 % quantile as a multiple of that of the standard
    normal distribution. Where nearly all values are the same (most of a sparse feature is zero)
    this may be nothing, and ``sqrt(share) * size`` takes its place if larger: the share of the
    values that differ from the median, and the median of their distances. For a feature that is 0
    or 1 this is the root mean square, as the standard deviation is for a rare 1.

    Parameters
    ----------
    values
        Shape (N, columns), floating point.

    Returns
    -------
    median, scale
        Shape (columns,). The scale is infinite for a constant column, which thus becomes zero:
        one whose scale is no more than rounding (8 times the machine epsilon of the median).
    """
    last = len(values) - 1
    ordered = values.sort(0).values
    median = ordered[last // 2]
    low, high = ordered[int(_TAIL * last)], ordered[last - int(_TAIL * last)]
    distances = (values - median).abs().sort(0).values
    differing = (distances > 0).sum(0)
    middle = (len(values) - differing + differing // 2).clamp_max(last)
    size = distances.gather(0, middle.unsqueeze(0)).squeeze(0)
    sparse = (differing / len(values)).to(values.dtype).sqrt() * size
    scale = torch.maximum((high - low) / _NORMAL, sparse)
    rounding = 8 * torch.finfo(values.dtype).eps * median.abs()
    return median, torch.where(torch.maximum(scale, size) > rounding, scale, torch.inf)
