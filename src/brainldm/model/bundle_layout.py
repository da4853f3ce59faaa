"""The two ways in which MONAI names the parameters of these networks, and what shapes tell of an architecture.

The published weights are in the old layout (MONAI Generative, 2022-23); MONAI 1.6 and this package use the new one.
Between them lie two rules, both pure renamings: the decoder's upsampling convolution is `conv` in the old layout and
`postconv` in the new one, and the projection that ends an attention is `to_out.0` in the old and `out_proj` in the new.

That second rule holds for the transformer blocks that these networks have. The old package also had a plain attention
block whose projection, `proj_attn`, was stored but never applied; MONAI 1.6 copies and applies it by default, which
changes the network's output without a word (MONAI issues 7991 and 8030). No network here has such a block, so weights
that contain one are refused, never reinterpreted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from brainldm.nets.autoencoder import AutoencoderConfig
from brainldm.nets.unet import UNetConfig

Layout = Literal["old", "new"]
Shapes = Mapping[str, tuple[int, ...]]

_UPSAMPLE = re.compile(r"^(decoder\.blocks\.\d+)\.(postconv\.conv|conv\.conv)\.(weight|bias)$")
_PROJECTION = re.compile(r"^(.*\.transformer_blocks\.\d+\.attn[12])\.(out_proj|to_out\.0)\.(weight|bias)$")
_PLAIN_ATTENTION = re.compile(r"\.(proj_attn|attn\.out_proj|to_q|attn\.to_q)\.(weight|bias)$")
_NEW_MARKS = ("postconv.conv", "out_proj")


def network_kind(names: Iterable[str]) -> Literal["autoencoder", "unet", "unknown"]:
    """Which of the two networks the parameters belong to."""
    names = set(names)
    if "quant_conv_mu.conv.weight" in names:
        return "autoencoder"
    return "unet" if {"conv_in.conv.weight", "time_embed.0.weight"} <= names else "unknown"


def layout_of(names: Iterable[str]) -> Layout:
    """The layout of a network's parameters; ValueError where it is both, or holds attention that cannot be trusted.

    A network with neither mark (one level, no attention) is the same in both layouts and called new.
    """
    marks = set()
    for name in names:
        matched = _UPSAMPLE.match(name) or _PROJECTION.match(name)
        if matched:
            marks.add("new" if matched[2] in _NEW_MARKS else "old")
        elif _PLAIN_ATTENTION.search(name) and ".transformer_blocks." not in name:
            raise ValueError(
                f"{name} belongs to a plain attention block, which the networks of Pinaya et al. 2022 do not have; "
                "whether its projection is to be applied cannot be told from the file"
            )
    if len(marks) > 1:
        raise ValueError("the parameters are named partly in MONAI's old layout, partly in its new one")
    return "old" if marks == {"old"} else "new"


def renamed(name: str, layout: Layout) -> str:
    """The parameter's name in `layout`, whichever it is in now."""
    upsample = _UPSAMPLE.match(name)
    if upsample:
        return f"{upsample[1]}.{'postconv.conv' if layout == 'new' else 'conv.conv'}.{upsample[3]}"
    projection = _PROJECTION.match(name)
    if projection:
        return f"{projection[1]}.{'out_proj' if layout == 'new' else 'to_out.0'}.{projection[3]}"
    return name


def autoencoder_config(shapes: Shapes) -> AutoencoderConfig:
    """The architecture that new-layout parameters of these shapes belong to; ValueError where none fits."""
    chain = _blocks(shapes, "encoder.blocks.")
    widths: list[int] = []
    per_level: list[int] = [0]
    for block in sorted(chain)[1:-2]:  # between the first convolution and the last norm and convolution
        prefix = f"encoder.blocks.{block}."
        if f"{prefix}conv2.conv.weight" in shapes:
            per_level[-1] += 1
            width = shapes[f"{prefix}conv2.conv.weight"][0]
            widths = [*widths[: len(per_level) - 1], width]
        elif f"{prefix}conv.conv.weight" in shapes:
            per_level.append(0)
    if not widths or len(set(per_level)) != 1:
        raise ValueError(f"its encoder has levels of {per_level} residual blocks: they must have equally many")
    return AutoencoderConfig(
        in_channels=shapes["encoder.blocks.0.conv.weight"][1],
        latent_channels=shapes["quant_conv_mu.conv.weight"][0],
        channels=tuple(widths),
        res_blocks=per_level[0],
    )


def unet_config(shapes: Shapes) -> UNetConfig:
    """The architecture that new-layout parameters of these shapes belong to; ValueError where none fits.

    Shapes do not tell the number of attention heads: it is the published one, a single head.
    """
    levels = sorted(_blocks(shapes, "down_blocks."))
    widths = tuple(shapes[f"down_blocks.{level}.resnets.0.conv1.conv.weight"][0] for level in levels)
    attends = tuple(f"down_blocks.{level}.attentions.0.norm.weight" in shapes for level in levels)
    middle = "middle_block.attention.transformer_blocks.0.attn2.to_k.weight"
    return UNetConfig(
        in_channels=shapes["conv_in.conv.weight"][1],
        out_channels=shapes["out.2.conv.weight"][0],
        channels=widths,
        attention=attends,
        head_channels=tuple(
            width if on or level == len(widths) - 1 else 0 for level, (width, on) in enumerate(zip(widths, attends))
        ),
        res_blocks=len(_blocks(shapes, "down_blocks.0.resnets.")),
        context_features=shapes[middle][1],
    )


def _blocks(shapes: Shapes, prefix: str) -> set[int]:
    return {int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)}
