"""The card of a model trained on phantoms: what it makes, against people it has not seen, by one command.

OUT/results.json     every figure with its count, interval, seed, target, and the paper's where there is one
OUT/README.md        the same for people, with what the model is and is not
OUT/mosaic.png       held-out phantoms and generated brains side by side; extrapolation.png is the paper's Figure 4
OUT/brains/          the brains, drawn from the model's joint distribution     OUT/judged/   their scorecard
OUT/figure4/         Figure 4 from several noises                    OUT/reconstruction.jsonl   a line a person

The same command goes on with what an interrupted one left, and makes nothing twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import brainldm
from brainldm.base.counts import counted
from brainldm.base.errors import PartialFailure, UsageError
from brainldm.base.files import check_output_apart, locked_folder, write_json, write_text
from brainldm.base.manifest import Manifest
from brainldm.base.progress import Progress, Quiet
from brainldm.base.streams import drawn, stream
from brainldm.cohort.measure import TemplateMeasure
from brainldm.evaluate.measuring import Instrument
from brainldm.evaluate.scorecard import evaluate_dataset
from brainldm.generate.plan import make_plan
from brainldm.generate.run import GenerateSettings
from brainldm.recipes.card_facts import commands, model_facts, settings_facts, training_facts
from brainldm.recipes.card_figures import (
    extrapolation_figures,
    instrument_figures,
    judged_figures,
    reconstruction_figures,
)
from brainldm.recipes.card_parts import open_parts
from brainldm.recipes.card_text import card_lines, card_text
from brainldm.recipes.mosaic import draw_mosaic
from brainldm.recipes.reconstruction import reconstructions
from brainldm.recipes.timed_brains import make_brains

SCHEMA, SCHEMA_VERSION = "brainldm model card", 1


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
    instrument: Instrument | None = None,
    workers: int = 1,
    progress: Progress = Quiet(),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Makes `n` brains, judges them against the held-out people of `cohort` with the predictors `age` and `sex`,
    reconstructs at most `reconstructed` of those people, extrapolates as Figure 4 does, and writes the card into `out`;
    returns results.json.

    Without a predictor the card says that its covariate was not judged. `phantoms` is the study that `cohort` was
    prepared from; `instrument` finds volumes, by default without trained weights. UsageError or BadInput, before the
    first brain, where the parts do not belong together; PartialFailure, after all is written, where images could not be
    made or judged.
    """
    if min(n, reconstructed, pairs) < 1:
        raise UsageError(
            f"{n} brains, {reconstructed} reconstructions and {pairs} pairs were asked for.",
            remedy="Ask for 1 of each or more.",
        )
    check_output_apart(out, cohort, phantoms)
    parts = open_parts(model, cohort, out, age, sex, phantoms, seed)
    instrument = instrument or TemplateMeasure()
    with locked_folder(out):
        say(f"1/4 {n} brains")
        loaded = parts.loaded
        rows = make_plan({}, n=n, seed=seed, ranges=loaded.ranges, joint=loaded.joint)
        settings = GenerateSettings(seed=seed)
        speed = make_brains(
            parts.model, rows, settings, out / "brains", out / "timing.json", progress=progress, say=say
        )
        say(f"2/4 judge them against {len(parts.people)} held-out phantoms")
        judged = evaluate_dataset(
            out / "brains",
            cohort,
            out / "judged",
            instrument=instrument,
            pairs=pairs,
            seed=seed,
            max_real=max(len(parts.people), 1),
            workers=workers,
            predictors=[folder for folder in (age, sex) if folder is not None],
            held_out_only=True,
            progress=progress,
        )
        say("3/4 reconstruct held-out phantoms")
        people = drawn(parts.people, reconstructed, stream(seed, "card/reconstructed"))
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
        beyond = extrapolation_figures(parts.model, out / "figure4", instrument, seed, workers, progress)
        figure_4 = next(iter(sorted((out / "figure4").glob("noise-*/figure.png"))), None)
        results: dict[str, Any] = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "model": model_facts(parts),
            "training": training_facts(parts.loaded.description.training),
            "settings": settings_facts(out, n, pairs, seed, parts, judged) | {"not_made": speed["not_made"]},
            "speed": speed,
            **judged_figures(judged, seed),
            "instrument": instrument_figures(parts.people, parts.study, seed),
            "reconstruction": reconstruction_figures(kept, seed),
            "extrapolation": beyond | {"picture": None if figure_4 is None else "extrapolation.png"},
            "warnings": list(judged.warnings),
            "commands": commands(parts, cohort, n, reconstructed, pairs, seed),
            "software": {"brainldm": brainldm.__version__, "torch": torch.__version__, "numpy": np.__version__},
        }
        made = Manifest(out / "brains" / "manifest.jsonl").proven(out / "brains")
        sides = {
            "held-out phantoms": [row.path for row in parts.people],
            "generated brains": [out / "brains" / made[index]["file"] for index in sorted(made)],
        }
        draw_mosaic(sides, out / "mosaic.png")
        if figure_4 is not None:
            shutil.copyfile(figure_4, out / "extrapolation.png")
        write_text(out / "README.md", card_text(results))
        write_json(out / "results.json", results)  # last: it says that the card is whole
    for line in card_lines(results):
        say(line)
    if judged.failures or speed["not_made"]:
        raise PartialFailure(
            f"{counted(judged.failed + speed['not_made'], 'image')} could not be made or judged, or not in every way.",
            remedy="The card is of the others; failures.tsv in brains/ and judged/ says why.",
            path=out,
        )
    return results
