"""The published weights (MONAI bundle `brain_image_synthesis_latent_diffusion_model`): in as a model folder, and out.

A checkpoint is a pickle, and a pickle can run code: it is read with torch's weights-only reader, which knows tensors
and plain containers and refuses everything else. Nothing of the bundle is ever executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from brainldm.base.covariates import COVARIATES, PAPER_RANGES
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import atomic_path, locked_folder
from brainldm.base.volume import GRIDS, Grid
from brainldm.model.bundle_layout import Layout, autoencoder_config, layout_of, network_kind, renamed, unet_config
from brainldm.model.description import (
    CovariatesDescription,
    GridDescription,
    LatentDescription,
    LatentDiffusionDescription,
    ScheduleDescription,
)
from brainldm.model.folder import DESCRIPTION_NAME, load_latent_diffusion, save_model
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.tensors import misfits, shortened
from brainldm.nets.atlas import AtlasAutoencoderConfig
from brainldm.nets.autoencoder import Autoencoder, AutoencoderConfig
from brainldm.nets.unet import DiffusionUNet, UNetConfig

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PublishedFile:
    """One file of the bundle as its model zoo lists it (version 1.0.3)."""

    name: str
    md5: str
    bytes: int


PUBLISHED = {
    "autoencoder": PublishedFile("autoencoder.pt", "329e97b3085643ff235f11f049856242", 55_100_000),
    "unet": PublishedFile("model.pt", "21c3047556fb671caf0556f1cce6ef22", 2_210_000_000),
}
PUBLISHED_VERSION = "MONAI model zoo 1.0.3 (31,740 people of UK Biobank)"
_COPY_AGAIN = "Get the file again, whole; `brainldm fetch ukb` does it where there is a network."
_PICKLE = b"\x80"
_NOT_WEIGHTS = {
    b"<": "a web page, not weights: the download met a login or an error page",
    b"version https://git-lfs": "a pointer of Git LFS, not weights: the repository was cloned without its large files",
}


@dataclass(frozen=True)
class ImportSummary:
    """What was imported: where it lies, the layout of each file, and the version its md5 proves (None: not known)."""

    folder: Path
    layouts: dict[str, Layout]
    version: str | None

    def __str__(self) -> str:
        proven = (
            f"They are {self.version}, proven by md5."
            if self.version
            else ("Their md5 is not that of the published files: they are taken for what their shapes say they are.")
        )
        layouts = ", ".join(f"{name} in the {layout} layout" for name, layout in self.layouts.items())
        return f"Imported {layouts}. {proven} The model is in {self.folder}."


def import_monai(autoencoder: Path, unet: Path, out: Path) -> ImportSummary:
    """Writes a model folder of two MONAI checkpoints, of either layout and any width of this architecture.

    Ranges, grid, schedule and latent scale are the publication's (Pinaya et al. 2022; the bundle decodes raw latents).
    BadInput for files that are truncated, swapped, hold anything but tensors, or belong to another architecture.
    """
    if (out / DESCRIPTION_NAME).exists():
        raise UsageError("there is a model already.", remedy="Choose another folder.", path=out)
    read = {name: _read_network(path, name) for name, path in (("autoencoder", autoencoder), ("unet", unet))}
    ae_config = _fitted(autoencoder, "autoencoder", autoencoder_config, read["autoencoder"].tensors)
    net_config = _fitted(unet, "unet", unet_config, read["unet"].tensors)
    grid = GRIDS["paper"]
    proven = all(read[name].md5 == PUBLISHED[name].md5 for name in read)
    version = PUBLISHED_VERSION if proven else None
    try:
        description = _description(ae_config, net_config, grid, {n: r.md5 for n, r in read.items()}, version)
    except ValueError as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise BadInput(
            f"the two files do not belong together ({told}).",
            remedy="Give the bundle's autoencoder.pt and model.pt.",
            path=unet,
            reason="architecture",
        ) from error
    with torch.device("meta"):
        networks = Autoencoder(ae_config), DiffusionUNet(net_config)
    for network, name, path in zip(networks, read, (autoencoder, unet)):
        _fill(network, read[name].tensors, path)
    with locked_folder(out):
        save_model(out, LatentDiffusion(description, *networks))
    return ImportSummary(out, {name: r.layout for name, r in read.items()}, version)


def export_monai(model: Path, out: Path, layout: Layout = "old") -> list[Path]:
    """Writes a model folder's weights as the bundle's two files, in MONAI's old (the published) or new layout.

    Every value goes out as it came in; a calibrated model's networks answer as they did before. UsageError for a model
    that would be another one when read from the two files, and where one of them is there already.
    """
    loaded = load_latent_diffusion(model)
    untold = _untold(loaded)
    if untold:
        raise UsageError(
            f"{untold}, and the bundle has no place to say so.",
            remedy="Only models that differ from the published one in widths and weights alone can be exported.",
            path=model,
        )
    paths = {name: out / file.name for name, file in PUBLISHED.items()}
    for path in paths.values():
        if path.exists():
            raise UsageError("there is such a file already.", remedy="Choose another folder.", path=path)
    # Both are written before either takes its place: one alone would forbid the same command again.
    with locked_folder(out), contextlib.ExitStack() as renamed_at_the_end:
        for name, network in (("autoencoder", loaded.autoencoder), ("unet", loaded.unet)):
            tensors = OrderedDict((renamed(key, layout), t.contiguous()) for key, t in network.state_dict().items())
            part = renamed_at_the_end.enter_context(atomic_path(paths[name]))
            # A file, not its path: given a path, torch hides what the operating system said about a full disk.
            with part.open("wb") as file:
                try:
                    torch.save(tensors, file)
                except RuntimeError as error:
                    # Given a file it tells of a wrong position while it closes what the full disk cut off.
                    if isinstance(error.__context__, OSError):
                        raise error.__context__ from error
                    raise
    return list(paths.values())


def _untold(model: LatentDiffusion) -> str:
    """What of the model neither the bundle's file format nor its tensors' shapes tell; empty where they tell all."""
    autoencoder, unet, description = model.autoencoder.config, model.unet.config, model.description
    norms = {(config.norm_groups, config.norm_eps) for config in (autoencoder, unet)}
    heads = [
        (width, head)
        for level, (width, head) in enumerate(zip(unet.channels, unet.head_channels))
        if unet.attends(level) and head != width
    ]
    if isinstance(autoencoder, AtlasAutoencoderConfig):
        return "its autoencoder is of atlases, for registered images"
    if autoencoder.fold != 1:
        return f"its autoencoder folds {autoencoder.fold} voxels along each axis into channels"
    if norms != {(AutoencoderConfig().norm_groups, AutoencoderConfig().norm_eps)}:
        return f"its norms have (groups, epsilon) {', '.join(map(str, sorted(norms)))}"
    if heads:
        return f"its attention splits {heads[0][0]} channels into heads of {heads[0][1]}"
    if description.latent.scale != 1.0:
        return f"its latent scale is {description.latent.scale}"
    if description.target != "eps":
        return f"it predicts {description.target} instead of the noise"
    if description.schedule != ScheduleDescription():
        return "it has a noise schedule of its own"
    if (
        description.latent.by_population
        or unet.covariates_in_time
        or unet.fold != 1
        or description.covariates.scaling != "min_max"
    ):
        return "its latents or its covariates reach the U-Net in a way of its own"
    if description.volume_reader is not None:
        return "it reads the volumes of its images and corrects them"
    if description.covariates.ranges != CovariatesDescription(ranges=PAPER_RANGES.to_json()).ranges:
        return "it was told covariates on ranges of its own"
    if description.grid != GridDescription.of(GRIDS["paper"], network_x="right_to_left"):
        return "its images lie on another grid or run from left to right"
    return ""


@dataclass(frozen=True)
class _Checkpoint:
    tensors: Tensors
    layout: Layout
    md5: str


def _read_network(path: Path, expected: str) -> _Checkpoint:
    """The parameters of a checkpoint in the new layout's names."""
    tensors = read_checkpoint(path)
    kind = network_kind(tensors)
    if kind != expected:
        what = {"unet": "the U-Net", "autoencoder": "the autoencoder"}.get(kind, "neither network of this system")
        swapped = kind != "unknown"
        raise BadInput(
            f"was given as the {'U-Net' if expected == 'unet' else expected} and holds {what}.",
            remedy="Swap --autoencoder and --unet." if swapped else "Give the bundle's autoencoder.pt and model.pt.",
            path=path,
            reason="swapped" if swapped else "architecture",
        )
    try:
        layout = layout_of(tensors)
    except ValueError as error:
        raise BadInput(f"{error}.", remedy="Import only unmixed checkpoints.", path=path, reason="ambiguous") from error
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    return _Checkpoint({renamed(name, "new"): tensor for name, tensor in tensors.items()}, layout, md5)


