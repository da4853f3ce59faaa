"""A training run from a prepared cohort to a model folder: check, stage 1, latents, stage 2, model.

RUN/run.json                      the resolved recipe, the cohort and the versions
RUN/autoencoder/  RUN/diffusion/  log.jsonl, timing.jsonl, previews/, checkpoints/, summary.json
RUN/autoencoder/reconstruction.*  what the autoencoder loses of held-out people
RUN/cache/                        training images uncompressed, where they do not fit in memory; may be deleted
RUN/latents/                      the cohort encoded once, and what is measured in its reconstructions
RUN/model/                        what `brainldm generate` takes
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import brainldm
from brainldm.base.covariates import CovariateRanges, Covariates
from brainldm.base.errors import EnvironmentProblem, UsageError
from brainldm.base.files import locked_folder, read_json, read_json_object, write_json
from brainldm.base.manifest import Manifest
from brainldm.base.progress import Progress, Quiet
from brainldm.cohort.dataset import PreparedCohort, VolumeDataset, check_trainable, warn_of_flagged
from brainldm.model.description import LatentDescription, LatentDiffusionDescription
from brainldm.model.folder import save_model
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.model.latent_population import FEWEST_FOR_A_POPULATION, LatentPopulation
from brainldm.model.memory import SLAB_BYTES
from brainldm.model.precision import autocast, choose_device, choose_precision
from brainldm.model.volume_reader import LEAST_EXPLAINED, VolumeReader
from brainldm.nets.atlas import AnyAutoencoder, AtlasAutoencoderConfig
from brainldm.nets.slabs import decode_in_slabs
from brainldm.train.autoencoder_stage import AutoencoderStage
from brainldm.train.checkpoint import load_newest
from brainldm.train.config import STAGES, AutoencoderStageConfig, Recipe
from brainldm.train.describe_model import described, quality_of
from brainldm.train.diffusion_stage import DiffusionStage, schedule_description, unet_config
from brainldm.train.distributed import ALONE, Place, check_divides, together
from brainldm.train.kept_volumes import kept_volumes
from brainldm.train.latents import Latents, distributions, encode_cohort
from brainldm.train.loop import EndsBetween, asked_to_end, check_asked, run_stage, warn_of_checkpoints
from brainldm.train.perceptual import PerceptualChoice
from brainldm.train.record import record_run
from brainldm.train.start_model import start_model
from brainldm.train.tensorboard import check_tensorboard
from brainldm.train.volume_reading import find_volume_reader


@dataclass(frozen=True)
class TrainSummary:
    """What a run has come to: its folder, its model's folder once there is one, and each stage's figures."""

    folder: Path
    model: Path | None
    stages: dict[str, dict[str, Any]]


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    stage: str = "all",
    steps: int | None = None,
    minutes: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    shard: bool = False,
    perceptual_weights: Sequence[Path] = (),
    cache: Path | None = None,
    tensorboard: bool = False,
    start_from: Path | None = None,
    progress: Progress = Quiet(),
) -> TrainSummary:
    """Trains `recipe` on the prepared cohort `data` in `out`, going on from whatever is already there.

    `stage` is `autoencoder`, `diffusion` or `all`; `steps` replaces the recipe's steps of the stages trained, and a
    stage that is left out keeps those recorded in `out`; `minutes` bounds the training time, divided between the stages
    as the recipe says. Started by torchrun, the processes share every batch, and with `shard` the weights as well.
    `perceptual_weights` are the files that the recipe's perceptual distance needs (train/perceptual), if any; `cache`
    is where training images that do not fit in memory lie uncompressed (default: OUT/cache). `start_from` is a model
    whose weights the stages begin with (train/start_model); with `stage` diffusion its autoencoder is used as it is.
    UsageError where the data cannot be trained on, the batch not be shared, or `out` holds another run; all of it
    before the first step.
    """
    if stage not in (*STAGES, "all"):
        raise UsageError(f"there is no stage {stage!r}.", remedy=f"Choose one of: {', '.join(STAGES)}, all.")
    stages = STAGES if stage == "all" else (stage,)
    check_asked(steps, minutes)
    cohort = PreparedCohort.open(data)
    where = choose_device(device)
    if tensorboard:
        check_tensorboard()
    with (
        asked_to_end() as asked,
        together(where) as place,
        locked_folder(out) if place.leads else contextlib.nullcontext(),
    ):
        recipe = _with_steps(recipe, stages, steps, out)
        # Before the start model is read, which is compared with the networks that this proves can be built.
        smallest_side = min(cohort.grid.shape_XYZ) // _downsampling(recipe)
        run = _Run(
            recipe=recipe,
            cohort=cohort,
            train=VolumeDataset(cohort, "train"),
            validation=VolumeDataset(cohort, "validation"),
            out=out,
            device=where,
            precision=choose_precision(precision, where, trained_side=smallest_side),
            start=None if start_from is None else start_model(start_from, recipe, cohort.grid),
            perceptual=_perceptual(recipe, perceptual_weights, cohort, out, needed="autoencoder" in stages),
            cache=cache,
            tensorboard=tensorboard,
            place=place,
            shard=shard,
            progress=EndsBetween(progress if place.leads else Quiet(), asked),
        )
        budget = dict.fromkeys(STAGES, minutes)
        if minutes is not None and stage == "all":
            budget = {name: minutes * share for name, share in recipe.minutes_share.items()}
        run.check_and_record(stages, budget["autoencoder"])
        summaries = {}
        if "autoencoder" in stages:
            summaries["autoencoder"] = run.train_autoencoder(budget["autoencoder"])
        if "diffusion" in stages:
            summaries["diffusion"] = run.train_diffusion(budget["diffusion"])
        place.wait()
    model = out / "model" if (out / "model" / "model.json").is_file() else None
    return TrainSummary(out, model, summaries)


def _with_steps(recipe: Recipe, stages: Sequence[str], steps: int | None, out: Path) -> Recipe:
    """The recipe with the `steps` asked for, if any, for the stages trained now; for the others with those recorded in
    `out`, where the recipe's own would take their place."""
    recorded = _recorded(out).get("recipe", {})
    for name in STAGES:
        config = getattr(recipe, name)
        wanted = steps if name in stages else recorded.get(name, {}).get("steps")
        recipe = replace(recipe, **{name: replace(config, steps=wanted or config.steps)})
    return recipe


