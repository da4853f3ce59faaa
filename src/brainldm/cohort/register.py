"""Where a scan lies in the template's space: a rigid motion to put it there, an affine to compare it.

The MNI152 template is larger than the people it averages, so a rigid motion cannot be optimised against it without
bias. The affine (12 degrees of freedom) is found first; the rigid motion is the one that moves the template's brain
points most nearly as the affine does (least squares): every head keeps its size, and its brain is centred alike.

Deterministic: full sampling, one thread, no random start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.ndimage as ndi
import SimpleITK as sitk  # noqa: N813  # its documentation does so
from scipy.spatial.transform import Rotation

from brainldm.base.errors import BadInput
from brainldm.base.volume import GRIDS, Grid, Volume
from brainldm.cohort.resample import on_voxels
from brainldm.cohort.template import load_template

# ITK's points are LPS, ours RAS: x and y change sign.
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])

COARSE_MM, MIDDLE_MM, FINE_MM = 8, 4, 2
HISTOGRAM_BINS = 32
# First steps of the gradient descent in mm of physical shift; an affine that starts with more can run away.
_FIRST_STEP = {
    ("similarity", COARSE_MM): 2.0,
    ("similarity", MIDDLE_MM): 0.5,
    ("affine", MIDDLE_MM): 0.2,
    ("affine", FINE_MM): 0.1,
}
# Starts for a scan whose header may be off: the header's own directions and turns about each axis.
_TURNS_DEGREES = [(0, 0, 0)] + [
    tuple(int(angle * (axis == k)) for k in range(3)) for axis in range(3) for angle in (-40, 40)
]
# A mutual information (negative, at 8 mm) that only a brain lying right reaches; turned ones stay above -0.8.
GOOD_START = -0.9
# Of a scan on the template: skin and neck say little of the brain's size, so small heads are tried too.
_WHOLE_HEAD_SCALE, _SMALL_HEAD_SCALE = 0.92, 0.82
# Below this correlation with the template (over its brain, after the affine) somebody should look at the overlay.
POOR_CORRELATION = 0.6
# What tells a brain from a whole head: its size, and how far the brightness falls from skin and fat to bone (0.7 to 0.8
# in a head, 0.1 at most in brains of people, of phantoms and of models).
LARGER_THAN_BRAINS_ML = 2600
WHOLE_HEAD_FALL = 0.25
_PROFILE_MM, _PROFILE_SHELLS = 3.0, 6
BACKGROUND_SHARE = 0.02  # of the bright end; tissue, CSF too, is well above it in T1w


@dataclass(frozen=True)
class Registration:
    """How a scan maps onto the template. Both matrices are (4, 4) and act on RAS+ mm.

    `mni_from_scan` is rigid; `mni_from_scan_affine` also scales and shears. `head_scaling` is the volume ratio of the
    template to this head (the affine's determinant): what SIENAX normalises brain volumes by.
    """

    mni_from_scan: np.ndarray
    mni_from_scan_affine: np.ndarray
    quality: dict[str, float]
    method: str

    @property
    def head_scaling(self) -> float:
        return float(np.linalg.det(self.mni_from_scan_affine[:3, :3]))


def register_to_template(
    scan: Volume, brain_mask: Volume | None = None, *, aligned: bool = False, skull_stripped: bool | None = None
) -> Registration:
    """The rigid and the affine motion of a T1w scan (brain or whole head) onto the MNI152 template.

    `brain_mask`, on the scan's own grid, limits the scan to the brain. `aligned` says that the scan already lies
    rigidly in MNI space: only its affine is sought, from there, and the rigid motion is the identity.
    `quality` holds the correlation with the template after the affine, the rigid motion's rotation and translation, and
    the share of the brain that the paper's box cuts off. BadInput when there is nothing to register.
    """
    moving = _prepared(scan, brain_mask)
    if skull_stripped is None:
        skull_stripped = brain_mask is not None or is_skull_stripped(scan)
    starts = [np.eye(4)] if aligned else _starts(moving, skull_stripped)
    mni_from_scan_affine = _affine(moving, starts, aligned=aligned, skull_stripped=skull_stripped)
    rigid = np.eye(4) if aligned else closest_rigid(mni_from_scan_affine)
    rotation = Rotation.from_matrix(rigid[:3, :3]).magnitude()
    template_centre = _centre_of_mass(_fixed(MIDDLE_MM))
    shift = template_centre - (np.linalg.inv(rigid) @ np.append(template_centre, 1))[:3]
    quality = {
        "correlation": _correlation(scan, mni_from_scan_affine),
        "head_scaling": float(np.linalg.det(mni_from_scan_affine[:3, :3])),
        "rotation_degrees": float(np.degrees(rotation)),
        "translation_mm": float(np.linalg.norm(shift)),
        "cut_brain_fraction": _cut_fraction(rigid, mni_from_scan_affine),
    }
    return Registration(rigid, mni_from_scan_affine, quality, "rigid" if not aligned else "none")


def closest_rigid(mni_from_scan_affine: np.ndarray) -> np.ndarray:
    """The rigid motion that agrees best with an affine one over the template's brain: least squares in scan mm."""
    scan_from_mni = np.linalg.inv(mni_from_scan_affine)
    points_mni = _brain_points()
    points_scan = points_mni @ scan_from_mni[:3, :3].T + scan_from_mni[:3, 3]
    centre_mni, centre_scan = points_mni.mean(axis=0), points_scan.mean(axis=0)
    u, _, vt = np.linalg.svd((points_mni - centre_mni).T @ (points_scan - centre_scan))
    turn = np.diag([1.0, 1.0, np.linalg.det(u @ vt)])
    rotation = u @ turn @ vt  # mni = rotation @ scan
    rigid = np.eye(4)
    rigid[:3, :3] = rotation
    rigid[:3, 3] = centre_mni - rotation @ centre_scan
    return rigid


def resample_to_grid(scan: Volume, mni_from_scan: np.ndarray, grid: Grid) -> Volume:
    """The scan on `grid` after one trilinear interpolation (as the authors) straight from its own voxels; 0 where the
    scan does not reach.

    Where the grid is coarser than the scan, the scan is smoothed first (a Gaussian of the missing width), so that
    fine structure becomes partial volume and not noise.
    """
    # Plain `constant` drops the outermost plane to rounding.
    resampled = on_voxels(_antialiased(scan, grid.voxel_mm), grid, np.linalg.inv(mni_from_scan), mode="grid-constant")
    return Volume(resampled, np.array(grid.affine), scan.notes)


def is_skull_stripped(scan: Volume) -> bool:
    """Whether a scan shows a brain alone: much of it is dark, what is not is brain-sized, and no skin lies over bone.

    Size alone cannot tell: a small head cut at the box's floor has two litres, as a large brain has.
    """
    background_XYZ = _background(scan)
    inside_ml = float((~background_XYZ).sum()) * scan.voxel_mm3 / 1000
    if background_XYZ.mean() <= 0.2 or inside_ml >= LARGER_THAN_BRAINS_ML:
        return False
    return _fall_inwards(scan, ~background_XYZ) < WHOLE_HEAD_FALL


def _fall_inwards(scan: Volume, lit_XYZ: np.ndarray) -> float:
    """By what share the brightness falls on the way from the surface inwards, over the upper 75 mm of what is lit.

    Skin and fat are bright and the bone below them is dark; a brain alone only grows brighter from the pia to the white
    matter.
    """
    every = tuple(max(1, round(_PROFILE_MM / size)) for size in scan.voxel_mm)
    data_XYZ, lit_XYZ = (array_XYZ[:: every[0], :: every[1], :: every[2]] for array_XYZ in (scan.data_XYZ, lit_XYZ))
    pieces, count = ndi.label(lit_XYZ)
    if count == 0:
        return 0.0
    if count > 1:
        lit_XYZ = pieces == 1 + np.bincount(pieces[pieces > 0] - 1).argmax()
    # Where the field of view ends is no surface: beyond it the head is taken to go on.
    head_XYZ = ndi.binary_fill_holes(ndi.binary_closing(np.pad(lit_XYZ, 3, mode="edge"), iterations=2))
    depth_XYZ = ndi.distance_transform_edt(head_XYZ)[3:-3, 3:-3, 3:-3]
    z_mm = sum(
        scan.affine[2, axis] * np.arange(n).reshape([-1 if axis == along else 1 for along in range(3)]) * step
        for axis, (n, step) in enumerate(zip(data_XYZ.shape, every))
    )
    inside_XYZ = depth_XYZ > 0
    top_mm = np.percentile(np.broadcast_to(z_mm, data_XYZ.shape)[inside_XYZ], 99.5)
    upper_XYZ = inside_XYZ & (z_mm > top_mm - 75.0)
    shells = [upper_XYZ & (depth_XYZ > d) & (depth_XYZ <= d + 1) for d in range(_PROFILE_SHELLS)]
    low = float(scan.data_XYZ.min())
    profile = [float(np.median(data_XYZ[shell])) - low for shell in shells if shell.sum() >= 20]
    brightest, fall = 0.0, 0.0
    for brightness in profile:
        brightest = max(brightest, brightness)
        fall = max(fall, 1 - brightness / brightest if brightest > 0 else 0.0)
    return fall


def with_black_background(brain: Volume) -> Volume:
    """A skull-stripped scan, shifted so that its background is exactly 0: networks and interpolation leave a haze there
    that is no tissue."""
    lit_XYZ = brain.data_XYZ - brain.data_XYZ.min()
    return Volume(np.where(_background(brain), 0, lit_XYZ).astype(np.float32), brain.affine, brain.notes)


def _background(scan: Volume) -> np.ndarray:
    """The voxels within BACKGROUND_SHARE of the darkest, of the way from there to the bright ones."""
    low = float(scan.data_XYZ.min())
    lit = scan.data_XYZ[scan.data_XYZ > low]
    top = float(np.percentile(lit, 99.5)) if lit.size else low
    return scan.data_XYZ <= low + BACKGROUND_SHARE * (top - low)


# ------------------------------------------------------------------------------------------------------- preparation


def _antialiased(scan: Volume, target_mm: float) -> Volume:
    """The scan smoothed for a target resolution: variances add, so sigma^2 = (target^2 - voxel^2) / (8 ln 2)."""
    missing = np.maximum(target_mm**2 - scan.voxel_mm**2, 0.0) / (8 * np.log(2))
    sigma_voxels = np.sqrt(missing) / scan.voxel_mm
    data_XYZ = scan.data_XYZ.astype(np.float32)
    if sigma_voxels.max() >= 0.3:
        data_XYZ = ndi.gaussian_filter(data_XYZ, sigma_voxels, mode="constant")
    return Volume(data_XYZ, scan.affine)


def _prepared(scan: Volume, brain_mask: Volume | None) -> Volume:
    data_XYZ = scan.data_XYZ.astype(np.float32)
    if brain_mask is not None:
        if brain_mask.shape_XYZ != scan.shape_XYZ:
            raise BadInput(
                f"the brain mask has the shape {brain_mask.shape_XYZ}, the scan {scan.shape_XYZ}.",
                remedy="Give a mask on the scan's own grid.",
                reason="mask",
            )
        data_XYZ = np.where(brain_mask.data_XYZ > 0.5, data_XYZ, 0)
    low = float(data_XYZ.min())
    lit = data_XYZ[data_XYZ > low]
    if lit.size < 100:
        raise BadInput("there is nothing in the image to register.", remedy="Check the scan.", reason="empty")
    top = float(np.percentile(lit, 99.5))
    if not top > low:
        raise BadInput("the image has no contrast to register.", remedy="Check the scan.", reason="constant")
    return Volume(np.clip((data_XYZ - low) / (top - low), 0, 1.2), scan.affine)


def _to_itk(volume: Volume) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.data_XYZ.T.astype(np.float32)))
    lps = _FLIP @ volume.affine
    spacing = volume.voxel_mm
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


