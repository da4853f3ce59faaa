"""The autoencoder: the same function as MONAI's AutoencoderKL, and what ours adds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from brainldm.nets.autoencoder import (
    LOG_VARIANCE_RANGE,
    Autoencoder,
    AutoencoderConfig,
    LatentDistribution,
)

SMALL = AutoencoderConfig(channels=(8, 16, 16), norm_groups=4)
LAST = torch.channels_last_3d


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(config: AutoencoderConfig = SMALL, **options: bool) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(config, **options)


def monai_autoencoder(config: AutoencoderConfig) -> torch.nn.Module:
    """MONAI's, at the same widths and initialised by MONAI."""
    from monai.networks.nets import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        spatial_dims=3,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        latent_channels=config.latent_channels,
        channels=config.channels,
        num_res_blocks=config.res_blocks,
        attention_levels=(False,) * len(config.channels),
        norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    return ((found - true).abs().max() / true.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        AutoencoderConfig(in_channels=2, latent_channels=4, channels=(6, 12), norm_groups=3, res_blocks=1),
        AutoencoderConfig(channels=(8,), norm_groups=8, norm_eps=1e-3, res_blocks=3),
    ],
)
def test_same_as_monai_with_the_same_weights(config: AutoencoderConfig) -> None:
    theirs, ours = monai_autoencoder(config), build(config)
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the same
    image, latent = draw(2, config.in_channels, 8, 12, 16), draw(2, config.latent_channels, 2, 3, 4, seed=1)
    mean, sigma = theirs.encode(image)
    distribution = ours.encode(image)
    assert relative_error(distribution.mean_BCXYZ, mean) <= 1e-5
    assert relative_error((distribution.log_variance_BCXYZ / 2).exp(), sigma) <= 1e-5
    assert relative_error(ours.decode(latent), theirs.decode(latent)) <= 1e-5


@torch.no_grad()
def test_gradients_are_not_needed_for_the_same_result() -> None:
    """The in-place activation of inference is the activation of training (of a batch: single maps go to oneDNN)."""
    autoencoder, image = build(), draw(2, 1, 8, 12, 16)
    with torch.enable_grad():
        trained = autoencoder.decode(autoencoder.encode(image).mean_BCXYZ)
    inferred = autoencoder.decode(autoencoder.encode(image).mean_BCXYZ)
    assert torch.equal(inferred, trained.detach())


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_fold_shrinks_the_grid_before_the_first_convolution(factor: int) -> None:
    config = AutoencoderConfig(channels=(8, 16), norm_groups=4, res_blocks=1, fold=factor)
    autoencoder, image = build(config), draw(1, 1, 16, 24, 8)
    widest = []
    for module in autoencoder.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(lambda _, inputs, out: widest.append(max(out.shape[2:])))
    latent = autoencoder.encode(image).mean_BCXYZ
    assert latent.shape[1:] == config.latent_shape_CXYZ((16, 24, 8)) == (3, 8 // factor, 12 // factor, 4 // factor)
    assert autoencoder.decode(latent).shape == image.shape
    assert config.downsampling == 2 * factor
    assert max(widest) == 24 // factor  # so it does see the largest maps, and none is larger


def test_sample_is_mean_plus_sigma_noise_and_kl_is_the_textbook_s() -> None:
    mean, log_variance, noise = draw(2, 3, 2, 3, 4), draw(2, 3, 2, 3, 4, seed=1), draw(2, 3, 2, 3, 4, seed=2)
    distribution = LatentDistribution(mean, log_variance)
    sigma = (log_variance / 2).exp()
    torch.testing.assert_close(distribution.sample(noise), mean + sigma * noise)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, sigma), normal(0.0, 1.0)).sum(dim=(1, 2, 3, 4))
    torch.testing.assert_close(distribution.kl_B(), expected)
    standard = LatentDistribution(torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 3, 2, 2, 2))
    assert standard.kl_B().tolist() == [0.0]


def test_log_variance_is_held_in_its_range() -> None:
    autoencoder = build()
    for bias, limit in zip((-1e3, 1e3), LOG_VARIANCE_RANGE):
        torch.nn.init.constant_(autoencoder.quant_conv_log_sigma.conv.bias, bias)
        assert (autoencoder.encode(draw(1, 1, 8, 8, 8)).log_variance_BCXYZ == limit).all()