def read_checkpoint(path: Path) -> Tensors:
    """The tensors of a `.pt`, `.pth` or `.safetensors` checkpoint; nothing in it is executed.

    BadInput for a file that is missing, damaged, not a checkpoint, or that holds anything but tensors and plain data.
    """
    if not path.is_file():
        raise BadInput("there is no such file.", remedy="Check the path.", path=path, reason="missing")
    if path.suffix == ".safetensors":
        try:
            return _tensors_of(load_file(path), path)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, _first_line(error)) from error
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}.", path=path, reason="unreadable") from error
    for mark, told in _NOT_WEIGHTS.items():
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(mark):
            raise BadInput(f"is {told}.", remedy=_COPY_AGAIN, path=path, reason="not_a_checkpoint")
    if not head:
        raise _damaged(path, "it is empty")
    zipped = head.startswith(b"PK")  # torch's format since 2020; before, it was a chain of pickles
    try:
        if zipped and not zipfile.is_zipfile(path):
            raise EOFError("its end is missing")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        if not called and not head.startswith(_PICKLE):
            raise _damaged(path, "its pickle cannot be read") from error
        raise BadInput(
            f"holds more than tensors ({called[1] if called else 'a pickle of another kind'}); "
            "nothing of it was executed.",
            remedy="A file of weights needs no code: do not open this one with other tools unless you trust its maker.",
            path=path,
            reason="unsafe",
        ) from error
    except Exception as error:  # whatever a damaged pickle makes torch raise
        raise _damaged(path, _first_line(error)) from error
    return _tensors_of(content, path)


