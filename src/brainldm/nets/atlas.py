"""An autoencoder of registered images that explains each by atlases: warped, weighted, added up.

Brains of one space differ mostly by where things lie. So the decoder holds learnt atlases; from the latent it makes,
for each cell of voxels, a displacement, a weight of each atlas, and what has to be added:

    image(x) = sum_k weight_k(x) atlas_k(x + displacement(x)) + residual(x)

The encoder compares instead of looking: it decodes the latent it has, finds by least squares how the cells of that
image should move to match the given one (Lucas & Kanade 1981), and corrects the latent, a few times over. A network
that is shown where it is wrong has little to learn. It is not the paper's, which knows nothing of places; see Marino
et al. 2018 for encoders that iterate and Shu et al. 2018 for autoencoders that deform.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from brainldm.nets.autoencoder import (
    LOG_VARIANCE_RANGE,
    Autoencoder,
    AutoencoderConfig,
    Chain,
    LatentDistribution,
    ResidualBlock,
)
from brainldm.nets.blocks import (
    Convolution,
    at_full_precision,
    channels_last,
    check_at_least_one,
    check_divisible,
    check_widths,
    fold,
    unfold,
    zeroed,
)

_FIRST_ATLAS_NOISE = 0.02  # of the atlases beside the mean image, so that they differ
_CELLS_PER_UNIT = 0.5  # how far one unit of a latent's first three channels moves a cell, to begin with
# The networks' last convolutions are taken at a fifth: what Adam adds to weights in a step, times a thousand inputs,
# would move cells by more than they are apart.
_GAIN = 0.2
_WRONG_GAIN = 4.0  # brings what is wrong with an image near the size of latents
# Least squares of a displacement: how much the gradients' squares are raised, in grey values squared and as a share,
# so that a cell without an edge stays where it is; and how often they are averaged over neighbours.
_RIDGE, _RIDGE_SHARE = 3e-5, 0.02
_AVERAGED_TIMES = (1, 3)
_MOST_CELLS = 1.0  # further than that the straight line through an edge tells nothing


@dataclass(frozen=True)
class AtlasAutoencoderConfig:
    """Widths of an atlas autoencoder for images of `grid_XYZ` voxels: `cell` voxels along each axis for one of the
    latent, `channels` and `res_blocks` of the encoder and of the decoder, and how often the encoder compares."""

    grid_XYZ: tuple[int, int, int]
    cell: int
    latent_channels: int
    channels: int
    res_blocks: int
    norm_groups: int
    atlases: int
    passes: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid_XYZ", tuple(self.grid_XYZ))
        check_divisible(self.grid_XYZ, self.cell, "the grid of registered images")
        check_widths((self.channels,), self.norm_groups, self.norm_eps)
        check_at_least_one(cell=self.cell, res_blocks=self.res_blocks, atlases=self.atlases, passes=self.passes)
        if self.latent_channels < 3:
            raise ValueError(f"latent_channels is {self.latent_channels}: a displacement alone takes 3")

    @property
    def downsampling(self) -> int:
        """Voxels along an image's edge for one of the latent."""
        return self.cell

    @property
    def cells_XYZ(self) -> tuple[int, int, int]:
        x, y, z = (n // self.cell for n in self.grid_XYZ)
        return x, y, z

    def latent_shape_CXYZ(self, grid_XYZ: tuple[int, ...]) -> tuple[int, int, int, int]:
        """The latent of an image on that grid; ValueError for another than the one that images are registered to."""
        if tuple(grid_XYZ) != self.grid_XYZ:
            raise ValueError(
                f"the image grid is {tuple(grid_XYZ)}: this autoencoder knows the places of {self.grid_XYZ} alone"
            )
        return self.latent_channels, *self.cells_XYZ


class PlaceFeatures(nn.Module):
    """Adds to a feature map what was learnt of each of its places; 0 at first."""

    def __init__(self, channels: int, shape_XYZ: tuple[int, int, int]) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.zeros(1, channels, *shape_XYZ))

    def forward(self, x_BCXYZ: torch.Tensor) -> torch.Tensor:
        return x_BCXYZ + self.features


