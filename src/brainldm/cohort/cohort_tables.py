"""The tables and descriptions of a prepared cohort, written whole from what is known: a valid BIDS derivative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainldm.base.covariates import MEANINGS, SEX_LETTERS, UNITS
from brainldm.base.derivative import SPACE, dataset_description, t1w_sidecar
from brainldm.base.files import write_json, write_text
from brainldm.base.tables import write_table
from brainldm.base.volume import grid_named
from brainldm.cohort.bids import Scan, Study
from brainldm.cohort.prepare_config import PrepareConfig
from brainldm.cohort.split import Split
from brainldm.cohort.study_images import Failure

OUR_COLUMNS = ("participant_id", "age_years", "sex", "ventricles_mm3", "brain_mm3", "split")
# What BIDS has no place for. The validator is told to look away; people and our own commands read it.
BIDSIGNORE = ("prepared.json", "manifest.jsonl", "quality.*", "failures.tsv", "sub-*/figures", "*_xfm.json")
FLAGS = {
    "poor_registration": "the aligned scan hardly goes with the template",
    "poor_measurement": "the tissues found in the scan are not those of a brain; its volumes are not to be believed",
    "field_of_view_cut": "part of the template's brain lies outside the scan",
    "ventricles_at_limit": "ventricles larger than the built-in measure sees whole: they are found too small",
    "brain_outside_box": "part of the brain lies outside the grid's box",
    "not_own_size": "the scan was warped to a template: head and ventricles are of the template's size",
    "duplicate": "another person has the same image",
}


@dataclass(frozen=True)
class CohortPerson:
    """Somebody who is in the cohort: the study's word on them, the manifest's record, and their volumes."""

    scan: Scan
    record: Mapping[str, Any]
    ventricles_mm3: float
    brain_mm3: float
    same_image_as: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.scan.participant_id

    @property
    def flags(self) -> tuple[str, ...]:
        told = {"not_own_size": self.scan.is_warped, "duplicate": bool(self.same_image_as)}
        return (*self.record["flags"], *(flag for flag, is_so in told.items() if is_so))


def alignment(people: Sequence[CohortPerson]) -> str:
    """How these people's images lie, in words: a rigid motion keeps a head's size, a warp before it did not."""
    warped = [p.scan.space for p in people if p.scan.is_warped]
    if not warped:
        return "rigidly aligned to MNI152"
    told = f"warped to the size of a template ({', '.join(f'space-{space}' for space in sorted(set(warped)))})"
    if len(warped) == len(people):
        return told
    return f"rigidly aligned to MNI152; {len(warped)} of {len(people)} {told}"


def write_cohort_tables(
    out: Path,
    study: Study,
    config: PrepareConfig,
    people: Sequence[CohortPerson],
    splits: Mapping[str, Split],
    failures: Sequence[Failure],
) -> None:
    """Writes participants, quality, failures, their dictionaries, and what BIDS wants of a derivative dataset.

    The study's own columns stay as the study wrote them, even where a spreadsheet would take a cell for a formula: they
    are data, and an apostrophe before -1 would make it another. What is said here in words never begins like a formula:
    ids and files begin with `sub-`, messages and notes with a word.
    """
    _write_failures(out, failures)
    if not people:
        return
    _write_descriptions(out, study, config, people)
    _write_quality(out, people)
    _write_participants(out, study, people, splits)


def _write_participants(out: Path, study: Study, people: Sequence[CohortPerson], splits: Mapping[str, Split]) -> None:
    renamed = _beside_ours(study.columns)
    rows = []
    for person in people:
        ours = {
            "participant_id": person.id,
            "age_years": person.scan.age_years,
            "sex": SEX_LETTERS[person.scan.sex],
            "ventricles_mm3": person.ventricles_mm3,
            "brain_mm3": person.brain_mm3,
            "split": splits[person.id],
        }
        rows.append(ours | {renamed[c]: person.scan.others[c] for c in study.columns})
    write_table(out / "participants.tsv", (*OUR_COLUMNS, *renamed.values()), rows)
    dictionary: dict[str, dict[str, Any]] = {
        "age_years": {"Description": MEANINGS["age_years"], "Units": UNITS["age_years"]},
        "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
        "ventricles_mm3": {"Description": MEANINGS["ventricles_mm3"], "Units": UNITS["ventricles_mm3"]},
        "brain_mm3": {"Description": MEANINGS["brain_mm3"], "Units": UNITS["brain_mm3"]},
        "split": {
            "Description": "What this person may be used for",
            "Levels": {"train": "training", "validation": "watching the training", "test": "the final judgement"},
        },
    }
    for column, ours_or_theirs in renamed.items():
        meaning = study.column_meanings.get(column)
        own = {"Description": f"Column {column!r} of the study's own table"}
        dictionary[ours_or_theirs] = meaning if isinstance(meaning, dict) else own
    write_json(out / "participants.json", dictionary)


def _beside_ours(columns: Sequence[str]) -> dict[str, str]:
    """The study's columns by the names they get here: their own, or with `study_` before it where that is taken."""
    taken, renamed = set(OUR_COLUMNS) | set(columns), {}
    for column in columns:
        name = column
        while name in OUR_COLUMNS or (name != column and name in taken):
            name = f"study_{name}"
        taken.add(name)
        renamed[column] = name
    return renamed


