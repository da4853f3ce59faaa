"""A folder of images to be judged, whoever made them: which images, what was asked of each, what is missing.

Three kinds of folder are understood: a synthetic dataset (plan.tsv and manifest.jsonl), a prepared cohort
(prepared.json), and any folder of NIfTI files, BIDS or flat, with or without a participants.tsv.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from brainldm.base.counts import counted
from brainldm.base.covariates import COVARIATES, SEX_LETTERS, sex_code
from brainldm.base.errors import BadInput, BrainldmError
from brainldm.base.files import PART_PREFIX, read_json
from brainldm.base.manifest import Manifest
from brainldm.base.tables import Table, read_table
from brainldm.cohort.split import HELD_OUT

Kind = Literal["synthetic", "prepared", "folder"]

# Our names of the covariates, and the columns in which datasets keep them (BIDS names beside ours).
COLUMNS_OF: dict[str, tuple[str, ...]] = {
    "age_years": ("age_years", "age"),
    "ventricles_mm3": ("ventricles_mm3", "ventricular_volume"),
    "brain_mm3": ("brain_mm3", "brain_volume"),
}
IMAGE_SUFFIXES = (".nii", ".nii.gz")
# Files of a BIDS tree that are about an image, not an image of a brain.
NOT_IMAGES = ("_mask", "_dseg", "_probseg", "_defacemask", "_xfm", "_warp")


@dataclass(frozen=True)
class JudgedImage:
    """One image and what is known of it without opening it.

    `covariates` are what was asked of a synthetic brain or recorded of a real person. `extrapolated` names those that
    lie outside the model's training range, None where nobody says. `sha256` is what the manifest states, None where
    there is no manifest.
    """

    participant_id: str
    path: Path
    file: str
    covariates: Mapping[str, float] = field(default_factory=dict)
    sex: str | None = None
    extrapolated: tuple[str, ...] | None = None
    split: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Failure:
    """One image that could not be judged, or in which an instrument found nothing, as a row of failures.tsv."""

    side: str  # "synthetic" or "real"
    participant_id: str
    file: str
    reason: str
    message: str
    remedy: str = ""

    @classmethod
    def of(cls, side: str, image: JudgedImage, error: Exception) -> Failure:
        if isinstance(error, BrainldmError):
            return cls(side, image.participant_id, image.file, error.reason, error.message, error.remedy)
        return cls(side, image.participant_id, image.file, "crash", f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder in a fixed order.

    `planned` counts the rows that the folder says it should hold. `provenance` is what the folder's own JSON files say
    about its making, as they say it.
    """

    folder: Path
    kind: Kind
    images: tuple[JudgedImage, ...]
    planned: int
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """How a cohort was prepared, as far as it says."""
        prepared = self.provenance.get("prepared.json")
        config = prepared.get("config") if isinstance(prepared, dict) else None
        return config if isinstance(config, dict) else {}

    @property
    def volumes_were_measured(self) -> bool:
        """Whether the volumes recorded of these people are what an instrument found in their scans, and so no truth."""
        return self.config.get("volumes") == "measure"

    @property
    def training(self) -> tuple[JudgedImage, ...]:
        return tuple(image for image in self.images if image.split == "train")

    @property
    def held_out(self) -> tuple[JudgedImage, ...]:
        return tuple(image for image in self.images if image.split in HELD_OUT)


def open_images(folder: str | Path, side: str) -> ImageFolder:
    """The images in `folder`; `side` ("synthetic" or "real") is the name under which its failures are listed.

    Nothing is read but tables and manifests. BadInput when the folder holds nothing that could be judged.
    """
    folder = Path(folder)
    if not folder.exists():
        raise BadInput("there is no such folder.", remedy="Check the path.", path=folder, reason="missing")
    if not folder.is_dir():
        raise BadInput("is a file; a folder of images is needed.", path=folder, reason="not_a_folder")
    if (folder / "plan.tsv").exists() and (folder / "manifest.jsonl").exists():
        found = _synthetic_dataset(folder, side)
    elif (folder / "prepared.json").exists():
        found = _prepared_cohort(folder, side)
    else:
        found = _any_folder(folder)
    if not found.images:
        raise BadInput(
            "holds no image that could be judged.",
            remedy=_what_it_may_be(folder),
            path=folder,
            reason="empty",
        )
    return found


def _what_it_may_be(folder: Path) -> str:
    if (folder / "model.json").exists():
        return "This is a model folder: generate images with it first, and evaluate those."
    if any(folder.rglob("*.dcm")):
        return "These are DICOM files: convert them with dcm2niix."
    if (folder / "plan.tsv").exists():
        return "Its plan has not been carried out: run the generate command again."
    return "Name a synthetic dataset, a prepared cohort or a folder of .nii.gz images."


