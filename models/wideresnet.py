"""WideResNet-d-k (Zagoruyko and Komodakis, arXiv 1605.07146), named as in the TRADES release."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.reverse_attention import ReverseAttentionNetwork


class WideBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv plus shortcut.

    Where channels change, the shortcut starts behind the first ReLU. conv_bn: the pair of layers
    that the copy for attacks folds into one. bn1 follows no convolution.
    """

    conv_bn = (("conv1", "bn2"),)

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.convShortcut = None
        if in_planes != planes:
            self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True)) + shortcut


class Stage(nn.Module):
    """A stage's blocks, under the published name `layer`."""

    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(WideBlock(in_planes, planes, stride))
        for _ in range(blocks - 1):
            self.layer.append(WideBlock(planes, planes, 1))


class WideResNet(ReverseAttentionNetwork):
    """WideResNet: three stages of (depth - 4) / 6 blocks, one final BatchNorm.

    Channels are 16 * width * (1, 2, 4). The last two blocks of the last stage carry reverse
    attention. With width 1 the first block has as many channels as the stem, so no shortcut
    convolution.
    """

    def __init__(
        self,
        num_classes: int,
        reverse_attention: bool,
        width: int = 10,
        image_size: int = 32,
        *,
        depth: int,
    ) -> None:
        super().__init__()
        self.reverse_attention = reverse_attention
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = Stage(blocks, 16, 16 * width, 1)
        self.block2 = Stage(blocks, 16 * width, 32 * width, 2)
        self.block3 = Stage(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.zeros_(self.fc.bias)

    def trunk(self, x: Tensor) -> Tensor:
        return self.block3.layer[:-2](self.block2.layer(self.block1.layer(self.conv1(x))))

    def last_blocks(self) -> nn.Sequential:
        return self.block3.layer[-2:]

    def activate(self, z: Tensor) -> Tensor:
        return F.relu(self.bn1(z), inplace=True)
