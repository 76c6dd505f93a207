"""The scale at which a probe sees the features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Scaled"]

_NEAR = 3.0  # robust deviations; what is beyond is drawn nearer
_FARTHEST = 10.0  # of the excess beyond them
_AT_ONCE = 4_000_000  # values scaled together


class Scaled(nn.Module):
    """A probe behind a robust standardisation of its input.

    A few outliers must not make the other samples look alike: the location is the median, the
    scale the range from the 10 % to the 90 % quantile (`sklearn.preprocessing.RobustScaler`). The
    excess over three robust deviations is divided by its own root mean square, where that is above
    1: outliers end up near, and what they tell by how far they are can still be read. The result
    is brought to mean 0 and deviation 1. A value that is much farther off than any seen in training
    would decide everything there; the excess ends at 10.

    Parameters
    ----------
    probe
        Maps float32 features to logits.
    features
        Of the samples to learn from, (N, D) or (N, D, *S), float32 or float64: the computation is
        in this type, the probe's input is float32.
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
    from sklearn.preprocessing import RobustScaler

    robust = RobustScaler(quantile_range=(10, 90), unit_variance=True)
    robust.fit(values.double().cpu().numpy())  # its float32 takes a range of 1e-6 for none
    median, scale = (
        torch.from_numpy(found).to(values) for found in (robust.center_, robust.scale_)
    )
    rounding = 8 * torch.finfo(values.dtype).eps * median.abs()
    scale = torch.where(scale > rounding, scale, torch.inf)  # a constant column becomes zero
    near, excess = _parts(values, median, scale)
    largest = excess.abs().amax(0).clamp_min(1)  # the square of a large one may be infinite
    root_mean_square = largest * (excess / largest).square().mean(0).sqrt()
    root_mean_square = root_mean_square.clamp_min(1)
    squeezed = near + (excess / root_mean_square).clamp(-_FARTHEST, _FARTHEST)
    deviation, mean = torch.std_mean(squeezed, 0, correction=0)
    return median, scale, root_mean_square, mean, torch.where(deviation > 0, deviation, 1.0)
