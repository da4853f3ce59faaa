"""Phantoms: brains of nobody with a known anatomy, so that every claim can be tested against a known truth.

    person (population) -> deformation of one anatomy (deformation, flow) -> soft labels -> image (appearance)

The volumes that go with an image are measured on its own soft labels at its own resolution. One template anatomy with
smooth sulci: scores on phantoms prove the machinery, not clinical realism.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from brainldm.base.volume import GRIDS, Grid
from brainldm.cohort.anatomy import LABELS, Anatomy, template_anatomy
from brainldm.cohort.appearance import Appearance, paint
from brainldm.cohort.deformation import LATTICE, Deformation, Shape, deform, points_of
from brainldm.cohort.flow import fields_of, sample
from brainldm.cohort.population import Person, Population, draw_person

__all__ = ["LABELS", "Person", "Phantom", "PhantomConfig", "Population", "draw_person", "make_phantom"]


@dataclass(frozen=True)
class PhantomConfig:
    """All constants of the phantoms. `version` changes when equal arguments would give other voxels."""

    population: Population = field(default_factory=Population)
    shape: Shape = field(default_factory=Shape)
    appearance: Appearance = field(default_factory=Appearance)
    version: int = 1


@dataclass(frozen=True)
class Phantom:
    """One person's image with the truth about it.

    `labels_LXYZ` are soft (csf, grey, white, ventricles), sum to 1 inside the head and are 0 outside. `ventricles_mm3`
    is as in the image; `brain_mm3` (grey + white) is normalised to the size of the template's head.
    """

    person: Person
    grid: Grid
    image_XYZ: np.ndarray
    noise_free_XYZ: np.ndarray
    labels_LXYZ: np.ndarray
    deformation: Deformation
    ventricles_mm3: float
    brain_mm3: float
    head_mm3: float
    lesions_mm3: float

    @property
    def hard_labels_XYZ(self) -> np.ndarray:
        """uint8: 0 where there is more air than head, else 1 + the position of the largest label in LABELS."""
        return np.where(self.labels_LXYZ.sum(axis=0) < 0.5, 0, 1 + self.labels_LXYZ.argmax(axis=0)).astype(np.uint8)


def make_phantom(
    person: Person,
    grid: Grid,
    seed: int,
    index: int,
    anatomy: Anatomy | None = None,
    config: PhantomConfig | None = None,
) -> Phantom:
    """The phantom of `person` on one of the GRIDS; shape, look and noise belong to (seed, index)."""
    config = config or PhantomConfig()
    anatomy = anatomy or template_anatomy()
    deformation = deform(person, fields_of(anatomy), seed, index, config.shape)
    labels_LXYZ, distance_XYZ = warped_labels(deformation, anatomy, grid)
    painted = paint(labels_LXYZ, distance_XYZ, grid, person.age_years, seed, index, config.appearance)
    csf, grey, white, ventricles = (float(s) * grid.voxel_mm3 for s in labels_LXYZ.sum(axis=(1, 2, 3), dtype=np.float64))
    head_mm3 = csf + grey + white + ventricles
    return Phantom(
        person,
        grid,
        painted.image_XYZ,
        painted.noise_free_XYZ,
        labels_LXYZ,
        deformation,
        ventricles_mm3=ventricles,
        brain_mm3=(grey + white) * template_anatomy().head_mm3 / head_mm3,
        head_mm3=head_mm3,
        lesions_mm3=painted.lesions_mm3,
    )


def warped_labels(deformation: Deformation, anatomy: Anatomy, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The person's soft labels on `grid`, and the distance (mm) to the ventricles before the head was deformed.

    Labels are looked up at points half a voxel apart (but at most 1 mm) and averaged over each voxel.
    """
    fine, factor = {"paper": ("paper", 1), "2mm": ("paper", 2), "4mm": ("2mm", 2)}[grid.name]
    points_grid = GRIDS[fine]
    displacement, depth = deformation.displacement_CXYZ, deformation.head_depth_XYZ
    if points_grid.voxel_mm < LATTICE.voxel_mm:
        displacement, depth = np.stack([_doubled(c) for c in displacement]), _doubled(depth)
    head = np.clip(depth.ravel() / points_grid.voxel_mm + 0.5, 0, 1)
    inside = np.flatnonzero(head > 0)
    affine_3N = points_of(points_grid, deformation.centre_mm, deformation.stretch)
    points = affine_3N[:, inside] + displacement.reshape(3, -1)[:, inside]
    fields = fields_of(anatomy)
    space = head[inside]
    tissue = [sample(data, anatomy.grid, points) for data in (anatomy.grey_XYZ, anatomy.white_XYZ, anatomy.ventricles_XYZ)]
    # At the rim a point can be mostly air and yet come from tissue: the labels share what there is of head.
    too_much = np.maximum(sum(tissue) / np.maximum(space, 1e-6), 1)
    grey, white, ventricles = (t / too_much for t in tissue)
    csf = np.maximum(space - grey - white - ventricles, 0)
    distance = sample(fields.ventricle_distance_XYZ, fields.grid, points, 99.0)
    values = np.zeros((5, head.size), np.float32)
    for row, value in zip(values, (csf, grey, white, ventricles, distance)):
        row[inside] = value
    x, y, z = grid.shape_XYZ
    means = values.reshape(5, x, factor, y, factor, z, factor).mean(axis=(2, 4, 6), dtype=np.float32)
    return means[:4], means[4]


def _doubled(data_XYZ: np.ndarray) -> np.ndarray:
    """Linear interpolation to voxels of half the size in the same box, one axis at a time."""
    for axis in range(3):
        data = np.moveaxis(data_XYZ, axis, 0)
        padded = np.concatenate([data[:1], data, data[-1:]])
        doubled = np.empty((2 * len(data), *data.shape[1:]), np.float32)
        doubled[0::2] = 0.75 * data + 0.25 * padded[:-2]
        doubled[1::2] = 0.75 * data + 0.25 * padded[2:]
        data_XYZ = np.moveaxis(doubled, 0, axis)
    return np.ascontiguousarray(data_XYZ)