@lru_cache(maxsize=4)
def _fixed(resolution_mm: int) -> Volume:
    """The template's brain on a grid of that resolution, in a 16 mm margin of nothing."""
    template = load_template(2)
    margin = 8
    data_XYZ = np.pad(template.t1.data_XYZ * (template.brain_mask.data_XYZ > 0), margin)
    affine = template.t1.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, float(margin))
    padded = Volume(data_XYZ.astype(np.float32), affine)
    return padded if resolution_mm == FINE_MM else _coarser(padded, resolution_mm)


@lru_cache(maxsize=4)
def _fixed_mask(resolution_mm: int, margin_mm: int) -> sitk.Image:
    """Where the metric looks: the template's brain, widened by a margin."""
    brain = _to_itk(_fixed(resolution_mm)) > 0.05
    steps = max(1, round(margin_mm / resolution_mm))
    return sitk.BinaryDilate(sitk.Cast(brain, sitk.sitkUInt8), [steps] * 3)


def _coarser(volume: Volume, resolution_mm: float) -> Volume:
    """The volume smoothed and sampled on isotropic voxels of that size along its own axes."""
    voxel_mm = volume.voxel_mm
    steps = np.maximum(resolution_mm / voxel_mm, 1.0)
    shape = [max(1, int(np.ceil(n / s))) for n, s in zip(volume.shape_XYZ, steps)]
    offset = (steps - 1) / 2
    smooth = _antialiased(volume, resolution_mm)
    data_XYZ = ndi.affine_transform(smooth.data_XYZ, steps, offset, output_shape=tuple(shape), order=1)
    affine = volume.affine.copy()
    affine[:3, :3] = volume.affine[:3, :3] * steps
    affine[:3, 3] = volume.affine[:3, 3] + volume.affine[:3, :3] @ offset
    return Volume(data_XYZ, affine)


