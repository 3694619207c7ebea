"""PreActResNet-18 for small images (He et al., arXiv 1603.05027)."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.reverse_attention import ReverseAttentionNetwork


class PreActBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv plus shortcut.

    Where shapes change, the shortcut starts behind the first ReLU. conv_bn: the pair of layers that
    the copy for attacks folds into one. bn1 follows no convolution.
    """

    conv_bn = (("conv1", "bn2"),)

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or in_planes != planes:
            projection = nn.Conv2d(in_planes, planes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True)) + shortcut


def _stage(in_planes: int, planes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(PreActBlock(in_planes, planes, stride), PreActBlock(planes, planes, 1))


class PreActResNet(ReverseAttentionNetwork):
    """PreActResNet-18: channels width * (1, 2, 4, 8), one final BatchNorm for both last blocks.

    Pooling is over 4x4 windows as published, so an image of 64x64 (a map of 8x8) has 2x2 cells and
    F = 4 * 8 * width features.
    """

    pool_window = 4

    def __init__(
        self, num_classes: int, reverse_attention: bool, width: int = 64, image_size: int = 32
    ) -> None:
        super().__init__()
        self.reverse_attention = reverse_attention
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.pooled_cells = max(1, image_size // 8 // self.pool_window) ** 2
        self.linear = nn.Linear(8 * width * self.pooled_cells, num_classes)

    @property
    def classifier(self) -> nn.Linear:
        """The layer that other networks call `fc`, under its published name."""
        return self.linear

    def trunk(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self.conv1(x))))

    def last_blocks(self) -> nn.Sequential:
        return self.layer4

    def activate(self, z: Tensor) -> Tensor:
        return F.relu(self.bn(z), inplace=True)
