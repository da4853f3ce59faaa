"""MedicalNet's 3-D ResNet (Chen, Ma and Zheng 2019, "Med3D"), as its published encoders are built.

Depth 50, shortcut type B, no segmentation head: 7 x 7 x 7 stem of stride 2, maximum of stride 2, four stages of which
only the second halves; the third and fourth are dilated by 2 and 4 instead. Parameter names are those of the published
checkpoints, without their "module." prefix. Weights come from the user: none are shipped.
"""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from brainldm.base.errors import BadInput

_EXPANSION = 4

# The published ResNet-50 checkpoints: trained on 23 datasets (the one that Pinaya's later code takes), and on eight.
MED3D_NAME = "resnet_50_23dataset.pth"
MED3D_SHA256 = {
    MED3D_NAME: "ff48a62219073fb977fd3f4ddfb8dc1367f0ec156c8d6f6c37e205bd683a246e",
    "resnet_50.pth": "5b6189cafbee2f5604a7279b62bc163365aa6a86a377e1dc260a14275cacbd84",
}


@dataclass(frozen=True)
class MedicalNetConfig:
    """ResNet-50 as published; other depths and strides for tests. Features: 4 x the last width."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    strides: tuple[int, ...] = (1, 2, 1, 1)
    dilations: tuple[int, ...] = (1, 1, 2, 4)

    @property
    def features(self) -> int:
        return _EXPANSION * self.widths[-1]


class Bottleneck(nn.Module):
    """1 - 3 - 1 convolutions with a residual; the width grows fourfold at the end."""

    def __init__(self, before: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        after = _EXPANSION * width
        self.conv1 = nn.Conv3d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv3d(before, after, 1, stride=stride, bias=False), nn.BatchNorm3d(after)
            )

    def forward(self, x_BCXYZ: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x_BCXYZ)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x_BCXYZ if self.downsample is None else self.downsample(x_BCXYZ)))


class MedicalNet(nn.Module):
    """(B, 1, X, Y, Z) to pooled features (B, F): the mean of the last map over space."""

    def __init__(self, config: MedicalNetConfig = MedicalNetConfig()) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, config.widths[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(config.widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        before, stages = config.widths[0], OrderedDict[str, nn.Module]()
        for number, (count, width, stride, dilation) in enumerate(
            zip(config.blocks, config.widths, config.strides, config.dilations), start=1
        ):
            members = []
            for position in range(count):
                members.append(Bottleneck(before, width, stride if position == 0 else 1, dilation))
                before = _EXPANSION * width
            stages[f"layer{number}"] = nn.Sequential(*members)
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.stages = tuple(stages)

    def maps(self, image_B1XYZ: torch.Tensor) -> Iterator[torch.Tensor]:
        """The map (B, C, X, Y, Z) at the end of each stage."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image_B1XYZ))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
            yield x

    def forward(self, image_B1XYZ: torch.Tensor) -> torch.Tensor:
        *_, last = self.maps(image_B1XYZ)
        return last.mean(dim=(2, 3, 4))


def read_medicalnet(checkpoint: Path) -> MedicalNet:
    """The ResNet-50 with the weights of a published checkpoint, in evaluation mode; BadInput for a file of other ones.

    Read by torch.load(weights_only=True): nothing in it is executed.
    """
    if not checkpoint.is_file():
        raise BadInput(
            "there is no such checkpoint.",
            remedy=f"Get {MED3D_NAME}: brainldm fetch med3d, or from MedicalNet's pages.",
            path=checkpoint,
            reason="missing",
        )
    try:
        # Files from before PyTorch 1.6 are no archives, and only archives can be mapped.
        mapped = zipfile.is_zipfile(checkpoint)
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a file that is no checkpoint makes torch raise
        raise BadInput(
            f"cannot be read as a checkpoint ({type(error).__name__}).", path=checkpoint, reason="damaged"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    encoder = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        network = MedicalNet()
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    wrong = [
        name
        for name, shape in wanted.items()
        # older checkpoints do not count batches
        if not name.endswith("num_batches_tracked") and getattr(encoder.get(name), "shape", None) != shape
    ]
    if wrong:
        raise BadInput(
            f"is no MedicalNet ResNet-50: {len(wrong)} of its {len(wanted)} tensors are missing or of another shape, "
            f"the first is {wrong[0]}.",
            remedy=f"Take {MED3D_NAME} (depth 50, shortcut B).",
            path=checkpoint,
            reason="architecture",
        )
    kept = {name: encoder.get(name, torch.zeros((), dtype=torch.long)) for name in wanted}
    network.load_state_dict(kept, assign=True)
    return network.eval()