@lru_cache(maxsize=1)
def _brain_points() -> np.ndarray:
    """The template's brain as points in mm, (N, 3), one for each 8 mm."""
    mask = load_template(8).brain_mask
    voxels = np.argwhere(mask.data_XYZ > 0)
    return np.asarray(voxels @ mask.affine[:3, :3].T + mask.affine[:3, 3])


def _centre_of_mass(volume: Volume) -> np.ndarray:
    voxel = ndi.center_of_mass(np.maximum(volume.data_XYZ, 0))
    return np.asarray(volume.affine[:3, :3] @ np.array(voxel) + volume.affine[:3, 3])


# ---------------------------------------------------------------------------------------------------- the optimisation


def _starts(moving: Volume, skull_stripped: bool) -> list[np.ndarray]:
    """First guesses of scan_from_mni: centres on one another, heads of one size, several turns; for a whole head also
    several heights, because its centre of mass lies below the brain's, and upright ones of a small head."""
    coarse = _coarser(moving, COARSE_MM)
    fixed = _fixed(COARSE_MM)
    centre_mni = _centre_of_mass(fixed)
    if skull_stripped:
        scale = _size_ratio(coarse)
        centres = [_centre_of_mass(coarse)]
    else:
        scale = _WHOLE_HEAD_SCALE
        lit = coarse.data_XYZ > 0.2
        voxels = np.argwhere(lit) @ coarse.affine[:3, :3].T + coarse.affine[:3, 3]
        centre, top = voxels.mean(axis=0), float(np.percentile(voxels[:, 2], 99.5))
        # The brain's centre lies about 75 mm below the top of the skin, wherever the field of view ends below.
        heights = [top - 75.0, top - 90.0, float(centre[2])]
        centres = [np.array([centre[0], centre[1], z]) for z in heights]
    wanted = [(scale, centre, turn) for centre in centres for turn in _TURNS_DEGREES]
    if not skull_stripped:
        wanted += [(_SMALL_HEAD_SCALE, centre, _TURNS_DEGREES[0]) for centre in centres]
    starts = []
    for size, centre, turn in wanted:
        start = np.eye(4)
        start[:3, :3] = size * Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
        start[:3, 3] = centre - start[:3, :3] @ centre_mni
        starts.append(start)
    return starts


