"""The card of a model trained on phantoms: what it makes, against people it has not seen, by one command.

OUT/results.json     every figure with its count, interval, seed, target, and the paper's where there is one
OUT/README.md        the same for people, with what the model is and is not
OUT/mosaic.png       held-out phantoms and generated brains side by side; extrapolation.png is the paper's Figure 4
OUT/brains/          the brains, drawn from the model's joint distribution     OUT/judged/   their scorecard
OUT/figure4/         Figure 4 from several noises                    OUT/reconstruction.jsonl   a line a person

The same command goes on with what an interrupted one left, and makes nothing twice.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import brainldm
from brainldm.base.covariates import CONTINUOUS, COVARIATES
from brainldm.base.errors import BadInput, PartialFailure, UsageError
from brainldm.base.files import atomic_path, locked_folder, read_json, write_json, write_text
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import read_nifti
from brainldm.base.pool import each_in_a_pool
from brainldm.base.progress import Progress, Quiet
from brainldm.base.slices import VIEWS, Crop, middle_slice
from brainldm.base.streams import stream
from brainldm.base.tables import read_table
from brainldm.cohort.dataset import PreparedCohort, PreparedRow, read_prepared_json
from brainldm.cohort.measure import TemplateMeasure
from brainldm.cohort.predictor import Predictor, read_predictor
from brainldm.cohort.prepare_config import PrepareConfig
from brainldm.evaluate.estimate import Estimate, mean, share
from brainldm.evaluate.images import JudgedImage
from brainldm.evaluate.measuring import Instrument, measure_one
from brainldm.evaluate.scorecard import Scorecard, evaluate_dataset
from brainldm.generate.dataset import image_name
from brainldm.generate.plan import make_plan, read_plan
from brainldm.generate.run import GenerateSettings, generate
from brainldm.generate.start import start
from brainldm.model.folder import find_model, load_latent_diffusion
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.recipes.card_text import card_text
from brainldm.recipes.figures import figure_4, make_figure
from brainldm.recipes.reconstruction import FIGURES, PhantomStudy, held_out, reconstructions

SCHEMA, SCHEMA_VERSION = "brainldm model card", 1
NOISES = 5  # of Figure 4: one brain a value could be monotone by luck
SHOWN = 12  # brains of either side in the mosaic
_WHITE_QUANTILE = 99.8


@dataclass(frozen=True)
class _Parts:
    """What the card is made of, opened and found to belong together."""

    model: Path
    loaded: LatentDiffusion
    cohort: PreparedCohort
    people: tuple[PreparedRow, ...]  # held out
    study: PhantomStudy
    predictors: Mapping[str, Predictor]


def make_card(
    model: Path,
    cohort: Path,
    out: Path,
    *,
    age: Path | None,
    sex: Path | None,
    phantoms: Path,
    n: int = 200,
    reconstructed: int = 40,
    pairs: int = 1000,
    seed: int = 0,
    measure: Instrument | None = None,
    workers: int = 1,
    progress: Progress = Quiet(),  # noqa: B008  # stateless
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Makes `n` brains, judges them against the held-out people of `cohort` with the predictors `age` and `sex`,
    reconstructs at most `reconstructed` of those people, extrapolates as Figure 4 does, and writes the card into `out`;
    returns results.json.

    Without a predictor the card says that its covariate was not judged. `phantoms` is the study that `cohort` was
    prepared from; `measure` finds volumes, by default the instrument without trained weights. UsageError or BadInput,
    before the first brain, where the parts do not belong together.
    """
    if n < 1 or reconstructed < 1:
        raise UsageError(f"{n} brains and {reconstructed} reconstructions were asked for.", remedy="Ask for 1 of each.")
    parts = _opened(model, cohort, out, age, sex, phantoms)
    instrument = measure or TemplateMeasure()
    with locked_folder(out):
        say(f"1/4 {n} brains")
        speed = _make_brains(parts, out, n, seed, progress, say)
        say(f"2/4 judge them against {len(parts.people)} held-out phantoms")
        judged = evaluate_dataset(
            out / "brains",
            cohort,
            out / "judged",
            measure=instrument,
            pairs=pairs,
            seed=seed,
            workers=workers,
            predictors=[folder for folder in (age, sex) if folder is not None],
            held_out_only=True,
            progress=progress,
        )
        say("3/4 reconstruct held-out phantoms")
        people = _some(parts.people, reconstructed, seed)
        kept = reconstructions(
            parts.loaded,
            people,
            parts.cohort,
            parts.study,
            Manifest(out / "reconstruction.jsonl"),
            workers=workers,
            progress=progress,
        )
        say("4/4 extrapolate, and draw")
        beyond = _extrapolation(parts.model, out / "figure4", instrument, seed, workers, progress)
        results: dict[str, Any] = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "model": _about(parts),
            "training": _training(parts.loaded.description.training),
            "settings": _settings(out, n, pairs, seed, parts, judged),
            "speed": speed,
            **judged_figures(judged, seed),
            "reconstruction": reconstruction_figures(kept, seed),
            "extrapolation": beyond,
            "commands": _commands(parts, cohort, n, reconstructed, pairs, seed),
            "software": {"brainldm": brainldm.__version__, "torch": torch.__version__, "numpy": np.__version__},
        }
        made = Manifest(out / "brains" / "manifest.jsonl").proven(out / "brains")
        sides = {
            "held-out phantoms": [row.path for row in parts.people],
            "generated brains": [out / "brains" / made[index]["file"] for index in sorted(made)],
        }
        draw_mosaic(sides, out / "mosaic.png")
        for drawn in sorted((out / "figure4").glob("noise-*/figure.png"))[:1]:
            shutil.copyfile(drawn, out / "extrapolation.png")
        write_text(out / "README.md", card_text(results))
        write_json(out / "results.json", results)  # last: it says that the card is whole
    return results


