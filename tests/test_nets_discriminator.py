"""The patch discriminator and the least-squares losses."""

from __future__ import annotations

import pytest
import torch

from brainldm.nets.discriminator import discriminator_loss, generator_loss, patch_discriminator


def test_it_judges_patches_and_both_sides_learn_from_it() -> None:
    torch.manual_seed(0)
    discriminator = patch_discriminator(channels=4, layers=2)
    fake = torch.rand(2, 1, 16, 24, 16, requires_grad=True)
    judged = discriminator(fake)[-1]
    assert judged.shape[:2] == (2, 1)
    assert judged[0, 0].numel() > 1
    generator_loss(judged).backward()
    assert fake.grad is not None and fake.grad.abs().max() > 0
    discriminator.zero_grad()
    real = torch.rand(2, 1, 16, 24, 16)
    discriminator_loss(discriminator(real)[-1], discriminator(fake.detach())[-1]).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in discriminator.parameters())


def test_the_losses_are_zero_for_a_perfect_player() -> None:
    yes, no = torch.ones(2, 1, 3, 4, 3), torch.zeros(2, 1, 3, 4, 3)
    assert generator_loss(yes) == 0
    assert discriminator_loss(judged_real=yes, judged_fake=no) == 0
    assert generator_loss(no) == 1
    assert discriminator_loss(judged_real=no, judged_fake=yes) == 1


def test_the_losses_are_monai_s() -> None:
    from monai.losses import PatchAdversarialLoss

    theirs = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 2, 1, 3, 4, 5, generator=generator)
    torch.testing.assert_close(generator_loss(fake), theirs(fake, target_is_real=True, for_discriminator=False))
    halves = [theirs(real, True, True), theirs(fake, False, True)]
    torch.testing.assert_close(discriminator_loss(real, fake), 0.5 * sum(halves))


@pytest.mark.parametrize("wrong", [{"channels": 0, "layers": 3}, {"channels": 8, "layers": 0}])
def test_sizes_that_make_no_network_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        patch_discriminator(**wrong)
