"""Perceptual distances: how far apart two images are in the eyes of a network. A recipe names one, run.json records it.

    random          fixed random 3-D convolutions: needs no download, knows nothing of brains or of pictures
    lpips-squeeze   the authors' (paper.md 3.1): LPIPS with SqueezeNet on a share of slices along each axis
    medicalnet      MedicalNet's 3-D ResNet-50, trained on medical scans (Chen et al. 2019)
    encoder         the first levels of an autoencoder that was trained before, on whatever it was trained on

The weights of all but the first come from files of the user's: they are not ours to ship, and nothing is fetched.
All are 0 for equal images, and differentiable in the first of the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import sha256_of
from brainldm.base.streams import stream
from brainldm.model.description import AUTOENCODER_NAME
from brainldm.model.folder import find_model, load_autoencoder
from brainldm.model.tensors import shortened
from brainldm.nets.autoencoder import Autoencoder
from brainldm.nets.medicalnet import MED3D_NAME, MedicalNet, read_medicalnet
from brainldm.nets.random_network import RandomNetwork
from brainldm.nets.squeezenet import SMALLEST_SIDE, TAP_CHANNELS, SqueezeNetFeatures
from brainldm.train.config import PERCEPTUAL_DISTANCES, PerceptualName

WEIGHTS_NEEDED: dict[str, str] = {
    "lpips-squeeze": "torchvision's squeezenet1_1 state dict and LPIPS v0.1's squeeze.pth (give the option twice), or "
    "one safetensors file of both",
    "medicalnet": f"a MedicalNet ResNet-50 checkpoint such as {MED3D_NAME} (brainldm fetch med3d)",
    "encoder": "a model folder whose autoencoder is trained",
}
SLICE_SHARE = 0.25  # of the slices along each axis: the authors' (paper.md 3.1)
ENCODER_LEVELS = 2
# LPIPS v0.1's input scaling: the mean and deviation of ImageNet's colours, for pictures in -1..1.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class PerceptualDistance(nn.Module):
    """What every one of them is: images (B, 1, X, Y, Z) in 0..1 to one number, 0 for equal images."""

    def distance(
        self, image_B1XYZ: torch.Tensor, reference_B1XYZ: torch.Tensor, draws: np.random.Generator
    ) -> torch.Tensor:
        """The mean over the batch; whatever is drawn comes from `draws` alone."""
        raise NotImplementedError


def _normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Features of length 1 at every voxel. vector_norm has gradient 0 at 0, where the root of a sum has none, and
    whole slices of background may leave no feature alive."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps)


def _mean_over_levels(maps: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean over levels of the squared difference of channel-normalised features (the form of LPIPS, unweighted)."""
    total, levels = torch.zeros(()), 0  # a number of no device goes with every device
    for x, y in zip(maps, others):
        total = total + (F.normalize(x, dim=1, eps=1e-3) - F.normalize(y, dim=1, eps=1e-3)).square().sum(1).mean()
        levels += 1
    return total / levels