@pytest.mark.parametrize("factor", [1, 2])
def test_bfloat16_is_close_to_float32_and_ends_in_float32(factor: int) -> None:
    autoencoder = build(AutoencoderConfig(channels=(16, 32), norm_groups=4, res_blocks=1, fold=factor))
    image = draw(2, 1, 16, 24, 16)
    exact = autoencoder.decode(autoencoder.encode(image).mean_BCXYZ)
    autoencoder = autoencoder.to(memory_format=LAST)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16):
        latent = autoencoder.encode(image.contiguous(memory_format=LAST)).mean_BCXYZ
        rounded = autoencoder.decode(latent)
    assert latent.dtype == rounded.dtype == torch.float32
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.02
    # bfloat16 itself has 128 values to a doubling, so a few thousand voxels would share a few hundred values.
    assert len(rounded.unique()) > 0.5 * rounded.numel()
    rounded.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in autoencoder.encoder.parameters())


@torch.no_grad()
def test_memory_layout_changes_nothing_but_speed() -> None:
    autoencoder, image = build(), draw(2, 1, 8, 12, 16)
    plain = autoencoder.decode(autoencoder.encode(image).mean_BCXYZ)
    autoencoder = autoencoder.to(memory_format=LAST)  # type: ignore[call-overload]
    last = autoencoder.decode(autoencoder.encode(image.contiguous(memory_format=LAST)).mean_BCXYZ)
    assert relative_error(last, plain) <= 1e-5


def gradients(autoencoder: Autoencoder) -> dict[str, torch.Tensor]:
    distribution = autoencoder.encode(draw(2, 1, 8, 12, 16))
    image = autoencoder.decode(distribution.sample(draw(2, 3, 2, 3, 4, seed=1)))
    (image.square().mean() + 1e-3 * distribution.kl_B().mean()).backward()
    return {name: p.grad for name, p in autoencoder.named_parameters() if p.grad is not None}


def test_every_parameter_learns() -> None:
    autoencoder = build()
    found = gradients(autoencoder)
    assert set(found) == {name for name, _ in autoencoder.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_checkpointing_gives_the_same_gradients() -> None:
    kept, computed_again = gradients(build()), gradients(build(checkpointing=True))
    for name, gradient in kept.items():
        assert torch.equal(gradient, computed_again[name]), name


def test_checkpointing_keeps_fewer_feature_maps() -> None:
    def bytes_kept(run: Callable[[torch.Tensor], object], *shape: int) -> int:
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            run(draw(*shape))
        return kept

    plain, sparing = build(), build(checkpointing=True)
    latent, image = (1, 3, 4, 4, 4), (1, 1, 16, 16, 16)
    assert bytes_kept(sparing.decode, *latent) < 0.5 * bytes_kept(plain.decode, *latent)
    assert bytes_kept(sparing.encode, *image) < 0.1 * bytes_kept(plain.encode, *image), "maps between the blocks too"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"channels": (64, 100)}, "100 channels are not a positive multiple of norm_groups, 32"),
        ({"channels": ()}, "channels is empty"),
        ({"channels": (0, 32)}, "0 channels"),
        ({"norm_groups": 0}, "norm_groups is 0"),
        ({"norm_eps": 0.0}, "norm_eps 0.0"),
        ({"fold": 0}, "fold is 0: it must be at least 1"),
        ({"res_blocks": 0}, "res_blocks is 0"),
        ({"latent_channels": -1}, "latent_channels is -1"),
        ({"in_channels": 0}, "in_channels is 0"),
    ],
)
def test_a_wrong_config_is_refused_with_the_value_and_the_rule(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        AutoencoderConfig(**wrong)


def test_a_grid_that_does_not_divide_is_refused_before_the_work() -> None:
    with pytest.raises(ValueError, match=r"image grid is \(8, 12, 10\): it must be divisible by 4 .*\(8, 12, 12\)"):
        build().encode(draw(1, 1, 8, 12, 10))