def _recorded(out: Path) -> dict[str, Any]:
    """What run.json says of the run in `out`; nothing where there is none yet."""
    path = out / "run.json"
    return read_json_object(path) if path.is_file() else {}


def _downsampling(recipe: Recipe) -> int:
    """How many voxels along an image's edge become one of the U-Net's coarsest map. UsageError where no such U-Net or
    noise schedule can be built."""
    try:
        unet = unet_config(recipe.diffusion, recipe.autoencoder.net.latent_channels)
        schedule_description(recipe.diffusion).build()
    except ValueError as error:
        raise UsageError(
            f"no stage 2 can be made of recipe {recipe.name!r}: {error}.",
            remedy="Change it: --set diffusion.NAME=VALUE.",
        ) from error
    return recipe.autoencoder.net.downsampling * unet.downsampling


def _perceptual(
    recipe: Recipe, weights: Sequence[Path], cohort: PreparedCohort, out: Path, *, needed: bool
) -> PerceptualChoice:
    """The perceptual distance, its weights proven. Stage 2 alone does not need them: what is recorded stays."""
    config = recipe.autoencoder
    if needed and config.perceptual_weight > 0:
        return PerceptualChoice.of(config.perceptual, weights, cohort.grid.shape_XYZ)
    return PerceptualChoice(config.perceptual, sha256=tuple(_recorded(out).get("perceptual_weights_sha256", ())))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the stages of one run share."""

    recipe: Recipe
    cohort: PreparedCohort
    train: VolumeDataset
    validation: VolumeDataset
    out: Path
    device: torch.device
    precision: str
    start: LatentDiffusion | None
    perceptual: PerceptualChoice
    cache: Path | None
    tensorboard: bool
    place: Place
    shard: bool
    progress: EndsBetween

    # ---- before the first step ----------------------------------------------------------------------------------

    def check_and_record(self, stages: tuple[str, ...], autoencoder_minutes: float | None) -> None:
        """Refuses what cannot be trained, then records the run, or compares it with the one recorded here."""
        if stages == STAGES:
            self._check_that_stage_2_may_go_on(autoencoder_minutes)
        if self.shard and self.place.alone:
            raise UsageError(
                "there is nothing to shard in one process.", remedy="Start several: torchrun --nproc-per-node N ..."
            )
        check_trainable(self.train, self.recipe.autoencoder.batch)
        downsampling = _downsampling(self.recipe)
        if any(n % downsampling for n in self.cohort.grid.shape_XYZ):
            raise UsageError(
                f"the grid {self.cohort.grid.shape_XYZ} is not divisible by {downsampling}, what the autoencoder "
                f"and the U-Net of recipe {self.recipe.name!r} divide it by together.",
                remedy="Choose another recipe or another grid.",
            )
        net = self.recipe.autoencoder.net
        if isinstance(net, AtlasAutoencoderConfig) and net.grid_XYZ != self.cohort.grid.shape_XYZ:
            raise UsageError(
                f"recipe {self.recipe.name!r} is for images of {net.grid_XYZ} voxels, and the cohort's have "
                f"{self.cohort.grid.shape_XYZ}.",
                remedy="Prepare the study on that grid, or choose another recipe.",
            )
        if self.recipe.diffusion.latent_population and len(self.train) < FEWEST_FOR_A_POPULATION:
            raise UsageError(
                f"{len(self.train)} people to train on do not show how latents follow the covariates; recipe "
                f"{self.recipe.name!r} needs {FEWEST_FOR_A_POPULATION}.",
                remedy="Prepare more people, or choose a recipe without latent_population.",
            )
        batches = {
            "autoencoder": self.recipe.autoencoder.batch,
            "diffusion": min(self.recipe.diffusion.batch, len(self.train) * self.recipe.diffusion.latent_views),
        }
        for name in stages:
            check_divides(self.place, name, batches[name])
        CovariateRanges.fitted(self.train.covariates)  # refuses what all people share
        description = {
            "recipe": asdict(self.recipe),
            "cohort": {"name": self.cohort.name, "digest": self.cohort.digest, "training_images": len(self.train)},
            "perceptual_weights_sha256": self.perceptual.sha256,
            "precision": self.precision,
            "device": self.device.type,
            "started_from": self.start_facts,
        }
        self.place.check_same(description, "recipes, cohorts or precisions")
        if self.place.leads:
            self._warn_of_learning_rates_that_rise(stages)
            warn_of_flagged(self.train)
            record_run(self.out, description)
        self.place.wait()

    def _check_that_stage_2_may_go_on(self, minutes: float | None) -> None:
        """UsageError where stage 1 would be trained further under a stage 2 that has learnt its latents."""
        path = self.out / "autoencoder" / "summary.json"
        if not path.is_file() or not list(self.out.glob("diffusion/checkpoints/*.safetensors")):
            return
        ended = read_json(path)
        in_time = minutes is None or ended["seconds"] < minutes * 60
        if ended["steps"] < self.recipe.autoencoder.steps and in_time:
            raise UsageError(
                f"stage 1 ended after {ended['steps']} steps and would go on, and stage 2 has learnt the latents that "
                "it made.",
                remedy="For a longer stage 2: --stage diffusion. For both longer: delete RUN/diffusion first.",
                path=self.out,
            )

    def _warn_of_learning_rates_that_rise(self, stages: Sequence[str]) -> None:
        """Where a run that goes on is made longer than its learning rate was falling over."""
        recorded = _recorded(self.out).get("recipe", {})
        for name in stages:
            config, before = getattr(self.recipe, name), recorded.get(name, {}).get("steps", math.inf)
            if config.cosine_decay and config.steps > before and (self.out / name / "checkpoints").is_dir():
                print(  # noqa: T201
                    f"warning: the {name}'s learning rate was falling over {before} steps. Over {config.steps} it is "
                    "higher again from here on, and the loss rises at first.",
                    file=sys.stderr,
                )

    @property
    def start_facts(self) -> dict[str, str] | None:
        """Which model the run began with."""
        if self.start is None:
            return None
        return {"name": self.start.description.name, "id": self.start.description.identity}

    # ---- stage 1 ------------------------------------------------------------------------------------------------

    def train_autoencoder(self, minutes: float | None) -> dict[str, Any]:
        self._feed_from_disk()
        path = self.out / "autoencoder" / "summary.json"
        before = read_json(path) if path.is_file() else {}
        self.place.wait()
        stage = self._autoencoder_stage(self.recipe.autoencoder, self.place, sharded=self.shard)
        summary = self._run(stage, minutes)
        if "validation" in before and before["steps"] == summary["steps"]:
            summary["validation"] = before["validation"]
        else:
            folder = path.parent if self.place.leads else None
            # Of shards all must take part; whole weights the leader looks at alone, and the others wait.
            found = stage.validate(folder, self.progress) if self.shard or self.place.leads else {}
            summary["validation"] = self.place.from_leader(found)
        if self.place.leads:
            write_json(path, summary)
        self.place.wait()
        return summary

    def _feed_from_disk(self) -> None:
        """Where there are steps to make and images do not fit in memory (or a cache was asked for), they are laid out
        uncompressed. A default cache that the disk has no room for is done without, and said so."""
        made = [r["index"] for r in Manifest(self.out / "autoencoder" / "checkpoints" / "manifest.jsonl").records()]
        wanted = self.cache is not None or not self.train.fits_in_memory
        if not wanted or max(made, default=0) >= self.recipe.autoencoder.steps:
            return
        try:
            self.train.keep_uncompressed(self.cache or self.out / "cache", self.progress)
        except EnvironmentProblem as error:
            if self.cache is not None or error.reason != "disk_full":
                raise
            print(f"warning: {error} Every epoch inflates its images again.", file=sys.stderr)  # noqa: T201

    def _autoencoder_stage(self, config: AutoencoderStageConfig, place: Place, *, sharded: bool) -> AutoencoderStage:
        return AutoencoderStage(
            config,
            self.train,
            self.validation,
            seed=self.recipe.seed,
            device=self.device,
            precision=self.precision,
            place=place,
            sharded=sharded,
            perceptual_weights=self.perceptual.weights,
            start=None if self.start is None else self.start.autoencoder,
        )

    def _run(self, stage: AutoencoderStage | DiffusionStage, minutes: float | None) -> dict[str, Any]:
        self.progress.check()
        return run_stage(
            stage,
            self.out / stage.name,
            minutes=minutes,
            checkpoint_minutes=self.recipe.checkpoint_minutes,
            tensorboard=self.tensorboard,
            progress=self.progress.progress,  # the loop itself ends with its state saved
            place=self.place,
            asked=self.progress.asked,
        )

    def _trained_autoencoder(self) -> tuple[AnyAutoencoder, dict[str, Any]]:
        """The autoencoder as stage 1 left it (with any number of steps), or where it was left out, the one of the model
        that the run began with."""
        summary_path = self.out / "autoencoder" / "summary.json"
        if not summary_path.is_file() and self.start is not None:
            return self.start.autoencoder.to(self.device), {"stage": "autoencoder", "taken_from": self.start_facts}
        if not summary_path.is_file():
            raise UsageError(
                "stage 2 needs the autoencoder, and stage 1 has not ended here.",
                remedy="Train with --stage autoencoder (or all) first, or with --start-from a model that has one.",
                path=self.out,
            )
        # Its perceptual distance is left out: it is not trained.
        stage = self._autoencoder_stage(replace(self.recipe.autoencoder, perceptual_weight=0.0), ALONE, sharded=False)
        checkpoint = load_newest(self.out / "autoencoder" / "checkpoints", warn_of_checkpoints, self.place)
        summary = read_json(summary_path)
        if checkpoint is None or checkpoint.step != summary["steps"]:
            raise UsageError(
                f"stage 1 ended after {summary['steps']} steps, and its newest checkpoint is of "
                f"{'none' if checkpoint is None else checkpoint.step}: it went on and did not end, or lost its last.",
                remedy="Train with --stage autoencoder (or all) to its end first.",
                path=self.out,
            )
        stage.restore(checkpoint.tensors)
        return stage.autoencoder.eval(), summary

    # ---- stage 2 ------------------------------------------------------------------------------------------------

    def train_diffusion(self, minutes: float | None) -> dict[str, Any]:
        config = self.recipe.diffusion
        autoencoder, autoencoder_summary = self._trained_autoencoder()
        key = _latents_key(autoencoder, self.cohort)
        latents = encode_cohort(
            self.out / "latents",
            autoencoder,
            self.train,
            key,
            views=config.latent_views,
            augmentation=config.augmentation,
            seed=self.recipe.seed,
            device=self.device,
            precision=self.precision,
            place=self.place,
            progress=self.progress,
        )
        scale = 1.0 / latents.std if config.latent_scale is None else config.latent_scale
        people = self._covariates_of(latents, autoencoder, key)
        description = self._description(latents, scale, {})
        condition_NF = description.covariates.conditions(people)
        population = None
        if config.latent_population:
            told_NF = torch.from_numpy(condition_NF)
            fitted = LatentPopulation.fitted(distributions(latents.kept), told_NF) if self.place.leads else None
            population = self.place.from_leader(fitted)
        stage = DiffusionStage(
            config,
            latents,
            scale,
            population,
            condition_NF,
            self.train.names * config.latent_views,
            seed=self.recipe.seed,
            device=self.device,
            precision=self.precision,
            place=self.place,
            sharded=self.shard,
            start=None if self.start is None else self.start.unet,
        )
        stage.facts = {"latents": key}
        here = None if population is None else LatentPopulation.from_tensors(population.tensors(), self.device)
        stage.sample_preview = LatentDiffusion(
            description, autoencoder, stage.unet, slab_bytes=SLAB_BYTES, population=here
        )
        summary = self._run(stage, minutes)
        unet = stage.trained_unet()
        if not self.place.leads:
            return summary
        reader, reader_facts = self._volume_reader(latents, autoencoder, people, key)
        model = LatentDiffusion(
            self._description(latents, scale, self._training_facts(autoencoder_summary, summary, reader_facts), reader),
            autoencoder,
            unet,
            population=population,
            volume_reader=reader,
        )
        save_model(self.out / "model", model)
        return summary

    def _training_facts(
        self, autoencoder: dict[str, Any], diffusion: dict[str, Any], reader: dict[str, Any] | None
    ) -> dict[str, Any]:
        """What model.json says of the training, with the summaries of both stages and how well volumes are read."""
        config = self.recipe.autoencoder
        return {
            "recipe": self.recipe.name,
            "settings": list(self.recipe.settings),
            "seed": self.recipe.seed,
            "cohort": self.cohort.name,
            "split_by": dict(self.cohort.split_by),
            "training_images": len(self.train),
            "validation_images": len(self.validation),
            "perceptual": config.perceptual if config.perceptual_weight > 0 else "none",
            "perceptual_weights_sha256": list(self.perceptual.sha256),
            "volumes": "as decoded" if self.recipe.diffusion.volumes_as_decoded else "as recorded",
            "volume_reader": reader,
            "autoencoder": autoencoder,
            "diffusion": diffusion,
            "started_from": self.start_facts,
            "precision": self.precision,
            "versions": {"brainldm": brainldm.__version__, "torch": torch.__version__},
        }

    def _covariates_of(self, latents: Latents, autoencoder: AnyAutoencoder, key: str) -> list[Covariates]:
        """What the U-Net is told of each latent: the recorded covariates, changed as an augmentation changed the image
        and, where the recipe asks, as decoding changes it."""
        people, config = self.train.covariates, self.recipe.diffusion
        if config.volumes_as_decoded:
            decoded_XYZ = self._decoder(latents, autoencoder)
            with self.place.leader_first():
                kept = kept_volumes(self.out / "latents", self.train, decoded_XYZ, key, progress=self.progress)
            people = [
                replace(row, ventricles_mm3=row.ventricles_mm3 * ventricles, brain_mm3=row.brain_mm3 * brain)
                for row, (ventricles, brain) in zip(people, kept.shares_NV.tolist())
            ]
        return [
            replace(row, ventricles_mm3=row.ventricles_mm3 * factor)
            for row, factor in zip(people * config.latent_views, latents.ventricle_factor_N.tolist())
        ]

    def _decoder(self, latents: Latents, autoencoder: AnyAutoencoder) -> Callable[[int], np.ndarray]:
        """What the autoencoder makes of the latent of that number: (X, Y, Z), float32."""

        def decoded_XYZ(index: int) -> np.ndarray:
            with torch.no_grad(), autocast(self.device, self.precision):
                latent_BCXYZ = latents.mean_BCXYZ([index]).to(self.device)
                image_BCXYZ = decode_in_slabs(autoencoder, latent_BCXYZ, SLAB_BYTES)
            return image_BCXYZ[0, 0].float().cpu().numpy()

        return decoded_XYZ

    def _volume_reader(
        self, latents: Latents, autoencoder: AnyAutoencoder, told: list[Covariates], key: str
    ) -> tuple[VolumeReader | None, dict[str, Any] | None]:
        """The reader that the recipe asks for, and how well it reads; of the images as they are, without views."""
        if not self.recipe.diffusion.volume_reader:
            return None, None
        people, voxel_mm = told[: len(self.train)], self.cohort.grid.voxel_mm
        reader, facts = find_volume_reader(
            self.out / "latents",
            latents.mean_BCXYZ,
            people,
            self._decoder(latents, autoencoder),
            voxel_mm,
            key,
            progress=self.progress,
        )
        if reader is None:
            explained = ", ".join(f"{100 * share:.1f} % of {name}" for name, share in facts["explained"].items())
            print(  # noqa: T201
                f"warning: volumes cannot be read in reconstructions of {facts['people']} people ({explained} is "
                "explained; it takes "
                f"{100 * LEAST_EXPLAINED:.0f} %), so the model does not correct them. More people would help, or more "
                "steps of stage 1.",
                file=sys.stderr,
            )
        return reader, facts

    def _description(
        self, latents: Latents, scale: float, training: dict[str, Any], reader: VolumeReader | None = None
    ) -> LatentDiffusionDescription:
        c, x, y, z = latents.shape_CXYZ
        latent = LatentDescription(
            shape_CXYZ=(c, x, y, z),
            scale=scale,
            channel_mean=latents.channel_mean,
            channel_std=latents.channel_std,
            by_population=self.recipe.diffusion.latent_population,
        )
        return described(
            self.recipe,
            f"{self.cohort.name}-{self.recipe.name}",
            self.cohort.grid,
            self.train.covariates,
            latent,
            preprocessing=dict(self.cohort.preprocessing),
            training=training,
            quality=quality_of(self.train) if training else None,
            licence=self.cohort.licence,
            volume_reader=None if reader is None else reader.description(),
        )


def _latents_key(autoencoder: AnyAutoencoder, cohort: PreparedCohort) -> str:
    digest = hashlib.sha256(cohort.digest.encode())
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