class RandomFeatures(PerceptualDistance):
    """Three levels of fixed random convolutions; their weights are a function of the seed alone.

    Such features already punish blur (deep image prior and random-feature Frechet distances rest on the same fact).
    """

    def __init__(self, seed: int, channels: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()
        self.network = RandomNetwork(stream(seed, "perceptual-weights"), channels)

    def distance(
        self, image_B1XYZ: torch.Tensor, reference_B1XYZ: torch.Tensor, draws: np.random.Generator
    ) -> torch.Tensor:
        maps, others = ((whole for whole, _ in self.network.maps(x)) for x in (image_B1XYZ, reference_B1XYZ))
        return _mean_over_levels(maps, others)


class SlicedLpips(PerceptualDistance):
    """The authors' 2.5-D LPIPS: of slices along x, along y and along z, the mean LPIPS; the sum of the three.

    A quarter of the slices along each axis is drawn at every step, the same of every image of the batch (the authors
    draw from the batch's slices together, which is one thing at their batch of 1), so that a batch shared by several
    processes is the whole batch. Values 0..1 are taken as they are, as in the authors' code, though LPIPS was made for
    -1..1.

    Not verified against the published weights, which this project was never given: the mathematics is held to a slow
    transcription with random weights (tests/test_perceptual.py), the names and shapes to torchvision's and LPIPS'.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, squeezenet: SqueezeNetFeatures, weights: Sequence[torch.Tensor]) -> None:
        """`weights`: of each tap's channels, (1, C, 1, 1)."""
        super().__init__()
        self.squeezenet = squeezenet
        self.weights = nn.ParameterList([nn.Parameter(w.float(), requires_grad=False) for w in weights])
        self.register_buffer("shift", torch.tensor(_SHIFT)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE)[None, :, None, None])

    def distance(
        self, image_B1XYZ: torch.Tensor, reference_B1XYZ: torch.Tensor, draws: np.random.Generator
    ) -> torch.Tensor:
        total = torch.zeros((), device=image_B1XYZ.device)
        for axis in (2, 3, 4):
            slices = image_B1XYZ.shape[axis]
            chosen = draws.permutation(slices)[: max(1, int(slices * SLICE_SHARE))]
            index = torch.from_numpy(chosen).to(image_B1XYZ.device)
            first, second = (
                x.index_select(axis, index).movedim(axis, 1).flatten(0, 1) for x in (image_B1XYZ, reference_B1XYZ)
            )
            total = total + self.lpips(first, second).mean()
        return total

    def lpips(self, picture_B1HW: torch.Tensor, other_B1HW: torch.Tensor) -> torch.Tensor:
        """LPIPS of grey pictures, (B,): sum over taps of the mean over space of w (f - g)^2 (Zhang et al., eq. 1)."""
        maps, others = (self.squeezenet((x - self.shift) / self.scale) for x in (picture_B1HW, other_B1HW))
        taps = [
            (weight * (_normalised(x, 1e-10) - _normalised(y, 1e-10)).square()).sum(1).mean((1, 2))
            for weight, x, y in zip(self.weights, maps, others)
        ]
        return torch.stack(taps).sum(0)


