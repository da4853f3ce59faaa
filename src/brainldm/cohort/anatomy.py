"""The anatomy that phantoms are deformed from, as soft labels in MNI space, and where new ones come in.

Whatever can fill an `Anatomy` can be deformed, painted and measured: nilearn's template does by default, and label maps
of the user's own bring real folding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import scipy.ndimage as ndi

from brainldm.base.errors import BadInput
from brainldm.base.nifti import read_nifti
from brainldm.base.volume import Grid, Volume
from brainldm.cohort.template import load_template

LABELS = ("csf", "grey", "white", "ventricles")
SULCAL_CSF = (0.03, 0.43)  # this much CSF in the average is none, and all, in a person
MARGIN_VOXELS = 16  # air around the head, for the flows and distances to run out in


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Soft labels of one head at the template's size and place: 0..1, on an axis-aligned 1 mm grid.

    Where `head_XYZ` (bool) is true and no label claims a voxel, there is CSF. Compared by identity, so that what is
    derived from an anatomy can be cached by it.
    """

    name: str
    grid: Grid
    grey_XYZ: np.ndarray
    white_XYZ: np.ndarray
    ventricles_XYZ: np.ndarray
    head_XYZ: np.ndarray

    @property
    def head_mm3(self) -> float:
        return float(self.head_XYZ.sum()) * self.grid.voxel_mm3


@lru_cache(maxsize=1)
def template_anatomy() -> Anatomy:
    """The nilearn template's anatomy: one brain, with the smooth sulci of an average."""
    template = load_template(1)
    grey, white, csf = (volume.data_XYZ for volume in (template.grey, template.white, template.csf))
    # Averaging 152 people has blurred sulci into a little CSF everywhere in the cortex; one person's are clear.
    low, high = SULCAL_CSF
    clear_csf = np.clip((csf - low) / (high - low), 0, 1)
    kept = (1 - clear_csf) / np.maximum(1 - csf, 1e-6)
    ventricles = template.ventricles.data_XYZ
    return _anatomy("MNI152", template.brain_mask, grey * kept, white * kept, clear_csf, ventricles)


def _anatomy(
    name: str, head: Volume, grey: np.ndarray, white: np.ndarray, csf: np.ndarray, ventricles: np.ndarray
) -> Anatomy:
    """Crops to the head with a margin, and shares out each voxel so that the labels sum to 1, the ventricles first."""
    others = grey + white + np.maximum(csf - ventricles, 0)
    share = np.where(head.data_XYZ, (1 - ventricles) / np.maximum(others, 1e-6), 0).astype(np.float32)
    occupied = ndi.find_objects(head.data_XYZ.astype(np.int8))[0]

    def framed(data_XYZ: np.ndarray) -> np.ndarray:
        return np.pad(data_XYZ[occupied], MARGIN_VOXELS)

    start = np.array([s.start - MARGIN_VOXELS for s in occupied])
    ox, oy, oz = (head.affine[:3, :3] @ start + head.affine[:3, 3]).tolist()
    head_XYZ = framed(head.data_XYZ)
    x, y, z = head_XYZ.shape
    return Anatomy(
        name,
        Grid(name, (x, y, z), float(head.affine[0, 0]), (ox, oy, oz)),
        framed(grey * share),
        framed(white * share),
        framed(ventricles * head.data_XYZ),
        head_XYZ,
    )


# ------------------------------------------------------------------------------------ label maps of the user's own

# FreeSurfer's numbers, as SynthSeg and its training maps use them: how much of each is grey matter and how much white.
# The deep nuclei look like something between in T1.
_GREY_AND_WHITE: dict[int, tuple[float, float]] = {
    **dict.fromkeys((3, 42, 8, 47, 17, 53, 18, 54, 26, 58, 136, 137), (1.0, 0.0)),  # cortices, hippocampus, amygdala
    **dict.fromkeys((11, 50, 12, 51), (0.85, 0.15)),  # caudate, putamen
    **dict.fromkeys((10, 49), (0.5, 0.5)),  # thalamus
    **dict.fromkeys((13, 52, 163, 164), (0.35, 0.65)),  # pallidum, basal forebrain
    **dict.fromkeys((16, 28, 60), (0.15, 0.85)),  # brainstem, ventral diencephalon
    **dict.fromkeys((2, 41, 7, 46, 77, 78, 79, 85, 192, 251, 252, 253, 254, 255, 25, 57), (0.0, 1.0)),
}
_VENTRICLES = (4, 43, 5, 44, 31, 63)  # lateral, inferior lateral, their choroid plexus
_OTHER_CSF = (14, 15, 24, 72, 30, 62, 80)  # third, fourth, around the brain, fifth; vessels
_NEEDED = (2, 41, 3, 42, 4, 43)


