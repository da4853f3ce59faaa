"""The command `brainldm`: one verb for each arrow of the way. Flags say where and how much, never the science.

Nothing heavy is imported until a verb runs, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from brainldm import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from brainldm.base.errors import BrainldmError
    from brainldm.base.nifti import Dtype
    from brainldm.generate.plan import Sweep
    from brainldm.train.run import TrainSummary

app = App(
    name="brainldm",
    version=__version__,
    help="Brains of nobody: scans become a cohort, a cohort a model, a model as many T1w brains as you ask for.",
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # main says what becomes of what was begun
)

import_app = App(name="import", help="Weights from elsewhere become a model folder.", help_format="plaintext")
export_app = App(name="export", help="A model folder becomes weights for elsewhere.", help_format="plaintext")
fetch_app = App(name="fetch", help="Published weights, downloaded.", help_format="plaintext")
for part in (import_app, export_app, fetch_app):
    app.command(part)


def _checked_workers(_: object, workers: int) -> None:
    from brainldm.base.pool import check_workers

    check_workers(workers)


Workers = Annotated[int, Parameter(help="Processes that work side by side.", validator=_checked_workers)]
Device = Annotated[str, Parameter(help="auto, cpu, cuda, or cuda:1 and so on.")]
Measure = Annotated[
    Literal["template", "synthseg"],
    Parameter(name="--measure", help="What finds volumes: the built-in measure, or mri_synthseg."),
]
Precision = Annotated[str, Parameter(help="auto, fp32 or bf16; auto takes bf16 where the processor is made for it.")]


@app.command
def demo(
    out: Path,
    /,
    *,
    train: Annotated[
        bool, Parameter(help="Train a small model on phantoms first, instead of the shipped one.", negative="")
    ] = False,
    people: Annotated[int | None, Parameter(help="With --train: phantoms to make and train on (64).")] = None,
    minutes: Annotated[float | None, Parameter(help="With --train: longest time of the trainings (6.5).")] = None,
    seed: int = 0,
    workers: Workers = 2,
) -> None:
    """24 brains by the model that comes with brainldm, their evaluation against phantoms, and a page to look at.

    OUT is the folder to write. The same command goes on with an interrupted demo. With --train the whole way is shown:
    a made-up population, its cohort, both trainings, 16 brains, evaluation and page.
    """
    from brainldm.base.errors import UsageError
    from brainldm.recipes.whole_way import run_demo, run_demo_training

    if not train and (people is not None or minutes is not None):
        raise UsageError("--people and --minutes are of the training.", remedy="Add --train, or leave them out.")
    with _progress() as progress:
        if not train:
            run_demo(out, seed=seed, workers=workers, progress=progress, say=_say)
            return
        run_demo_training(
            out,
            people=64 if people is None else people,
            seed=seed,
            minutes=6.5 if minutes is None else minutes,
            workers=workers,
            progress=progress,
            say=_say,
        )


@app.command
def phantom(
    out: Path,
    /,
    *,
    n: Annotated[int, Parameter(help="How many people.")] = 64,
    grid: Annotated[str, Parameter(help="paper (1 mm), 2mm or 4mm.")] = "4mm",
    seed: int = 0,
    labels: Annotated[
        Path | None, Parameter(help="Folder of label maps (FreeSurfer numbers) to use as anatomies.")
    ] = None,
    workers: Workers = 1,
) -> None:
    """A population of made-up people with known anatomy, as a BIDS dataset."""
    from brainldm.base.counts import counted
    from brainldm.base.volume import grid_named
    from brainldm.cohort.phantom import write_phantom_study

    with _progress() as progress:
        write_phantom_study(
            out, n=n, grid=grid_named(grid), seed=seed, labels=labels, workers=workers, progress=progress
        )
    phantoms = counted(n, "phantom is", "phantoms are")
    _say(f"{phantoms} in {out}. Next: brainldm prepare {_quoted(out)} COHORT --grid {grid}")


@app.command
def prepare(
    bids: Path,
    out: Path,
    /,
    *,
    grid: Annotated[str, Parameter(help="paper (1 mm), 2mm or 4mm.")] = "paper",
    register: Annotated[
        Literal["auto", "rigid", "none", "unires"],
        Parameter(help="auto registers rigidly what is not in MNI space yet; unires drives an installed UniRes."),
    ] = "auto",
    skull: Annotated[Literal["keep", "strip"], Parameter(help="Keep what is there, or strip the skull.")] = "keep",
    strip_with: Annotated[
        Literal["mask", "template", "deepbet"], Parameter(help="How to strip: the study's masks, or a method.")
    ] = "template",
    volumes: Annotated[
        str, Parameter(help="measure; table (the study's own columns); or a SynthSeg/FreeSurfer volume table.")
    ] = "measure",
    masks: Annotated[Path | None, Parameter(help="Folder of brain masks, when not among the derivatives.")] = None,
    nan: Annotated[Literal["error", "zero"], Parameter(help="What to do with voxels that are not finite.")] = "error",
    volume: Annotated[int | None, Parameter(help="Which volume of 4-D files, from 0.")] = None,
    assume_orientation: Annotated[
        bool, Parameter(help="Accept headers that do not say how the image lies.", negative="")
    ] = False,
    percentile: Annotated[
        float | None,
        Parameter(help="Brightness that becomes 1, say, 99.9, so that a hot vessel darkens nothing; else the maximum."),
    ] = None,
    strict: Annotated[bool, Parameter(help="Refuse a study that holds one scan twice.", negative="")] = False,
    leave_out: Annotated[
        list[str] | None,
        Parameter(help="People who shall not be in the cohort; several after one another.", consume_multiple=True),
    ] = None,
    holdout: Annotated[float, Parameter(help="Share of people kept out of training.")] = 0.2,
    seed: Annotated[int, Parameter(help="Seed of the split.")] = 0,
    workers: Workers = 1,
) -> None:
    """A study's scans become a cohort: registered, on one grid, 0..1, with covariates and a split."""
    from brainldm.cohort.prepare import PrepareConfig, prepare_study

    config = PrepareConfig(
        grid=grid,
        register=register,
        skull=skull,
        strip_with=strip_with,
        volumes=volumes,
        masks=masks,
        nan=nan,
        volume_index=volume,
        assume_orientation=assume_orientation,
        percentile=percentile,
        strict=strict,
        holdout=holdout,
        seed=seed,
    )
    with _progress() as progress:
        summary = prepare_study(bids, out, config, leave_out=leave_out or (), workers=workers, progress=progress)
    _say(str(summary))