class AtlasAutoencoder(nn.Module):
    """Variational autoencoder of images (B, 1, *config.grid_XYZ) in 0..1. `set_atlas` gives it a mean image to begin
    with: then its first reconstructions are that image, moved."""

    def __init__(self, config: AtlasAutoencoderConfig, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        latent, voxels = config.latent_channels, config.cell**3
        moves = 3 * len(_AVERAGED_TIMES)
        seen = voxels + moves + latent  # what is wrong, how cells should move, the latent so far
        self.encoder = Chain(_blocks(config, seen, 2 * latent), checkpointing=checkpointing)
        self.decoder = Chain(_blocks(config, latent, 3 + config.atlases + voxels), checkpointing=checkpointing)
        # A way past both networks, by which the latent's first three channels begin as the displacement.
        self.latent_of_displacement = _handing_on(moves, moves - 3, latent, 1 / _CELLS_PER_UNIT)
        self.displacement_of_latent = _handing_on(latent, 0, 3, _CELLS_PER_UNIT)
        self.atlases = nn.Parameter(_FIRST_ATLAS_NOISE * torch.randn(1, config.atlases, *config.grid_XYZ))

    def set_log_variance(self, value: float) -> None:
        """Makes the encoder begin with that logarithm of the latent's variance, everywhere."""
        last = self.encoder.blocks[-1]
        assert isinstance(last, Convolution) and last.conv.bias is not None
        nn.init.constant_(last.conv.bias[self.config.latent_channels :], value)

    def set_atlas(self, mean_image_XYZ: torch.Tensor) -> None:
        """Makes that image the first atlas, the one of which an untrained decoder takes all."""
        self.atlases.data[0, 0] = mean_image_XYZ

    @property
    def exact_parts(self) -> tuple[nn.Module, ...]:
        """What runs in the weights' own precision whatever the context: small and at either end of the latent."""
        ends = self.encoder.blocks[-1], self.decoder.blocks[-1]
        return (*ends, self.latent_of_displacement, self.displacement_of_latent)

    def encode(self, image_BCXYZ: torch.Tensor, passes: int | None = None) -> LatentDistribution:
        """The latent's distribution, float32, after `passes` comparisons (by default the config's). Gradients pass
        through the last alone. ValueError for images on another grid."""
        latent_CXYZ = self.config.latent_shape_CXYZ(tuple(image_BCXYZ.shape[2:]))
        z_BCXYZ = image_BCXYZ.new_zeros(len(image_BCXYZ), *latent_CXYZ)
        with torch.no_grad():
            for _ in range((self.config.passes if passes is None else passes) - 1):
                z_BCXYZ = self._corrected(image_BCXYZ, z_BCXYZ).mean_BCXYZ
        return self._corrected(image_BCXYZ, z_BCXYZ)

    def _corrected(self, image_BCXYZ: torch.Tensor, z_BCXYZ: torch.Tensor) -> LatentDistribution:
        with torch.no_grad():
            explained_BCXYZ = self.decode(z_BCXYZ)
            wrong_BCXYZ = image_BCXYZ - explained_BCXYZ
            moves_BCXYZ = displacements(wrong_BCXYZ, explained_BCXYZ, self.config.cell)
        wrong_BCXYZ = _WRONG_GAIN * fold(wrong_BCXYZ, self.config.cell)
        seen_BCXYZ = torch.cat([wrong_BCXYZ, moves_BCXYZ, z_BCXYZ], dim=1)
        answer_BCXYZ = self.encoder(channels_last(seen_BCXYZ)).float()
        step_BCXYZ, log_variance_BCXYZ = answer_BCXYZ.chunk(2, dim=1)
        step_BCXYZ = at_full_precision(self.latent_of_displacement, moves_BCXYZ) + _GAIN * step_BCXYZ
        return LatentDistribution(z_BCXYZ + step_BCXYZ, log_variance_BCXYZ.clamp(*LOG_VARIANCE_RANGE))

    def decode(self, latent_BCXYZ: torch.Tensor) -> torch.Tensor:
        """The image of a latent, float32. Values lie near 0..1 by training, not by force."""
        latent_BCXYZ = channels_last(latent_BCXYZ)
        answer_BCXYZ = _GAIN * self.decoder(latent_BCXYZ).float()
        straight_BCXYZ = at_full_precision(self.displacement_of_latent, latent_BCXYZ).float()
        return self._composed(straight_BCXYZ, answer_BCXYZ)

    def _composed(self, straight_BCXYZ: torch.Tensor, answer_BCXYZ: torch.Tensor) -> torch.Tensor:
        """Atlases moved (on top of `straight`) and weighted as the decoder's answer says, and its residual added."""
        config = self.config
        moves_BCXYZ, weights_BKXYZ, residual_BCXYZ = answer_BCXYZ.split([3, config.atlases, config.cell**3], dim=1)
        first_K = torch.zeros(config.atlases, device=weights_BKXYZ.device)
        first_K[0] = 1
        weights_BKXYZ = weights_BKXYZ + first_K[:, None, None, None]
        fields_BCXYZ = F.interpolate(
            torch.cat([straight_BCXYZ + moves_BCXYZ, weights_BKXYZ], dim=1).contiguous(),
            scale_factor=config.cell,
            mode="trilinear",
        )
        moved_BKXYZ = warped(self.atlases, config.cell * fields_BCXYZ[:, :3])
        image_BCXYZ = (moved_BKXYZ * fields_BCXYZ[:, 3:]).sum(dim=1, keepdim=True)
        return image_BCXYZ + unfold(residual_BCXYZ, config.cell)


def _blocks(config: AtlasAutoencoderConfig, in_channels: int, out_channels: int) -> list[nn.Module]:
    width, groups, eps = config.channels, config.norm_groups, config.norm_eps
    return [
        Convolution(in_channels, width),
        PlaceFeatures(width, config.cells_XYZ),
        *(ResidualBlock(width, width, groups, eps) for _ in range(config.res_blocks)),
        nn.GroupNorm(groups, width, eps),
        nn.SiLU(),
        zeroed(Convolution(width, out_channels)),
    ]


def _handing_on(in_channels: int, first: int, out_channels: int, weight: float) -> Convolution:
    """A 1 x 1 x 1 convolution whose first three outputs begin as `weight` times three inputs from `first` on."""
    convolution = Convolution(in_channels, out_channels, kernel=1)
    zeroed(convolution)
    with torch.no_grad():
        for axis in range(3):
            convolution.conv.weight[axis, first + axis] = weight
    return convolution


def warped(maps_BKXYZ: torch.Tensor, displacement_BCXYZ: torch.Tensor) -> torch.Tensor:
    """maps(x + displacement(x)), linear between voxels, the outermost beyond them; displacements are in voxels along
    X, Y and Z. One set of maps serves a whole batch."""
    shape_XYZ = displacement_BCXYZ.shape[2:]
    # grid_sample counts from -1 to 1 between the outer faces of the outermost voxels, and names the axes Z, Y, X.
    axes = [(2 * torch.arange(n, device=displacement_BCXYZ.device) + 1) / n - 1 for n in shape_XYZ]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    halves = torch.tensor([n / 2 for n in shape_XYZ], device=displacement_BCXYZ.device)[:, None, None, None]
    points_BXYZ3 = (places + displacement_BCXYZ / halves).flip(1).permute(0, 2, 3, 4, 1)
    maps_BKXYZ = maps_BKXYZ.expand(len(displacement_BCXYZ), -1, -1, -1, -1)
    return F.grid_sample(maps_BKXYZ, points_BXYZ3, padding_mode="border", align_corners=False)


def displacements(wrong_B1XYZ: torch.Tensor, explained_B1XYZ: torch.Tensor, cell: int) -> torch.Tensor:
    """How the cells of `explained` should move so that it loses `wrong` (what the image has more), in cells:
    (B, 3 n, x, y, z), X, Y and Z for each of n breadths of averaging, narrow first.

    The d that minimises the squares of wrong - gradient . d over a neighbourhood (Lucas & Kanade 1981), a bit ridged.
    """
    gradient = [_slope(explained_B1XYZ, axis) for axis in (2, 3, 4)]
    pairs = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
    products = [wrong_B1XYZ * g for g in gradient] + [gradient[i] * gradient[j] for i, j in pairs]
    sums_B9XYZ = F.avg_pool3d(torch.cat(products, dim=1), cell)
    found, averaged = [], 0
    for times in _AVERAGED_TIMES:
        for _ in range(times - averaged):
            sums_B9XYZ = F.avg_pool3d(sums_B9XYZ, 3, stride=1, padding=1, count_include_pad=False)
        averaged = times
        wanted = sums_B9XYZ[:, :3]
        xx, yy, zz, xy, xz, yz = sums_B9XYZ[:, 3:].unbind(1)
        ridge = _RIDGE + _RIDGE_SHARE * (xx + yy + zz)
        rows = [torch.stack(row, 1) for row in ((xx + ridge, xy, xz), (xy, yy + ridge, yz), (xz, yz, zz + ridge))]
        matrix_BXYZ33 = torch.stack(rows, dim=1).permute(0, 3, 4, 5, 1, 2)
        moves_BXYZ3 = torch.linalg.solve(matrix_BXYZ33, wanted.permute(0, 2, 3, 4, 1))
        found.append((moves_BXYZ3 / cell).clamp(-_MOST_CELLS, _MOST_CELLS).permute(0, 4, 1, 2, 3))
    return torch.cat(found, dim=1)


def _slope(map_BCXYZ: torch.Tensor, axis: int) -> torch.Tensor:
    """Central differences a voxel along one axis; 0 at its ends."""
    n = map_BCXYZ.shape[axis]
    inner = (map_BCXYZ.narrow(axis, 2, n - 2) - map_BCXYZ.narrow(axis, 0, n - 2)) / 2
    sides = [0, 0] * (map_BCXYZ.ndim - 1 - axis) + [1, 1]
    return F.pad(inner, sides)


AnyAutoencoder = Autoencoder | AtlasAutoencoder
AnyAutoencoderConfig = AutoencoderConfig | AtlasAutoencoderConfig


def build_autoencoder(config: AnyAutoencoderConfig, *, checkpointing: bool = False) -> AnyAutoencoder:
    """The autoencoder that a config is of."""
    if isinstance(config, AtlasAutoencoderConfig):
        return AtlasAutoencoder(config, checkpointing=checkpointing)
    return Autoencoder(config, checkpointing=checkpointing)
