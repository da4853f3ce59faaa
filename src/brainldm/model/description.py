"""What model.json says: everything that has to be known to use the weights beside it rightly.

The description is data, never code: strict pydantic models over plain JSON, unknown fields refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator, with_config

from brainldm.base.covariates import COVARIATES, UNITS, CovariateRanges, Covariates, conditions
from brainldm.base.joint import CovariateModel
from brainldm.base.volume import Grid
from brainldm.diffusion.schedule import Schedule, rectified, scaled_linear
from brainldm.model.response import LEAST_SLOPE, own_slopes, told_for
from brainldm.nets.atlas import AnyAutoencoderConfig, AtlasAutoencoderConfig
from brainldm.nets.autoencoder import AutoencoderConfig
from brainldm.nets.gan import GanConfig
from brainldm.nets.unet import UNetConfig

FORMAT_VERSION: Literal[1] = 1
AUTOENCODER_NAME = "autoencoder.safetensors"
UNET_NAME = "unet.safetensors"
POPULATION_NAME = "latent_population.safetensors"
VOLUME_READER_NAME = "volume_reader.safetensors"
GENERATOR_NAME = "generator.safetensors"
WeightsDtype = Literal["float32", "float16"]  # as stored; loaded, both are float32


class Strict(BaseModel):
    """Refuses what it does not know, so that a newer or foreign description is never half understood."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ScheduleDescription(Strict):
    """The noise schedule; `scaled_linear` is the paper's (linear in the square root of beta), `rectified` the straight
    line of rectified flow, which has no betas."""

    kind: Literal["scaled_linear", "rectified"] = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0205
    steps: int = 1000

    def build(self) -> Schedule:
        if self.kind == "rectified":
            return rectified(self.steps)
        return scaled_linear(self.beta_start, self.beta_end, self.steps)


# Of the networks model.json says what their own configurations say, as strictly.
for _config in (AutoencoderConfig, AtlasAutoencoderConfig, UNetConfig):
    with_config(ConfigDict(extra="forbid"))(_config)


class LatentDescription(Strict):
    """The space the diffusion works in: U-Net latent = autoencoder latent x scale, or with `by_population` what its
    voxels' lines leave of it (latent_population.py), which a file of its own holds.

    Mean and standard deviation per channel are those of the training people; None where nobody published them.
    """

    shape_CXYZ: tuple[int, int, int, int]
    scale: float = Field(gt=0)
    channel_mean: tuple[float, ...] | None = None
    channel_std: tuple[float, ...] | None = None
    by_population: bool = False


class GridDescription(Strict):
    """Where a generated image lies: RAS+, isotropic, mm.

    `network_x` is the direction in which the network sees the first axis. The published weights were trained on images
    stored from right to left; theirs are turned before they are written, so that every file is RAS+.
    """

    name: str
    shape_XYZ: tuple[int, int, int]
    voxel_mm: float = Field(gt=0)
    origin_mm: tuple[float, float, float]
    network_x: Literal["left_to_right", "right_to_left"] = "left_to_right"

    @classmethod
    def of(cls, grid: Grid, network_x: Literal["left_to_right", "right_to_left"] = "left_to_right") -> GridDescription:
        return cls(
            name=grid.name,
            shape_XYZ=grid.shape_XYZ,
            voxel_mm=grid.voxel_mm,
            origin_mm=grid.origin_mm,
            network_x=network_x,
        )

    def build(self) -> Grid:
        return Grid(self.name, self.shape_XYZ, self.voxel_mm, self.origin_mm)


class ResponseDescription(Strict):
    """The lines of response.py for a model: how it shows ventricles and brain of what it is told, found on so many
    `brains` of its own, drawn with `seed` and measured by `instrument`."""

    intercepts_mm3: tuple[float, float]
    slopes: tuple[tuple[float, float, float, float], tuple[float, float, float, float]]
    brains: int
    seed: int
    instrument: str

    @model_validator(mode="after")
    def _can_be_inverted(self) -> ResponseDescription:
        for name, slope in own_slopes(np.array(self.slopes)).items():
            if not slope >= LEAST_SLOPE:
                raise ValueError(f"{name} is shown with a slope of {slope:.2f}; it must be {LEAST_SLOPE} or more")
        return self

    def told_for(self, rows: Sequence[Covariates]) -> list[Covariates]:
        return told_for(rows, np.array(self.intercepts_mm3), np.array(self.slopes))