# --------------------------------------------------------------------------------------------------- kinds of folder


def _synthetic_dataset(folder: Path, side: str) -> ImageFolder:
    plan = read_table(folder / "plan.tsv")
    plan.require("index", "participant_id")
    made = {record["index"]: record for record in Manifest(folder / "manifest.jsonl").records() if "index" in record}
    images, failures = [], []
    for row in range(len(plan)):
        index = plan.number(row, "index")
        if index is None or index != int(index):
            raise plan.fault(row, "index", "is not a whole number.", "Restore plan.tsv from where it came.")
        record = made.get(int(index))
        if record is None:
            continue
        covariates, sex, _ = _covariates_of(plan, row, strict=True)
        image = _manifested(
            folder, plan.rows[row]["participant_id"], record, covariates, sex, _extrapolated(plan, row), None
        )
        if isinstance(image, JudgedImage):
            images.append(image)
        else:
            failures.append(
                Failure(side, plan.rows[row]["participant_id"], str(record.get("file")), "bad_manifest", image)
            )
    warnings = []
    if len(images) + len(failures) < len(plan):
        missing = len(plan) - len(images) - len(failures)
        warnings.append(f"{missing} of {len(plan)} planned images are not in the manifest yet and are not judged.")
    return ImageFolder(
        folder,
        "synthetic",
        tuple(images),
        len(plan),
        tuple(failures),
        tuple(warnings),
        _json_at_root(folder, "dataset_description.json", "generation.json"),
    )


def _prepared_cohort(folder: Path, side: str) -> ImageFolder:
    people = read_table(folder / "participants.tsv")
    people.require("participant_id")
    row_of = {cells["participant_id"]: row for row, cells in enumerate(people.rows)}
    images, failures = [], []
    latest = {
        str(record.get("participant_id", record.get("file"))): record
        for record in Manifest(folder / "manifest.jsonl").records()
        if "file" in record
    }
    for participant_id, record in latest.items():
        if participant_id not in row_of:
            continue  # done, then taken out of the study's table: no longer part of the cohort
        row = row_of[participant_id]
        covariates, sex, _ = _covariates_of(people, row, strict=True)
        split = people.rows[row].get("split") or None
        image = _manifested(folder, participant_id, record, covariates, sex, None, split)
        if isinstance(image, JudgedImage):
            images.append(image)
        else:
            failures.append(Failure(side, participant_id, str(record.get("file")), "bad_manifest", image))
    return ImageFolder(
        folder,
        "prepared",
        tuple(sorted(images, key=lambda image: image.participant_id)),
        len(people),
        tuple(failures),
        (),
        _json_at_root(folder, "prepared.json"),
    )


def _any_folder(folder: Path) -> ImageFolder:
    files = _image_files(folder)
    t1w = [file for file in files if _stem(file).endswith("_T1w")]
    chosen = t1w or files
    warnings = []
    if t1w and len(t1w) < len(files):
        warnings.append(f"{len(files) - len(t1w)} NIfTI files that are not named _T1w are not judged.")
    people: Table | None = None
    row_of: dict[str, int] = {}
    if (folder / "participants.tsv").exists():
        people = read_table(folder / "participants.tsv")
        people.require("participant_id")
        row_of, unclear = _row_of_each(people)
        if unclear:
            warnings.append(
                f"{counted(len(unclear), 'person has', 'people have')} several rows that differ in participants.tsv "
                f"({', '.join(unclear[:3])}): none is used. Keep one row a person, that of the scan which is judged."
            )
    images = []
    images_of = Counter(map(subject_of, chosen))
    for file in chosen:
        subject = subject_of(file)
        row = row_of.get(bare(subject))
        covariates: dict[str, float] = {}
        sex = split = extrapolated = None
        if people is not None and row is not None:
            covariates, sex, ignored = _covariates_of(people, row, strict=False)
            warnings += ignored
            split, extrapolated = people.rows[row].get("split") or None, _extrapolated(people, row)
        # A subject with one image is called by its name, one with several (sessions, runs) by the path of each.
        name = subject if images_of[subject] == 1 else (PurePosixPath(file).parent / _stem(file)).as_posix()
        path = folder / file
        images.append(JudgedImage(_writable(name), path, _writable(file), covariates, sex, extrapolated, split))
    if people is not None:
        unmatched = sum(not image.covariates and image.sex is None for image in images)
        if unmatched:
            warnings.append(f"{unmatched} of {len(images)} images have no usable row in participants.tsv.")
    return ImageFolder(
        folder,
        "folder",
        tuple(images),
        len(images),
        (),
        tuple(warnings),
        _json_at_root(folder, "dataset_description.json"),
    )


