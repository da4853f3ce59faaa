"""Whole trajectories beside MONAI's own scheduler and networks: the published way of sampling, number for number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from brainldm.diffusion.schedule import scaled_linear
from brainldm.diffusion.solvers import SAMPLERS
from brainldm.nets.autoencoder import Autoencoder, AutoencoderConfig
from brainldm.nets.unet import DiffusionUNet, UNetConfig, with_covariates
from test_nets_autoencoder import monai_autoencoder
from test_nets_unet import SMALL, monai_unet, wake

CONDITION = torch.tensor([[0.0, 0.5, 0.2, 0.47]])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    return ((found - true).norm() / true.norm()).item()


def scheduler(kind: str, steps: int):  # type: ignore[no-untyped-def]  # of MONAI
    from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

    makers = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
    made = makers[kind](1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0205, clip_sample=False)
    made.set_timesteps(steps)
    return made


@torch.no_grad()
def theirs_ddim(unet: torch.nn.Module, start: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
    """The bundle's loop: covariates as maps beside the latent and as context."""
    steps, latent = scheduler("ddim", len(timesteps)), start
    maps = CONDITION[:, :, None, None, None].expand(-1, -1, *start.shape[2:])
    for t in timesteps:
        joined = torch.cat([latent, maps], dim=1)
        eps = unet(joined, timesteps=torch.tensor([t]), context=CONDITION[:, None])
        latent, _ = steps.step(eps, t, latent)
    return latent


def ours(unet: DiffusionUNet) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda x, timesteps_B: unet(*with_covariates(x, timesteps_B, CONDITION))


def pair(config: UNetConfig) -> tuple[torch.nn.Module, DiffusionUNet]:
    theirs = wake(monai_unet(config)).eval()
    unet = DiffusionUNet(config).eval()
    unet.load_state_dict(theirs.state_dict())
    return theirs, unet


@torch.no_grad()
def test_fifty_steps_of_ddim_are_monai_s_at_the_published_timesteps() -> None:
    theirs, unet = pair(SMALL)
    start = draw(1, 3, 4, 8, 4)
    expected = theirs_ddim(theirs, start, list(range(980, -1, -20)))
    found = SAMPLERS["ddim"].run(ours(unet), lambda k: start, scaled_linear(), 50)
    assert relative_error(found, expected) < 1e-4
    # The decoder after it: the same image of the same latent.
    config = AutoencoderConfig(channels=(8, 16, 16), norm_groups=4)
    theirs_autoencoder = monai_autoencoder(config)
    autoencoder = Autoencoder(config)
    autoencoder.load_state_dict(theirs_autoencoder.state_dict())
    image = theirs_autoencoder.decode_stage_2_outputs(expected)
    assert relative_error(autoencoder.decode(found), image) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_ddpm_is_monai_s_given_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, unet = pair(SMALL)
    noise = [draw(1, 3, 4, 4, 4, seed=k) for k in range(1001)]
    steps, latent, number = scheduler("ddpm", 1000), noise[0], 0
    maps = CONDITION[:, :, None, None, None].expand(-1, -1, 4, 4, 4)

    def next_noise(*_: object, **__: object) -> torch.Tensor:
        nonlocal number
        number += 1
        return noise[number]

    monkeypatch.setattr("monai.networks.schedulers.ddpm.torch.randn", next_noise)
    for t in reversed(range(1000)):
        eps = theirs(torch.cat([latent, maps], dim=1), timesteps=torch.tensor([t]), context=CONDITION[:, None])
        latent, _ = steps.step(eps, t, latent)
    monkeypatch.undo()
    found = SAMPLERS["ddpm"].run(ours(unet), lambda k: noise[k], scaled_linear(), 1000)
    assert number == 999
    assert relative_error(found, latent) < 1e-4


@torch.no_grad()
def test_the_authors_first_code_is_followed_too() -> None:
    """Timesteps 981, 961, ..., 1, eta 1, ending at alpha_bar_0: transcribed from the formulas (Song et al. 2021, 12 and
    16), in float64, against the sampler `ddim-original`."""
    _, unet = pair(SMALL)
    schedule = scaled_linear()
    noise = [draw(1, 3, 4, 4, 4, seed=k) for k in range(51)]
    x = noise[0].double()
    timesteps = list(range(981, 0, -20))
    for k, t in enumerate(timesteps):
        now = schedule.alpha_bars[t]
        then = schedule.alpha_bars[timesteps[k + 1]] if k < 49 else schedule.alpha_bars[0]
        eps = ours(unet)(x.float(), torch.tensor([t])).double()
        x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        sigma = np.sqrt((1 - then) / (1 - now)) * np.sqrt(1 - now / then)
        x = np.sqrt(then) * x0 + np.sqrt(1 - then - sigma**2) * eps + sigma * noise[k + 1].double()
    found = SAMPLERS["ddim-original"].run(ours(unet), lambda k: noise[k], schedule, 50)
    assert relative_error(found.double(), x) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@torch.no_grad()
def test_fifty_steps_at_the_published_widths() -> None:
    """2.2 GB of weights twice; on a smaller latent, since what is proven is the arithmetic. Some minutes on two cores.

    The whole thing on the published grid as well is `bench/bench.py --exact`.
    """
    theirs, unet = pair(UNetConfig())
    start = draw(1, 3, 8, 12, 8)
    expected = theirs_ddim(theirs, start, list(range(980, -1, -20)))
    found = SAMPLERS["ddim"].run(ours(unet), lambda k: start, scaled_linear(), 50)
    assert relative_error(found, expected) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@torch.no_grad()
def test_encoding_and_decoding_at_the_published_widths() -> None:
    """A brain of 80 x 112 x 80 through both, in float32; `bench/bench.py --exact` decodes one on the full grid."""
    theirs = monai_autoencoder(AutoencoderConfig()).eval()
    autoencoder = Autoencoder(AutoencoderConfig()).eval()
    autoencoder.load_state_dict(theirs.state_dict())
    image, latent = draw(1, 1, 80, 112, 80), draw(1, 3, 10, 14, 10, seed=1)
    mean, sigma = theirs.encode(image)
    encoded = autoencoder.encode(image)
    assert relative_error(encoded.mean_BCXYZ, mean) < 1e-4
    assert relative_error((0.5 * encoded.log_variance_BCXYZ).exp(), sigma) < 1e-4
    assert relative_error(autoencoder.decode(latent), theirs.decode(latent)) < 1e-4
