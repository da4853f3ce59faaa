"""Covariates: ranges there and back, a joint distribution that names nobody, units on commands; splits by person."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainldm.base.covariates import (
    CONTINUOUS,
    COVARIATES,
    FEMALE,
    MALE,
    NOT_TOLD,
    PAPER_RANGES,
    CovariateRanges,
    Covariates,
    conditions,
    covariates_array,
    implausible,
    sex_code,
)
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.joint import CovariateModel, Marginal
from brainldm.base.quantities import parse_age, parse_sex, parse_volume
from brainldm.base.streams import stream
from brainldm.cohort.split import SPLITS, assign_splits, moved_people, split_of


def population(n: int, seed: int = 0, male_share: float = 0.5) -> list[Covariates]:
    """People whose ventricles grow and whose brains shrink with age, and whose ventricles are larger when male."""
    draw = np.random.default_rng(seed)
    sex = (draw.random(n) < male_share).astype(int)
    age = draw.uniform(20, 90, n)
    ventricles = np.exp(9.0 + 0.02 * age + 0.35 * sex + 0.4 * draw.standard_normal(n))
    brain = 1.6e6 - 4000 * age + 5e4 * draw.standard_normal(n)
    return [Covariates(int(s), float(a), float(v), float(b)) for s, a, v, b in zip(sex, age, ventricles, brain)]


def draws(model: CovariateModel, n: int, given: dict[str, float] | None = None) -> np.ndarray:
    return covariates_array([model.draw(stream(0, "test", i), given) for i in range(n)])


# -------------------------------------------------------------------------------------------------------------- ranges


def test_the_papers_ranges_map_to_0_and_1() -> None:
    low = np.array([0, 44, 6995.68, 1144240.0])
    high = np.array([1, 82, 171375.0, 1793910.0])
    np.testing.assert_allclose(PAPER_RANGES.normalise(low), [0, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(PAPER_RANGES.normalise(high), [1, 1, 1, 1])
    np.testing.assert_allclose(PAPER_RANGES.normalise(np.array([1, 63, 89185.34, 1469075.0])), [1, 0.5, 0.5, 0.5])


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=4, max_size=4))
def test_normalising_is_undone(values: list[float]) -> None:
    array = np.array([values, values[::-1]])
    np.testing.assert_allclose(PAPER_RANGES.normalise(PAPER_RANGES.denormalise(array)), array, atol=1e-9)


def test_ranges_are_those_of_the_people_and_survive_json() -> None:
    rows = population(40)
    ranges = CovariateRanges.fitted(rows)
    values = covariates_array(rows)
    np.testing.assert_array_equal(ranges.low, values.min(axis=0))
    np.testing.assert_array_equal(ranges.high, values.max(axis=0))
    assert CovariateRanges.from_json(json.loads(json.dumps(ranges.to_json()))) == ranges
    assert all(ranges.inside(row) == dict.fromkeys(COVARIATES, True) for row in rows)
    assert ranges.outside_of(rows[0]) == ""


def test_what_lies_outside_is_named_one_by_one() -> None:
    """Fault 32"""
    asked = Covariates(MALE, 95.0, 40_000.0, 1.0e6)
    assert PAPER_RANGES.inside(asked) == {"sex": True, "age_years": False, "ventricles_mm3": True, "brain_mm3": False}
    assert "age_years 95 is outside 44 to 82" in PAPER_RANGES.outside_of(asked)
    assert "ventricles" not in PAPER_RANGES.outside_of(asked)


def test_a_constant_covariate_is_an_error_at_fit_and_no_nan_later() -> None:
    """Fault 33"""
    rows = [Covariates(i % 2, 50.0, 1e4 + i, 1.2e6 + i) for i in range(6)]
    for fit in (CovariateRanges.fitted, CovariateModel.fitted):
        with pytest.raises(BadInput, match="age_years, 50") as caught:
            fit(rows)
        assert caught.value.reason == "constant_covariate" and caught.value.remedy
    for rows in ([], population(1)):
        with pytest.raises(BadInput):
            CovariateRanges.fitted(rows)


def test_one_sex_alone_can_be_trained_on_and_the_other_is_outside() -> None:
    women = [p for p in population(40) if p.sex == FEMALE]
    ranges = CovariateRanges.fitted(women)
    assert np.isfinite(ranges.normalise(covariates_array(women))).all()
    assert ranges.normalise(women[0].as_array())[0] == 0
    man = Covariates(MALE, women[0].age_years, women[0].ventricles_mm3, women[0].brain_mm3)
    assert not ranges.inside(man)["sex"]
    assert ranges.normalise(man.as_array())[0] == 1
    assert (draws(CovariateModel.fitted(women), 200)[:, 0] == FEMALE).all()


@pytest.mark.parametrize("content", [{}, {"sex": {"low": 0}}, {n: {"low": "x", "high": 1} for n in COVARIATES}, []])
def test_damaged_ranges_are_refused(content: dict) -> None:
    with pytest.raises(BadInput):
        CovariateRanges.from_json(content)


# --------------------------------------------------------------------------------------------------- joint distribution


def test_draws_look_like_the_people() -> None:
    people = covariates_array(population(4000))
    drawn = draws(CovariateModel.fitted(population(4000)), 4000)
    np.testing.assert_allclose(drawn.mean(axis=0), people.mean(axis=0), rtol=0.06)
    np.testing.assert_allclose(drawn.std(axis=0), people.std(axis=0), rtol=0.1)
    np.testing.assert_allclose(np.corrcoef(drawn.T), np.corrcoef(people.T), atol=0.08)
    for q in (5, 25, 50, 75, 95):
        np.testing.assert_allclose(
            np.percentile(drawn[:, 1:], q, axis=0), np.percentile(people[:, 1:], q, axis=0), rtol=0.06
        )


def test_what_is_given_is_kept_and_the_rest_follows_it() -> None:
    model = CovariateModel.fitted(population(4000))
    old_men = draws(model, 400, {"age_years": 80.0, "sex": MALE})
    young_women = draws(model, 400, {"age_years": 30.0, "sex": FEMALE})
    assert (old_men[:, 1] == 80).all() and (old_men[:, 0] == MALE).all() and (young_women[:, 0] == FEMALE).all()
    # From the population's own formulas; a copula bends what is straight in the logarithm a little.
    assert np.log(old_men[:, 2]).mean() == pytest.approx(9.0 + 0.02 * 80 + 0.35, abs=0.2)
    assert np.log(young_women[:, 2]).mean() == pytest.approx(9.0 + 0.02 * 30, abs=0.2)
    assert old_men[:, 3].mean() == pytest.approx(1.6e6 - 4000 * 80, rel=0.02)
    assert np.log(old_men[:, 2]).std() == pytest.approx(0.4, rel=0.15)


def test_sex_follows_from_the_volumes_given() -> None:
    model = CovariateModel.fitted(population(4000))
    share = {v: draws(model, 500, {"age_years": 55.0, "ventricles_mm3": v})[:, 0].mean() for v in (1.2e4, 5.5e4)}
    # Bayes: the log odds are the difference of two log-normal densities with means 10.1 and 10.45, s.d. 0.4.
    for ventricles, told in share.items():
        x = math.log(ventricles)
        odds = math.exp(((x - 10.1) ** 2 - (x - 10.45) ** 2) / (2 * 0.4**2))
        assert told == pytest.approx(odds / (1 + odds), abs=0.08)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 17])
def test_a_handful_of_people_is_enough(n: int) -> None:
    rows = population(n)
    model, ranges = CovariateModel.fitted(rows), CovariateRanges.fitted(rows)
    drawn = draws(model, 200)
    assert np.isfinite(drawn).all()
    assert all(ranges.inside(Covariates.from_array(row))[name] for row in drawn for name in CONTINUOUS)
    correlations = np.array(model.covariance)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() <= n / (n + 5) + 1e-9  # shrunk as documented
    assert len(np.unique(drawn[:, 1])) > 150


def test_ties_and_plateaus_can_be_inverted() -> None:
    rows = [Covariates(i % 2, 20.0 if i < 15 else 60.0 + i, 1e4 + 100 * i, 1.3e6 - 1000 * i) for i in range(20)]
    model = CovariateModel.fitted(rows)
    marginal = model.marginals["age_years"]
    scores = np.linspace(-3, 3, 61)
    values = marginal.value(scores)
    assert (np.diff(values) > 0).all()
    np.testing.assert_allclose([marginal.score(float(v)) for v in values], scores, atol=1e-3)
    assert np.isfinite(draws(model, 100, {"age_years": 20.0})).all()


@pytest.mark.parametrize("given_values", [{"ventricles_mm3": 5e5}, {"age_years": 120.0}, {"brain_mm3": 3e5, "sex": 1}])
def test_values_far_outside_are_kept_and_draw_nobody_impossible(given_values: dict[str, float]) -> None:
    rows = population(200)
    ranges = CovariateRanges.fitted(rows)
    for row in draws(CovariateModel.fitted(rows), 50, given_values):
        covariates = Covariates.from_array(row)
        inside = ranges.inside(covariates)
        for name in CONTINUOUS:
            if name in given_values:
                assert getattr(covariates, name) == given_values[name]
            else:
                assert inside[name]


def test_all_given_is_all_kept() -> None:
    asked = Covariates(MALE, 70.5, 4e4, 1.45e6)
    model = CovariateModel.fitted(population(50))
    assert model.draw(stream(0, "t"), vars(asked)) == asked
    with pytest.raises(UsageError, match="'weight'"):
        model.draw(stream(0, "t"), {"weight": 70})


def test_the_same_stream_gives_the_same_person() -> None:
    model = CovariateModel.fitted(population(50))
    again = CovariateModel.from_json(json.loads(json.dumps(model.to_json(), allow_nan=False)))
    assert again == model
    assert model.draw(stream(3, "plan", 7)) == again.draw(stream(3, "plan", 7))
    assert model.draw(stream(3, "plan", 7)) != model.draw(stream(3, "plan", 8))


@pytest.mark.parametrize("n", [5, 17, 300])
def test_what_is_stored_is_nobodys_row(n: int) -> None:
    """Only the ranges' ends are values of people, and those are published with any model anyway."""
    rows = population(n)
    content = CovariateModel.fitted(rows).to_json()
    for i, name in enumerate(CONTINUOUS):
        own = np.sort(covariates_array(rows)[:, 1 + i])
        knots = np.array(content["marginals"][name]["values"])
        apart = np.abs(knots[:, None] - own[None, :]).min()
        assert apart > 1e-9 * own.mean()
    assert len(json.dumps(content)) < 6000, "the size must not grow with the people"


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("covariance"),
        lambda c: c.update(kind="other"),
        lambda c: c.update(covariance=[[1, 2, 0], [2, 1, 0], [0, 0, 1]]),
        lambda c: c.update(male_probability=1.5),
        lambda c: c["marginals"].pop("age_years"),
        lambda c: c["marginals"]["age_years"].update(values=[1, 2]),
        lambda c: c["marginals"]["age_years"]["values"].__setitem__(-1, float("nan")),
        lambda c: c.update(mean_by_sex=[[0, 0, 0]]),
    ],
)
def test_a_damaged_joint_distribution_is_refused(damage) -> None:  # type: ignore[no-untyped-def]
    content = CovariateModel.fitted(population(20)).to_json()
    damage(content)
    with pytest.raises(BadInput) as caught:
        CovariateModel.from_json(content)
    assert caught.value.reason == "bad_joint_distribution"


