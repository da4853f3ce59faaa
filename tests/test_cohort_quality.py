"""The gate: broken images are told from a population's, and its own members pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from brainldm.base.errors import BadInput, PartialFailure, UsageError
from brainldm.base.streams import stream
from brainldm.base.tables import read_table
from brainldm.cohort.quality import FALSE_POSITIVE_RATE, FIGURES, UsualImages, figures_of
from brainldm.generate.plan import make_plan
from brainldm.generate.run import GenerateSettings, generate
from brainldm.model.folder import load_model

SHAPE_XYZ = (16, 20, 16)


def brain(index: int) -> np.ndarray:
    """An ellipsoid with three tissues, a hole and some noise; everybody differs a little."""
    draw = stream(0, "quality test", index)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE_XYZ), indexing="ij")
    radius = np.sqrt((x / (0.85 + 0.05 * draw.random())) ** 2 + y**2 + (z / 0.9) ** 2)
    image = np.where(radius < 0.95, 0.55 + 0.02 * draw.standard_normal(), 0.0)
    image[radius < 0.7] = 0.8 + 0.02 * draw.standard_normal()
    image[radius < 0.25 + 0.1 * draw.random()] = 0.25
    return np.clip(image + 0.02 * (radius < 0.95) * draw.standard_normal(SHAPE_XYZ), 0, 1)


@pytest.fixture(scope="module")
def population() -> UsualImages:
    found = UsualImages.fitted(figures_of(brain(index), 8.0) for index in range(40))  # type: ignore[misc]
    assert found is not None
    return found


def test_members_pass_and_broken_images_do_not(population: UsualImages) -> None:
    objections = [population.objection(figures_of(brain(index), 8.0)) for index in range(100, 160)]
    assert sum(map(bool, objections)) <= 2
    good = brain(200)
    noisy = np.clip(good + 0.3 * stream(0, "noise").standard_normal(SHAPE_XYZ), 0, 1)
    half = good * (np.arange(SHAPE_XYZ[0]) < 8)[:, None, None]
    for broken in (noisy, half, np.clip(3 * good, 0, 1), 1 - good, np.full(SHAPE_XYZ, 0.5), 0.3 * good):
        assert "from the population" in population.objection(figures_of(broken, 8.0))
    assert FIGURES["symmetry"] in population.objection(figures_of(half, 8.0)) or "head" in population.objection(
        figures_of(half, 8.0)
    )


def test_one_broken_image_among_the_people_does_not_let_others_pass() -> None:
    """People of correlated normal figures, of whom one lies 15 or 1000 standard deviations away."""
    draw = stream(0, "quality outlier", 0)
    mixing = np.eye(len(FIGURES)) + 0.3 * draw.standard_normal((len(FIGURES), len(FIGURES)))
    people = 50 + draw.standard_normal((200, len(FIGURES))) @ mixing
    direction = mixing[0] * 7
    broken = 50 + direction + draw.standard_normal((100, len(FIGURES))) @ mixing
    for far in (0, 15, 1000):
        if far:
            people[17] = 50 + far / 7 * direction
        found = UsualImages.fitted(people)
        assert found is not None
        assert bool(found.objection(people[17])) == bool(far)
        assert sum(bool(found.objection(figures)) for figures in broken) > 80, far


def test_real_people_are_rejected_at_the_stated_rate() -> None:
    draw = stream(0, "quality rate", 0)
    rates = []
    for people in (200, 400, 800, 1600):
        found = UsualImages.fitted(draw.standard_normal((people, len(FIGURES))))
        assert found is not None
        rates.append(np.mean([bool(found.objection(f)) for f in draw.standard_normal((4000, len(FIGURES)))]))
    assert 0.4 * FALSE_POSITIVE_RATE < np.mean(rates) < 1.5 * FALSE_POSITIVE_RATE, rates


def test_nothing_reads_a_global_generator() -> None:
    found = []
    for seed in (1, 2, 3):
        np.random.seed(seed)  # noqa: NPY002
        found.append(figures_of(brain(0), 8.0))
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("nothing", [np.zeros(SHAPE_XYZ), np.full(SHAPE_XYZ, np.nan), np.full(SHAPE_XYZ, np.inf)])
def test_images_of_nothing_have_no_figures(population: UsualImages, nothing: np.ndarray) -> None:
    assert figures_of(nothing, 8.0) is None
    assert "not finite, or no head" in population.objection(None)


def test_too_few_people_make_no_population(population: UsualImages) -> None:
    assert UsualImages.fitted(figures_of(brain(index), 8.0) for index in range(19)) is None  # type: ignore[misc]
    assert UsualImages.from_json(population.to_json()) == population
    for damage in ({"mean": [1.0]}, {"figures": ["other"]}, {"threshold": "far"}):
        with pytest.raises(BadInput, match="damaged or incomplete"):
            UsualImages.from_json(population.to_json() | damage)


def test_a_gate_draws_again_and_says_what_it_could_not_make(
    tiny_run: Path, tmp_path: Path, population: UsualImages
) -> None:
    """A model of six steps makes no brain: all are rejected, each with its reason, and nothing is written for them."""
    model = load_model(tiny_run)
    rows = make_plan({}, n=2, seed=0, ranges=model.ranges, joint=model.joint)
    settings = GenerateSettings(steps=2, gate=True)
    with pytest.raises(UsageError, match="--gate has nothing to compare with"):
        generate(model, tmp_path / "out", rows, settings)
    assert not (tmp_path / "out").exists()
    gated = replace(model, description=model.description.model_copy(update={"quality": population.to_json()}))
    with pytest.raises(PartialFailure, match="2 of 2 brains"):
        generate(gated, tmp_path / "out", rows, settings)
    failures = read_table(tmp_path / "out" / "failures.tsv")
    assert all("3 draws gave no image to keep" in cells["message"] for cells in failures.rows)
    everybody = replace(population, threshold=1e9)
    open_gate = replace(model, description=model.description.model_copy(update={"quality": everybody.to_json()}))
    assert generate(open_gate, tmp_path / "open", rows, settings).made == 2
