"""Ventricular and brain volume from a T1w image, with no trained weights.

    affine to the template  ->  three tissues by a Gaussian mixture  ->  CSF near and below the template's ventricles

Anything that gives a `Measured` can take its place: tables of SynthSeg and FreeSurfer are read at the end of this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import scipy.ndimage as ndi
from sklearn.mixture import GaussianMixture

from brainldm.base.errors import BadInput
from brainldm.base.tables import Table, read_table
from brainldm.base.volume import Volume
from brainldm.cohort.register import (
    POOR_CORRELATION,
    Registration,
    is_skull_stripped,
    register_to_template,
    with_black_background,
)
from brainldm.cohort.resample import on_voxels
from brainldm.cohort.skull import brain_mask
from brainldm.cohort.template import load_template

# Ventricular CSF lies within this distance of the template's ventricles and deeper than this under its surface (mm in
# template space), in pieces that touch the template's ventricles and are not mere specks beside the largest.
NEAR_VENTRICLES_MM = 10.5
DEEP_MM = 15.0
SPECK_FRACTION = 0.05
MOST_ROOM_FILLED = 0.7
# From this share of CSF on a voxel is ventricle; around it the share is summed as far as one voxel of the image smears
# it, so that thin horns keep their volume in coarse images.
CSF_SHARE = 0.4
_MARGIN_MM = 20
_MIXTURE_SAMPLES = 40_000


@dataclass(frozen=True)
class Measured:
    """Volumes of one head. `ventricles_mm3` (lateral and inferior lateral, both sides) and `brain_native_mm3` (grey and
    white matter) are as in the image; `brain_mm3` is the latter times `head_scaling`, template head over this head
    (SIENAX's normalisation, UK Biobank's field 25009). `regions` are further volumes by name, normalised likewise."""

    ventricles_mm3: float
    brain_mm3: float
    brain_native_mm3: float
    head_scaling: float
    quality: dict[str, float] = field(default_factory=dict)
    regions: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TemplateMeasure:
    """The built-in measure. `aligned` says that images lie rigidly in MNI space already, as prepared and generated ones
    do, so that only the affine is sought. BadInput for an image that shows no brain."""

    aligned: bool = False
    name: str = "brainldm-template-3"

    def __call__(self, image: Volume, registration: Registration | None = None) -> Measured:
        """The volumes in `image`: a brain or a whole head, of any resolution and intensity scale.

        `regions` are grey matter, white matter and CSF in 12 boxes of template space. `quality` holds the correlation
        with the template, the separation of grey and white matter in standard deviations, `ventricle_room_filled` (the
        share of the room in which ventricles are looked for; beyond MOST_ROOM_FILLED larger ones are found too small),
        and `poor` (1 where the numbers should not be believed).
        """
        stripped = is_skull_stripped(image)
        if stripped:
            image = with_black_background(image)
        if registration is None:
            registration = register_to_template(image, aligned=self.aligned, skull_stripped=stripped)
        if not stripped:
            mask = brain_mask(image, registration, method="template")
            image = Volume(np.where(mask.data_XYZ > 0.5, image.data_XYZ - image.data_XYZ.min(), 0), image.affine)
        tissues = _tissues(image, registration)
        head_scaling = registration.head_scaling
        regions = _template_mm3(image, registration, tissues)
        ventricles_template_mm3 = _ventricles_template_mm3(image, registration, tissues)
        brain_mm3 = sum(volume for name, volume in regions.items() if not name.startswith("csf"))
        separation = (tissues.white - tissues.grey) / tissues.spread
        correlation = registration.quality.get("correlation", 1.0)
        poor = correlation < POOR_CORRELATION or separation < 1.5 or not 0.6 < head_scaling < 2.6
        return Measured(
            ventricles_mm3=ventricles_template_mm3 / head_scaling,
            brain_mm3=brain_mm3,
            brain_native_mm3=brain_mm3 / head_scaling,
            head_scaling=head_scaling,
            quality={
                "correlation": correlation,
                "tissue_separation": float(separation),
                "ventricle_room_filled": ventricles_template_mm3 / float(_ventricle_region().allowed.sum()),
                "poor": float(poor),
            },
            regions=regions,
        )


# ------------------------------------------------------------------------------------------------------------- tissues


@dataclass(frozen=True)
class _Tissues:
    """Mean intensities of the three tissues and their common standard deviation."""

    csf: float
    grey: float
    white: float
    spread: float

    def csf_fraction(self, intensity: np.ndarray, neighbour: float) -> np.ndarray:
        """How much of a voxel is CSF when the rest of it is of the `neighbour` intensity."""
        return np.clip((neighbour - intensity) / (neighbour - self.csf), 0.0, 1.0)


def _tissues(image: Volume, registration: Registration) -> _Tissues:
    """A mixture of three Gaussians of one width over the brain.

    One width for all, because the few and varied CSF voxels of a young brain otherwise spread their Gaussian over the
    grey matter.
    """
    brain = load_template(2).brain_mask
    sampled = _at_template(image, registration, brain)
    inside = sampled[(brain.data_XYZ > 0) & (sampled > 0)]
    if inside.size < 1000:
        raise BadInput("there is no brain where the template has one.", remedy="Look at the scan.", reason="no_brain")
    bright = float(np.percentile(inside, 90))
    mixture = GaussianMixture(
        3, covariance_type="tied", means_init=np.array([[0.3], [0.65], [1.0]]) * bright, random_state=0, max_iter=200
    )
    step = max(1, inside.size // _MIXTURE_SAMPLES)
    mixture.fit(inside[::step, None].astype(np.float64))
    csf, grey, white = np.sort(mixture.means_[:, 0])
    return _Tissues(float(csf), float(grey), float(white), float(mixture.covariances_[0, 0] ** 0.5))


def _template_mm3(image: Volume, registration: Registration, tissues: _Tissues) -> dict[str, float]:
    """Grey matter, white matter and CSF in each box of template space, template mm^3.

    Every voxel of the brain is its CSF fraction beside grey matter, and the rest is shared between grey and white by
    its intensity.
    """
    template = load_template(2)
    sampled = _at_template(image, registration, template.t1)
    inside = (_near_brain() > 0) & (sampled > 0)
    intensity = sampled[inside]
    csf = tissues.csf_fraction(intensity, tissues.grey)
    white = np.clip((intensity - tissues.grey) / (tissues.white - tissues.grey), 0.0, 1.0)
    box, names = _boxes()
    volumes: dict[str, float] = {}
    for tissue, share in (("grey", (1 - csf) * (1 - white)), ("white", (1 - csf) * white), ("csf", csf)):
        sums = np.bincount(box[inside], weights=share.astype(np.float64), minlength=len(names))
        volumes |= {f"{tissue}_{name}": float(total) * template.t1.voxel_mm3 for name, total in zip(names, sums)}
    return volumes


@lru_cache(maxsize=1)
def _boxes() -> tuple[np.ndarray, tuple[str, ...]]:
    """Which of 12 boxes each voxel of the template at 2 mm lies in, and their names: left and right of the midline;
    before, between and behind the anterior commissure (y = 0) and y = -45 mm; above and below z = 10 mm."""
    t1 = load_template(2).t1
    x, y, z = (
        np.arange(n).reshape([-1 if axis == along else 1 for along in range(3)]) * t1.affine[axis, axis]
        + t1.affine[axis, 3]
        for axis, n in enumerate(t1.shape_XYZ)
    )
    third = (y <= 0).astype(int) + (y <= -45)
    box = 6 * (x >= 0) + 2 * third + (z < 10)
    names = tuple(
        f"{side}_{along}_{height}"
        for side in ("left", "right")
        for along in ("anterior", "middle", "posterior")
        for height in ("upper", "lower")
    )
    return np.broadcast_to(box, t1.shape_XYZ), names


@lru_cache(maxsize=1)
def _near_brain() -> np.ndarray:
    """The template's brain and 4 mm around it, at 2 mm: people's brains reach over the average one's edge."""
    return ndi.binary_dilation(load_template(2).brain_mask.data_XYZ > 0, iterations=2)