# ---------------------------------------------------------------------------------------------- before the first brain


def _opened(model: Path, cohort: Path, out: Path, age: Path | None, sex: Path | None, phantoms: Path) -> _Parts:
    folder = find_model(model)
    if (out / "model.json").exists():
        raise UsageError("the folder holds a model.", remedy="Give the card a folder of its own.", path=out)
    loaded = load_latent_diffusion(folder)
    prepared = PreparedCohort.open(cohort)
    people = held_out(prepared)
    if not people:
        raise UsageError("nobody in this cohort is held out.", remedy="Prepare it with --holdout above 0.", path=cohort)
    study = PhantomStudy.open(phantoms)
    predictors = {}
    for name, target, path in (("age", "age_years", age), ("sex", "sex", sex)):
        if path is None:
            continue
        predictors[name] = read_predictor(path)
        if predictors[name].target != target:
            raise UsageError(
                f"predicts {predictors[name].target}, and --{name} needs {target}.",
                remedy=f"Train one: brainldm train {name} --data COHORT --out RUN.",
                path=path,
            )
    grids = {"model": loaded.grid, "phantom study": study.grid} | {
        f"predictor of {name}": predictor.grid for name, predictor in predictors.items()
    }
    for what, grid in grids.items():
        if grid.shape_XYZ != prepared.grid.shape_XYZ or not np.allclose(grid.affine, prepared.grid.affine, atol=1e-3):
            raise UsageError(
                f"the {what} is of {grid.shape_XYZ} voxels of {grid.voxel_mm:g} mm, the cohort of "
                f"{prepared.grid.shape_XYZ} of {prepared.grid.voxel_mm:g} mm.",
                remedy="All must lie on one grid.",
            )
    strangers = [row.participant_id for row in people if row.participant_id not in study.index_of]
    if strangers:
        raise BadInput(
            f"lacks {', '.join(strangers[:3])} of the cohort ({len(strangers)} of {len(people)} held out).",
            remedy="Name the study that the cohort was prepared from.",
            path=phantoms,
            reason="other_phantoms",
        )
    return _Parts(folder, loaded, prepared, people, study, predictors)


def _some(people: Sequence[PreparedRow], most: int, seed: int) -> list[PreparedRow]:
    """At most `most` of them, drawn at random, in their order."""
    if len(people) <= most:
        return list(people)
    chosen = stream(seed, "card/reconstructed").choice(len(people), size=most, replace=False)
    return [people[int(position)] for position in sorted(chosen)]


# ---------------------------------------------------------------------------------------------------------- the brains


