"""Table 1 and Figures 1 to 4 of Pinaya et al. 2022, in kind: four ways to make brains, one cohort, one judge.

OUT/models/      what had to be trained: ldm, lsgan, vaegan, age, sex
OUT/brains/      a dataset a way, all asked for the same people
OUT/judged/      a scorecard a way; cache/ holds what was found in each image, by its hash
OUT/figures/     figure 1 to 4
OUT/table1.json  table1.md

Everything is gone on with when the same command is given again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import brainldm
from brainldm.base.errors import UsageError
from brainldm.base.files import atomic_path, check_output_apart, make_folder, read_json, write_json, write_text
from brainldm.base.nifti import read_nifti
from brainldm.base.progress import Progress, Quiet
from brainldm.base.slices import VIEWS, middle_slice
from brainldm.base.tables import read_table
from brainldm.cohort.split import HELD_OUT

if TYPE_CHECKING:
    from brainldm.cohort.dataset import PreparedCohort
    from brainldm.evaluate.measuring import Instrument

REAL = "Real images"
_TARGETS = {"age": "age_years", "sex": "sex"}


@dataclass(frozen=True)
class Way:
    """One way to make brains: a model, and how it is sampled (None: the model's only way)."""

    name: str
    title: str
    model: str  # a key of the models: ldm, lsgan, vaegan
    sampler: str | None = None
    steps: int | None = None


WAYS = (
    Way("lsgan", "LSGAN", "lsgan"),
    Way("vaegan", "VAE-GAN", "vaegan"),
    Way("ldm_ddpm", "LDM, DDPM 1000", "ldm", "ddpm", 1000),
    Way("ldm_ddim", "LDM, DDIM 50", "ldm", "ddim", 50),
    Way("ldm_fast", "LDM, UniPC 12", "ldm", "unipc", 12),
)

# What the table shows: key of a scorecard's row, heading, decimals.
_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("{space}.frechet", "Fréchet", 3),
    ("{space}.frechet_beyond", "beyond chance", 3),
    ("ms_ssim", "MS-SSIM", 3),
    ("4_g_r_ssim", "4-G-R-SSIM", 3),
    ("regions.wasserstein", "regional volumes", 2),
    ("ventricles_mm3.pearson_r", "ventricles r", 3),
    ("brain_mm3.pearson_r", "brain r", 3),
    ("age_years.pearson_r", "age r", 3),
    ("sex.auc", "sex AUC", 3),
    ("nearer_than_unseen", "copies", 3),
)