def _affine(moving: Volume, starts: Sequence[np.ndarray], *, aligned: bool, skull_stripped: bool) -> np.ndarray:
    """mni_from_scan: a similarity from every start at 8 mm, the best of them refined as an affine at 4 and 2 mm."""
    margin_mm = 10 if skull_stripped else 4
    if aligned:
        best = starts[0]
        # A head that keeps its size is smaller than the template, which centres both at the same place.
        best = _scaled_about_centre(best, _size_ratio(moving) if skull_stripped else _WHOLE_HEAD_SCALE)
    else:
        best = _best_start(moving, starts, margin_mm)
        best, _ = _optimised(moving, best, MIDDLE_MM, margin_mm, kind="similarity")
    fine = float(moving.voxel_mm.min()) < 3.0
    best, _ = _optimised(moving, best, MIDDLE_MM, margin_mm, kind="affine", roughly=fine)
    if fine:
        best, _ = _optimised(moving, best, FINE_MM, margin_mm, kind="affine")
    return np.linalg.inv(best)


def _best_start(moving: Volume, starts: Sequence[np.ndarray], margin_mm: int) -> np.ndarray:
    best, best_metric = starts[0], float("inf")
    for start in starts:
        found, metric = _optimised(moving, start, COARSE_MM, margin_mm, kind="similarity")
        if metric < best_metric:
            best, best_metric = found, metric
        if best_metric < GOOD_START:
            break
    return best


def _size_ratio(moving: Volume) -> float:
    """How much longer this head is than the template's, as far as that is believed."""
    inside_mm3 = float((moving.data_XYZ > 0.1).sum()) * moving.voxel_mm3
    return float(np.clip((inside_mm3 / load_template(2).head_mm3) ** (1 / 3), 0.7, 1.15))


