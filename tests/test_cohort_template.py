"""The MNI152 template and its soft labels: volumes and places that are known from elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from brainldm.base.volume import Volume
from brainldm.cohort.template import load_template


def _value_at(volume: Volume, *mm: float) -> float:
    voxel = np.linalg.solve(volume.affine, [*mm, 1])[:3]
    return float(volume.data_XYZ[tuple(np.rint(voxel).astype(int))])


def _centre_mm(volume: Volume) -> np.ndarray:
    weights = volume.data_XYZ.astype(np.float64)
    centre = [
        (weights.sum(axis=tuple(a for a in range(3) if a != axis)) * np.arange(n)).sum()
        for axis, n in enumerate(volume.shape_XYZ)
    ]
    return volume.affine[:3, :3] @ (np.array(centre) / weights.sum()) + volume.affine[:3, 3]


def test_labels_share_out_the_head():
    template = load_template(1)
    mask = template.brain_mask.data_XYZ
    total = template.grey.data_XYZ + template.white.data_XYZ + template.csf.data_XYZ
    np.testing.assert_allclose(total[mask], 1, atol=1e-5)
    assert total[~mask].max() == 0
    assert template.t1.data_XYZ.min() >= 0 and template.t1.data_XYZ.max() == 1
    assert template.head_mm3 == pytest.approx(1.883e6, rel=0.01)


def test_ventricles_have_their_volume_and_nothing_of_their_neighbours():
    ventricles = load_template(1).ventricles
    assert load_template(1).ventricles_mm3 == pytest.approx(17_800, rel=0.01)
    for inside in ((10, -10, 20), (-10, -10, 20), (20, -40, 14), (-20, -40, 14)):
        assert _value_at(ventricles, *inside) > 0.9
    third, fourth, cistern, insula = (0, -12, 2), (0, -46, -32), (0, -44, 6), (38, 4, 4)
    for outside in (third, fourth, cistern, insula):
        assert _value_at(ventricles, *outside) < 0.1


def test_template_is_symmetric_left_to_right():
    template = load_template(1)
    for volume in (template.ventricles, template.white, template.brain_mask):
        assert abs(_centre_mm(volume)[0]) < 0.1


@pytest.mark.parametrize("resolution_mm", [2, 4])
def test_coarser_templates_keep_volumes_and_places(resolution_mm):
    fine, coarse = load_template(1), load_template(resolution_mm)
    np.testing.assert_allclose(coarse.grey.voxel_mm, resolution_mm)
    assert coarse.ventricles_mm3 == pytest.approx(fine.ventricles_mm3, rel=1e-4)
    assert coarse.brain_mm3 == pytest.approx(fine.brain_mm3, rel=1e-4)
    assert coarse.head_mm3 == pytest.approx(fine.head_mm3, rel=0.02)
    np.testing.assert_allclose(_centre_mm(coarse.ventricles), _centre_mm(fine.ventricles), atol=0.01)
    assert coarse.brain_mask.data_XYZ.dtype == bool


def test_shared_arrays_cannot_be_written_to():
    template = load_template(1)
    with pytest.raises(ValueError, match="read-only"):
        template.grey.data_XYZ[0, 0, 0] = 1
    assert load_template(1) is template