def label_maps_in(folder: Path) -> list[Path]:
    """The NIfTI files in a folder, by name; BadInput when there are none."""
    if not folder.is_dir():
        raise BadInput(
            "there is no such folder of label maps.", remedy="Check the path.", path=folder, reason="missing"
        )
    maps = sorted(p for p in folder.iterdir() if p.name.endswith((".nii", ".nii.gz")) and not p.name.startswith("."))
    if not maps:
        raise BadInput(
            "holds no label maps (.nii or .nii.gz).",
            remedy="Give a folder of segmentations with FreeSurfer's numbers.",
            path=folder,
            reason="missing",
        )
    return maps


def check_label_map(path: Path) -> None:
    """BadInput when the file is no label map with FreeSurfer's numbers."""
    _cropped_label_map(path, read_nifti(path))


@lru_cache(maxsize=2)
def label_map_anatomy(path: Path) -> Anatomy:
    """The anatomy in a label map with FreeSurfer's numbers, moved and scaled to the template."""
    from brainldm.cohort.register import register_to_template  # SimpleITK takes a second to import

    label_map = read_nifti(path)
    numbers, affine = _cropped_label_map(path, label_map)
    grey_of, white_of, ventricle_of, csf_of = np.zeros((4, numbers.max() + 1), np.float32)
    for number, (grey, white) in _GREY_AND_WHITE.items():
        if number <= numbers.max():
            grey_of[number], white_of[number] = grey, white
    ventricle_of[[number for number in _VENTRICLES if number <= numbers.max()]] = 1
    csf_of[[number for number in _OTHER_CSF if number <= numbers.max()]] = 1
    soft = [table[numbers] for table in (grey_of, white_of, csf_of, ventricle_of)]
    head = ndi.binary_fill_holes(sum(soft) > 0.5)

    # The template is a T1 image: painted roughly like one, the label map can be registered to it.
    t1_like = 0.65 * soft[0] + 0.9 * soft[1] + 0.25 * (head - soft[0] - soft[1])
    registration = register_to_template(Volume(t1_like.astype(np.float32), affine), Volume(head, affine))
    template = load_template(1).brain_mask
    map_from_template = np.linalg.inv(registration.mni_from_scan_affine @ affine) @ template.affine

    def moved(data_XYZ: np.ndarray) -> np.ndarray:
        return ndi.affine_transform(
            data_XYZ.astype(np.float32), map_from_template, output_shape=template.shape_XYZ, order=1
        )

    head_there = Volume(moved(head) > 0.5, template.affine)
    return _anatomy(path.name, head_there, *(moved(data_XYZ) for data_XYZ in soft))


def _cropped_label_map(path: Path, label_map: Volume) -> tuple[np.ndarray, np.ndarray]:
    """The numbers and their affine, cropped to what is inside the skull; BadInput where these are other numbers."""
    numbers = np.rint(label_map.data_XYZ).astype(np.int32)
    there = set(np.unique(numbers).tolist())
    missing = [number for number in _NEEDED if number not in there]
    if missing or min(there) < 0 or np.abs(label_map.data_XYZ - numbers).max() > 0.01:
        raise BadInput(
            f"is no label map with FreeSurfer's numbers (found: {_listed(there)}).",
            remedy="White matter must be 2 and 41, cortex 3 and 42, the lateral ventricles 4 and 43.",
            path=path,
            reason="bad_labels",
        )
    known = np.isin(numbers, [*_GREY_AND_WHITE, *_VENTRICLES, *_OTHER_CSF])
    inside = tuple(slice(max(s.start - 4, 0), s.stop + 4) for s in ndi.find_objects(known.astype(np.int8))[0])
    affine = label_map.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [s.start for s in inside]
    return numbers[inside], affine


def _listed(numbers: set[int]) -> str:
    some = [str(number) for number in sorted(numbers)[:12]]
    return ", ".join(some) + (", ..." if len(numbers) > 12 else "")
