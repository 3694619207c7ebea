"""ResNet-18 for small images (He et al., arXiv 1512.03385): a 3x3 stem, no max-pooling."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.reverse_attention import ReverseAttentionNetwork


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus shortcut, then ReLU.

    conv_bn: pairs of layers that the copy for attacks folds into one.
    """

    conv_bn = (("conv1", "bn1"), ("conv2", "bn2"), ("shortcut.0", "shortcut.1"))

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


def _stage(in_planes: int, planes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(in_planes, planes, stride), BasicBlock(planes, planes, 1))


class ResNet(ReverseAttentionNetwork):
    """ResNet-18: four stages of two blocks, channels width * (1, 2, 4, 8).

    Both blocks of the last stage carry reverse attention.
    """

    conv_bn = (("conv1", "bn1"),)

    def __init__(
        self, num_classes: int, reverse_attention: bool, width: int = 64, image_size: int = 32
    ) -> None:
        super().__init__()
        self.reverse_attention = reverse_attention
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, num_classes)

    def trunk(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.layer3(self.layer2(self.layer1(z)))

    def last_blocks(self) -> nn.Sequential:
        return self.layer4