# ---------------------------------------------------------------------------------------------------------- ventricles


@dataclass(frozen=True)
class _Region:
    """The part of template space (1 mm) in which ventricles are looked for."""

    core: Volume
    allowed: np.ndarray


@lru_cache(maxsize=1)
def _ventricle_region() -> _Region:
    template = load_template(1)
    core = template.ventricles.data_XYZ > 0.5
    corners = np.argwhere(core)
    low, high = corners.min(axis=0) - _MARGIN_MM, corners.max(axis=0) + 1 + _MARGIN_MM
    box = tuple(slice(a, b) for a, b in zip(low, high))
    deep = ndi.distance_transform_edt(template.brain_mask.data_XYZ > 0)[box] > DEEP_MM
    near = ndi.distance_transform_edt(~core[box]) < NEAR_VENTRICLES_MM
    affine = template.t1.affine.copy()
    affine[:3, 3] += template.t1.affine[:3, :3] @ low
    return _Region(Volume(core[box], affine), near & deep)


def _ventricles_template_mm3(image: Volume, registration: Registration, tissues: _Tissues) -> float:
    """Ventricular CSF in template mm^3, with partial volume at its border.

    The ventricles' walls are half white matter, half grey (caudate, thalamus), so a border voxel is shared between CSF
    and their mean.
    """
    region = _ventricle_region()
    sampled = _at_template(image, registration, region.core)
    wall = 0.5 * (tissues.grey + tissues.white)
    fraction = tissues.csf_fraction(sampled, wall) * region.allowed
    pieces, count = ndi.label(fraction > CSF_SHARE)
    if count == 0:
        return 0.0
    sizes = np.bincount(pieces.ravel())
    in_core = np.bincount(pieces.ravel(), weights=region.core.data_XYZ.ravel())
    sizes[0] = in_core[0] = 0
    kept = np.flatnonzero((in_core > 0) & (sizes >= SPECK_FRACTION * sizes[in_core > 0].max(initial=0)))
    smear_mm = float(image.voxel_mm.mean()) * registration.head_scaling ** (1 / 3)
    ventricles = ndi.binary_dilation(np.isin(pieces, kept), iterations=max(1, round(smear_mm)))
    return float((fraction * ventricles).sum(dtype=np.float64))  # voxels of 1 mm^3


