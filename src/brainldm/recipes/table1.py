"""Table 1 and Figures 1 to 4 of Pinaya et al. 2022, in kind: four ways to make brains, one cohort, one judge.

OUT/models/      what had to be trained: ldm, lsgan, vaegan, age, sex
OUT/brains/      a dataset a way, all asked for the same people
OUT/judged/      a scorecard a way; cache/ holds what was found in each image, by its hash
OUT/figures/     figure 1 to 4
OUT/table1.json  table1.md

Everything is gone on with when the same command is given again. Brains that cannot be made or judged are counted in the
table, and PartialFailure is raised after all is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import brainldm
from brainldm.base.counts import counted
from brainldm.base.errors import PartialFailure, UsageError
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
    timings, cards = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    unseen = sum(row.split in HELD_OUT for row in prepared.people)
    for way in ways:
        say(f"{way.title}: {n} brains")
        timings[way.name] = _generate(way, trained, out / "brains" / way.name, n, seed, progress, say)
        if timings[way.name]["not_made"] == n:
            say(f"{way.title}: not one brain could be made, so that there is nothing to judge")
            continue
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
    if not cards:
        raise PartialFailure("not one brain could be made in any way.", remedy="Train the models longer.", path=out)
    table = _table(ways, cards, timings, n, pairs, seed, trained)
    write_json(out / "table1.json", table)
    write_text(out / "table1.md", as_markdown(table))
    say("figures 1 to 4")
    failed = _failed(table) + _figures(ways, cohort, out, trained, seed, progress)
    say(as_markdown(table))
    if failed:
        raise PartialFailure(
            f"{'; '.join(failed)}.",
            remedy="The table is of the others; failures.tsv in the folders of brains/, judged/ and figures/ says why.",
            path=out,
        )
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

    def of_way(way: Way) -> dict[str, Any]:
        """The way's line; without figures where not one brain could be made."""
        timing, card = timings[way.name], cards.get(way.name)
        line = {
            "way": way.name,
            "title": way.title,
            "seconds_an_image": timing["seconds_a_brain"],
            "device": timing["machine"]["device"],
            "not_made": timing["not_made"],
        }
        if card is None:
            return line | {"judged": 0, "failures": {}, "warnings": [], "figures": {}, "scorecard": {}}
        return line | {
            "judged": card["synthetic"]["judged"],
            "failures": {side: card[side]["failed"] for side in ("synthetic", "real")},
            "warnings": list(card["warnings"]),
            "figures": found(card, "synthetic"),
            "scorecard": all_found(card),
        }

    real = {"way": "real", "title": REAL, "seconds_an_image": None, "device": None, "judged": first["real"]["judged"]}
    lines = [*map(of_way, ways), real | {"figures": found(first, "reference")}]
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


def _failed(table: Mapping[str, Any]) -> list[str]:
    """What could not be made or judged, a phrase each."""
    told, of_real = [], 0
    for line in table["lines"][:-1]:
        if line["not_made"]:
            told.append(f"{line['title']}: {line['not_made']} of {counted(table['n'], 'brain')} could not be made")
        if count := line["failures"].get("synthetic"):
            told.append(f"{line['title']}: {counted(count, 'brain')} could not be judged, or not in every way")
        of_real = max(of_real, line["failures"].get("real", 0))
    return [*told, f"{counted(of_real, 'real image')} could not be judged, or not in every way"] if of_real else told


def as_markdown(table: Mapping[str, Any]) -> str:
    """The table, a line a way, values with their 95 % intervals; below it how many images each is of, what failed, and
    what is to be known of all."""
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
    from brainldm.evaluate.printed import inert

    judged = ", ".join(f"{line['title']} {line['judged']}" for line in table["lines"])
    lines += ["", f"Images judged: {judged}. " + "".join(f"{failed}. " for failed in _failed(table)), ""]
    first, *others = [line["warnings"] for line in table["lines"][:-1] if line["judged"]]
    lines += [f"- {inert(warning)}" for warning in first if all(warning in said for said in others)]
    return "\n".join(line.rstrip() for line in lines).rstrip("\n") + "\n"


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
) -> list[str]:
    """Draws all four; returns which lack brains that could not be made, a phrase each."""
    from brainldm.recipes.figures import make_figure

    _figure_1(ways, cohort, out)
    failed = []
    for number in (2, 4):
        try:
            make_figure(number, trained["ldm"], out / "figures" / f"figure{number}", seed=seed, progress=progress)
        except PartialFailure as failure:  # the figure is drawn all the same
            failed.append(f"figure {number}: {failure.message.rstrip('.')}")
    _figure_3(out)
    return failed


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


def _figure_3(out: Path) -> None:
    """Figure 3: asked against measured ventricles, and asked age against what the predictor says, of LDM with DDIM."""
    from matplotlib.figure import Figure

    from brainldm.evaluate.conditioning import agreement

    judged = out / "judged" / "ldm_ddim" / "measured.tsv"
    if not judged.is_file():  # not one of those brains could be made
        return
    people = read_table(judged)

    def column(name: str, factor: float = 1.0) -> list[float | None]:
        known = name in people.columns  # nothing was found in any image otherwise
        values = [people.number(row, name) if known else None for row in range(len(people))]
        return [None if value is None else factor * value for value in values]

    panels = (
        ("ventricles_mm3", 1e-3, "ventricular volume, mL"),
        ("age_years", 1.0, "age, years"),
    )
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, (covariate, factor, label) in zip(axes, panels):
        x, y = (column(f"{covariate}_{kind}", factor) for kind in ("asked", "measured"))
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