def _tensors_of(content: Any, path: Path) -> Tensors:
    """The one state dict in a checkpoint, without the prefix that data-parallel training leaves."""
    if isinstance(content, dict) and not any(isinstance(value, torch.Tensor) for value in content.values()):
        inner = [value for value in content.values() if isinstance(value, dict) and _is_state(value)]
        if len(inner) != 1:
            raise BadInput(
                f"holds {len(inner)} sets of weights, not one.",
                remedy="Save the one network's state dict by itself.",
                path=path,
                reason="ambiguous" if inner else "not_a_checkpoint",
            )
        content = inner[0]
    if not isinstance(content, dict) or not _is_state(content):
        raise BadInput(
            "is no state dict: names with tensors.", remedy=_COPY_AGAIN, path=path, reason="not_a_checkpoint"
        )
    tensors = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    if len(tensors) < len(content):
        raise BadInput(
            "holds parameters twice, with `module.` before their names and without.",
            remedy="Save the one network's state dict by itself.",
            path=path,
            reason="ambiguous",
        )
    wrong = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if wrong:
        raise BadInput(f"{wrong[0]} is not a floating-point tensor.", remedy=_COPY_AGAIN, path=path, reason="damaged")
    return tensors


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _is_state(content: dict) -> bool:
    return bool(content) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    )


def _damaged(path: Path, told: str) -> BadInput:
    return BadInput(
        f"is truncated or damaged, or is no checkpoint ({told}).",
        remedy=_COPY_AGAIN,
        path=path,
        reason="damaged",
    )


def _first_line(error: Exception) -> str:
    told = str(error).strip().splitlines()
    return f"{type(error).__name__}: {told[0][:200]}" if told else type(error).__name__


def _fitted(path: Path, name: str, infer: Any, tensors: Tensors) -> Any:
    try:
        return infer({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    except (ValueError, KeyError, IndexError) as error:
        told = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise BadInput(
            f"is of another architecture than the {name} of Pinaya et al. 2022 ({told}).",
            remedy="Give the bundle's autoencoder.pt and model.pt.",
            path=path,
            reason="architecture",
        ) from error


def _fill(network: torch.nn.Module, tensors: Tensors, path: Path) -> None:
    faults = misfits(network, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if faults:
        raise BadInput(
            f"does not fit the architecture its shapes suggest: {shortened(faults)}.",
            remedy=_COPY_AGAIN,
            path=path,
            reason="architecture",
        )
    single: Tensors = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise BadInput(
                f"{name} holds values that are not finite numbers.", remedy=_COPY_AGAIN, path=path, reason="nan"
            )
        # Two names for one piece of memory are two parameters here, and safetensors refuses to write them.
        storage = tensor.untyped_storage().data_ptr()
        single[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    network.load_state_dict(single, assign=True)


def _description(
    autoencoder: AutoencoderConfig, unet: UNetConfig, grid: Grid, md5: dict[str, str], version: str | None
) -> LatentDiffusionDescription:
    """What the model folder says of the two; ValueError where they could not make images of the grid together."""
    latent_CXYZ = autoencoder.latent_shape_CXYZ(grid.shape_XYZ)
    unet.check_latent(latent_CXYZ[1:])
    if autoencoder.in_channels != 1:
        raise ValueError(f"the autoencoder is one of images of {autoencoder.in_channels} channels")
    if unet.context_features != len(COVARIATES):
        raise ValueError(f"the U-Net is told {unet.context_features} covariates instead of {len(COVARIATES)}")
    return LatentDiffusionDescription(
        name="ukb-ldm" if version else "monai-import",
        autoencoder=autoencoder,
        unet=unet,
        latent=LatentDescription(shape_CXYZ=latent_CXYZ, scale=1.0),
        covariates=CovariatesDescription(ranges=PAPER_RANGES.to_json()),
        grid=GridDescription.of(grid, network_x="right_to_left"),
        preprocessing={"register": "unires", "intensity": "min-max", "skull_stripped": False},
        training={
            "imported_from": version or "MONAI checkpoints of unknown origin",
            "md5": md5,
            **({"training_images": 31_740, "cohort": "UK Biobank"} if version else {}),
        },
        licence="Apache-2.0" if version else "unknown",
        weights={},
    )
