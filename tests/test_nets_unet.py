"""The U-Net: the same function as MONAI's DiffusionModelUNet, hybrid conditioning, and what ours adds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from brainldm.nets.blocks import fold, unfold
from brainldm.nets.unet import DiffusionUNet, UNetConfig, timestep_embedding, with_covariates

SMALL = UNetConfig(channels=(8, 16, 24), head_channels=(0, 16, 24), norm_groups=4)
TWO_LEVELS = UNetConfig(channels=(8, 16), attention=(False, True), head_channels=(0, 16), norm_groups=4)
# An odd time embedding, attention where the paper has none, and a middle that attends although its level does not.
ODD = replace(SMALL, channels=(9, 18, 27), norm_groups=9, attention=(True, False, False), head_channels=(3, 0, 9))
LAST = torch.channels_last_3d


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wake(network: torch.nn.Module) -> torch.nn.Module:
    """Random values for the parameters that start at 0, without which a U-Net is the function 0."""
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


def build(config: UNetConfig = SMALL, **options: bool) -> DiffusionUNet:
    torch.manual_seed(0)
    unet = wake(DiffusionUNet(config, **options))
    assert isinstance(unet, DiffusionUNet)
    return unet


def monai_unet(config: UNetConfig) -> torch.nn.Module:
    """MONAI's, at the same widths, as MONAI initialises it."""
    from monai.networks.nets import DiffusionModelUNet

    torch.manual_seed(1)
    return DiffusionModelUNet(
        spatial_dims=3,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        channels=config.channels,
        num_res_blocks=config.res_blocks,
        attention_levels=config.attention,
        norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        resblock_updown=True,
        num_head_channels=config.head_channels,
        with_conditioning=True,
        cross_attention_dim=config.context_features,
        upcast_attention=True,
    )


def inputs(shape_XYZ: tuple[int, int, int], tokens: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return draw(2, 7, *shape_XYZ), torch.tensor([3, 999]), draw(2, tokens, 4, seed=1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "shape", "tokens"),
    [
        (SMALL, (8, 12, 4), 1),
        (SMALL, (4, 4, 4), 3),  # one voxel at the bottom; a context of several tokens
        (TWO_LEVELS, (10, 14, 6), 1),  # 5 x 7 x 3 at the bottom
        (replace(SMALL, head_channels=(0, 4, 8), res_blocks=1), (8, 12, 4), 2),
        (ODD, (8, 4, 12), 1),
    ],
)
def test_same_as_monai_with_the_same_weights(config: UNetConfig, shape: tuple[int, int, int], tokens: int) -> None:
    theirs, ours = wake(monai_unet(config)), build(config)
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the same
    given = inputs(shape, tokens)
    expected = theirs(*given)
    assert expected.std() > 0.01
    assert ((ours(*given) - expected).abs().max() / expected.abs().max()).item() <= 1e-5


@torch.no_grad()
def test_timesteps_may_lie_between_integers() -> None:
    unet, (x, _, context) = build(), inputs((8, 4, 4))
    at = [unet(x, torch.full((2,), t), context) for t in (10.0, 10.5, 11.0)]
    assert torch.equal(at[0], unet(x, torch.tensor([10, 10]), context))
    first, second = (at[1] - at[0]).norm(), (at[2] - at[1]).norm()
    assert 0 < first < (at[2] - at[0]).norm() and second > 0


def test_the_timestep_embedding_is_the_formula() -> None:
    times = torch.tensor([0.0, 1.0, 333.25, 999.0])
    found = timestep_embedding(times, 6)
    for row, t in zip(found, times.tolist()):
        angles = [t * 10_000 ** (-i / 3) for i in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-4, rtol=0)
    assert timestep_embedding(times, 7).shape == (4, 7)


def test_covariates_go_in_as_maps_after_the_latent_channels_and_as_one_token() -> None:
    x, times, condition = draw(2, 3, 4, 8, 4), torch.tensor([1, 2]), draw(2, 4, seed=1)
    joined, same_times, context = with_covariates(x, times, condition)
    assert torch.equal(joined[:, :3], x)
    assert torch.equal(joined[:, 3:], condition[:, :, None, None, None].expand(2, 4, 4, 8, 4))
    assert torch.equal(context, condition[:, None])
    assert same_times is times
    assert build()(joined, times, context).shape == x.shape