class CovariatesDescription(Strict):
    """The covariates in the network's order, their units and training ranges, and their joint distribution.

    The distribution holds no individual's row: quantiles and correlations of the training people. `scaling` is how the
    network is told them (base/covariates.py), `dropout` how often its training kept them back; guidance needs that.
    With a `response` the network is told other volumes than are asked, so that it shows those.
    """

    names: tuple[str, ...] = COVARIATES
    ranges: dict[str, dict[str, float | str]]
    joint: dict | None = None
    scaling: Literal["min_max", "equalised"] = "min_max"
    dropout: float = Field(default=0.0, ge=0, le=1)
    response: ResponseDescription | None = None

    @model_validator(mode="after")
    def _are_the_known_ones(self) -> CovariatesDescription:
        if self.names != COVARIATES:
            raise ValueError(f"the covariates must be {', '.join(COVARIATES)}, not {', '.join(self.names)}")
        for name in COVARIATES:
            if self.ranges.get(name, {}).get("units") != UNITS[name]:
                raise ValueError(f"the range of {name} must be in {UNITS[name]!r}")
        if self.scaling == "equalised" and self.joint is None:
            raise ValueError("equalised covariates need the distribution by which they are")
        return self

    def fitted_ranges(self) -> CovariateRanges:
        return CovariateRanges.from_json(self.ranges)

    def joint_model(self) -> CovariateModel | None:
        return None if self.joint is None else CovariateModel.from_json(self.joint)

    def conditions(self, rows: Sequence[Covariates]) -> np.ndarray:
        """What the network is told where these people are asked for: float32, (n, 4)."""
        equalised_by = self.joint_model() if self.scaling == "equalised" else None
        return conditions(self.told(rows), self.fitted_ranges(), equalised_by)

    def told(self, rows: Sequence[Covariates]) -> list[Covariates]:
        """Whom the network is told of, where these people are asked for."""
        return list(rows) if self.response is None else self.response.told_for(rows)


class VolumeReaderDescription(Strict):
    """What of volume_reader.py is no tensor: the cells' size, and training people's volumes (ventricles, brain)."""

    cell_voxels: int = Field(ge=1)
    centre_mm3: tuple[float, float]
    spread_mm3: tuple[float, float]
    lowest_mm3: tuple[float, float]
    highest_mm3: tuple[float, float]


class WeightsFile(Strict):
    bytes: int
    sha256: str


class ModelDescription(Strict):
    """What model.json says of a model of any kind."""

    format_version: Literal[1] = FORMAT_VERSION
    kind: str
    name: str
    covariates: CovariatesDescription
    grid: GridDescription
    preprocessing: dict
    training: dict
    quality: dict | None = None  # what training images look like in a few figures (cohort/quality.py), for --gate
    licence: str
    weights: dict[str, WeightsFile]
    weights_dtype: WeightsDtype = "float32"

    @property
    def decodes(self) -> int:
        """How often each image is decoded, or a generator called."""
        return 1

    @property
    def identity(self) -> str:
        """The first digits of a hash of all that generates: the weights, and how covariates and latents are told them.
        Its name, training and licence may change without it."""
        told_of_it = {"name", "preprocessing", "training", "quality", "licence"}
        # Without defaults, so that a field that is new tomorrow leaves today's models their identity.
        facts = self.model_dump(mode="json", exclude=told_of_it, exclude_defaults=True)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


class LatentDiffusionDescription(ModelDescription):
    """model.json of a latent diffusion model."""

    kind: Literal["latent_diffusion"] = "latent_diffusion"
    autoencoder: AnyAutoencoderConfig
    unet: UNetConfig
    schedule: ScheduleDescription = ScheduleDescription()
    target: Literal["eps", "v", "flow"] = "eps"
    latent: LatentDescription
    volume_reader: VolumeReaderDescription | None = None

    @property
    def decodes(self) -> int:
        return 1 if self.volume_reader is None else 2

    @model_validator(mode="after")
    def _parts_fit(self) -> LatentDiffusionDescription:
        channels = self.autoencoder.latent_channels
        downsampling = self.autoencoder.downsampling
        expected = (channels, *(n // downsampling for n in self.grid.shape_XYZ))
        if tuple(self.latent.shape_CXYZ) != expected:
            raise ValueError(f"latent shape {self.latent.shape_CXYZ} does not fit grid and autoencoder: {expected}")
        if self.unet.in_channels != channels + len(self.covariates.names) or self.unet.out_channels != channels:
            raise ValueError("the U-Net's channels do not fit the latent channels plus the covariates")
        return self


class GanNetDescription(Strict):
    channels: tuple[int, ...]
    noise_features: int
    covariates: int
    norm_groups: int


class GanDescription(ModelDescription):
    """model.json of a GAN baseline: only the generator is kept."""

    kind: Literal["lsgan", "vaegan"]
    generator: GanNetDescription

    def build(self) -> GanConfig:
        return GanConfig(shape_XYZ=self.grid.shape_XYZ, **self.generator.model_dump())

    @model_validator(mode="after")
    def _net_fits(self) -> GanDescription:
        self.build()
        if self.generator.covariates not in (0, len(self.covariates.names)):
            raise ValueError(f"a generator of {self.generator.covariates} covariates: it must be 0 or all of them")
        return self