@app.command
def train(
    recipe: str,
    /,
    *,
    data: Annotated[Path, Parameter(help="A prepared cohort.")],
    out: Annotated[Path, Parameter(help="The run's folder; an interrupted run there is gone on with.")],
    stage: Literal["autoencoder", "diffusion", "all"] = "all",
    steps: Annotated[int | None, Parameter(help="Steps of each stage, instead of the recipe's.")] = None,
    minutes: Annotated[float | None, Parameter(help="Training time in all, shared by the stages.")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    shard: Annotated[
        bool, Parameter(help="Under torchrun: each process holds a part of the weights (FSDP2).", negative="")
    ] = False,
    perceptual: Annotated[
        Literal["random", "lpips-squeeze", "medicalnet", "encoder"] | None,
        Parameter(help="Stage 1's perceptual distance, by the weights you have, instead of the recipe's."),
    ] = None,
    perceptual_weights: Annotated[
        list[Path] | None, Parameter(help="Its weights: files, or a model folder; can be given twice.")
    ] = None,
    cache: Annotated[
        Path | None,
        Parameter(help="Where training images lie uncompressed (default: OUT/cache, where they do not fit in memory)."),
    ] = None,
    tensorboard: Annotated[
        bool, Parameter(help="Event files in OUT/STAGE/tensorboard; needs brainldm[tensorboard].", negative="")
    ] = False,
    start_from: Annotated[
        Path | None,
        Parameter(help="A model (folder, run or name) to begin with; with --stage diffusion its autoencoder stays."),
    ] = None,
    averaging: Annotated[
        int | None,
        Parameter(help="age and sex: voxels along each axis that become their mean first; 8 times faster at 2."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        Parameter(
            name="--set",
            help="NAME=VALUE, a value other than the recipe's, named as --dry-run prints it "
            "(autoencoder.learning_rate=0.001); can be given more than once.",
            negative="",
        ),
    ] = None,
    dry_run: Annotated[bool, Parameter(help="Print the resolved recipe and stop.", negative="")] = False,
) -> None:
    """A cohort becomes a model. RECIPE is quick, demo, small, fast or paper; lsgan or vaegan trains a baseline, age or
    sex the judge's predictor."""
    _check_apart(out, data)
    given, changes = perceptual or perceptual_weights, tuple(settings or ())
    _check_flags_of(
        recipe,
        perceptual=given,
        cache=cache,
        tensorboard=tensorboard,
        shard=shard,
        start_from=start_from,
        averaging=averaging,
        stage=None if stage == "all" else stage,
    )
    if recipe in ("age", "sex"):
        _train_predictor(
            recipe,
            data,
            out,
            steps=steps,
            minutes=minutes,
            averaging=averaging,
            device=device,
            precision=precision,
            settings=changes,
            dry_run=dry_run,
        )
        return
    if recipe in ("lsgan", "vaegan"):
        _train_baseline(
            recipe,
            data,
            out,
            steps=steps,
            minutes=minutes,
            device=device,
            precision=precision,
            cache=cache,
            tensorboard=tensorboard,
            settings=changes,
            dry_run=dry_run,
        )
        return
    from brainldm.base.errors import UsageError
    from brainldm.recipes import recipe_named
    from brainldm.train.settings import with_settings

    chosen = with_settings(recipe_named(recipe), changes)
    if given and not chosen.autoencoder.perceptual_weight:
        raise UsageError(
            f"recipe {recipe} gives the perceptual distance no weight, so that it would change nothing.",
            remedy="Add --set autoencoder.perceptual_weight=0.002, say, or leave it out.",
        )
    if perceptual is not None:
        chosen = replace(chosen, autoencoder=replace(chosen.autoencoder, perceptual=perceptual))
    chosen = replace(chosen, settings=changes)
    if dry_run:
        _say(json.dumps(asdict(chosen), indent=2))
        return
    from brainldm.train.run import train as run_training

    with _progress() as progress:
        summary = run_training(
            chosen,
            data,
            out,
            stage=stage,
            steps=steps,
            minutes=minutes,
            device=device,
            precision=precision,
            shard=shard,
            perceptual_weights=perceptual_weights or (),
            cache=cache,
            tensorboard=tensorboard,
            start_from=start_from,
            progress=progress,
        )
    if _leads():
        _say_trained(summary)


def _check_flags_of(recipe: str, **flags: object) -> None:
    """UsageError for a flag that this kind of training would pass over in silence."""
    from brainldm.base.errors import UsageError

    heard: dict[str, tuple[str, ...]] = {
        "age": ("averaging",),
        "sex": ("averaging",),
        "lsgan": ("cache", "tensorboard"),
        "vaegan": ("cache", "tensorboard"),
    }
    of_diffusion = tuple(name for name in flags if name != "averaging")
    deaf = [name for name, value in flags.items() if value and name not in heard.get(recipe, of_diffusion)]
    if deaf:
        raise UsageError(f"training {recipe} knows nothing of --{deaf[0].replace('_', '-')}.", remedy="Leave it out.")


def _say_trained(summary: TrainSummary) -> None:
    for name, figures in summary.stages.items():
        shown = ", ".join(f"{key} {value:.4g}" for key, value in figures["last"].items())
        _say(f"{name}: {figures['steps']} of {figures['planned_steps']} steps in {figures['seconds']:.0f} s; {shown}")
    if summary.model:
        _say(f"The model is in {summary.model}. Next: brainldm generate {_quoted(summary.folder)} OUT --n 16")


def _train_baseline(
    kind: str,
    data: Path,
    out: Path,
    *,
    steps: int | None,
    minutes: float | None,
    device: str,
    precision: str,
    cache: Path | None,
    tensorboard: bool,
    settings: Sequence[str],
    dry_run: bool,
) -> None:
    from brainldm.cohort.dataset import PreparedCohort
    from brainldm.recipes.gan import baseline
    from brainldm.train.gan_run import train_gan
    from brainldm.train.settings import with_settings

    config = with_settings(baseline(kind, PreparedCohort.open(data).grid.shape_XYZ), settings)
    if dry_run:
        _say(json.dumps(asdict(config), indent=2))
        return
    with _progress() as progress:
        summary = train_gan(
            config,
            data,
            out,
            steps=steps,
            minutes=minutes,
            device=device,
            precision=precision,
            cache=cache,
            tensorboard=tensorboard,
            progress=progress,
        )
    _say_trained(summary)


def _train_predictor(
    what: str,
    data: Path,
    out: Path,
    *,
    steps: int | None,
    minutes: float | None,
    averaging: int | None,
    device: str,
    precision: str,
    settings: Sequence[str],
    dry_run: bool,
) -> None:
    from brainldm.train.config import PredictorConfig
    from brainldm.train.predictor_run import train_predictor
    from brainldm.train.settings import with_settings

    config = with_settings(PredictorConfig(), settings)
    if averaging is not None:
        config = replace(config, averaging=averaging)
    if dry_run:
        _say(json.dumps(asdict(config), indent=2))
        return
    with _progress() as progress:
        predictor = train_predictor(
            what,
            data,
            out,
            config=config,
            steps=steps,
            minutes=minutes,
            device=device,
            precision=precision,
            progress=progress,
        )
    _say(f"On held-out people: {json.dumps(predictor.training['held_out'])}")
    _say(f"The predictor is in {predictor.folder}.")


@app.command
def reconstruct(
    model: Path,
    cohort: Path,
    out: Path,
    /,
    *,
    split: Annotated[
        Literal["held-out", "train", "validation", "test", "all"],
        Parameter(help="Whose images; held-out: those of validation and test."),
    ] = "held-out",
    most: Annotated[int | None, Parameter(help="Most people of each split.")] = None,
    seed: Annotated[int, Parameter(help="Seed of the bootstrap.")] = 0,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """What MODEL's autoencoder loses of COHORT's people: L1, PSNR, SSIM and MS-SSIM, a table and a picture in OUT."""
    from brainldm.train.reconstruction import reconstruct_cohort

    _check_apart(out, cohort)
    with _progress() as progress:
        report = reconstruct_cohort(
            model, cohort, out, split=split, most=most, seed=seed, device=device, precision=precision, progress=progress
        )
    for name, told in report.figures().items():
        if told["mean"] is None:
            _say(f"{name}: none ({told['reason']})")
        else:
            low_high = " to ".join(f"{bound:.4g}" for bound in told["interval_95"] or ())
            _say(f"{name}: {told['mean']:.4g} ({low_high or told['reason']}; {told['n']} people)")
    _say(f"The figures are in {out / 'reconstruction.json'}, a picture in {out / 'reconstruction.png'}.")


@app.command
def generate(
    model: Path,
    out: Path,
    /,
    *,
    n: Annotated[
        int | None, Parameter(help="How many brains (default: one a combination of the sweeps, or 16).")
    ] = None,
    age: Annotated[str | None, Parameter(help="Years: 70, or a sweep 50:80:4 (from, to, how many).")] = None,
    sex: Annotated[str | None, Parameter(help="F, M, or both as F:M.")] = None,
    ventricles: Annotated[str | None, Parameter(help="Ventricular volume: 40ml, or a sweep 15ml:60ml:4.")] = None,
    brain: Annotated[
        str | None, Parameter(help="Head-size-normalised grey + white matter: 1450ml, or a sweep.")
    ] = None,
    plan: Annotated[Path | None, Parameter(help="A table with a row a brain, instead of the four above.")] = None,
    seed: int = 0,
    sampler: Annotated[
        str,
        Parameter(help="unipc, dpm++ or heun (few steps); ddim, ddim-original or ddpm (as published)."),
    ] = "unipc",
    steps: Annotated[int | None, Parameter(help="Sampling steps, instead of the sampler's own number.")] = None,
    guidance: Annotated[
        float, Parameter(help="Above 1, what is asked is exaggerated; for models trained for it (see info).")
    ] = 1.0,
    batch: Annotated[int | None, Parameter(help="Brains sampled together (default: 4, with --exact 1).")] = None,
    dtype: Annotated[Literal["int16", "uint8", "float32"], Parameter(help="How voxels (0..1) are stored.")] = "int16",
    as_bundle: Annotated[
        bool,
        Parameter(help="150 x 214 x 145 and uint8, as the published bundle writes them; paper grid only.", negative=""),
    ] = False,
    gate: Annotated[
        bool, Parameter(help="Draw again what looks unlike every training image; count it.", negative="")
    ] = False,
    allow_extrapolation: Annotated[
        bool, Parameter(help="Accept covariates outside the training range, and mark them.", negative="")
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    exact: Annotated[bool, Parameter(help="float32, one at a time: the same bytes every time.", negative="")] = False,
    max_memory: Annotated[
        str | None, Parameter(help="Most memory to take, such as 3GB (default: nine tenths of what is free).")
    ] = None,
    compile_: Annotated[
        bool, Parameter(name="--compile", help="torch.compile the U-Net (CUDA; pays from some dozens on).", negative="")
    ] = False,
    dry_run: Annotated[bool, Parameter(help="Print the plan, the time and the memory, and stop.", negative="")] = False,
) -> None:
    """Brains of the covariates you ask for, as a BIDS derivative dataset.

    What is not asked is drawn from the model's training population. The same command finishes an interrupted dataset.
    """
    from brainldm.base.counts import counted
    from brainldm.base.errors import UsageError
    from brainldm.generate.plan import as_text, check_ranges, make_plan, read_plan
    from brainldm.generate.run import GenerateSettings, check_settings
    from brainldm.generate.run import generate as run_generation
    from brainldm.generate.start import parse_memory, start
    from brainldm.model.folder import read_description

    asked = _asked(age, sex, ventricles, brain)
    if plan is not None and (asked or n is not None):
        raise UsageError("--plan fixes every row, so it cannot go with --n, --age, --sex, --ventricles or --brain.")
    if exact and (precision == "bf16" or batch not in (None, 1)):
        raise UsageError("--exact is float32, one brain at a time.", remedy="Leave --precision and --batch out.")
    settings = GenerateSettings(
        seed=seed,
        sampler=sampler,
        steps=steps,
        batch=batch if batch is not None else 1 if exact else 4,
        dtype="uint8_unit" if as_bundle else _DTYPES[dtype],
        as_bundle=as_bundle,
        gate=gate,
        guidance=guidance,
    )
    description = read_description(model)
    check_settings(description, settings)
    if max_memory is not None:
        parse_memory(max_memory)
    covariates = description.covariates
    ranges = covariates.fitted_ranges()
    if plan is not None:
        rows = check_ranges(read_plan(plan), ranges, allow_extrapolation=allow_extrapolation)
    else:
        joint = covariates.joint_model()
        rows = make_plan(asked, n=n, seed=seed, ranges=ranges, joint=joint, allow_extrapolation=allow_extrapolation)
    ready = start(
        model,
        rows,
        settings,
        device=device,
        precision="fp32" if exact else precision,
        max_memory=max_memory,
        may_shrink_batch=batch is None and not exact,
        exact=exact,
        begun=out,
        compiles=compile_,
        say=_say,
    )
    if dry_run:
        _say(as_text(rows))
        return
    with _progress() as progress:
        summary = run_generation(ready.load(), out, rows, ready.settings, progress=progress)
    again = f", {summary.redrawn} of them drawn again" if summary.redrawn else ""
    made, there = counted(summary.made, "brain"), counted(summary.were_there, "was", "were")
    _say(f"{made} made{again}, {there} there; all {len(rows)} are in {out}.")


_DTYPES: dict[str, Dtype] = {"int16": "int16_unit", "uint8": "uint8_unit", "float32": "float32"}


def _asked(age: str | None, sex: str | None, ventricles: str | None, brain: str | None) -> dict[str, Sweep]:
    """The sweeps asked for, by covariate; one value is a sweep of one."""
    from brainldm.base.errors import UsageError
    from brainldm.base.quantities import parse_age, parse_sex, parse_volume
    from brainldm.generate.plan import Sweep

    asked = {}
    sweep = "A sweep is from:to:how-many (2 or more), such as"
    for name, text, parse, remedy in (
        ("sex", sex, lambda t: float(parse_sex(t)), "Write F, M or F:M."),
        ("age_years", age, parse_age, f"{sweep} 50:80:4."),
        ("ventricles_mm3", ventricles, parse_volume, f"{sweep} 15ml:60ml:4."),
        ("brain_mm3", brain, parse_volume, f"{sweep} 1300ml:1600ml:4."),
    ):
        if text is None:
            continue
        parts = text.split(":")
        if name == "sex" and len(parts) == 2:
            asked[name] = Sweep(parse(parts[0]), parse(parts[1]), 2)
        elif len(parts) == 1:
            asked[name] = Sweep(parse(text), parse(text), 1)
        elif len(parts) == 3 and parts[2].isdecimal() and int(parts[2]) >= 2 and name != "sex":
            asked[name] = Sweep(parse(parts[0]), parse(parts[1]), int(parts[2]))
        else:
            raise UsageError(f"{text!r} is neither a value nor a sweep.", remedy=remedy)
    return asked


@app.command
def figure(
    number: Literal["2", "4"],
    model: Path,
    out: Path,
    /,
    *,
    seed: int = 0,
    sampler: Annotated[str, Parameter(help="As of generate.")] = "unipc",
    steps: Annotated[int | None, Parameter(help="Sampling steps, instead of the sampler's own number.")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    max_memory: Annotated[str | None, Parameter(help="Most memory to take, such as 3GB.")] = None,
) -> None:
    """A figure of Pinaya et al. 2022 from MODEL: its brains as a dataset in OUT, and OUT/figure.png.

    2: two sweeps of five, of ventricular and of brain volume. 4: the same beyond what training covered.
    """
    from brainldm.recipes.figures import make_figure

    with _progress() as progress:
        picture = make_figure(
            int(number),
            model,
            out,
            seed=seed,
            sampler=sampler,
            steps=steps,
            device=device,
            precision=precision,
            max_memory=max_memory,
            progress=progress,
            say=_say,
        )
    _say(f"The figure is {picture}.")


@app.command
def table1(
    cohort: Path,
    out: Path,
    /,
    *,
    ldm: Annotated[Path | None, Parameter(help="A latent diffusion run or model; trained here if not given.")] = None,
    lsgan: Annotated[Path | None, Parameter(help="A run of `brainldm train lsgan`.")] = None,
    vaegan: Annotated[Path | None, Parameter(help="A run of `brainldm train vaegan`.")] = None,
    age: Annotated[Path | None, Parameter(help="A run of `brainldm train age`.")] = None,
    sex: Annotated[Path | None, Parameter(help="A run of `brainldm train sex`.")] = None,
    recipe: Annotated[str, Parameter(help="Recipe of the latent diffusion model, where it is trained here.")] = "quick",
    minutes: Annotated[float, Parameter(help="Training time of each model; the predictors take a quarter.")] = 10.0,
    n: Annotated[int, Parameter(help="Brains made in each way.")] = 64,
    pairs: Annotated[int, Parameter(help="Random pairs for the diversity figures.")] = 1000,
    features: Annotated[str, Parameter(help="The space of the Frechet distance, as of evaluate.")] = "random",
    seed: int = 0,
    workers: Workers = 1,
) -> None:
    """Table 1 and Figures 1 to 4 of Pinaya et al. 2022: LSGAN, VAE-GAN and latent diffusion by one judge."""
    from brainldm.recipes.table1 import make_table1

    with _progress() as progress:
        make_table1(
            cohort,
            out,
            models={"ldm": ldm, "lsgan": lsgan, "vaegan": vaegan, "age": age, "sex": sex},
            recipe=recipe,
            minutes=minutes,
            n=n,
            pairs=pairs,
            seed=seed,
            feature_space=features,
            workers=workers,
            progress=progress,
            say=_say,
        )
    _say(f"The table is in {out / 'table1.md'}, the figures in {out / 'figures'}.")


@app.command
def calibrate(
    model: Path,
    out: Path,
    /,
    *,
    n: Annotated[int, Parameter(help="Brains to make and measure.")] = 200,
    seed: Annotated[int, Parameter(help="Of these brains; judge the model on brains of another seed.")] = 1,
    measure_: Measure = "template",
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = 1,
) -> None:
    """A model that shows the volumes it is asked for: how it answers is measured, and corrected. Writes OUT/model.

    The same command goes on with an interrupted one.
    """
    from brainldm.recipes.calibrate import calibrate as run

    with _progress() as progress:
        found = run(
            model,
            out,
            n=n,
            seed=seed,
            instrument=_instrument(measure_),
            device=device,
            precision=precision,
            workers=workers,
            progress=progress,
            say=_say,
        )
    _say(found.as_text())
    _say(f"The calibrated model is {out / 'model'}.")


@app.command
def card(
    model: Path,
    cohort: Path,
    out: Path,
    /,
    *,
    phantoms: Annotated[Path, Parameter(help="The phantom study that the cohort was prepared from.")],
    age: Annotated[Path | None, Parameter(help="A run of `brainldm train age`; without it age is not judged.")] = None,
    sex: Annotated[Path | None, Parameter(help="A run of `brainldm train sex`; without it sex is not judged.")] = None,
    n: Annotated[int, Parameter(help="Brains to make and judge.")] = 200,
    reconstructed: Annotated[int, Parameter(help="Most held-out phantoms to reconstruct (4 s each at 2 mm).")] = 40,
    pairs: Annotated[int, Parameter(help="Random pairs for the diversity figures.")] = 1000,
    seed: int = 0,
    workers: Workers = 1,
) -> None:
    """The card of a model of phantoms: what it reaches against people it has not seen, as results.json and README.md.

    The same command goes on with an interrupted one.
    """
    from brainldm.recipes.model_card import make_card

    with _progress() as progress:
        make_card(
            model,
            cohort,
            out,
            age=age,
            sex=sex,
            phantoms=phantoms,
            n=n,
            reconstructed=reconstructed,
            pairs=pairs,
            seed=seed,
            workers=workers,
            progress=progress,
            say=_say,
        )
    _say(f"The card is {out / 'README.md'}.")


@app.command
def samplers(
    model: Path,
    out: Path,
    /,
    *,
    n: Annotated[int, Parameter(help="Brains to compare on.")] = 8,
    seed: int = 0,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """How far each sampler is from 1000 steps, and how long it takes: OUT/samplers.json, samplers.png and a table."""
    from brainldm.generate.sampler_table import compare_samplers

    with _progress() as progress:
        table = compare_samplers(model, out, n=n, seed=seed, device=device, precision=precision, progress=progress)
    _say(table.as_text())
    _say(f"The table is in {out}.")


@import_app.command(name="monai")
def import_monai(
    *,
    autoencoder: Annotated[Path, Parameter(help="The bundle's autoencoder.pt.")],
    unet: Annotated[Path, Parameter(help="The bundle's model.pt.")],
    out: Annotated[Path, Parameter(help="The model folder to write.")],
) -> None:
    """The published MONAI bundle's two files become a model folder. Old and new key layouts; nothing is executed."""
    from brainldm.model.bundle import import_monai as run_import

    _say(str(run_import(autoencoder, unet, out)))
    _say(f"Next: brainldm generate {_quoted(out)} BRAINS --n 4 --age 63 --sex F --ventricles 40ml --brain 1450ml")


@export_app.command(name="monai")
def export_monai(
    model: Path,
    out: Path,
    /,
    *,
    layout: Annotated[
        Literal["old", "new"], Parameter(help="old is the published bundle's, new is MONAI 1.6's.")
    ] = "old",
) -> None:
    """A model folder becomes the two files of the MONAI bundle, every value as it is."""
    from brainldm.model.bundle import export_monai as run_export

    for path in run_export(model, out, layout):
        _say(f"Wrote {path}")


@export_app.command(name="package")
def export_package(
    model: Path,
    out: Path,
    /,
    *,
    licence: Annotated[str | None, Parameter(help="The licence of the weights, where the model states none.")] = None,
    most_megabytes: Annotated[
        float, Parameter(name="--max-megabytes", help="Refuse a larger model; what comes with the package has 25.")
    ] = 25.0,
) -> None:
    """A model becomes one to ship: weights in float16, at most 25 MB. It is used as any other model folder."""
    from brainldm.base.errors import UsageError
    from brainldm.model.package import package_model

    if not 0 < most_megabytes < math.inf:
        raise UsageError(f"--max-megabytes is {most_megabytes:g}.", remedy="Write a number above 0, such as 25.")
    packed = package_model(model, out, licence=licence, most_bytes=round(most_megabytes * 1e6))
    _say(
        f"{out} takes {packed.bytes / 1e6:.1f} MB; rounding changed no weight by more than {packed.rounding:.2g} "
        "of its tensor's largest."
    )
    command = f"brainldm card {_quoted(out)} COHORT CARD --age AGE --sex SEX --phantoms STUDY"
    _say(f"Next, for a model of phantoms: {command}")


@fetch_app.command(name="ukb")
def fetch_ukb(out: Path = Path("ukb"), /) -> None:
    """The published weights (UK Biobank, 2.3 GB): downloaded, proven by md5, made a model folder OUT/model.

    The same command goes on with an interrupted download. Mirrors are taken from HF_ENDPOINT.
    """
    from brainldm.model.bundle import import_monai as run_import
    from brainldm.model.fetch import fetch_published
    from brainldm.model.folder import DESCRIPTION_NAME

    with _progress() as progress:
        files = fetch_published(out, progress=progress)
    if not (out / "model" / DESCRIPTION_NAME).exists():
        _say(str(run_import(files["autoencoder"], files["unet"], out / "model")))
    model = _quoted(out / "model")
    _say(f"Next: brainldm generate {model} BRAINS --n 4 --age 63 --sex F --ventricles 40ml --brain 1450ml")


@fetch_app.command(name="med3d")
def fetch_med3d(out: Path = Path("med3d"), /) -> None:
    """MedicalNet's ResNet-50 (Med3D, 185 MB), the network of the published Frechet distances: proven by SHA-256."""
    from brainldm.model.fetch import fetch_med3d as run

    with _progress() as progress:
        checkpoint = run(out, progress=progress)
    _say(f"Next: brainldm evaluate BRAINS --real COHORT --out RESULTS --features {_quoted(f'med3d={checkpoint}')}")


@app.command
def evaluate(
    synth: Path,
    /,
    *,
    real: Annotated[Path | None, Parameter(help="A prepared cohort (or any folder of images) to compare with.")] = None,
    out: Annotated[Path, Parameter(help="Where the scorecard goes.")],
    pairs: Annotated[int, Parameter(help="Random pairs for the diversity figures.")] = 1000,
    runs: Annotated[Path | None, Parameter(help="A training run, to show its learning curves.")] = None,
    predictor: Annotated[
        list[Path] | None, Parameter(help="A run of `brainldm train age` or `sex`; can be given for each.")
    ] = None,
    features: Annotated[
        list[str] | None,
        Parameter(help="Spaces to compare the sets in: random (default), med3d=CHECKPOINT, med3d-signed=..., none."),
    ] = None,
    measure_: Measure = "template",
    volumes: Annotated[
        Path | None, Parameter(help="What mri_synthseg --vol or asegstats2table found in SYNTH, instead of measuring.")
    ] = None,
    real_volumes: Annotated[Path | None, Parameter(help="The same of the real people.")] = None,
    max_real: Annotated[int, Parameter(help="Most real people to measure; copies are looked for among all.")] = 200,
    held_out: Annotated[
        bool, Parameter(help="Compare with held-out people alone; copies are looked for as always.", negative="")
    ] = False,
    hide_real: Annotated[bool, Parameter(help="Show no slice of a real person on the page.", negative="")] = False,
    seed: int = 0,
    workers: Workers = 1,
) -> None:
    """Judges a folder of brains: does it obey, is it diverse, how far is it from real ones. Writes scorecard.json."""
    from brainldm.base.counts import counted
    from brainldm.base.errors import PartialFailure, UsageError
    from brainldm.evaluate.scorecard import evaluate_dataset

    if real is None and (held_out or hide_real):
        raise UsageError("--held-out and --hide-real are about real people.", remedy="Name them: --real COHORT.")
    with _progress() as progress:
        scorecard = evaluate_dataset(
            synth,
            real,
            out,
            instrument=_instrument(measure_),
            pairs=pairs,
            seed=seed,
            workers=workers,
            max_real=max_real,
            runs=runs,
            predictors=predictor or (),
            features=features or ("random",),
            volumes=None if volumes is None and real_volumes is None else (volumes, real_volumes),
            show_real=not hide_real,
            held_out_only=held_out,
            progress=progress,
        )
    _say(scorecard.as_text())
    _say(f"The scorecard is in {out}. Next: brainldm report {_quoted(out)}")
    if scorecard.failures:
        images = counted(scorecard.failed, "image")
        raise PartialFailure(f"{images} could not be judged, or not in every way; see failures.tsv.", path=out)


@app.command
def measure(
    study: Path,
    out: Path,
    /,
    *,
    against: Annotated[
        str | None,
        Parameter(help="A column of participants.tsv that holds the ventricular volume somebody else found."),
    ] = None,
    measure_: Measure = "template",
    workers: Workers = 1,
) -> None:
    """Ventricular and brain volume of scans, without trained weights; and how well that agrees with others."""
    from brainldm.evaluate.instrument import check_instrument

    with _progress() as progress:
        check = check_instrument(
            study, out, against=against, instrument=_instrument(measure_), workers=workers, progress=progress
        )
    _say(check.as_text())
    _say(f"A row a scan is in {out / 'measured.tsv'}.")


def _instrument(name: str):  # type: ignore[no-untyped-def]  # an evaluate.measuring.Instrument, imported late
    if name == "synthseg":
        from brainldm.cohort.synthseg import SynthSegMeasure, installed_program

        installed_program()  # said now, not after hours of making brains
        return SynthSegMeasure()
    from brainldm.cohort.measure import TemplateMeasure

    return TemplateMeasure()


@app.command
def validate(
    people: Path,
    out: Path,
    /,
    *,
    features: Annotated[
        list[str] | None,
        Parameter(help="Spaces of features: random (default), med3d=CHECKPOINT, med3d-signed=..., none."),
    ] = None,
    pairs: Annotated[int, Parameter(help="Random pairs for the diversity figures.")] = 200,
    seed: int = 0,
    workers: Workers = 1,
) -> None:
    """Judges the judge on real people: does it find planted copies, know a person again, call real people real?"""
    from brainldm.base.counts import counted
    from brainldm.base.errors import PartialFailure
    from brainldm.evaluate.validation import validate as run

    with _progress() as progress:
        found = run(
            people, out, features=features or ("random",), pairs=pairs, seed=seed, workers=workers, progress=progress
        )
    _say(found.as_text())
    _say(f"All figures are in {out / 'validation.json'} and {out / 'real_against_real'}.")
    if found.failures:
        images = counted(len(found.failures), "image")
        raise PartialFailure(f"{images} could not be judged; see validation.json.", path=out)


@app.command
def morphometry(
    synth: Path,
    real: Path,
    out: Path,
    /,
    *,
    head: Annotated[str | None, Parameter(help="A column with each head's size, to take it out of the others.")] = None,
    seed: int = 0,
) -> None:
    """Regional volumes of two tables compared: each region's difference, and the distance of the two sets."""
    from brainldm.evaluate.morphometry import compare_tables

    found = compare_tables(synth, real, out, head=head, seed=seed)
    distances = {
        "Wasserstein distance": found.parts.across,
        "two parts of the real": found.parts.real,
        "beyond chance": found.parts.beyond,
    }
    for name, estimate in distances.items():
        value = f"none ({estimate.reason})" if estimate.value is None else f"{estimate.value:.3f}"
        _say(f"{name}, {len(found.regions)} regions: {value}")
    _say(f"A row a region is in {out / 'regions.tsv'}.")


@app.command
def report(folder: Path, /) -> None:
    """A page to look at, from the result files in FOLDER: index.html, which needs no network."""
    from brainldm.report import write_report

    _say(f"Open {write_report(folder)} in a browser.")


@app.command
def info(path: Path, /, *, json_: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """What is this folder or file? A study, a cohort, a run, a model, a dataset, a scorecard or a scan."""
    from brainldm.base.describe import describe

    _show(describe(path), as_json=json_)


@app.command
def doctor(*, json_: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """Is this machine fit: versions, processor, memory, disk, and whether its arithmetic is right."""
    from brainldm.base.errors import EnvironmentProblem
    from brainldm.model.machine import examine_machine

    findings = examine_machine()
    _show(findings, as_json=json_)
    if findings["problems"]:
        raise EnvironmentProblem("; ".join(findings["problems"]))


def _check_apart(out: Path, *inputs: Path) -> None:
    from brainldm.base.files import check_output_apart

    check_output_apart(out, *inputs)


def _show(content: dict, *, as_json: bool) -> None:
    if as_json:
        _say(json.dumps(content, indent=2, ensure_ascii=False, default=str))
        return
    width = max(len(key) for key in content)
    for key, value in content.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        _say(f"{key:<{width}}  {shown}")


def _quoted(path: object) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def _say(text: str) -> None:
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:
        # Whoever read is gone (`| head`): the work goes on, and nothing more is said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _progress():  # type: ignore[no-untyped-def]  # a context manager of base.progress, imported late
    from brainldm.base.progress import Quiet, shown_progress

    return shown_progress() if _leads() else contextlib.nullcontext(Quiet())


def _leads() -> bool:
    """Whether this process speaks: of those that torchrun starts, the first."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a bug, 2 wrong use, 3 bad input, 4 partly failed, 5 the machine, 130
    interrupted, 143 asked to end."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr does: a file's name may hold what no text can
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(_run(arguments, debug=debug))


def _run(arguments: list[str], *, debug: bool) -> int:
    from brainldm.base.errors import BrainldmError

    try:
        app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        return 2
    except BrainldmError as error:
        if debug:
            raise
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted. What was finished is kept; the same command goes on with the rest.")
        return 130
    except Exception as error:
        if debug:
            raise
        if _is_out_of_memory(error):
            _complain(
                f"the memory does not suffice ({str(error).splitlines()[0] if str(error) else 'MemoryError'}). Take a "
                "recipe with a smaller batch or with checkpointing, --precision bf16, or a coarser grid; generate with "
                "--batch 1 or --max-memory; share weights with --shard. What was finished is kept."
            )
            return 5
        if isinstance(error, OSError) and error.errno is not None:  # one without a number is a library's own
            problem = _refused_by_the_system(error)
            _complain(str(problem))
            return problem.exit_code
        _complain(f"this is a bug in brainldm: {type(error).__name__}: {error}. Run again with --debug and report it.")
        return 1
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Of the machine or of a GPU. torch says the first as a plain RuntimeError; it is not imported here to ask."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _refused_by_the_system(error: OSError) -> BrainldmError:
    """The problem of the machine that an error of no door of ours tells: which file, what is wrong, what to do."""
    from brainldm.base.errors import EnvironmentProblem
    from brainldm.base.files import environment_problem

    file: Any = error.filename if isinstance(error.filename, str | os.PathLike) else None  # a number where it was open
    if error.errno == errno.ENOSPC:
        return environment_problem(error, file)
    return EnvironmentProblem(
        f"the system refused: {error.strerror}.",
        remedy="Check that the files of this command are there, are yours to read and write, and lie on a disk that "
        "works; then run it again.",
        path=file,
    )


def _complain(text: str) -> None:
    print(f"brainldm: {text}", file=sys.stderr, flush=True)  # noqa: T201
