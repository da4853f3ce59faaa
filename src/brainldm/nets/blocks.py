"""The bricks of both networks.

Axes: B batch, C channels, X Y Z space, N tokens, F features. Parameter names are those of MONAI 1.6's networks, so
that weights pass between the two without a table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from brainldm.nets.packed import DoublingConvolution, PackedConvolution, packing_works
from brainldm.nets.slabbed_gradient import convolved, has_a_slow_gradient, in_float32_on_a_cpu


class Convolution(nn.Module):
    """A 3-D convolution that keeps the grid (stride 1) or halves it (stride 2, padding at the far ends only).

    With `doubles` the map is doubled by repetition first.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, doubles: bool = False
    ) -> None:
        super().__init__()
        self.padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=self.padding)
        self.doubles = doubles
        self.packs = False
        self.packed: PackedConvolution | DoublingConvolution | None = None

    def forward(self, x_BCXYZ: torch.Tensor, *, haloed: bool = False) -> torch.Tensor:
        """The convolved map. With `haloed` the map brings a neighbour at either end of X, and is not padded there."""
        if self.packs:
            return self._through_packed(x_BCXYZ, haloed)
        if self.doubles:
            x_BCXYZ = double_by_nearest(x_BCXYZ)
        if not haloed or self.conv.kernel_size[0] == 1:
            if has_a_slow_gradient(x_BCXYZ, self.conv):
                return convolved(x_BCXYZ, self.conv)
            return self._by_onednn(x_BCXYZ) if by_onednn(x_BCXYZ, self.conv) else self.conv(x_BCXYZ)
        if self.doubles:
            x_BCXYZ = x_BCXYZ[:, :, 1:-1]  # of each neighbour's two planes the nearer one
        return F.conv3d(x_BCXYZ, self.conv.weight, self.conv.bias, padding=(0, 1, 1))

    def _by_onednn(self, x_BCXYZ: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        return torch.mkldnn_convolution(
            x_BCXYZ, conv.weight, conv.bias, [self.padding] * 3, conv.stride, conv.dilation, conv.groups
        )

    def _through_packed(self, x_BCXYZ: torch.Tensor, haloed: bool) -> torch.Tensor:
        if self.packed is None:
            self.packed = self._pack()
        if isinstance(self.packed, DoublingConvolution):
            return self.packed(x_BCXYZ, haloed=haloed)
        return self.packed(x_BCXYZ, padding=[0, self.padding, self.padding] if haloed else None)

    def _pack(self) -> PackedConvolution | DoublingConvolution:
        """Packs the weights, and gives up the plain ones: two copies of them would be a waste of gigabytes."""
        weight, bias, stride = self.conv.weight.detach(), self.conv.bias, self.conv.stride[0]
        self.conv.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        if self.doubles:
            return DoublingConvolution(weight.float(), bias, torch.bfloat16)
        return PackedConvolution(weight.to(torch.bfloat16), bias, padding=self.padding, stride=stride)


def by_onednn(x_BCXYZ: torch.Tensor, conv: nn.Conv3d) -> bool:
    """Whether oneDNN has to be called by name. For a single small map on a CPU torch 2.13 takes a kernel of its own,
    which needs 2 to 15 times as long on the maps of a latent. Without gradients alone: training has batches."""
    return (
        len(x_BCXYZ) == 1
        and in_float32_on_a_cpu(x_BCXYZ, conv)
        and conv.kernel_size[0] > 1
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
    )


def run_block(block: Callable[..., torch.Tensor], *inputs: object, checkpointing: bool) -> torch.Tensor:
    """`block(*inputs)`; with `checkpointing` only the inputs are kept for a backward pass, which computes it again."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def activated(norm: nn.Module, x_BCXYZ: torch.Tensor) -> torch.Tensor:
    """SiLU of the normalised map, in place where nothing has to be kept for a backward pass: at full resolution a
    feature map is gigabytes."""
    return F.silu(norm(x_BCXYZ), inplace=not torch.is_grad_enabled())


def at_full_precision(convolution: nn.Module, x_BCXYZ: torch.Tensor, **options: bool) -> torch.Tensor:
    """The convolution in the precision of its weights, whatever the autocast around it.

    For the last one of a network: it costs little, and bfloat16 would leave an image 128 grey values between 0.5 and 1.
    """
    weights = next(convolution.parameters())
    if not torch.amp.is_autocast_available(x_BCXYZ.device.type):  # no device at all, when shapes or work are counted
        return convolution(x_BCXYZ, **options)
    with torch.autocast(x_BCXYZ.device.type, enabled=False):
        return convolution(x_BCXYZ.to(weights.dtype), **options)


def pack_for_sampling(network: nn.Module, full_precision: tuple[nn.Module, ...]) -> set[str]:
    """Turns a network's convolutions to packed bfloat16 ones and its other matrices to bfloat16, for sampling on a CPU.

    Those in `full_precision` and all norms stay as they are. Works on a network whose weights are still to come: the
    names returned are of the parameters to be given in bfloat16. RuntimeError where torch cannot pack.
    """
    if not packing_works():
        raise RuntimeError("this build of torch cannot pack convolutions")
    kept = {id(module) for chosen in full_precision for module in chosen.modules()}
    names: set[str] = set()
    for name, module in network.named_modules():
        if id(module) in kept:
            continue
        if isinstance(module, Convolution):
            module.packs = True
            names.add(f"{name}.conv.weight")
        elif isinstance(module, nn.Linear):
            names |= {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
    network.requires_grad_(False)
    return names


def forget(network: nn.Module) -> None:
    """Gives up a network's weights, packed ones too; they have to be loaded again before the next call."""
    for module in network.modules():
        if isinstance(module, Convolution):
            module.packed = None
    network.to("meta")


def is_forgotten(network: nn.Module) -> bool:
    """Whether `forget` has been called since the weights were loaded. Norms are never packed, so they tell."""
    return any(m.weight.device.type == "meta" for m in network.modules() if isinstance(m, nn.GroupNorm))


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all weights 0, so that the branch it ends adds nothing at the start of training."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def halve_by_mean(x_BCXYZ: torch.Tensor) -> torch.Tensor:
    """Means over 2 x 2 x 2 voxels, summed in at least float32.

    Sums of slices instead of `avg_pool3d`, which on a CPU has no bfloat16 kernel, loses the channels-last layout and
    takes ten times as long.
    """
    sums = x_BCXYZ.float() if x_BCXYZ.dtype in (torch.bfloat16, torch.float16) else x_BCXYZ
    sums = sums[:, :, 0::2] + sums[:, :, 1::2]
    sums = sums[:, :, :, 0::2] + sums[:, :, :, 1::2]
    sums = sums[:, :, :, :, 0::2] + sums[:, :, :, :, 1::2]
    return (0.125 * sums).to(x_BCXYZ.dtype)


def double_by_nearest(x_BCXYZ: torch.Tensor) -> torch.Tensor:
    """Every voxel repeated 2 x 2 x 2 times."""
    return F.interpolate(x_BCXYZ, scale_factor=2.0, mode="nearest")


def channels_last(x_BCXYZ: torch.Tensor) -> torch.Tensor:
    """The map with its channels side by side in memory, as the convolutions are fastest."""
    return x_BCXYZ.contiguous(memory_format=torch.channels_last_3d)


def fold(x_BCXYZ: torch.Tensor, factor: int) -> torch.Tensor:
    """Space to channels: (B, C, X, Y, Z) to (B, C f^3, X/f, Y/f, Z/f); nothing is lost."""
    if factor == 1:
        return x_BCXYZ
    b, c, x, y, z = x_BCXYZ.shape
    f = factor
    split = x_BCXYZ.reshape(b, c, x // f, f, y // f, f, z // f, f)
    return split.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * f**3, x // f, y // f, z // f)


def unfold(x_BCXYZ: torch.Tensor, factor: int) -> torch.Tensor:
    """Channels to space, the inverse of `fold`."""
    if factor == 1:
        return x_BCXYZ
    b, c, x, y, z = x_BCXYZ.shape
    f = factor
    split = x_BCXYZ.reshape(b, c // f**3, f, f, f, x, y, z)
    return split.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // f**3, x * f, y * f, z * f)


def check_widths(channels: tuple[int, ...], norm_groups: int, norm_eps: float) -> None:
    """ValueError for widths that group normalisation cannot divide."""
    if norm_groups < 1 or not norm_eps > 0:
        raise ValueError(f"norm_groups is {norm_groups} and norm_eps {norm_eps}: they must be at least 1 and above 0")
    if not channels:
        raise ValueError("channels is empty: give one width for each level, at least one")
    for width in channels:
        if width < 1 or width % norm_groups:
            fix = f"use widths such as {norm_groups} or {2 * norm_groups}, or other norm_groups"
            raise ValueError(f"{width} channels are not a positive multiple of norm_groups, {norm_groups}: {fix}")


def check_at_least_one(**counts: int) -> None:
    """ValueError naming the count that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}: it must be at least 1")


def check_divisible(shape_XYZ: tuple[int, ...], factor: int, what: str) -> None:
    """ValueError for a grid that cannot be halved as often as a network does."""
    if len(shape_XYZ) != 3 or any(n < 1 or n % factor for n in shape_XYZ):
        padded = tuple(max(factor, -(-n // factor) * factor) for n in shape_XYZ)
        raise ValueError(
            f"{what} is {tuple(shape_XYZ)}: it must be divisible by {factor} along each of three axes; "
            f"pad it to {padded}, or use a network with fewer levels"
        )


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to a context."""

    def __init__(self, features: int, heads: int, context_features: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        source = features if context_features is None else context_features
        self.to_q = nn.Linear(features, features, bias=False)
        self.to_k = nn.Linear(source, features, bias=False)
        self.to_v = nn.Linear(source, features, bias=False)
        self.out_proj = nn.Linear(features, features)

    def forward(self, x_BNF: torch.Tensor, context_BNF: torch.Tensor | None = None) -> torch.Tensor:
        source = x_BNF if context_BNF is None else context_BNF
        if source.shape[1] == 1:
            # A softmax over one token is 1: queries and keys have no say (nor a gradient), and one row serves all
            # tokens. They stay for the sake of contexts of more tokens and of published weights.
            return self.out_proj(self.to_v(source)).expand(-1, x_BNF.shape[1], -1)
        q, k, v = (self._split(t) for t in (self.to_q(x_BNF), self.to_k(source), self.to_v(source)))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, x_BNF: torch.Tensor) -> torch.Tensor:
        return x_BNF.unflatten(2, (self.heads, -1)).transpose(1, 2)


class GatedFeedForward(nn.Module):
    """GEGLU (Shazeer 2020): one half of a linear map gated by the GELU of the other."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(features, 8 * features)
        self.linear2 = nn.Linear(4 * features, features)

    def forward(self, x_BNF: torch.Tensor) -> torch.Tensor:
        value, gate = self.linear1(x_BNF).chunk(2, dim=-1)
        return self.linear2(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward, each on normalised tokens and added to them."""

    def __init__(self, features: int, heads: int, context_features: int) -> None:
        super().__init__()
        self.attn1 = Attention(features, heads)
        self.attn2 = Attention(features, heads, context_features)
        self.ff = GatedFeedForward(features)
        self.norm1 = nn.LayerNorm(features)
        self.norm2 = nn.LayerNorm(features)
        self.norm3 = nn.LayerNorm(features)

    def forward(self, x_BNF: torch.Tensor, context_BNF: torch.Tensor) -> torch.Tensor:
        x_BNF = x_BNF + self.attn1(self.norm1(x_BNF))
        x_BNF = x_BNF + self.attn2(self.norm2(x_BNF), context_BNF)
        return x_BNF + self.ff(self.norm3(x_BNF))


class SpatialTransformer(nn.Module):
    """A transformer block over all voxels of a feature map, told the context."""

    def __init__(self, channels: int, head_channels: int, context_features: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.proj_in = Convolution(channels, channels, kernel=1)
        block = TransformerBlock(channels, channels // head_channels, context_features)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = zeroed(Convolution(channels, channels, kernel=1))

    def forward(self, x_BCXYZ: torch.Tensor, context_BNF: torch.Tensor) -> torch.Tensor:
        h_BCXYZ = self.proj_in(self.norm(x_BCXYZ))
        h_BNF = h_BCXYZ.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h_BNF = block(h_BNF, context_BNF)
        h_BCXYZ = h_BNF.transpose(1, 2).unflatten(2, x_BCXYZ.shape[2:])
        return x_BCXYZ + self.proj_out(h_BCXYZ.contiguous(memory_format=torch.channels_last_3d))