class MedicalNetFeatures(PerceptualDistance):
    """The four stages of MedicalNet's ResNet. Both images are scaled by the reference's mean and deviation: a z-score
    of each by its own, as MONAI's loss takes, would forgive a reconstruction that is too dark."""

    def __init__(self, network: MedicalNet) -> None:
        super().__init__()
        self.network = network

    def distance(
        self, image_B1XYZ: torch.Tensor, reference_B1XYZ: torch.Tensor, draws: np.random.Generator
    ) -> torch.Tensor:
        mean = reference_B1XYZ.mean((1, 2, 3, 4), keepdim=True)
        std = reference_B1XYZ.std((1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
        maps, others = (self.network.maps((x - mean) / std) for x in (image_B1XYZ, reference_B1XYZ))
        return _mean_over_levels(maps, others)


class EncoderFeatures(PerceptualDistance):
    """The ends of the first levels of a trained autoencoder's encoder: edges and tissues, not compressed yet."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def distance(
        self, image_B1XYZ: torch.Tensor, reference_B1XYZ: torch.Tensor, draws: np.random.Generator
    ) -> torch.Tensor:
        maps, others = (self.autoencoder.encoder_maps(x, ENCODER_LEVELS) for x in (image_B1XYZ, reference_B1XYZ))
        return _mean_over_levels(maps, others)


# ----------------------------------------------------------------------------------------------- choosing, and weights


@dataclass(frozen=True)
class PerceptualChoice:
    """A distance by name, the files of its weights, and their SHA-256, sorted: what a run records of it."""

    name: PerceptualName
    weights: tuple[Path, ...] = ()
    sha256: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: PerceptualName, weights: Sequence[Path], shape_XYZ: Sequence[int]) -> PerceptualChoice:
        """Proves that images of that grid can be compared so, by building it once. UsageError where weights are
        missing or not needed, or the grid does not suit; BadInput where they do not fit."""
        if name not in PERCEPTUAL_DISTANCES:
            raise UsageError(
                f"no perceptual distance is named {name!r}.",
                remedy=f"Choose one of: {', '.join(PERCEPTUAL_DISTANCES)}.",
            )
        if name == "random" and weights:
            raise UsageError(
                "the perceptual distance 'random' takes no weights, and some were given.",
                remedy="Leave --perceptual-weights out, or name the distance they are for with --perceptual.",
                path=weights[0],
            )
        if name != "random" and not weights:
            raise UsageError(
                f"the perceptual distance {name!r} needs weights, and none were given.",
                remedy=f"Give --perceptual-weights PATH: {WEIGHTS_NEEDED[name]}.",
            )
        if name == "lpips-squeeze" and min(shape_XYZ) < SMALLEST_SIDE:
            raise UsageError(
                f"SqueezeNet needs slices of at least {SMALLEST_SIDE} voxels a side; the grid is {tuple(shape_XYZ)}.",
                remedy="Choose another perceptual distance or a finer grid.",
            )
        network = perceptual_distance(name, weights, seed=0)
        if isinstance(network, EncoderFeatures) and any(n % network.autoencoder.config.fold for n in shape_XYZ):
            raise UsageError(
                f"the grid {tuple(shape_XYZ)} does not divide by {network.autoencoder.config.fold}, which that encoder "
                "folds by.",
                remedy="Choose an encoder of this grid.",
                path=weights[0],
            )
        files = [find_model(weights[0]) / AUTOENCODER_NAME] if name == "encoder" else list(weights)
        return cls(name, tuple(weights), tuple(sorted(sha256_of(file) for file in files)))


def perceptual_distance(name: PerceptualName, weights: Sequence[Path], seed: int) -> PerceptualDistance:
    """The distance of that name, frozen. BadInput where the weights are not those it needs."""
    if name == "lpips-squeeze":
        made: PerceptualDistance = _sliced_lpips(weights)
    elif name == "medicalnet":
        made = MedicalNetFeatures(read_medicalnet(_only(weights, name)))
    elif name == "encoder":
        made = EncoderFeatures(_plain_autoencoder(_only(weights, name)))
    else:
        made = RandomFeatures(seed)
    return made.requires_grad_(False).eval()


def _plain_autoencoder(folder: Path) -> Autoencoder:
    autoencoder = load_autoencoder(folder)[1]
    if not isinstance(autoencoder, Autoencoder):
        raise BadInput(
            "has an autoencoder of atlases, whose encoder sees differences and no images.",
            remedy="Name a model with a plain autoencoder, or choose another perceptual distance.",
            path=folder,
            reason="architecture",
        )
    return autoencoder


def _only(weights: Sequence[Path], name: str) -> Path:
    if len(weights) != 1:
        raise UsageError(
            f"the perceptual distance {name!r} takes one path of weights; {len(weights)} were given.",
            remedy=f"It needs {WEIGHTS_NEEDED[name]}.",
        )
    return weights[0]


def _sliced_lpips(weights: Sequence[Path]) -> SlicedLpips:
    found: dict[str, torch.Tensor] = {}
    for path in weights:
        found |= _tensors_of(path)
    with torch.device("meta"):
        squeezenet = SqueezeNetFeatures()
    wanted = {name: tuple(tensor.shape) for name, tensor in squeezenet.state_dict().items()}
    linear = [f"lin{tap}.model.1.weight" for tap in range(len(TAP_CHANNELS))]
    shapes = wanted | {name: (1, channels, 1, 1) for name, channels in zip(linear, TAP_CHANNELS)}
    faults = [
        f"{name} is missing" if name not in found else f"{name} has shape {tuple(found[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name not in found or tuple(found[name].shape) != shape
    ]
    if faults:
        raise BadInput(
            f"the weights are not those of LPIPS with SqueezeNet 1.1: {shortened(faults)}.",
            remedy=f"Give {WEIGHTS_NEEDED['lpips-squeeze']}.",
            path=weights[0],
            reason="architecture",
        )
    if not all(bool(torch.isfinite(found[name]).all()) for name in shapes):
        raise BadInput("holds weights that are not finite numbers.", path=weights[0], reason="nan")
    squeezenet.load_state_dict({name: found[name].float() for name in wanted}, assign=True)
    return SlicedLpips(squeezenet, [found[name] for name in linear])


def _tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or of a state dict of torch's; nothing in it is executed."""
    if not path.is_file():
        raise BadInput("there is no such file of weights.", remedy="Check the path.", path=path, reason="missing")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is no checkpoint makes the readers raise
        raise BadInput(
            f"cannot be read as weights ({type(error).__name__}).",
            remedy="Give a state dict that torch.load(weights_only=True) reads, or a safetensors file.",
            path=path,
            reason="damaged",
        ) from error
    if not isinstance(content, dict):
        raise BadInput("holds no state dict.", path=path, reason="damaged")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