def _at_template(image: Volume, registration: Registration, template: Volume) -> np.ndarray:
    """The image at the voxels of a volume in template space."""
    return on_voxels(image, template, np.linalg.inv(registration.mni_from_scan_affine))


# ------------------------------------------------------------------------------------------- other people's segmenters

_SYNTHSEG_VENTRICLES = (
    "left lateral ventricle",
    "right lateral ventricle",
    "left inferior lateral ventricle",
    "right inferior lateral ventricle",
)
# Parcels of the cortex (`--parc`) are parts of columns that are summed already.
_SYNTHSEG_NOT_BRAIN = ("csf", "ventricle", "total intracranial", "ctx-")
_ASEG_VENTRICLES = ("Left-Lateral-Ventricle", "Right-Lateral-Ventricle", "Left-Inf-Lat-Vent", "Right-Inf-Lat-Vent")
_ASEG_BRAIN = ("BrainSegVolNotVent", "BrainSegNotVent")
_NOT_VOLUMES = ("to-etiv", "holes", "qc", "maskvol")  # columns of these tables that are no region's volume
_ASEG_HEAD = ("EstimatedTotalIntraCranialVol", "eTIV")


def measured_from_tables(path: Path) -> dict[str, Measured]:
    """Volumes by scan from what `mri_synthseg --vol` or FreeSurfer's `asegstats2table` wrote (CSV or TSV).

    The head's size is the intracranial volume of the table. Scans are called what `scan_of` makes of the first column's
    text. BadInput when a column is missing, a cell is no number, or a scan has several rows that differ.
    """
    table = read_table(path)
    lower = {column.lower(): column for column in table.columns}
    if all(name in lower for name in _SYNTHSEG_VENTRICLES):
        ventricles = [lower[name] for name in _SYNTHSEG_VENTRICLES]
        brain = [
            column for column in table.columns[1:] if not any(word in column.lower() for word in _SYNTHSEG_NOT_BRAIN)
        ]
        head = _first_of(table, lower, ("total intracranial",))
    elif all(name.lower() in lower for name in _ASEG_VENTRICLES):
        ventricles = [lower[name.lower()] for name in _ASEG_VENTRICLES]
        brain = [_first_of(table, lower, _ASEG_BRAIN)]
        head = _first_of(table, lower, _ASEG_HEAD)
    else:
        raise BadInput(
            f"is neither a SynthSeg nor a FreeSurfer table of volumes; its columns begin with "
            f"{', '.join(table.columns[:4])}.",
            remedy="Give what mri_synthseg --vol or asegstats2table wrote.",
            path=path,
            reason="unknown_table",
        )
    found: dict[str, Measured] = {}
    for row in range(len(table)):
        scan = scan_of(table.rows[row][table.columns[0]])
        measured = _measured_row(table, row, ventricles, brain, head)
        if found.setdefault(scan, measured) != measured:
            raise table.fault(
                row,
                table.columns[0],
                f"is a second row of {scan}, with other volumes.",
                "Keep one row a scan.",
            )
    return found