def _write_quality(out: Path, people: Sequence[CohortPerson]) -> None:
    figures = sorted({name for p in people for name in p.record["quality"]} - {"brain_native_mm3"})
    rows = []
    for person in people:
        notes = [f"same image as {', '.join(person.same_image_as)}"] if person.same_image_as else []
        if person.scan.is_warped:
            notes.append(f"warped to a template (space-{person.scan.space}): not of the person's own size")
        rows.append(
            {
                "participant_id": person.id,
                "source": person.record["source"],
                "flags": ", ".join(person.flags),
                "brain_native_mm3": (person.record["measured"] or {}).get("brain_native_mm3"),
                **person.record["quality"],
                "notes": "; ".join([*notes, *person.record["notes"]]),
            }
        )
    write_table(out / "quality.tsv", ("participant_id", "source", "flags", "brain_native_mm3", *figures, "notes"), rows)
    write_json(out / "quality.json", {"flags": {"Description": "What should be looked at", "Levels": FLAGS}})


def _write_failures(out: Path, failures: Sequence[Failure]) -> None:
    path = out / "failures.tsv"
    if failures:
        columns = ("participant_id", "file", "reason", "message", "remedy")
        write_table(path, columns, [{c: getattr(f, c) for c in columns} for f in failures])
    else:
        path.unlink(missing_ok=True)


def _write_descriptions(out: Path, study: Study, config: PrepareConfig, people: Sequence[CohortPerson]) -> None:
    grid = grid_named(config.grid)
    aligned = alignment(people)
    described = f"T1w images of {study.name}, {aligned}, on the {grid.name} grid, in 0..1"
    write_json(out / "dataset_description.json", dataset_description(f"{study.name}, prepared", described))
    readme = _README.format(name=study.name, aligned=aligned, grid=grid.name, voxel_mm=grid.voxel_mm)
    write_text(out / "README.md", readme)
    write_text(out / ".bidsignore", "\n".join(BIDSIGNORE) + "\n")
    all_stripped = all(p.record["stripped"] for p in people)
    sidecar = t1w_sidecar(described, skull_stripped=all_stripped, voxel_mm=grid.voxel_mm)
    write_json(out / f"space-{SPACE}_T1w.json", sidecar)
    for person in people:  # those who differ from what they would inherit say so themselves
        own = out / str(person.record["file"]).replace(".nii.gz", ".json")
        if person.record["stripped"] != all_stripped:
            write_json(own, {"SkullStripped": person.record["stripped"]})
        else:
            own.unlink(missing_ok=True)


_README = """# {name}, prepared

Made by `brainldm prepare`. The images are {aligned}, resliced once to the `{grid}` grid
({voxel_mm:g} mm, RAS+) and scaled to 0..1. A rigid motion keeps a head's size, a warp to a template does not.

- `participants.tsv`: covariates and split, one row a person; `participants.json` says what the columns mean
- `quality.tsv`: how well each scan fitted, and what should be looked at (`quality.json` says what the flags mean);
  `sub-*/figures/` shows it
- `failures.tsv` (only if there are any): who could not be used, and why
- `sub-*/anat/*_xfm.json`: the transforms, in mm
- `prepared.json`, `manifest.jsonl`: how it was made, and the SHA-256 of every image

These are images of real people, unless the study is made of phantoms: treat them as the study's consent says.
"""
