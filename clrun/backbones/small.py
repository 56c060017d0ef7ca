"""Small networks that adapt to the shape of the images: a convolutional net, an MLP, and those of published studies.

Each function takes the stored shape (C, H, W). Images that are smaller than a network accepts are resized to the
network's `input_size`. Initial weights are drawn from the global generator, which the engine seeds.
"""

from collections import OrderedDict
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from clrun.backbones.weights import takes_weights
from clrun.system.errors import ConfigError, PositiveInt

Shape = tuple[int, int, int]


class Backbone(nn.Module):
    """Layers from prepared images [B, *input_size] to features [B, num_features].

    Args:
        layers: named layers in order.
        input_size: (C, H, W) of the input.
        num_features: D.
    """

    mean: tuple[float, ...] | None = None  # None: those of the data set
    std: tuple[float, ...] | None = None

    def __init__(self, layers: dict[str, nn.Module], *, input_size: Shape, num_features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(OrderedDict(layers))
        self.input_size = input_size
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """Return features [B, D] of prepared images."""
        return self.layers(x)  # type: ignore[no-any-return]


@takes_weights
def mlp(shape: Shape, *, hidden: list[PositiveInt]) -> Backbone:
    """Return a multi-layer perceptron on the pixels: a linear layer and ReLU for each of the `hidden` widths.

    Without widths the pixels are the features.
    """
    size = _accepted(shape, smallest=1)
    widths = [prod(size), *hidden]
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for depth, (before, after) in enumerate(zip(widths, hidden, strict=False), start=1):
        layers |= {f"linear{depth}": nn.Linear(before, after), f"relu{depth}": nn.ReLU()}
    return Backbone(layers, input_size=size, num_features=widths[-1])


@takes_weights
def cnn(shape: Shape, *, width: PositiveInt, depth: PositiveInt) -> Backbone:
    """Return `depth` blocks of 3x3 convolution, group normalisation and ReLU, then an average over each quarter.

    The width doubles from block to block, and 2x2 max pooling halves the map as long as it has at least 8 pixels per
    side. Group normalisation (at most 8 groups, a divisor of the width) does not depend on the batch; the running
    statistics of batch normalisation would drift from task to task.

    Args:
        shape: (C, H, W) of the stored images.
        width: channels of the first block.
        depth: number of blocks.
    """
    size = _accepted(shape, smallest=4)
    channels, *sides = size
    layers: dict[str, nn.Module] = {}
    for block in range(1, depth + 1):
        after = width * 2 ** (block - 1)
        layers |= {
            f"conv{block}": nn.Conv2d(channels, after, 3, padding=1),
            f"norm{block}": nn.GroupNorm(_groups(after), after),
            f"relu{block}": nn.ReLU(),
        }
        if min(sides) >= 8:
            layers[f"pool{block}"] = nn.MaxPool2d(2)
            sides = [side // 2 for side in sides]
        channels = after
    layers |= {"average": nn.AvgPool2d((sides[0] // 2, sides[1] // 2)), "flatten": nn.Flatten()}
    return Backbone(layers, input_size=size, num_features=4 * channels)


@takes_weights
def lenet(shape: Shape) -> Backbone:
    """Return the LeNet of the order-robust studies (APD, Yoon et al., ICLR 2020; HALRP, arXiv 2311.15161).

    Two 5x5 convolutions (20, 50) with batch normalisation, ReLU and pooling, then 800 and 500 units with batch
    normalisation and ReLU; 2,995,620 parameters with a head of 10 classes on 3x32x32. The first linear layer grows with
    larger images.
    """
    size = _accepted(shape, smallest=32)
    layers: dict[str, nn.Module] = {}
    for block, (before, after) in enumerate(((size[0], 20), (20, 50)), start=1):
        layers |= {
            f"conv{block}": nn.Conv2d(before, after, 5, padding=2),
            f"norm{block}": nn.BatchNorm2d(after),
            f"relu{block}": nn.ReLU(),
            f"pool{block}": nn.MaxPool2d(2),
        }
    layers["flatten"] = nn.Flatten()
    flat = 50 * (size[1] // 4) * (size[2] // 4)
    for block, (before, after) in enumerate(((flat, 800), (800, 500)), start=3):
        layers |= {
            f"linear{block}": nn.Linear(before, after),
            f"norm{block}": BatchNormRows(after),
            f"relu{block}": nn.ReLU(),
        }
    return Backbone(layers, input_size=size, num_features=500)


@takes_weights
def alexnet(shape: Shape) -> Backbone:
    """Return the small AlexNet of HAT (Serrà et al., ICML 2018) with the batch normalisation of HALRP.

    Convolutions 4x4, 3x3, 2x2 (64, 128, 256) without padding, each with batch normalisation, ReLU, dropout (.2, .2, .5)
    and pooling, then twice 2048 units with dropout .5; 6,533,450 parameters with a head of 10 classes on 3x32x32.
    Deviation: the batch normalisation keeps running statistics; HALRP's does not, so that there a prediction depends
    on the other images of the test batch.
    """
    size = _accepted(shape, smallest=32)
    channels, height, width = size
    layers: dict[str, nn.Module] = {}
    for block, (after, kernel, drop) in enumerate(((64, 4, 0.2), (128, 3, 0.2), (256, 2, 0.5)), start=1):
        layers |= {
            f"conv{block}": nn.Conv2d(channels, after, kernel),
            f"norm{block}": nn.BatchNorm2d(after),
            f"relu{block}": nn.ReLU(),
            f"drop{block}": nn.Dropout(drop),
            f"pool{block}": nn.MaxPool2d(2),
        }
        channels, height, width = after, (height - kernel + 1) // 2, (width - kernel + 1) // 2
    layers["flatten"], before = nn.Flatten(), channels * height * width
    for block in (4, 5):
        layers |= {
            f"linear{block}": nn.Linear(before, 2048),
            f"norm{block}": BatchNormRows(2048),
            f"relu{block}": nn.ReLU(),
            f"drop{block}": nn.Dropout(0.5),
        }
        before = 2048
    return Backbone(layers, input_size=size, num_features=2048)


class BatchNormRows(nn.BatchNorm1d):
    """Batch normalisation of [B, D] that uses the running statistics for a batch of one row, which has no variance."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, D] normalised."""
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


@takes_weights
def resnet18(shape: Shape, *, width: PositiveInt, bias: bool, pool: PositiveInt | None) -> Backbone:
    """Return a ResNet-18 with a 3x3 stem without pooling, as used on images of 32 to 64 pixels.

    Args:
        shape: (C, H, W) of the stored images.
        width: channels of the first stage: 64 (He et al., CVPR 2016; 11,173,962 parameters with a head of 10 classes),
            20 (reduced, GEM: Lopez-Paz and Ranzato 2017), 32 (HALRP).
        bias: whether convolutions have a bias (HALRP's have: 2,807,690 parameters with width 32 and `pool` 2).
        pool: side of the average pooling at the end, whose output is the features; None averages over the whole map.
    """
    size = _accepted(shape, smallest=8 * max(2, pool or 2))
    layers = _stem(size[0], width, bias=bias)
    channels = width
    for stage in range(1, 5):
        after = width * 2 ** (stage - 1)
        for block in (1, 2):
            stride = 2 if stage > 1 and block == 1 else 1
            shortcut = nn.Sequential()
            if stride > 1:
                shortcut = nn.Sequential(nn.Conv2d(channels, after, 1, stride=2, bias=bias), nn.BatchNorm2d(after))
            layers[f"stage{stage}_{block}"] = Residual(channels, after, stride=stride, bias=bias, shortcut=shortcut)
            channels = after
    side = [-(-n // 8) for n in size[1:]]  # three halvings that round up
    layers |= {"pool": nn.AdaptiveAvgPool2d(1) if pool is None else nn.AvgPool2d(pool), "flatten": nn.Flatten()}
    features = channels if pool is None else channels * (side[0] // pool) * (side[1] // pool)
    return Backbone(layers, input_size=size, num_features=features)


@takes_weights
def resnet32(shape: Shape, *, width: PositiveInt) -> Backbone:
    """Return the ResNet-32 for CIFAR: three stages of five blocks (He et al., CVPR 2016, section 4.2).

    Shortcuts have no parameters (option A: every second pixel, zero channels added); 464,154 parameters with width 16
    and a head of 10 classes.

    Args:
        shape: (C, H, W) of the stored images.
        width: channels of the first stage; 16 in the paper.
    """
    size = _accepted(shape, smallest=8)
    layers = _stem(size[0], width, bias=False)
    channels = width
    for stage in range(1, 4):
        after = width * 2 ** (stage - 1)
        for block in range(1, 6):
            stride = 2 if stage > 1 and block == 1 else 1
            shortcut = Subsample(after - channels) if stride > 1 else nn.Identity()
            layers[f"stage{stage}_{block}"] = Residual(channels, after, stride=stride, bias=False, shortcut=shortcut)
            channels = after
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return Backbone(layers, input_size=size, num_features=channels)


class Residual(nn.Module):
    """The basic block: two 3x3 convolutions with batch normalisation beside a shortcut."""

    def __init__(self, before: int, after: int, *, stride: int, bias: bool, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, after, H / stride, W / stride]."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class Subsample(nn.Module):
    """A shortcut without parameters: every second pixel, `extra` channels of zeros, half on either side."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C + extra, H / 2, W / 2]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


def _stem(channels: int, width: int, *, bias: bool) -> dict[str, nn.Module]:
    """Return the first convolution of a ResNet for small images."""
    return {
        "conv": nn.Conv2d(channels, width, 3, padding=1, bias=bias),
        "norm": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
    }


def _accepted(shape: Shape, *, smallest: int) -> Shape:
    """Return the input shape: without alpha, with sides of at least `smallest` pixels."""
    if len(shape) != 3:
        raise ConfigError(
            f"backbone: takes images (channels, height, width), and the rows of this data set have the shape {shape}; "
            "choose another backbone, such as bert_tiny for texts"
        )
    channels, height, width = shape
    return {2: 1, 4: 3}.get(channels, channels), max(height, smallest), max(width, smallest)


def _groups(channels: int) -> int:
    """Return the number of groups to normalise: at most 8, a divisor of the channels."""
    return next(groups for groups in range(min(8, channels), 0, -1) if channels % groups == 0)
