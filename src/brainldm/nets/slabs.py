"""Decoding a latent slab by slab: the same image, in a fraction of the memory.

A decoder's feature maps at full resolution are gigabytes, and one layer after the other holds several at once. Here a
map is a list of slabs along X. A convolution needs one neighbouring plane at either end of a slab; a group norm needs
mean and variance over all slabs, which are merged from each slab's own. Nothing is approximated: the result is the
unsplit one but for the order of additions. A map's slabs are given up while the next map's are made, so that little
more than one map is held. Slabs that fit the processor's cache are also faster than whole maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from brainldm.nets.atlas import AnyAutoencoder, AtlasAutoencoder
from brainldm.nets.autoencoder import ResidualBlock, Upsample
from brainldm.nets.blocks import Convolution, at_full_precision, unfold

Slabs = list[torch.Tensor]  # each (1, C, x, Y, Z), channels last


def decode_in_slabs(autoencoder: AnyAutoencoder, latent_BCXYZ: torch.Tensor, slab_bytes: int) -> torch.Tensor:
    """`autoencoder.decode` for one latent (1, C, x, y, z), float32, in slabs of at most about `slab_bytes`.

    An autoencoder of atlases, which has no map at full resolution but its atlases', decodes whole.
    """
    if latent_BCXYZ.shape[0] != 1:
        raise ValueError(f"{latent_BCXYZ.shape[0]} latents were given: slabs are of one image, decode them in turn")
    if isinstance(autoencoder, AtlasAutoencoder):
        return autoencoder.decode(latent_BCXYZ)
    latent_BCXYZ = latent_BCXYZ.contiguous(memory_format=torch.channels_last_3d)
    slabs = [at_full_precision(autoencoder.post_quant_conv, latent_BCXYZ)]
    *blocks, norm, last = autoencoder.decoder.blocks
    for block in blocks:
        slabs = _through(block, slabs, slab_bytes)
    assert isinstance(norm, nn.GroupNorm)
    normed = _haloed(_drained(slabs), _Normalise(slabs, norm, then_silu=False))
    image = [at_full_precision(last, slab, haloed=True).float() for slab in normed]
    return unfold(torch.cat(image, dim=2), autoencoder.config.fold)


def _through(block: nn.Module, slabs: Slabs, slab_bytes: int) -> Slabs:
    if isinstance(block, ResidualBlock):
        return _through_residual(block, slabs)
    if isinstance(block, Upsample):
        # A plane becomes two of four times the size, so slabs are cut before they are doubled.
        cut = (part for slab in _drained(slabs) for part in _cut(slab, slab_bytes // 8))
        return [block.postconv(slab, haloed=True) for slab in _haloed(cut, _copy)]
    assert isinstance(block, Convolution)
    return [block(slab, haloed=True) for slab in _haloed(_drained(slabs), _copy)]


def _through_residual(block: ResidualBlock, slabs: Slabs) -> Slabs:
    kept: Slabs = []  # what is added at the end, made while the input is given up

    def first() -> Iterator[torch.Tensor]:
        for slab in _drained(slabs):
            kept.append(block.nin_shortcut(slab))
            yield slab

    activated = _haloed(first(), _Normalise(slabs, block.norm1, then_silu=True))
    middle = [block.conv1(slab, haloed=True) for slab in activated]
    activated = _haloed(_drained(middle), _Normalise(middle, block.norm2, then_silu=True))
    return [block.conv2(slab, haloed=True).add_(residual) for slab, residual in zip(activated, _drained(kept))]


class _Normalise:
    """Writes slabs after a group norm, as if they were one map, and SiLU."""

    def __init__(self, slabs: Slabs, norm: nn.GroupNorm, *, then_silu: bool):
        self._affine = _affine(slabs, norm)
        self._then_silu = then_silu

    def __call__(self, slab: torch.Tensor, out: torch.Tensor) -> None:
        normed = _applied(slab, self._affine)
        if self._then_silu:
            torch.ops.aten.silu.out(normed, out=out)
        else:
            _copy(normed, out)


def _affine(slabs: Slabs, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, variance, weight and bias for each channel, (C,) float32, that make a batch norm of the group norm.

    Channel means and variances of all slabs are merged in float64 (Chan et al. 1979).
    """
    channels = slabs[0].shape[1]
    counts = torch.tensor([slab.numel() // channels for slab in slabs], dtype=torch.float64)
    nothing = torch.zeros(channels, device=slabs[0].device)
    found = [torch.batch_norm_update_stats(_flat(slab), nothing.clone(), nothing.clone(), 0.0) for slab in slabs]
    means_SC = torch.stack([mean.double().cpu() for mean, _ in found])
    variances_SC = torch.stack([variance.double().cpu() for _, variance in found])
    weights_SG = (counts / counts.sum())[:, None, None] / (channels // norm.num_groups)
    grouped = (len(slabs), norm.num_groups, -1)
    means_SGc, variances_SGc = means_SC.reshape(grouped), variances_SC.reshape(grouped)
    mean_G = (weights_SG * means_SGc).sum((0, 2))
    variance_G = (weights_SG * (variances_SGc + (means_SGc - mean_G[:, None]).square())).sum((0, 2))
    each = channels // norm.num_groups
    mean, variance = (t.repeat_interleave(each).float().to(slabs[0].device) for t in (mean_G, variance_G))
    return mean, variance + (norm.eps - _BATCH_NORM_EPS), norm.weight.float(), norm.bias.float()


_BATCH_NORM_EPS = 1e-12


def _applied(slab: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    mean, variance, weight, bias = affine
    normed = F.batch_norm(_flat(slab), mean, variance, weight, bias, training=False, eps=_BATCH_NORM_EPS)
    return normed.unflatten(2, slab.shape[2:4])


def _flat(slab: torch.Tensor) -> torch.Tensor:
    """(1, C, x, Y, Z) as (1, C, x Y, Z): batch norm's kernels know channels-last images, not volumes."""
    return slab.flatten(2, 3)


def _haloed(
    slabs: Iterable[torch.Tensor], write: Callable[[torch.Tensor, torch.Tensor], None]
) -> Iterator[torch.Tensor]:
    """Each slab, as `write` puts it in its place, between the adjoining planes of its neighbours; planes of nought at
    the ends of the map. What is yielded holds until the next is asked for: its memory is used again, because memory
    fresh from the system costs more than what is done in it.
    """
    before: torch.Tensor | None = None
    spare: list[torch.Tensor] = []
    for slab in slabs:
        current = _room(slab, spare)
        write(slab, current[:, :, 1:-1])
        if before is None:
            current[:, :, :1] = 0
        else:
            _copy(before[:, :, -2:-1], current[:, :, :1])
            _copy(current[:, :, 1:2], before[:, :, -1:])
            yield before
            spare.append(before)
        before = current
    assert before is not None
    before[:, :, -1:] = 0
    yield before


def _room(slab: torch.Tensor, spare: list[torch.Tensor]) -> torch.Tensor:
    """Room for a slab and a plane at either end, channels last: in a spare of that shape where there is one."""
    _, channels, planes, *plane = slab.shape
    shape = (1, planes + 2, *plane, channels)
    while spare:
        room = spare.pop()
        if room.shape == (1, channels, planes + 2, *plane):
            return room
    return slab.new_empty(shape).permute(0, 4, 1, 2, 3)


def _copy(slab: torch.Tensor, out: torch.Tensor) -> None:
    """Copies as it lies in memory: torch copies channels-last volumes slowly when told their axes."""
    out.permute(0, 2, 3, 4, 1).copy_(slab.permute(0, 2, 3, 4, 1))


def _drained(slabs: Slabs) -> Iterator[torch.Tensor]:
    """The slabs in order, each forgotten by the list when it is handed out."""
    slabs.reverse()
    while slabs:
        yield slabs.pop()


def _cut(slab: torch.Tensor, most_bytes: int) -> Iterator[torch.Tensor]:
    planes = slab.shape[2]
    plane_bytes = slab.numel() * slab.element_size() // planes
    each = max(1, min(planes, most_bytes // max(plane_bytes, 1)))
    yield from slab.split(each, dim=2)