def _row_of_each(people: Table) -> tuple[dict[str, int], list[str]]:
    """The row of each person in a table, and who has several that differ, so that none can be theirs."""
    row_of: dict[str, int] = {}
    unclear: dict[str, str] = {}
    for row, cells in enumerate(people.rows):
        person = bare(cells["participant_id"])
        first = people.rows[row_of.setdefault(person, row)]
        if {**cells, "participant_id": ""} != {**first, "participant_id": ""}:
            unclear.setdefault(person, first["participant_id"])
    return {person: row for person, row in row_of.items() if person not in unclear}, list(unclear.values())


def _image_files(folder: Path) -> list[str]:
    """Paths of NIfTI files below `folder`, relative and sorted; links to folders are not followed (they may loop)."""
    found = []
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*names, *(f for f in folders if f.lower().endswith(IMAGE_SUFFIXES))):
            relative = PurePosixPath(Path(root, name).relative_to(folder)).as_posix()
            is_image = name.lower().endswith(IMAGE_SUFFIXES) and not _stem(relative).endswith(NOT_IMAGES)
            if is_image and not name.startswith((".", PART_PREFIX)):
                found.append(relative)
    return sorted(found)


def _stem(file: str) -> str:
    name = PurePosixPath(file).name
    return name[: -len(".nii.gz")] if name.lower().endswith(".nii.gz") else name[: -len(".nii")]


def subject_of(file: str) -> str:
    """The BIDS subject of a file (sub-X), or its name without the suffix where it has none."""
    first = _stem(file).split("_")[0]
    if first.startswith("sub-"):
        return first
    return next((part for part in PurePosixPath(file).parts if part.startswith("sub-")), _stem(file))


def _writable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8, which Linux allows in names, become escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def bare(participant_id: str) -> str:
    """A participant's name without the sub- that some tables leave out."""
    return participant_id.removeprefix("sub-")


# ------------------------------------------------------------------------------------------------ rows and manifests


def _covariates_of(table: Table, row: int, *, strict: bool) -> tuple[dict[str, float], str | None, list[str]]:
    """The covariates in a row and its sex; a bad cell is an error when `strict`, else it is left out and named."""
    values: dict[str, float] = {}
    ignored = []
    for name, columns in COLUMNS_OF.items():
        column = next((c for c in columns if c in table.columns), None)
        if column is None:
            continue
        try:
            value = table.number(row, column)
        except BadInput as error:
            if strict:
                raise
            ignored.append(f"{table.path.name}: {error.message} It is left out.")
            continue
        if value is not None:
            values[name] = value
    code = sex_code(table.rows[row].get("sex", ""))
    return values, None if code is None else SEX_LETTERS[code], ignored


def _extrapolated(table: Table, row: int) -> tuple[str, ...] | None:
    """The covariates named in the column `extrapolated`; a plain 1 or true, as others write it, means all of them."""
    if "extrapolated" not in table.columns:
        return None
    text = table.rows[row]["extrapolated"].strip()
    if table.is_missing(row, "extrapolated") or text.lower() in ("0", "false"):
        return ()
    if text.lower() in ("1", "true"):
        return COVARIATES
    return tuple(name.strip() for name in text.split(","))


def _manifested(
    folder: Path,
    participant_id: str,
    record: dict[str, Any],
    covariates: dict[str, float],
    sex: str | None,
    extrapolated: tuple[str, ...] | None,
    split: str | None,
) -> JudgedImage | str:
    """The image that a manifest line names, or why the line cannot be believed."""
    file = record.get("file")
    if not isinstance(file, str) or not file:
        return "the manifest line names no file."
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts:
        return f"the manifest names {file!r}, which lies outside the dataset."
    sha256 = record.get("sha256")
    return JudgedImage(
        participant_id,
        folder / file,
        file,
        covariates,
        sex,
        extrapolated,
        split,
        sha256 if isinstance(sha256, str) else None,
    )


def _json_at_root(folder: Path, *patterns: str) -> dict[str, Any]:
    """What the folder's own JSON files say, by file name; a broken one is left out (it is no image)."""
    said: dict[str, Any] = {}
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            try:
                said[path.name] = read_json(path)
            except BadInput:
                continue
    return said