@torch.no_grad()
def test_rows_do_not_see_each_other() -> None:
    unet, (x, times, context) = build(), inputs((8, 4, 4))
    together = unet(x, times, context)
    for row in range(2):
        alone = unet(x[row : row + 1], times[row : row + 1], context[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=1e-5)


def test_a_new_unet_is_the_function_zero_and_starts_at_zero_where_monai_s_does() -> None:
    ours = DiffusionUNet(SMALL)
    assert not ours(*inputs((8, 4, 4))).any()

    def zeros(network: torch.nn.Module) -> set[str]:
        norms = {name for name, module in network.named_modules() if "Norm" in type(module).__name__}
        return {name for name, p in network.named_parameters() if not p.any() and name.rpartition(".")[0] not in norms}

    assert zeros(ours) == zeros(monai_unet(SMALL))
    assert "middle_block.resnet_1.conv2.conv.weight" in zeros(ours)


@pytest.mark.parametrize("shape", [(10, 14, 10), (8, 8, 6)])
def test_a_grid_whose_skips_would_not_fit_is_refused_and_monai_fails_on_it(shape: tuple[int, int, int]) -> None:
    given = inputs(shape)
    with pytest.raises(ValueError, match=r"latent grid is .* divisible by 4"):
        build()(*given)
    with pytest.raises(RuntimeError):
        monai_unet(SMALL)(*given)


def gradients(unet: DiffusionUNet, shape: tuple[int, int, int] = (8, 12, 4), tokens: int = 1) -> dict:
    unet(*inputs(shape, tokens)).square().mean().backward()
    return {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


def test_every_parameter_learns_except_what_one_token_silences() -> None:
    unet = build()
    found = gradients(unet)
    silent = {name for name, _ in unet.named_parameters()} - set(found)
    # The softmax over one token is 1, so its queries (and the norm before them) and keys get no gradient.
    assert {".".join(name.split(".")[-3:]) for name in silent} == {
        "attn2.to_q.weight",
        "attn2.to_k.weight",
        "0.norm2.weight",
        "0.norm2.bias",
    }
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert set(gradients(build(), tokens=2)) == {name for name, _ in unet.named_parameters()}


def test_checkpointing_gives_the_same_gradients() -> None:
    kept, computed_again = gradients(build()), gradients(build(checkpointing=True))
    assert set(kept) == set(computed_again)
    for name, gradient in kept.items():
        assert torch.equal(gradient, computed_again[name]), name


def test_bfloat16_is_close_to_float32_forward_and_backward() -> None:
    config = replace(TWO_LEVELS, channels=(32, 64), head_channels=(0, 64), norm_groups=8)
    unet, given = build(config), inputs((10, 14, 6))  # 5 x 7 x 3 at the bottom: see model/precision.py on 2
    exact = unet(*given)
    exact.square().mean().backward()
    true = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad()
    unet = unet.to(memory_format=LAST)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = unet(given[0].contiguous(memory_format=LAST), *given[1:])
    assert rounded.dtype == torch.float32
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.02
    rounded.square().mean().backward()
    error = sum((p.grad - true[name]).square().sum() for name, p in unet.named_parameters() if p.grad is not None)
    assert (error / sum(gradient.square().sum() for gradient in true.values())).sqrt().item() < 0.03


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"channels": (256, 512)}, "differ in length"),
        ({"channels": (256, 500, 768)}, "500 channels are not a positive multiple of norm_groups, 32"),
        ({"head_channels": (0, 100, 768)}, "512 channels cannot be divided into attention heads of 100"),
        ({"attention": (False, True, False), "head_channels": (0, 512, 0)}, "768 channels .* heads of 0"),
        ({"res_blocks": 0}, "res_blocks is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"context_features": 0}, "context_features is 0"),
        ({"norm_eps": -1.0}, "norm_eps -1.0"),
    ],
)
def test_a_wrong_config_is_refused_with_the_value_and_the_rule(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        UNetConfig(**wrong)


def test_folding_moves_voxels_into_channels_and_back() -> None:
    """One network on a folded latent is the unfolded network on the folded tensor."""
    config = replace(TWO_LEVELS, in_channels=3, out_channels=2, fold=2)
    folded = build(config)
    plain = build(replace(config, in_channels=24, out_channels=16, fold=1))
    plain.load_state_dict(folded.state_dict())
    x, context = draw(1, 3, 8, 12, 8), draw(1, 1, config.context_features, seed=1)
    with torch.no_grad():
        found = folded(x, torch.tensor([5]), context)
        expected = unfold(plain(fold(x, 2), torch.tensor([5]), context), 2)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=f"divisible by {config.downsampling}"):
        folded(draw(1, 3, 6, 12, 8), torch.tensor([5]), context)
