"""What a model's card says beside its figures: what the model is, how it was trained and judged, what remakes it."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brainldm.base.covariates import CONTINUOUS, COVARIATES
from brainldm.base.errors import BadInput
from brainldm.base.files import read_json
from brainldm.base.shipped import SHIPPED, shipped_folder
from brainldm.cohort.dataset import read_prepared_json
from brainldm.cohort.prepare_config import PrepareConfig
from brainldm.evaluate.scorecard import Scorecard
from brainldm.model.folder import read_description
from brainldm.recipes.card_parts import CardParts


def model_facts(parts: CardParts) -> dict[str, Any]:
    """What the model is: its grid, sizes, ranges, licence, and how it was calibrated."""
    model, description = parts.loaded, parts.loaded.description
    parameters = {
        "autoencoder": sum(p.numel() for p in model.autoencoder.parameters()),
        "unet": sum(p.numel() for p in model.unet.parameters()),
    }
    for name, part in (("latent_population", model.population), ("volume_reader", model.volume_reader)):
        if part is not None:
            parameters[name] = sum(tensor.numel() for tensor in part.tensors().values())
    ranges, response = model.ranges, description.covariates.response
    return {
        "name": description.name,
        "id": description.identity,
        "shipped_as": _shipped_as(description.identity),
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


def _shipped_as(identity: str) -> str | None:
    """The name under which this model comes with the package; None where it does not."""
    with contextlib.suppress(BadInput):  # an installation may come without
        return next((name for name in SHIPPED if read_description(shipped_folder(name)).identity == identity), None)
    return None


def training_facts(training: Mapping[str, Any]) -> dict[str, Any]:
    """Whom it was trained on, for how long."""
    facts = {
        name: training.get(name)
        for name in (
            "recipe",
            "seed",
            "cohort",
            "split_by",
            "training_images",
            "validation_images",
            "precision",
            "perceptual",
            "volume_reader",
            "started_from",
        )
    }
    stages = {
        stage: {name: training[stage].get(name) for name in ("steps", "planned_steps", "seconds")}
        for stage in ("autoencoder", "diffusion")
        if isinstance(training.get(stage), dict)
    }
    return facts | {"stages": stages}


def settings_facts(out: Path, n: int, pairs: int, seed: int, parts: CardParts, judged: Scorecard) -> dict[str, Any]:
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
        "not_judged": judged.failed,
        "predictors": {
            name: {"name": predictor.name, "held_out": dict(predictor.training).get("held_out")}
            for name, predictor in parts.predictors.items()
        },
        "phantom_seed": parts.study.seed,
        "phantoms": len(parts.study.index_of),
    }


def commands(parts: CardParts, cohort: Path, n: int, reconstructed: int, pairs: int, seed: int) -> list[str]:
    """What makes all of it again, from nothing."""
    study, usual = parts.study, PrepareConfig().to_json()
    facts = read_prepared_json(cohort)
    config = facts["config"]
    prepared = [f"--grid {config.get('grid', study.grid.name)}"] + [
        f"--{name.replace('_', '-')} {config[name]}"
        for name in ("register", "skull", "strip_with", "volumes", "nan", "percentile", "holdout", "seed")
        if name in config and config[name] != usual[name]
    ]
    if left_out := facts.get("left_out"):
        prepared.append(f"--leave-out {shlex.join(left_out)}")
    training = parts.loaded.description.training
    recipe = training.get("recipe", "demo")
    licence = parts.loaded.description.licence
    stated = f" --licence {shlex.quote(licence)}" if licence else ""
    commands = [
        f"brainldm phantom PHANTOMS --n {len(study.index_of)} --grid {study.grid.name} --seed {study.seed}",
        f"brainldm prepare PHANTOMS COHORT {' '.join(prepared)}",
    ]
    begun_with = training.get("started_from")
    stages = ("autoencoder", "diffusion") if training.get("autoencoder", {}).get("steps") else ("diffusion",)
    for stage in stages:
        # The planned ones, by which the learning rate falls; the card says where time ended a stage before them.
        steps = training.get(stage, {}).get("planned_steps")
        told = f" --steps {steps}" if steps else ""
        told += f" --start-from {shlex.quote(begun_with['name'])}" if begun_with else ""
        if stage == "autoencoder" and training.get("perceptual", "none") != "none":
            told += f" --perceptual {training['perceptual']}"
        settings = [setting for setting in training.get("settings", ()) if not setting.startswith("seed=")]
        told += "".join(f" --set {shlex.quote(setting)}" for setting in settings) + _seed_of(training)
        commands.append(f"brainldm train {recipe} --data COHORT --out RUN --stage {stage}{told}")
    for name, predictor in parts.predictors.items():
        steps = dict(predictor.training).get("steps")
        told = f" --steps {steps}" if steps else ""
        told += f" --averaging {predictor.averaging}" if predictor.averaging > 1 else ""
        told += _seed_of(predictor.training)
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


def _seed_of(training: Mapping[str, Any]) -> str:
    """The flag that trains with its seed; empty where that is the one taken by default."""
    seed = training.get("seed", 0)
    return f" --set seed={seed}" if seed else ""
