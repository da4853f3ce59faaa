"""4-G-R-SSIM against a slow transcription of its formula (paper.md 4.1), and what it should say of known pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from brainldm.base.streams import stream
from brainldm.evaluate.gradient_ssim import ALL_TERMS, STRUCTURE, four_region_ssim, gradient_maps

SHAPE = (16, 15, 17)
C1, C2, C3 = 1e-4, 9e-4, 4.5e-4


def picture(seed: int, noise: float = 0.05) -> np.ndarray:
    """A ball of its own size in an empty field, textured: flat parts, edges and texture."""
    x, y, z = np.meshgrid(*(np.arange(n) - n / 2 for n in SHAPE), indexing="ij")
    drawn = stream(seed, "test/gradient")
    inside = x**2 + y**2 + z**2 < (4.5 + seed % 3) ** 2
    return np.where(inside, np.clip(0.7 + noise * drawn.standard_normal(SHAPE), 0, 1), 0.0)


def transcribed(x: np.ndarray, y: np.ndarray, exponents: tuple[float, float, float]) -> float:
    """The published steps, voxel by voxel."""
    plane = np.array([[1, 1, 1], [1, 2, 1], [1, 1, 1]]) / 20
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = taps[:, None, None] * taps[None, :, None] * taps[None, None, :]
    window /= window.sum()

    def gradient(image: np.ndarray) -> np.ndarray:
        kernels = [np.moveaxis(np.stack([-plane, 0 * plane, plane]), 0, axis) for axis in range(3)]
        shape = tuple(n - 2 for n in image.shape)
        found = np.zeros(shape)
        for i, j, k in itertools.product(*map(range, shape)):
            part = image[i : i + 3, j : j + 3, k : k + 3]
            found[i, j, k] = sum(abs((part * kernel).sum()) for kernel in kernels)
        return found

    gx, gy = gradient(x), gradient(y)
    t1, t2 = 0.12 * gx.max(), 0.06 * gx.max()
    shape = tuple(n - 10 for n in gx.shape)
    regions: list[list[float]] = [[], [], [], []]
    for i, j, k in itertools.product(*map(range, shape)):
        here = np.s_[i : i + 11, j : j + 11, k : k + 11]
        image_here = np.s_[i + 1 : i + 12, j + 1 : j + 12, k + 1 : k + 12]
        mx, my = (window * x[image_here]).sum(), (window * y[image_here]).sum()
        luminance = (2 * mx * my + C1) / (mx**2 + my**2 + C1)
        ax, ay = (window * gx[here]).sum(), (window * gy[here]).sum()
        ex, ey = (window * gx[here] ** 2).sum(), (window * gy[here] ** 2).sum()
        vx, vy = max(ex - ax**2, 0), max(ey - ay**2, 0)
        sx, sy = np.sqrt(vx + 1e-5 * (ex + ax**2) / 2), np.sqrt(vy + 1e-5 * (ey + ay**2) / 2)
        covariance = (window * gx[here] * gy[here]).sum() - ax * ay
        contrast = (2 * sx * sy + C2) / (sx**2 + sy**2 + C2)
        structure = (covariance + C3) / (sx * sy + C3)
        if (vx == 0) != (vy == 0):
            structure = 0.0
        a, b, c = exponents
        value = luminance**a * contrast**b * structure**c
        px, py = gx[i + 5, j + 5, k + 5], gy[i + 5, j + 5, k + 5]
        if px > t1 and py > t1:
            regions[0].append(value)
        elif px > t1 or py > t1:
            regions[1].append(value)
        elif px < t2 and py <= t1:
            regions[2].append(value)
        else:
            regions[3].append(value)
    means = [float(np.mean(region)) for region in regions if region]
    return max(0.0, float(np.mean(means)))


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (2, 4)])
def test_it_is_the_published_formula(first: int, second: int) -> None:
    x, y = picture(first), picture(second)
    found = four_region_ssim(gradient_maps(x), gradient_maps(y), STRUCTURE, ALL_TERMS)
    for value, exponents in zip(found, (STRUCTURE, ALL_TERMS)):
        assert value == pytest.approx(transcribed(x, y, exponents), abs=2e-4)
    assert 0.05 < found[1] < found[0] < 0.95


def test_identical_images_give_1_and_unlike_ones_less() -> None:
    maps = [gradient_maps(picture(seed)) for seed in (0, 3, 1)]
    assert four_region_ssim(maps[0], maps[0], STRUCTURE, ALL_TERMS) == pytest.approx((1, 1), abs=1e-4)
    same_size, other_size = (four_region_ssim(maps[0], other, STRUCTURE)[0] for other in maps[1:])
    assert 1 > same_size > other_size > 0


def test_structure_alone_does_not_mind_a_change_of_brightness() -> None:
    x = picture(0)
    value, with_luminance = four_region_ssim(gradient_maps(x), gradient_maps(x * 0.8), STRUCTURE, ALL_TERMS)
    assert value > 0.97 > with_luminance


def test_empty_images_and_small_ones() -> None:
    blank = gradient_maps(np.zeros(SHAPE))
    assert four_region_ssim(blank, blank, STRUCTURE) == (1.0,)
    with pytest.raises(ValueError, match="every side must have 14"):
        gradient_maps(np.zeros((13, 20, 20)))