def _scaled_about_centre(scan_from_mni: np.ndarray, scale: float) -> np.ndarray:
    centre = _centre_of_mass(_fixed(MIDDLE_MM))
    scaled = scan_from_mni.copy()
    scaled[:3, :3] *= scale
    scaled[:3, 3] = scan_from_mni[:3, :3] @ centre + scan_from_mni[:3, 3] - scaled[:3, :3] @ centre
    return scaled


def _optimised(
    moving: Volume,
    scan_from_mni: np.ndarray,
    resolution_mm: int,
    margin_mm: int,
    *,
    kind: str,
    roughly: bool = False,
) -> tuple[np.ndarray, float]:
    """scan_from_mni improved at one resolution, and the metric there (negative mutual information: lower is better).
    `roughly`: from half the voxels and to a tenth of the first step, where a finer resolution follows."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    fixed = _to_itk(_fixed(resolution_mm))
    image = _to_itk(_coarser(moving, resolution_mm))
    lps = _FLIP @ scan_from_mni @ _FLIP
    centre = (_FLIP[:3, :3] @ _centre_of_mass(_fixed(MIDDLE_MM))).tolist()
    transform = _itk_transform(lps, centre, kind)

    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(HISTOGRAM_BINS)
    method.SetMetricFixedMask(_fixed_mask(resolution_mm, margin_mm))
    sampled = 0.2 if resolution_mm == FINE_MM else 0.5 if roughly else 1.0
    if sampled < 1:
        method.SetMetricSamplingStrategy(method.REGULAR)
        # ITK jitters even regular samples, by the wall clock unless it is given a seed.
        method.SetMetricSamplingPercentage(sampled, seed=1)
    else:
        method.SetMetricSamplingStrategy(method.NONE)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=_FIRST_STEP[kind, resolution_mm],
        minStep=_FIRST_STEP[kind, resolution_mm] / (10 if roughly else 100),
        numberOfIterations=80,
        relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-6,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed, image)
    except RuntimeError:
        # ITK gives up where image and template do not overlap: as bad as a start can be.
        return scan_from_mni, float("inf")
    found = np.eye(4)
    found[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    found[:3, 3] = (
        np.array(transform.GetTranslation())
        + np.array(transform.GetCenter())
        - found[:3, :3] @ np.array(transform.GetCenter())
    )
    return _FLIP @ found @ _FLIP, float(method.GetMetricValue())


def _itk_transform(lps: np.ndarray, centre: list[float], kind: str) -> sitk.Transform:
    linear, offset = lps[:3, :3], lps[:3, 3]
    about = np.array(centre)
    translation = (linear @ about + offset - about).tolist()
    if kind == "affine":
        affine = sitk.AffineTransform(3)
        affine.SetCenter(centre)
        affine.SetMatrix(linear.ravel().tolist())
        affine.SetTranslation(translation)
        return affine
    similarity = sitk.Similarity3DTransform()
    similarity.SetCenter(centre)
    similarity.SetMatrix(_orthogonalised(linear).ravel().tolist(), 1e-6)
    similarity.SetTranslation(translation)
    return similarity


def _orthogonalised(linear: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(linear)
    return np.asarray(s.mean() * (u @ vt))


# ------------------------------------------------------------------------------------------------------------- quality


def _correlation(scan: Volume, mni_from_scan_affine: np.ndarray) -> float:
    """Pearson correlation of scan and template over the template's brain, at 4 mm."""
    fixed = _fixed(MIDDLE_MM)
    there = on_voxels(_antialiased(scan, MIDDLE_MM), fixed, np.linalg.inv(mni_from_scan_affine))
    inside = fixed.data_XYZ > 0.05
    if float(np.std(there[inside])) == 0.0:
        return 0.0
    return float(np.corrcoef(there[inside], fixed.data_XYZ[inside])[0, 1])


def _cut_fraction(mni_from_scan: np.ndarray, mni_from_scan_affine: np.ndarray) -> float:
    """The share of this person's brain that lies outside the paper's box after the rigid motion."""
    points_mni = _brain_points()
    to_rigid = mni_from_scan @ np.linalg.inv(mni_from_scan_affine)
    points = points_mni @ to_rigid[:3, :3].T + to_rigid[:3, 3]
    box = GRIDS["paper"]
    low = np.array(box.origin_mm) - box.voxel_mm / 2
    high = low + np.array(box.shape_XYZ) * box.voxel_mm
    return float(1 - ((points >= low) & (points <= high)).all(axis=1).mean())
