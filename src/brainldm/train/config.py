"""What a training run is made of: frozen dataclasses that recipes return and run.json records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from pydantic import Field

from brainldm.nets.atlas import AnyAutoencoderConfig

StageName = Literal["autoencoder", "diffusion"]
STAGES: tuple[StageName, ...] = get_args(StageName)
PerceptualName = Literal["random", "lpips-squeeze", "medicalnet", "encoder"]
PERCEPTUAL_DISTANCES: tuple[PerceptualName, ...] = get_args(PerceptualName)

# What a value may be; train/settings asks.
Count = Annotated[int, Field(ge=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images: those of the authors' sister projects (paper.md 3.1) where a recipe asks.

    A flip (left for right) teaches that brains are symmetric, which they are not quite: off unless a recipe asks.
    """

    flip_probability: Share = 0.0
    affine_probability: Share = 0.0
    translation_voxels: NotNegative = 1.0  # at most, along each axis
    scaling: NotNegative = 0.02  # at most, larger or smaller
    shift_probability: Share = 0.0
    intensity_shift: NotNegative = 0.05  # at most, up or down
    gamma_probability: Share = 0.0
    gamma_range: tuple[Positive, Positive] = (0.97, 1.03)


NO_AUGMENTATION = Augmentation()
PAPER_AUGMENTATION = Augmentation(
    flip_probability=0.5, affine_probability=0.1, shift_probability=0.1, gamma_probability=0.1
)


@dataclass(frozen=True)
class AutoencoderStageConfig:
    """Stage 1: weights and rates as the authors use them (paper.md 3.1), unless a recipe says otherwise."""

    net: AnyAutoencoderConfig
    steps: Count
    batch: Count = 1
    learning_rate: Positive = 5e-5
    warmup_steps: NotNegativeInt = 0
    cosine_decay: bool = False
    gradient_clip: Positive = 1.0
    kl_weight: NotNegative = 1e-8
    # The encoder's log-variance at first. At 0 (torch's own) it begins with noise as large as its signal; with less it
    # begins as a plain autoencoder.
    initial_log_variance: float = 0.0
    perceptual_weight: NotNegative = 0.002
    # A stand-in for the authors' lpips-squeeze: all but this one need weights of the user's (train/perceptual).
    perceptual: PerceptualName = "random"
    # Not the paper's: the difference of histograms in blocks of 8 voxels, which keeps volumes (train/local_histogram).
    local_histogram_weight: NotNegative = 0.0
    adversarial_weight: NotNegative = 0.005
    adversarial_from_step: NotNegativeInt = 0  # counted from 0, whatever the number of steps
    discriminator_learning_rate: Positive = 1e-4
    discriminator_channels: Count = 96
    discriminator_layers: Count = 3
    checkpointing: bool = False
    augmentation: Augmentation = NO_AUGMENTATION

    def reaches_adversarial(self, steps: int) -> bool:
        """Whether so many steps train the adversarial loss, where there is one."""
        return self.adversarial_weight == 0 or steps > self.adversarial_from_step


@dataclass(frozen=True)
class DiffusionStageConfig:
    """Stage 2. The U-Net's input and output channels follow from the latent and the covariates."""

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    head_channels: tuple[int, ...]
    steps: Count
    batch: Count = 4
    res_blocks: Count = 2
    norm_groups: Count = 32
    learning_rate: Positive = 2.5e-5
    warmup_steps: NotNegativeInt = 0
    cosine_decay: bool = False
    gradient_clip: Positive | None = None
    ema_decay: Share | None = 0.999
    target: Literal["eps", "v", "flow"] = "eps"
    schedule: Literal["scaled_linear", "rectified"] = "scaled_linear"
    beta_start: Positive = 0.0015
    beta_end: Positive = 0.0205
    schedule_steps: Count = 1000
    # How training draws timesteps: all alike, or more from the middle (Esser et al. 2024), where most is decided.
    timestep_draw: Literal["uniform", "logit_normal"] = "uniform"
    # How much more noise than that: t becomes shift t / (1 + (shift - 1) t) (ibid.). What neighbours share
    # (sizes, shapes, contrast) shows through far more noise than one voxel of the latent does, and is decided there.
    timestep_shift: Positive = 1.0
    latent_scale: Positive | None = None  # None: measured, 1 / standard deviation; 1.0 as the published bundle
    # Take each latent voxel's mean for the given covariates out, and divide by what is left (model/latent_population).
    latent_population: bool = False
    latent_views: Count = 1  # encodings kept of each person: the image as it is, and augmented ones
    augmentation: Augmentation = NO_AUGMENTATION
    # Tell the volumes that decoded latents show, not the recorded ones (train/kept_volumes).
    volumes_as_decoded: bool = False
    # Read the volumes of each image that is generated, and correct its latent (model/volume_reader).
    volume_reader: bool = False
    covariate_scaling: Literal["min_max", "equalised"] = "min_max"
    covariates_in_time: bool = False
    fold: Count = 1  # latent voxels along each axis that become channels of the U-Net
    condition_dropout: Share = 0.0  # how often nothing is told, which guidance needs (Ho & Salimans 2022)
    checkpointing: bool = False


@dataclass(frozen=True)
class GanStageConfig:
    """A GAN baseline. Rates and momentum are those that LSGAN's authors use; `reconstruction_weight` is Larsen's gamma,
    on a mean over features where his is on a sum.

    `kl_weight` is on means too, where Larsen's sums would be a few thousandths. With that little the encoder soon marks
    its noise as its own, and the generator makes brains of such noise and black images of any other: so it did in 500
    to 650 steps at 4 mm with 0.001, 0.01 and 0.1 and a `reconstruction_weight` of 10; with both at 1 it did not.
    """

    kind: Literal["lsgan", "vaegan"]
    channels: tuple[int, ...]  # finest first
    steps: Count
    batch: Count = 2
    noise_features: Count = 128
    conditioned: bool = True
    norm_groups: Count = 8
    learning_rate: Positive = 2e-4
    discriminator_learning_rate: Positive = 2e-4
    reconstruction_weight: NotNegative = 1.0
    kl_weight: NotNegative = 1.0
    gradient_clip: Positive = 10.0
    seed: NotNegativeInt = 0


@dataclass(frozen=True)
class PredictorConfig:
    """A predictor of age or sex: stochastic gradient descent with momentum, as Cole et al. 2017. `averaging` voxels
    along each axis become one before the first convolution."""

    steps: Count = 2000
    batch: Count = 8
    learning_rate: Positive = 0.01
    warmup_steps: NotNegativeInt = 50
    weight_decay: NotNegative = 5e-5
    gradient_clip: Positive = 5.0
    shift_voxels: NotNegativeInt = 2
    averaging: Count = 1
    seed: NotNegativeInt = 0


@dataclass(frozen=True)
class Recipe:
    """A whole run. `minutes_share` is how a time budget is divided between the stages; `settings` are the values that
    are not those of the recipe of that name (train/settings)."""

    name: str
    autoencoder: AutoencoderStageConfig
    diffusion: DiffusionStageConfig
    settings: tuple[str, ...] = ()
    seed: NotNegativeInt = 0
    checkpoint_minutes: Positive = 5.0
    minutes_share: Annotated[dict[StageName, Share], Field(min_length=2)] = field(
        default_factory=lambda: {"autoencoder": 0.5, "diffusion": 0.5}
    )