def _make_brains(
    parts: _Parts, out: Path, n: int, seed: int, progress: Progress, say: Callable[[str], None]
) -> dict[str, Any]:
    """Makes what is missing of OUT/brains; returns how long a brain took, as far as it was timed: a run that was killed
    is not."""
    model = parts.loaded
    rows = make_plan({}, n=n, seed=seed, ranges=model.ranges, joint=model.joint)
    ready = start(parts.model, rows, GenerateSettings(seed=seed), may_shrink_batch=True, say=say)
    loaded = ready.load()
    begun = time.monotonic()
    made = generate(loaded, out / "brains", rows, ready.settings, progress=progress).made
    spent = time.monotonic() - begun
    path = out / "timing.json"
    timed = read_json(path) if path.is_file() else {"brains": 0, "seconds": 0.0}
    if made:
        timed = {"brains": timed["brains"] + made, "seconds": timed["seconds"] + spent}
        write_json(path, timed)
    return {
        "seconds_a_brain": timed["seconds"] / timed["brains"] if timed["brains"] else None,
        "brains_timed": timed["brains"],
        "batch": ready.settings.batch,
        "precision": ready.precision,
        "machine": {
            "device": str(ready.device) if ready.device.type == "cpu" else torch.cuda.get_device_name(ready.device),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def _processor() -> str:
    """What the processor calls itself; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


# --------------------------------------------------------------------------------------------------------- the figures


def figure(estimate: Estimate | None, seed: int, **more: Any) -> dict[str, Any]:
    """One figure as results.json keeps it."""
    found = estimate or Estimate.none("it was not found")
    interval = None if found.low is None or found.high is None else [found.low, found.high]
    content: dict[str, Any] = {"value": found.value, "n": found.n, "interval_95": interval, "seed": seed}
    return content | ({"reason": found.reason} if found.reason else {}) | more


def _at_least(estimate: Estimate | None, least: float) -> bool:
    return estimate is not None and estimate.value is not None and estimate.value >= least


def judged_figures(card: Scorecard, seed: int) -> dict[str, Any]:
    """What the targets are about, from the scorecard's rows: value, target, and what can be reached at all.

    `alone` is the instrument's or the predictor's own figure on the held-out people, whose recorded values are known.
    """
    volumes, slope = card.row("ventricles_mm3.pearson_r"), card.row("ventricles_mm3.slope")
    straight = _at_least(slope.synthetic, 0.95) and not _at_least(slope.synthetic, np.nextafter(1.05, 2))
    brain = card.row("brain_mm3.pearson_r")
    age, age_alone = _predicted(card, "age_years.pearson_r", "age")
    sex, sex_alone = _predicted(card, "sex.auc", "sex")
    alike = card.row("ms_ssim")
    found = {
        "ventricles": figure(
            volumes.synthetic,
            seed,
            figure="Pearson r of ventricular volume, asked and measured",
            target="r at least 0.98 and slope 0.95 to 1.05",
            met=_at_least(volumes.synthetic, 0.98) and straight,
            paper=0.972,
            alone=figure(volumes.reference, seed),
            slope=figure(slope.synthetic, seed, met=straight, alone=figure(slope.reference, seed)),
        ),
        "brain": figure(
            brain.synthetic,
            seed,
            figure="Pearson r of brain volume, asked and measured",
            target="at least 0.95",
            met=_at_least(brain.synthetic, 0.95),
            paper=None,
            alone=figure(brain.reference, seed),
        ),
        "age": figure(
            age,
            seed,
            figure="Pearson r of age, asked and predicted",
            target="at least 0.80",
            met=_at_least(age, 0.80),
            paper=0.692,
            alone=figure(age_alone, seed),
        ),
    }
    ceiling = sex_alone.value
    found["sex"] = figure(
        sex,
        seed,
        figure="area under the curve of sex, asked and classified",
        target="at least 0.9, or the classifier's own on held-out phantoms",
        met=_at_least(sex, 0.9 if ceiling is None else min(0.9, ceiling)),
        paper=None,
        alone=figure(sex_alone, seed),
    )
    apart = _without_sign(alike.difference)
    found["ms_ssim"] = figure(
        apart,
        seed,
        figure="distance of MS-SSIM between pairs of brains from that between pairs of held-out phantoms",
        target="at most 0.01",
        met=apart.value is not None and apart.value <= 0.01,
        paper={"1000 steps": 0.002, "DDIM": 0.017},
        synthetic=figure(alike.synthetic, seed),
        held_out=figure(alike.reference, seed),
    )
    copies = card.row("nearer_than_unseen")
    found["copies"] = figure(
        copies.synthetic,
        seed,
        figure="share of brains nearer to a training image than anybody held out",
        by_chance=figure(copies.reference, seed),
    )
    implausible = card.row("gate.rejected")
    found["gate"] = figure(
        implausible.synthetic,
        seed,
        figure="share of brains that the gate rejects as unlike the held-out phantoms",
        by_design=figure(implausible.reference, seed),
    )
    return found


def _predicted(card: Scorecard, key: str, what: str) -> tuple[Estimate, Estimate]:
    """What a predictor found in the brains, and its own figure on held-out people."""
    try:
        row = card.row(key)
    except KeyError:
        untold = Estimate.none(f"no predictor of {what} was given")
        return untold, untold
    none = Estimate.none("it was not found")
    return row.synthetic or none, row.reference or none


def _without_sign(estimate: Estimate | None) -> Estimate:
    """The size of a difference, with the interval that its sign leaves."""
    if estimate is None or estimate.value is None:
        return estimate or Estimate.none("there is no difference")
    low, high = estimate.low, estimate.high
    if low is not None and high is not None:
        ends = sorted((abs(low), abs(high)))
        low, high = (0.0 if low <= 0 <= high else ends[0]), ends[1]
    return Estimate(abs(estimate.value), low, high, estimate.n, estimate.interval, estimate.reason)


def reconstruction_figures(records: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The means over people of reconstruction.FIGURES, with the targets."""
    means = {name: mean([float(record[name]) for record in records]) for name in FIGURES}
    psnr, ssim = means["psnr_db"], means["ssim"]
    return figure(
        psnr,
        seed,
        figure="PSNR in dB of the autoencoder's reconstruction against the phantom without noise",
        target="PSNR at least 32 dB and SSIM at least 0.95",
        met=_at_least(psnr, 32.0) and _at_least(ssim, 0.95),
        paper=None,
        ssim=figure(ssim, seed, met=_at_least(ssim, 0.95)),
        in_head=figure(means["psnr_in_head_db"], seed),
        scan_itself=figure(means["psnr_of_the_scan_db"], seed),
        how="range 1, over the whole box; SSIM with a 3-D Gaussian kernel of 7 voxels and sigma 1.5",
    )


def _extrapolation(
    model: Path, out: Path, instrument: Instrument, seed: int, workers: int, progress: Progress
) -> dict[str, Any]:
    """Figure 4 from NOISES noises: in how many the volume found grows with the volume asked, beyond what training
    covered."""
    images: list[JudgedImage] = []
    for number in range(NOISES):
        folder = out / f"noise-{number}"
        # What is empty beyond training is a finding too: it has no image, and so no volume.
        with contextlib.suppress(PartialFailure):
            make_figure(4, model, folder, seed=seed + number, progress=progress)
        for row in read_plan(folder / "plan.tsv"):
            images.append(JudgedImage(row.participant_id, folder / image_name(row), image_name(row)))
    values: dict[Path, Mapping[str, float]] = {}
    progress.start("measuring brains beyond training", len(images))
    with contextlib.closing(
        each_in_a_pool(partial(measure_one, instrument=instrument), images, workers=workers)
    ) as outcomes:
        for image, outcome in outcomes:
            # What is no brain any more cannot be measured; that is a finding, not a failure.
            if not isinstance(outcome, Exception):
                values[image.path] = outcome.values
            progress.advance()
    noises: list[dict[str, Any]] = []
    marked = True
    for number in range(NOISES):
        folder = out / f"noise-{number}"
        table, rows = read_table(folder / "plan.tsv"), read_plan(folder / "plan.tsv")
        position, sweeps = 0, dict[str, Any]()
        for name, shares in figure_4().rows.items():
            some = range(position, position + len(shares))
            asked = [float(rows[i].covariates.as_array()[COVARIATES.index(name)]) for i in some]
            measured = [values.get(folder / image_name(rows[i]), {}).get(name) for i in some]
            marked = marked and all(name in table.rows[i]["extrapolated"].split(",") for i in some)
            sweeps[name] = {"asked_mm3": asked, "measured_mm3": measured, "monotone": is_monotone(asked, measured)}
            position += len(shares)
        noises.append({"seed": seed + number, **sweeps})
    shares_of = {
        name: share(sum(noise[name]["monotone"] for noise in noises), NOISES)
        for name in ("ventricles_mm3", "brain_mm3")
    }
    return figure(
        shares_of["ventricles_mm3"],
        seed,
        figure=f"share of {NOISES} noises in which measured ventricles grow with what was asked, beyond training",
        target="all monotone, every brain marked as extrapolated",
        met=shares_of["ventricles_mm3"].value == 1 and marked,
        paper="shown for three values",
        marked=marked,
        brain=figure(shares_of["brain_mm3"], seed),
        noises=noises,
    )


def is_monotone(asked: Sequence[float], measured: Sequence[float | None]) -> bool:
    """Whether more is found wherever more was asked; not where something could not be measured."""
    ordered = [found for _, found in sorted(zip(asked, measured), key=lambda pair: pair[0])]
    return all(a is not None and b is not None and a < b for a, b in itertools.pairwise(ordered))


# ------------------------------------------------------------------------------------------------------- what it is


def _about(parts: _Parts) -> dict[str, Any]:
    model, description = parts.loaded, parts.loaded.description
    parameters = {
        "autoencoder": sum(p.numel() for p in model.autoencoder.parameters()),
        "unet": sum(p.numel() for p in model.unet.parameters()),
    }
    if model.population is not None:
        parameters["latent_population"] = sum(tensor.numel() for tensor in model.population.tensors().values())
    ranges, response = model.ranges, description.covariates.response
    return {
        "name": description.name,
        "id": description.identity,
        "grid": model.grid.to_json(),
        "latent_shape_CXYZ": list(description.latent.shape_CXYZ),
        "parameters": parameters,
        "weights_bytes": sum(weights.bytes for weights in description.weights.values()),
        "weights_dtype": description.weights_dtype,
        "target": description.target,
        "ranges": {
            name: [float(ranges.low[COVARIATES.index(name)]), float(ranges.high[COVARIATES.index(name)])]
            for name in CONTINUOUS
        },
        "licence": description.licence,
        "response": None if response is None else response.model_dump(mode="json"),
    }


def _training(training: Mapping[str, Any]) -> dict[str, Any]:
    """Whom it was trained on, for how long."""
    facts = {
        name: training.get(name)
        for name in ("recipe", "seed", "cohort", "training_images", "validation_images", "precision", "perceptual")
    }
    stages = {
        stage: {name: training[stage].get(name) for name in ("steps", "planned_steps", "seconds")}
        for stage in ("autoencoder", "diffusion")
        if isinstance(training.get(stage), dict)
    }
    return facts | {"stages": stages}


def _settings(out: Path, n: int, pairs: int, seed: int, parts: _Parts, judged: Scorecard) -> dict[str, Any]:
    made = read_json(out / "brains" / "generation.json")
    return {
        "brains": n,
        "pairs": pairs,
        "seed": seed,
        "sampler": made["sampler"],
        "steps": made["steps"],
        "guidance": made.get("guidance", 1),
        "instrument": judged.settings["instrument"],
        "held_out": 0 if judged.real is None else judged.real.sampled,
        "not_judged": len(judged.failures),
        "predictors": {
            name: {"name": predictor.name, "held_out": dict(predictor.training).get("held_out")}
            for name, predictor in parts.predictors.items()
        },
        "phantom_seed": parts.study.seed,
        "phantoms": len(parts.study.index_of),
    }


def _commands(parts: _Parts, cohort: Path, n: int, reconstructed: int, pairs: int, seed: int) -> list[str]:
    """What makes all of it again, from nothing."""
    study, usual = parts.study, PrepareConfig().to_json()
    config = read_prepared_json(cohort)["config"]
    prepared = [f"--grid {config.get('grid', study.grid.name)}"] + [
        f"--{name.replace('_', '-')} {config[name]}"
        for name in ("register", "skull", "strip_with", "volumes", "nan", "holdout", "seed")
        if name in config and config[name] != usual[name]
    ]
    training = parts.loaded.description.training
    recipe = training.get("recipe", "demo")
    licence = parts.loaded.description.licence
    stated = f' --licence "{licence}"' if licence else ""
    commands = [
        f"brainldm phantom PHANTOMS --n {len(study.index_of)} --grid {study.grid.name} --seed {study.seed}",
        f"brainldm prepare PHANTOMS COHORT {' '.join(prepared)}",
    ]
    for stage in ("autoencoder", "diffusion"):
        # The planned ones, by which the learning rate falls; the card says where time ended a stage before them.
        steps = training.get(stage, {}).get("planned_steps")
        told = f" --steps {steps}" if steps else ""
        commands.append(f"brainldm train {recipe} --data COHORT --out RUN --stage {stage}{told}")
    for name, predictor in parts.predictors.items():
        steps = dict(predictor.training).get("steps")
        told = f" --steps {steps}" if steps else ""
        told += f" --averaging {predictor.averaging}" if predictor.averaging > 1 else ""
        commands.append(f"brainldm train {name} --data COHORT --out {name.upper()}{told}")
    predictors = "".join(f" --{name} {name.upper()}" for name in parts.predictors)
    made = "RUN"
    response = parts.loaded.description.covariates.response
    if response is not None:
        commands.append(f"brainldm calibrate RUN CALIBRATED --n {response.brains} --seed {response.seed}")
        made = "CALIBRATED"
    return [
        *commands,
        f"brainldm export package {made} MODEL{stated}",
        f"brainldm card MODEL COHORT CARD{predictors} --phantoms PHANTOMS --n {n} "
        f"--reconstructed {reconstructed} --pairs {pairs} --seed {seed}",
    ]


# ---------------------------------------------------------------------------------------------------------- the mosaic


def draw_mosaic(sides: Mapping[str, Sequence[Path]], path: Path, *, across: int = 3) -> None:
    """A picture of the first SHOWN images of each side, one side beside the other: middle slices in three views, all in
    one grey scale. None is chosen by eye."""
    from matplotlib.figure import Figure

    images = {title: [read_nifti(file).data_XYZ for file in files[:SHOWN]] for title, files in sides.items()}
    everything = [image for some in images.values() for image in some]
    inside = np.concatenate([image[image > 0.04] for image in everything])
    white = float(np.percentile(inside, _WHITE_QUANTILE)) if inside.size else 1.0
    crop = Crop.around(everything[0], 0.1)
    for image in everything[1:]:
        crop = crop.joined(Crop.around(image, 0.1))
    blocks = {title: _block([_views(image, crop) for image in some], across) for title, some in images.items()}
    height, width = max(b.shape[0] for b in blocks.values()), sum(b.shape[1] for b in blocks.values())
    drawn = Figure(figsize=(15.0, 15.0 * height / width + 0.4), facecolor="black", layout="constrained")
    for ax, (title, block) in zip(np.atleast_1d(drawn.subplots(1, len(blocks))), blocks.items()):
        ax.imshow(block, cmap="gray", vmin=0, vmax=white, interpolation="nearest")
        ax.set_title(f"{title} ({len(images[title])})", color="white", fontsize=12)
        ax.set_axis_off()
    with atomic_path(path) as part:
        drawn.savefig(part, dpi=110, format="png")


def _views(image_XYZ: np.ndarray, crop: Crop) -> np.ndarray:
    """The three middle slices of one brain beside each other, centred on black."""
    slices = [crop.of(middle_slice(image_XYZ, view), view) for view in VIEWS]
    height = max(len(one) for one in slices)
    padded = []
    for one in slices:
        above = (height - len(one)) // 2
        padded.append(np.pad(one, ((above + 1, height - len(one) - above + 1), (1, 1))))
    return np.pad(np.hstack(padded), 2)


def _block(tiles: Sequence[np.ndarray], across: int) -> np.ndarray:
    """Tiles of one size in rows of `across`, black where there are none."""
    rows = []
    for first in range(0, len(tiles), across):
        row = list(tiles[first : first + across])
        rows.append(np.hstack(row + [np.zeros_like(row[0])] * (across - len(row))))
    return np.vstack(rows)
