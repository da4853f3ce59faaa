"""Random changes of training images: each kind does what it says, and nothing where a recipe asks for nothing."""

from __future__ import annotations

import numpy as np
import pytest

from brainldm.base.streams import stream
from brainldm.train.augment import Change, changed, draw_change
from brainldm.train.config import NO_AUGMENTATION, PAPER_AUGMENTATION, Augmentation


@pytest.fixture
def ball_XYZ() -> np.ndarray:
    """A ball off the middle, brighter to the left: no flip, move or scaling leaves it as it is."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in (21, 25, 23)), indexing="ij")
    ball = ((x - 9) ** 2 + (y - 12) ** 2 + (z - 11) ** 2 < 36) * (0.9 - 0.02 * x)
    return ball.astype(np.float32)


def centre(image_XYZ: np.ndarray) -> np.ndarray:
    return np.array([np.average(axis, weights=image_XYZ) for axis in np.indices(image_XYZ.shape)])


def test_nothing_asked_nothing_changed(ball_XYZ: np.ndarray) -> None:
    change = draw_change(stream(0, "test"), NO_AUGMENTATION)
    assert change == Change()
    np.testing.assert_array_equal(changed(ball_XYZ, change), ball_XYZ)


def test_a_flip_is_left_for_right(ball_XYZ: np.ndarray) -> None:
    np.testing.assert_array_equal(changed(ball_XYZ, Change(flip=True)), ball_XYZ[::-1])


def test_a_translation_moves_the_brain_by_so_many_voxels(ball_XYZ: np.ndarray) -> None:
    moved = changed(ball_XYZ, Change(translation_voxels=(1.0, -0.5, 0.25)))
    np.testing.assert_allclose(centre(moved) - centre(ball_XYZ), [1.0, -0.5, 0.25], atol=1e-4)


def test_a_scaling_is_about_the_middle_and_changes_the_volume_by_its_cube(ball_XYZ: np.ndarray) -> None:
    scaled = changed(ball_XYZ, Change(scale=1.2))
    assert scaled.sum() / ball_XYZ.sum() == pytest.approx(1.2**3, rel=0.02)
    middle = (np.array(ball_XYZ.shape) - 1) / 2
    np.testing.assert_allclose(centre(scaled) - middle, 1.2 * (centre(ball_XYZ) - middle), atol=0.05)


def test_brightness_changes_leave_air_alone_and_stay_in_range(ball_XYZ: np.ndarray) -> None:
    for change in (Change(shift=0.3), Change(shift=-0.3), Change(gamma=0.97)):
        image = changed(ball_XYZ, change)
        assert image.min() >= 0 and image.max() <= 1
        assert (image[ball_XYZ == 0] == 0).all()
    np.testing.assert_allclose(changed(ball_XYZ, Change(gamma=0.97)), ball_XYZ**0.97, rtol=1e-6)


def test_draws_follow_their_probabilities_and_bounds() -> None:
    draws = [draw_change(stream(0, "augment", i), PAPER_AUGMENTATION) for i in range(2000)]
    assert np.mean([d.flip for d in draws]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([d.scale != 1 for d in draws]) == pytest.approx(0.1, abs=0.03)
    assert max(abs(d.scale - 1) for d in draws) <= 0.02
    assert max(abs(t) for d in draws for t in d.translation_voxels) <= 1
    assert all(0.97 <= d.gamma <= 1.03 for d in draws)


def test_one_kind_asked_for_does_not_change_what_another_draws() -> None:
    both = Augmentation(flip_probability=0.5, gamma_probability=1.0)
    for i in range(20):
        alone = draw_change(stream(0, "same", i), Augmentation(gamma_probability=1.0))
        assert draw_change(stream(0, "same", i), both).gamma == alone.gamma