# --------------------------------------------------------------------------------------------------- commands and cells


@pytest.mark.parametrize(
    ("text", "mm3"),
    [
        ("40ml", 40_000),
        ("40mL", 40_000),
        ("40 ML", 40_000),
        ("40000mm3", 40_000),
        ("40000 mm^3", 40_000),
        ("40 cm3", 40_000),
        ("40cm³", 40_000),
        ("40cc", 40_000),
        ("0.04l", 40_000),
        ("1.45 L", 1_450_000),
        ("4e4mm3", 40_000),
        (".04l", 40_000),
        ("40.5ml", 40_500),
    ],
)
def test_volumes_with_units(text: str, mm3: float) -> None:
    assert parse_volume(text) == pytest.approx(mm3)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("40", "without a unit"),
        ("40000", "without a unit"),
        ("40,5ml", "decimal mark"),
        ("40 oz", "'oz'"),
        ("ml", "not a volume"),
        ("", "not a volume"),
        ("-3ml", "above 0"),
        ("0ml", "above 0"),
        ("1e400ml", "finite"),
        ("nanml", "not a volume"),
        ("40ml 50ml", "unit"),
        ("40_ml", "unit"),
        ("1__000ml", "unit"),
    ],
)
def test_volumes_that_are_none(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        parse_volume(text)
    assert caught.value.remedy


@pytest.mark.parametrize(("text", "years"), [("70", 70), ("61.5", 61.5), ("70y", 70), ("70 years", 70), ("0", 0)])
def test_ages(text: str, years: float) -> None:
    assert parse_age(text) == years


@pytest.mark.parametrize("text", ["old", "", "61,5", "-1", "200", "70 months", "nan", "1e400"])
def test_ages_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_age(text)


def test_sexes() -> None:
    for text in ("F", "f", "female", "FEMALE", "0", " F "):
        assert parse_sex(text) == sex_code(text) == FEMALE
    for text in ("M", "m", "Male", "1"):
        assert parse_sex(text) == MALE
    for text in ("2", "x", "", "n/a", "diverse"):
        assert sex_code(text) is None
        with pytest.raises(UsageError, match="F or M"):
            parse_sex(text)


def test_millilitres_given_as_mm3_are_recognised() -> None:
    """Fault 32"""
    assert "millilitres" in implausible("ventricles_mm3", 40.0)
    assert "millilitres" in implausible("brain_mm3", 1450.0)
    for name in CONTINUOUS:
        assert all(implausible(name, v) == "" for v in (PAPER_RANGES.low[COVARIATES.index(name)],))
        assert implausible(name, float("nan")) and implausible(name, -1.0)


# --------------------------------------------------------------------------------------------------------------- splits


def everybody(n: int) -> list[str]:
    return [f"sub-{i:05d}" for i in range(n)]


def test_splits_have_the_shares_asked_for() -> None:
    splits = assign_splits(everybody(5000), seed=0, holdout=0.2, moved=None)
    shares = {s: list(splits.values()).count(s) / 5000 for s in SPLITS}
    assert shares["train"] == pytest.approx(0.8, abs=0.02)
    assert shares["validation"] == pytest.approx(0.1, abs=0.015)
    assert shares["test"] == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("first", [1, 3, 5, 8, 12, 17, 60])
@pytest.mark.parametrize("seed", range(5))
def test_nobody_changes_sides_when_people_are_added(first: int, seed: int) -> None:
    moved: dict | None = None
    earlier: dict[str, str] = {}
    for n in (first, first + 1, first + 3, 2 * first + 10, 200):
        splits = assign_splits(everybody(200)[:n], seed=seed, holdout=0.2, moved=moved)
        assert {i: splits[i] for i in earlier} == earlier
        moved = (moved or {}) | moved_people(splits, seed=seed, holdout=0.2)
        earlier = splits
    assert len(moved) <= 2


def test_the_order_of_people_does_not_matter() -> None:
    people = everybody(50)
    assert assign_splits(people, seed=1, holdout=0.3, moved=None) == assign_splits(
        people[::-1], seed=1, holdout=0.3, moved=None
    )


@pytest.mark.parametrize("seed", range(20))
def test_small_studies_have_no_empty_split(seed: int) -> None:
    for n in range(1, 30):
        found = set(assign_splits(everybody(n), seed=seed, holdout=0.2, moved=None).values())
        assert "train" in found
        assert n < 5 or "validation" in found
        assert n < 10 or "test" in found


def test_without_a_holdout_all_are_trained_on() -> None:
    assert set(assign_splits(everybody(50), seed=0, holdout=0.0, moved=None).values()) == {"train"}


def test_a_holdout_must_be_a_share() -> None:
    for holdout in (-0.1, 1.0, 2.0, float("nan")):
        with pytest.raises(UsageError):
            assign_splits(everybody(5), seed=0, holdout=holdout, moved=None)


def test_seeds_split_differently_and_a_seed_always_the_same() -> None:
    one, other = ([split_of(i, seed, 0.2) for i in everybody(300)] for seed in (0, 1))
    assert one != other
    assert [split_of(f"sub-{i}", 0, 0.2) for i in range(1000, 1018)] == PINNED


PINNED = [
    "validation",
    "train",
    "validation",
    "train",
    "train",
    "train",
    "train",
    "train",
    "train",
    "test",
    "train",
    "train",
    "train",
    "train",
    "train",
    "train",
    "test",
    "train",
]


def test_conditions_are_min_max_as_in_the_paper_or_equalised_by_the_people() -> None:
    people = [draw_of(i) for i in range(300)]
    ranges, joint = CovariateRanges.fitted(people), CovariateModel.fitted(people)
    told = conditions(people, ranges)
    assert told.dtype == np.float32 and told.shape == (300, 4)
    np.testing.assert_allclose(told, ranges.normalise(covariates_array(people)), rtol=1e-6)
    even = conditions(people, ranges, joint)
    np.testing.assert_array_equal(even[:, 0], told[:, 0])
    # A normal score: half the people on either side of the middle, however skewed their volumes are.
    assert abs(np.median(told[:, 2]) - 0.5) > 0.1
    np.testing.assert_allclose(np.median(even[:, 1:], axis=0), 0.5, atol=0.02)
    np.testing.assert_allclose(even[:, 1:].std(axis=0), 1 / 5, rtol=0.1)
    assert even.min() > NOT_TOLD / 2, "nobody is told what means that nothing is told"


def test_equalised_conditions_rise_with_the_value_beyond_the_range_too() -> None:
    people = [draw_of(i) for i in range(100)]
    ranges, joint = CovariateRanges.fitted(people), CovariateModel.fitted(people)
    volumes = np.geomspace(3_000, 400_000, 40)
    sweep = [Covariates(0, 60.0, float(v), 1.4e6) for v in volumes]
    assert (np.diff(conditions(sweep, ranges, joint)[:, 2]) > 0).all()


def draw_of(index: int) -> Covariates:
    draws = stream(0, "conditions", index)
    return Covariates(
        int(draws.random() < 0.5),
        float(draws.uniform(44, 82)),
        float(np.exp(draws.normal(10.2, 0.5))),
        float(draws.normal(1.4e6, 5e4)),
    )


def test_every_volume_has_a_score_however_far_below_training() -> None:
    marginal = Marginal.fitted(np.exp(stream(0, "volumes").normal(10, 0.4, 300)), logarithmic=True)
    asked = np.array([-30_000.0, -1.0, 0.0, 0.5 * marginal.low, marginal.low, 20_000.0, 1.5 * marginal.high])
    scores = np.array([marginal.score(float(value)) for value in asked])
    assert (np.diff(scores) > 0).all()
    np.testing.assert_allclose(marginal.value(scores), asked, rtol=1e-6, atol=1e-3)