def by_participant(measured: Mapping[str, Measured]) -> dict[str, dict[str, Measured]]:
    """What `measured_from_tables` found, the scans of each participant together."""
    found: dict[str, dict[str, Measured]] = {}
    for scan, volumes in measured.items():
        found.setdefault(participant_of(scan), {})[scan] = volumes
    return found


def volumes_of_scan(of_participant: Mapping[str, Measured], file: str) -> Measured:
    """The volumes of the scan in `file` among those of its participant's scans.

    A session, run and so on that both names give must agree, leading zeros aside; what one of them leaves out is no
    difference. BadInput when all are of other scans, or several that differ could be this one's.
    """
    wanted = _which_scan(file)
    fitting: dict[tuple[int, int, int], list[str]] = {}
    for scan in of_participant:
        told = _which_scan(scan)
        both = told.keys() & wanted.keys()
        if all(told[name].lstrip("0") == wanted[name].lstrip("0") for name in both):
            exact = sum(told[name] == wanted[name] for name in both)
            fitting.setdefault((len(both), exact, -len(told)), []).append(scan)
    if not fitting:
        raise BadInput(
            f"there are volumes of {', '.join(of_participant)} alone, not of this scan.",
            remedy="Segment the session (run) that is used, or name it in its row.",
            reason="bad_volume",
        )
    first, *others = fitting[max(fitting)]
    if any(of_participant[scan] != of_participant[first] for scan in others):
        raise BadInput(
            f"each of {', '.join([first, *others])} could be this scan, and their volumes differ.",
            remedy="Keep the row of this scan alone.",
            reason="bad_volume",
        )
    return of_participant[first]


def _first_of(table: Table, lower: dict[str, str], names: tuple[str, ...]) -> str:
    for name in names:
        if name.lower() in lower:
            return lower[name.lower()]
    table.require(names[0])
    return names[0]


def _measured_row(table: Table, row: int, ventricles: list[str], brain: list[str], head: str) -> Measured:
    def total(columns: list[str]) -> float:
        values = [table.number(row, column) for column in columns]
        for column, value in zip(columns, values):
            if value is None or value < 0:
                raise table.fault(row, column, "is no volume.")
        return float(sum(value for value in values if value is not None))

    head_mm3 = total([head])
    if head_mm3 <= 0:
        raise table.fault(row, head, "is no intracranial volume.")
    head_scaling = load_template(1).head_mm3 / head_mm3
    brain_native_mm3 = total(brain)
    regions = {
        column: volume * head_scaling
        for column in table.columns[1:]
        if column != head
        and not any(word in column.lower() for word in _NOT_VOLUMES)
        and (volume := table.number(row, column)) is not None
    }
    return Measured(total(ventricles), brain_native_mm3 * head_scaling, brain_native_mm3, head_scaling, regions=regions)


def participant_of(text: str) -> str:
    """The participant that a file name or path in a table of volumes is about."""
    found = re.search(r"sub-[^_/\\.]+", text)
    return found.group(0) if found else Path(text).name.split(".")[0]


def scan_of(text: str) -> str:
    """The participant, and which of their scans: sub-01_ses-2_run-1 of sub-01/ses-2/anat/sub-01_run-1_T1w.nii.gz."""
    return "_".join([participant_of(text), *(f"{name}-{value}" for name, value in _which_scan(text).items())])


def _which_scan(text: str) -> dict[str, str]:
    """What a file name or path gives of the entities that tell a participant's T1w scans apart."""
    given = dict(re.findall(r"[_/\\](ses|acq|ce|rec|run)-([^_/\\.]+)", text.partition("sub-")[2]))
    return {name: given[name] for name in ("ses", "acq", "ce", "rec", "run") if name in given}
