"""Networks as a user writes them, for --arch tests/own_networks.py:NAME."""

import torch
from torch import nn
from torchvision.models import shufflenet_v2_x0_5


class ViT(nn.Module):
    """A vision transformer of two blocks, with dropout."""

    def __init__(self, num_classes, image_size=32, width=8):
        """Make patches of 4x4, and two heads of width / 2 channels."""
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, (image_size // 4) ** 2, width))
        block = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def features(self, x):
        """Return tokens (N, D, T)."""
        tokens = self.patches(x - 0.5).flatten(2).transpose(1, 2) + self.position
        return self.norm(self.blocks(tokens)).relu().transpose(1, 2)

    def forward(self, x):
        """Return logits."""
        return self.fc(self.features(x).mean(2))


class Doubled(ViT):
    """A network that does something behind its last layer."""

    def forward(self, x):
        """Return logits that are not those of a linear layer."""
        return 2 * super().forward(x)


def shufflenet(num_classes):
    """Return a network of torchvision."""
    return shufflenet_v2_x0_5(num_classes=num_classes)


def seven(num_classes):
    """Return a network of another number of classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 7))


def function(num_classes):
    """Return no module."""
    return torch.zeros
