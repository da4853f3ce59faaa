"""The line that each latent voxel follows through a population, and what it leaves."""

from __future__ import annotations

import math

import pytest
import torch

from brainldm.model.latent_population import LatentPopulation

SHAPE_CXYZ = (2, 3, 4, 5)


def drawn(people: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents that follow a known line in three covariates, with noise of known size; covariates; the slopes."""
    generator = torch.Generator().manual_seed(0)
    condition_NF = torch.rand((people, 3), generator=generator)
    slopes_FCXYZ = torch.randn((3, *SHAPE_CXYZ), generator=generator)
    noise = 0.1 * torch.randn((people, *SHAPE_CXYZ), generator=generator)
    return 2 + torch.einsum("nf,fcxyz->ncxyz", condition_NF, slopes_FCXYZ) + noise, condition_NF, slopes_FCXYZ


def fitted(mean_NCXYZ: torch.Tensor, log_variance: float, condition_NF: torch.Tensor) -> LatentPopulation:
    """Of latents that come some people at a time, all as variable as that in themselves."""
    parts = mean_NCXYZ.split(64)
    return LatentPopulation.fitted(((part, torch.full_like(part, log_variance)) for part in parts), condition_NF)


def test_the_line_is_found_and_the_rest_has_unit_variance() -> None:
    mean, condition, slopes = drawn()
    found = fitted(mean, -math.inf, condition)
    torch.testing.assert_close(found.slopes_FCXYZ, slopes, atol=0.15, rtol=0)
    torch.testing.assert_close(found.mean_CXYZ, torch.full(SHAPE_CXYZ, 2.0), atol=0.15, rtol=0)
    left = found.standardised(mean, condition)
    assert abs(float(left.mean())) < 0.01
    assert float(left.std()) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(found.restored(left, condition), mean)


def test_the_encoder_s_own_variance_counts() -> None:
    mean, condition, _ = drawn()
    found = fitted(mean, 2 * math.log(0.3), condition)
    assert float(found.std_CXYZ.mean()) == pytest.approx((0.1**2 + 0.3**2) ** 0.5, rel=0.02)


def test_a_covariate_that_is_the_same_in_everybody_gets_no_slope_of_its_own() -> None:
    mean, condition, _ = drawn()
    condition[:, 1] = 0.0
    found = fitted(mean, -math.inf, condition)
    assert torch.isfinite(found.slopes_FCXYZ).all()
    assert float(found.slopes_FCXYZ[1].abs().max()) < 1e-6


def test_air_is_not_blown_up() -> None:
    mean, condition, _ = drawn()
    mean[:, :, 0] = 1.0
    found = fitted(mean, -math.inf, condition)
    assert float(found.standardised(mean, condition)[:, :, 0].abs().max()) < 1e-3


def test_too_few_people_are_refused() -> None:
    mean, condition, _ = drawn(4)
    with pytest.raises(ValueError, match="4 people cannot carry a line"):
        fitted(mean, -math.inf, condition)
