"""A convolution seen as a linear layer over patches: one position an output pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

#: Layers whose weight multiplies patches of the input; transposed convolutions multiply patches of the output.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_convolution(layer: nn.Module) -> bool:
    """Whether `patches` knows the layer: exactly a Conv1d, Conv2d or Conv3d, not a subclass with its own forward."""
    return type(layer) in CONVOLUTIONS


def patches(layer: _ConvNd, inputs: Tensor) -> Tensor:
    """What the weight of a convolution is multiplied with.

    Any dimension, stride, dilation, padding (also "same"), padding mode and number of groups.

    Args:
        layer: a Conv1d, Conv2d or Conv3d.
        inputs: shape (N, channels, *space).

    Returns:
        Shape (N, T, groups, channels / groups * kernel): one row an output position, in the order of the flattened
        output; entries in the order of the flattened weight of one output channel.
    """
    assert not isinstance(layer, _ConvTransposeNd)
    space = len(layer.kernel_size)
    padded = _pad(layer, inputs)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        reach = dilation * (size - 1) + 1
        padded = padded.unfold(axis, reach, stride)[..., ::dilation]
    # now (N, channels, *output space, *kernel)
    channels = inputs.shape[1] // layer.groups
    split = padded.unflatten(1, (layer.groups, channels))
    order = [0, *range(3, 3 + space), 1, 2, *range(3 + space, 3 + 2 * space)]
    split = split.permute(order)
    return split.flatten(space + 2).flatten(1, space)


def _pad(layer: _ConvNd, inputs: Tensor) -> Tensor:
    if layer.padding_mode != "zeros":
        # What torch itself pads with in the other modes, last axis first.
        return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    if layer.padding == "valid":
        return inputs
    if layer.padding == "same":
        sides: list[int] = []
        for size, dilation in zip(reversed(layer.kernel_size), reversed(layer.dilation), strict=True):
            total = dilation * (size - 1)
            sides += [total // 2, total - total // 2]
        return F.pad(inputs, sides)
    return F.pad(inputs, _both_sides(layer.padding))  # type: ignore[arg-type]


def _both_sides(padding: Sequence[int]) -> list[int]:
    return [side for axis in reversed(padding) for side in (axis, axis)]