def make_table1(
    cohort: Path,
    out: Path,
    *,
    models: Mapping[str, Path | None] | None = None,
    recipe: str = "quick",
    minutes: float = 10.0,
    n: int = 64,
    pairs: int = 1000,
    seed: int = 0,
    feature_space: str = "random",
    ways: Sequence[Way] = WAYS,
    instrument: Instrument | None = None,
    workers: int = 1,
    progress: Progress = Quiet(),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Trains what `models` (ldm, lsgan, vaegan, age, sex: a run each) does not name, each for `minutes` (the predictors
    a quarter of it), makes `n` brains in each way, judges them and writes table and figures; returns table1.json.
    Sets are compared with held-out people alone where the cohort has enough for parts of them. `instrument` finds
    volumes in images, by default the one without trained weights.

    UsageError, before anything is trained, where a given model's grid or split is not the cohort's, a predictor
    predicts something else, the model was calibrated on this seed, or `out` holds the models of another cohort, recipe,
    time or seed.
    """
    from brainldm.cohort.dataset import PreparedCohort
    from brainldm.evaluate.parts import FEWEST_REAL
    from brainldm.evaluate.scorecard import evaluate_dataset, feature_spaces
    from brainldm.recipes import recipe_named
    from brainldm.train.loop import check_asked

    if n < 1 or pairs < 1 or len(feature_spaces((feature_space,))) != 1:
        raise UsageError(
            f"{n} brains, {pairs} pairs and the feature space {feature_space!r} were asked for.",
            remedy="Ask for 1 of each or more, and a space that evaluate knows.",
        )
    given = {name: path for name, path in (models or {}).items() if path is not None}
    check_output_apart(out, cohort)
    prepared = PreparedCohort.open(cohort)
    check_asked(None, minutes)
    recipe_named(recipe)
    _check_given(given, prepared, seed)
    make_folder(out)
    _record_or_compare(out / "asked.json", cohort, recipe, minutes, seed)
    trained = {
        name: given[name]
        if name in given
        else _train(name, cohort, out / "models" / name, recipe, minutes, seed, progress, say)
        for name in ("ldm", "lsgan", "vaegan", "age", "sex")
    }
    timings, cards = {}, {}
    unseen = sum(row.split in HELD_OUT for row in prepared.people)
    for way in ways:
        say(f"{way.title}: {n} brains")
        timings[way.name] = _generate(way, trained, out / "brains" / way.name, n, seed, progress, say)
        cards[way.name] = evaluate_dataset(
            out / "brains" / way.name,
            cohort,
            out / "judged" / way.name,
            instrument=instrument,
            pairs=pairs,
            seed=seed,
            workers=workers,
            predictors=[trained["age"], trained["sex"]],
            features=(feature_space,),
            cache=out / "judged" / "cache",
            held_out_only=unseen >= FEWEST_REAL,
            progress=progress,
        ).to_json()
    table = _table(ways, cards, timings, n, pairs, seed, trained)
    write_json(out / "table1.json", table)
    write_text(out / "table1.md", as_markdown(table))
    say("figures 1 to 4")
    _figures(ways, cohort, out, trained, seed, progress)
    return table


# ------------------------------------------------------------------------------------------------------------- models


def _train(
    name: str,
    cohort: Path,
    out: Path,
    recipe: str,
    minutes: float,
    seed: int,
    progress: Progress,
    say: Callable[[str], None],
) -> Path:
    """Trains one of the models where `out` does not hold it whole."""
    if (out / "model" / "model.json").is_file() or (out / "predictor" / "predictor.json").is_file():
        return out
    say(f"training {name}, at most {minutes / 4 if name in ('age', 'sex') else minutes:g} minutes")
    if name == "ldm":
        from brainldm.recipes import recipe_named
        from brainldm.train.run import train

        train(replace(recipe_named(recipe), seed=seed), cohort, out, minutes=minutes, progress=progress)
    elif name in ("age", "sex"):
        from brainldm.train.predictor_run import train_predictor

        train_predictor(name, cohort, out, minutes=minutes / 4, seed=seed, progress=progress)
    else:
        from brainldm.cohort.dataset import PreparedCohort
        from brainldm.recipes.gan import baseline
        from brainldm.train.gan_run import train_gan

        config = baseline(name, PreparedCohort.open(cohort).grid.shape_XYZ)
        train_gan(config, cohort, out, minutes=minutes, seed=seed, progress=progress)
    return out


def _record_or_compare(path: Path, cohort: Path, recipe: str, minutes: float, seed: int) -> None:
    """Writes on what and how the models are trained here; UsageError where those that are there were otherwise."""
    from brainldm.cohort.dataset import PreparedCohort

    asked = {"cohort": PreparedCohort.open(cohort).digest, "recipe": recipe, "minutes": minutes, "seed": seed}
    models_there = (path.parent / "models").is_dir()
    recorded = read_json(path) if path.is_file() and models_there else asked
    different = [name for name in asked if recorded[name] != asked[name]]
    if different:
        raise UsageError(
            f"the models in this folder were trained with another {' and '.join(different)}.",
            remedy="Give the same command to finish it, or another folder.",
            path=path.parent,
        )
    write_json(path, asked)


def _check_given(models: Mapping[str, Path], cohort: PreparedCohort, seed: int) -> None:
    from brainldm.cohort.predictor import read_predictor
    from brainldm.model.folder import read_description
    from brainldm.recipes.card_parts import check_seed, check_split

    wanted = cohort.grid.shape_XYZ
    trainings: dict[str, Mapping[str, Any]] = {}
    for name, path in models.items():
        if name in _TARGETS:
            predictor = read_predictor(path)
            shape = predictor.grid.shape_XYZ
            if predictor.target != _TARGETS[name]:
                raise UsageError(
                    f"predicts {predictor.target}, not {_TARGETS[name]}.",
                    remedy=f"Train one: brainldm train {name} --data COHORT --out RUN.",
                    path=path,
                )
            trainings[f"predictor of {name}"] = predictor.training
        else:
            description = read_description(path)
            shape = description.grid.shape_XYZ
            trainings[f"{name} model"] = description.training
            check_seed(description, seed)
            if name == "ldm" and description.covariates.joint_model() is None:
                raise UsageError(
                    "this model does not know how covariates are distributed in its training people, and brains are "
                    "asked for here as they are.",
                    remedy="Give a model that brainldm trained.",
                    path=path,
                )
        if tuple(shape) != tuple(wanted):
            raise UsageError(
                f"the {name} model is of images of {shape} voxels, the cohort's are of {wanted}.",
                remedy="Give models that were trained on this grid.",
                path=path,
            )
    check_split(trainings, cohort)


def _generate(
    way: Way,
    trained: Mapping[str, Path],
    out: Path,
    n: int,
    seed: int,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Makes the way's brains and returns how long one took, and on what (timed_brains)."""
    from brainldm.generate.plan import make_plan
    from brainldm.generate.run import GenerateSettings
    from brainldm.model.folder import read_description
    from brainldm.recipes.timed_brains import make_brains

    # Everybody is asked for the same people: those of the latent diffusion model's cohort.
    covariates = read_description(trained["ldm"]).covariates
    rows = make_plan({}, n=n, seed=seed, ranges=covariates.fitted_ranges(), joint=covariates.joint_model())
    settings = GenerateSettings(seed=seed)
    if way.sampler is not None:
        settings = GenerateSettings(seed=seed, sampler=way.sampler, steps=way.steps)
    timing = out.parent / f"{way.name}.timing.json"
    return make_brains(trained[way.model], rows, settings, out, timing, progress=progress, say=say)


# -------------------------------------------------------------------------------------------------------------- table


def _table(
    ways: Sequence[Way],
    cards: Mapping[str, Mapping[str, Any]],
    timings: Mapping[str, Mapping[str, Any]],
    n: int,
    pairs: int,
    seed: int,
    trained: Mapping[str, Path],
) -> dict[str, Any]:
    from brainldm.model.folder import read_description

    first = next(iter(cards.values()))
    space = first["settings"]["features"][0]

    def found(card: Mapping[str, Any], side: str) -> dict[str, Any]:
        rows = {row["key"]: row for row in card["rows"] if row["group"] == "all"}
        return {
            heading: rows[key][side] for pattern, heading, _ in _COLUMNS if (key := pattern.format(space=space)) in rows
        }

    def all_found(card: Mapping[str, Any]) -> dict[str, Any]:
        """Every figure of the scorecard, of the brains and of what they are compared with."""
        sides = ("synthetic", "reference")
        kept = ("value", "low", "high", "n")
        return {
            row["key"]: {side: {name: row[side][name] for name in kept} for side in sides if row[side] is not None}
            for row in card["rows"]
            if row["group"] == "all"
        }

    training = {name: read_description(trained[name]).training for name in ("ldm", "lsgan", "vaegan")}
    lines: list[dict[str, Any]] = [
        {
            "way": way.name,
            "title": way.title,
            "seconds_an_image": timings[way.name]["seconds_a_brain"],
            "device": timings[way.name]["machine"]["device"],
            "figures": found(cards[way.name], "synthetic"),
            "scorecard": all_found(cards[way.name]),
        }
        for way in ways
    ]
    real = found(first, "reference")
    lines.append({"way": "real", "title": REAL, "seconds_an_image": None, "device": None, "figures": real})
    return {
        "software": {"brainldm": brainldm.__version__},
        "n": n,
        "pairs": pairs,
        "seed": seed,
        "features": space,
        "minutes_of_training": {name: _minutes(facts) for name, facts in training.items()},
        "training_images": training["ldm"].get("training_images"),
        "real": first["real"]["folder"],
        "columns": [heading for _, heading, _ in _COLUMNS],
        "lines": lines,
    }


def _minutes(training: Mapping[str, Any]) -> float | None:
    """What a model's stages took together; None for one that does not say."""
    stages = [facts for facts in training.values() if isinstance(facts, dict) and "seconds" in facts]
    return sum(facts["seconds"] for facts in stages) / 60 if stages else None


def as_markdown(table: Mapping[str, Any]) -> str:
    """The table, a line a way, values with their 95 % intervals."""
    headings = ["", *table["columns"], "s / image"]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    decimals = {heading: places for _, heading, places in _COLUMNS}
    devices = {line["device"] for line in table["lines"] if line["device"]}
    for line in table["lines"]:
        cells = [line["title"]]
        for heading in table["columns"]:
            estimate = line["figures"].get(heading)
            cells.append(_cell(estimate, decimals[heading]))
        timed = "" if line["seconds_an_image"] is None else f"{line['seconds_an_image']:.3g}"
        cells.append(f"{timed} ({line['device']})" if timed and len(devices) > 1 else timed)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(estimate: Mapping[str, Any] | None, places: int) -> str:
    if estimate is None or estimate.get("value") is None:
        return "-"
    text = f"{estimate['value']:.{places}f}"
    if estimate.get("low") is not None:
        text += f" ({estimate['low']:.{places}f}..{estimate['high']:.{places}f})"
    return text


# ------------------------------------------------------------------------------------------------------------ figures


def _figures(
    ways: Sequence[Way], cohort: Path, out: Path, trained: Mapping[str, Path], seed: int, progress: Progress
) -> None:
    from brainldm.cohort.predictor import read_predictor
    from brainldm.recipes.figures import make_figure

    _figure_1(ways, cohort, out)
    for number in (2, 4):
        make_figure(number, trained["ldm"], out / "figures" / f"figure{number}", seed=seed, progress=progress)
    _figure_3(out, read_predictor(trained["age"]).name)


def _figure_1(ways: Sequence[Way], cohort: Path, out: Path, people: int = 3) -> None:
    """Figure 1: real people (held out, where some are), and what each way made, in three views on one grey scale."""
    from matplotlib.figure import Figure

    from brainldm.base.manifest import Manifest
    from brainldm.cohort.dataset import PreparedCohort

    prepared = PreparedCohort.open(cohort)
    real = [row.path for split in (*HELD_OUT, "train") for row in prepared.rows(split)]
    shown = {REAL: real[:people]}
    for way in ways:
        made = out / "brains" / way.name
        shown[way.title] = [made / record["file"] for record in Manifest(made / "manifest.jsonl").records()[:people]]
    white = float(np.mean([np.percentile(read_nifti(file).data_XYZ, 99.8) for file in shown[REAL]]))
    figure = Figure(figsize=(1.5 * people * len(VIEWS), 1.7 * len(shown)), facecolor="black", layout="constrained")
    axes = figure.subplots(len(shown), people * len(VIEWS), squeeze=False)
    for line, (title, files) in enumerate(shown.items()):
        for column, file in enumerate(files):
            image_XYZ = read_nifti(file).data_XYZ
            for number, view in enumerate(VIEWS):
                ax = axes[line, column * len(VIEWS) + number]
                ax.imshow(middle_slice(image_XYZ, view), cmap="gray", vmin=0, vmax=white)
        axes[line, 0].set_title(title, color="white", fontsize=9, loc="left")
    for ax in axes.flat:
        ax.set_axis_off()
    _save(figure, out / "figures" / "figure1.png")


def _figure_3(out: Path, predictor: str) -> None:
    """Figure 3: asked against measured ventricles, and asked age against what `predictor` says, of LDM with DDIM."""
    from matplotlib.figure import Figure

    from brainldm.base.manifest import Manifest
    from brainldm.evaluate.conditioning import agreement

    people = read_table(out / "judged" / "ldm_ddim" / "measured.tsv")
    predicted = {
        record["sha256"]: record["values"]["age_years"]
        for record in Manifest(out / "judged" / "cache" / "measured.jsonl").records()
        if record["instrument"] == predictor
    }
    asked_age = [people.number(row, "age_years_asked") for row in range(len(people))]
    found_age = [predicted.get(cells["sha256"]) for cells in people.rows]
    millilitres = [
        [
            None if volume_mm3 is None else volume_mm3 / 1000
            for row in range(len(people))
            for volume_mm3 in (people.number(row, f"ventricles_mm3_{kind}"),)
        ]
        for kind in ("asked", "measured")
    ]
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, (x, y, label) in zip(
        axes, ((*millilitres, "ventricular volume, mL"), (asked_age, found_age, "age, years"))
    ):
        pairs = np.array([(a, b) for a, b in zip(x, y) if a is not None and b is not None], dtype=float)
        if len(pairs):
            ax.plot(pairs[:, 0], pairs[:, 1], "o", ms=4, alpha=0.7)
            low, high = pairs.min(), pairs.max()
            ax.plot([low, high], [low, high], color="grey", lw=1)
            r = agreement(*pairs.T.tolist()).pearson_r.value
            ax.set_title(f"r {'-' if r is None else f'{r:.3f}'}, n {len(pairs)}", fontsize=10)
        ax.set(xlabel=f"asked: {label}", ylabel="found in the image")
    _save(figure, out / "figures" / "figure3.png")


def _save(figure: Any, path: Path) -> None:
    make_folder(path.parent)
    with atomic_path(path) as part:
        figure.savefig(part, dpi=110, format="png")
