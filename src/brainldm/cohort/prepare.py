"""A BIDS study becomes a prepared cohort: every scan on one grid in 0..1, with covariates and a split.

What can be checked without a voxel is checked first. Then each scan is prepared on its own; the manifest alone says
which are done, so the same command goes on after any interruption, and only prepares the new people after some were
added. The tables are written last, whole, from the manifest and the study's own table.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import brainldm
from brainldm.base.counts import counted
from brainldm.base.covariates import VOLUMES, implausible
from brainldm.base.errors import BadInput, BrainldmError, EnvironmentProblem, PartialFailure, UsageError
from brainldm.base.files import check_output_apart, locked_folder, make_folder, read_json, write_json
from brainldm.base.manifest import Manifest
from brainldm.base.pool import check_workers, each_in_a_pool
from brainldm.base.progress import Progress, Quiet
from brainldm.base.tables import number_in, read_table
from brainldm.base.volume import grid_named
from brainldm.cohort.bids import Scan, Study, read_study
from brainldm.cohort.cohort_tables import CohortPerson, alignment, write_cohort_tables
from brainldm.cohort.dataset import FORMAT, KIND, read_prepared_json
from brainldm.cohort.prepare_config import PrepareConfig, ScanTask
from brainldm.cohort.source import is_source_of
from brainldm.cohort.split import SPLITS, Split, assign_splits, moved_people
from brainldm.cohort.study_images import Failure, composed
from brainldm.cohort.unires import unires_python

if TYPE_CHECKING:
    from brainldm.cohort.measure import Measured

__all__ = ["PrepareConfig", "PrepareSummary", "prepare_study"]

ASIDE = ".left-out"  # where the prepared images of people lie who are in no table

# A file name holds the id, the entities and, while it is written, a part prefix; it ends at 255 bytes.
_LONGEST_ID_BYTES = 200


@dataclass(frozen=True)
class PrepareSummary:
    """What came of it. `failures` is everybody the study names who is not in the cohort."""

    out: Path
    people: int
    splits: Mapping[str, int]
    failures: tuple[Failure, ...]
    flagged: int
    newly_prepared: int
    seconds: float
    left_out: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        splits = ", ".join(f"{split} {n}" for split, n in self.splits.items())
        new = "" if self.newly_prepared == self.people else f"; {self.newly_prepared} of them now"
        people = counted(self.people, "person is", "people are")
        lines = [f"{people} prepared in {self.out} ({splits}{new}), in {self.seconds:.0f} s."]
        if self.left_out:
            lines.append(f"{counted(len(self.left_out), 'person was', 'people were')} left out, as asked.")
        if self.unread:
            scans_of = f"The scans of {counted(len(self.unread), 'person', 'people')}"
            some = ", ".join(self.unread[:3])
            lines.append(f"{scans_of} cannot be read now, to see whether they changed; what there is is kept ({some}).")
        if self.flagged:
            lines.append(
                f"{self.flagged} of them should be looked at: see flags in {self.out / 'quality.tsv'}, and leave out "
                "with --leave-out whom you would not train on."
            )
        if self.failures:
            lines.append(f"{len(self.failures)} could not be used: see {self.out / 'failures.tsv'}.")
        return "\n".join(lines)


def prepare_study(
    bids: Path,
    out: Path,
    config: PrepareConfig,
    *,
    leave_out: Collection[str] = (),
    workers: int = 1,
    progress: Progress = Quiet(),
) -> PrepareSummary:
    """Prepares the study in `bids` into `out`, or finishes, extends or refreshes what an earlier call made there.

    Whoever is in `leave_out` is not in the cohort: what was prepared of them lies in OUT/.left-out, nobody else changes
    sides of the split, and a call without it has them back. UsageError for somebody the study does not have.

    PartialFailure when some people could not be used (the rest is done), BadInput when nobody could, UsageError when
    `out` holds anything else.
    """
    begun = time.monotonic()
    bids, out = Path(bids), Path(out)
    config.check()
    check_workers(workers)
    _check_tools(config)
    check_output_apart(out, bids)
    used_columns = VOLUMES if config.volumes == "table" else ()
    study = read_study(bids, masks=config.masks, need_masks=config.uses_masks, used_columns=used_columns)
    left_out = _left_out(study, leave_out)
    volumes, failures = _known_volumes(study, config)
    failures += study.failures + [f for f in map(_unusable_id, study.scans) if f]
    failures = [f for f in failures if f.participant_id not in left_out]
    failed_files = {f.file for f in failures}
    scans = [s for s in study.scans if s.file not in failed_files and s.participant_id not in left_out]
    with locked_folder(out):
        earlier = _earlier_facts(out, study, config)
        facts = _facts(study, config, earlier) | {"left_out": left_out}
        write_json(out / "prepared.json", facts | {"finished": False})
        manifest = Manifest(out / "manifest.jsonl")
        _bring_back(out)
        tasks, done, unread = _what_is_missing(out, manifest, scans, config)
        progress.start("preparing scans", len(scans), len(scans) - len(tasks))
        newly_prepared = 0
        with contextlib.closing(each_in_a_pool(_prepared, tasks, workers=workers)) as outcomes:
            for task, outcome in outcomes:
                if isinstance(outcome, Exception):
                    failures.append(_failure(task.scan, outcome, study.root))
                else:
                    manifest.append(**outcome)
                    done.add(task.scan.participant_id)
                    newly_prepared += 1
                progress.advance(1, task.scan.participant_id)
        records = list(_proven(out, manifest).values())
        manifest.rewrite(records)
        people = _people([s for s in scans if s.participant_id in done], records, volumes)
        people, refused = _duplicates(people, config)
        failures += refused + _left_over(study, records)
        summary = replace(
            _finish(out, study, config, facts, people, failures, newly_prepared, begun), unread=tuple(unread)
        )
        _set_aside(out, {r["participant_id"] for r in records} - {p.id for p in people})
    if not people:
        first = failures[0]
        raise BadInput(
            f"nobody could be prepared. {first.participant_id}: {first.message}",
            remedy=first.remedy or f"See {out / 'failures.tsv'}.",
            path=study.root / first.file,
            reason=first.reason,
        )
    if failures:
        raise PartialFailure(str(summary), remedy="Mend them and run the same command again, or leave them out.")
    return summary


# ------------------------------------------------------------------------------------------------ before any voxel


def _check_tools(config: PrepareConfig) -> None:
    if config.skull == "strip" and config.strip_with == "deepbet" and importlib.util.find_spec("deepbet") is None:
        raise EnvironmentProblem(
            "deepbet is not installed.", remedy="pip install 'brainldm[deepbet]', or --strip-with template."
        )
    if config.register == "unires":
        unires_python()


def _unusable_id(scan: Scan) -> Failure | None:
    name = scan.participant_id
    if name == " ".join(name.split()) and name.isprintable() and len(name.encode()) <= _LONGEST_ID_BYTES:
        return None
    message = f"the id {name!r} cannot name files and rows of tables (control characters, or too long)."
    return Failure(" ".join(name.split())[:60], scan.file, "bad_id", message, "Rename the folder and its scan.")


def _left_out(study: Study, asked: Collection[str]) -> list[str]:
    """The ids of those to leave out, as the study writes them; asked for with or without `sub-`."""
    usable = {s.participant_id.removeprefix("sub-"): s.participant_id for s in study.scans}
    there = {f.participant_id.removeprefix("sub-"): f.participant_id for f in study.failures} | usable
    asked = [composed(i) for i in asked]  # a shell completes a folder's own spelling
    unknown = [i for i in asked if i.removeprefix("sub-") not in there]
    if unknown:
        raise UsageError(
            f"nobody in this study is called {unknown[0]!r}.",
            remedy=f"Ids look like {min(there.values(), default='sub-01')}; the study's participants.tsv has them all.",
            path=study.root,
        )
    left_out = sorted({there[i.removeprefix("sub-")] for i in asked})
    if usable and set(usable.values()) <= set(left_out):
        raise UsageError("everybody in this study was to be left out.", remedy="Leave out fewer.", path=study.root)
    return left_out


def _known_volumes(study: Study, config: PrepareConfig) -> tuple[dict[str, dict[str, float]], list[Failure]]:
    """Each person's volumes where they are not to be measured, and those who have none."""
    if config.volumes == "measure":
        return {}, []
    known: dict[str, dict[str, float]] = {}
    failures: list[Failure] = []
    table: Mapping[str, Mapping[str, Measured]] | None = None
    if config.volumes == "table":
        missing = [c for c in VOLUMES if c not in study.columns]
        if missing:
            raise BadInput(
                f"participants.tsv has no column {missing[0]!r}; it has: {', '.join(study.columns) or 'no others'}.",
                remedy=f"Add {' and '.join(VOLUMES)}, or let them be measured: --volumes measure.",
                path=study.root / "participants.tsv",
                reason="missing_column",
            )
        told, remedy = "the study's table", "Write it in mm^3, or use --volumes measure."
    else:
        told, remedy = Path(config.volumes).name, "Measure this person too, or use --volumes measure."
        from brainldm.cohort.measure import by_participant, measured_from_tables

        table = by_participant(measured_from_tables(Path(config.volumes)))
    for scan in study.scans:
        try:
            cells = scan.others if table is None else _cells_in(table, scan)
        except BadInput as error:
            message = f"in {told}, {error.message}"
            failures.append(Failure(scan.participant_id, scan.file, "bad_volume", message, error.remedy))
            continue
        fault, values = "", {}
        for name in VOLUMES:
            text = cells.get(name, "")
            value = number_in(text)
            if value is not None:
                values[name] = value
            fault = fault or ("is no number" if value is None else implausible(name, value))
            if fault and not fault.startswith(name):
                fault = f"{name} {text or 'n/a'!r} {fault}"
        if fault:
            message = f"in {told}, {fault}."
            failures.append(Failure(scan.participant_id, scan.file, "bad_volume", message, remedy))
        else:
            known[scan.participant_id] = values
    return known, failures


def _cells_in(table: Mapping[str, Mapping[str, Measured]], scan: Scan) -> dict[str, str]:
    """The volumes of the scan under its person's id, written with or without `sub-`; empty where there are none.
    BadInput where those there are of other scans."""
    from brainldm.cohort.measure import volumes_of_scan

    of_person = table.get(scan.participant_id) or table.get(scan.participant_id.removeprefix("sub-"))
    if of_person is None:
        return {}
    measured = volumes_of_scan(of_person, scan.file)
    return {name: repr(getattr(measured, name)) for name in VOLUMES}


def _earlier_facts(out: Path, study: Study, config: PrepareConfig) -> Mapping[str, Any]:
    """What prepared.json says of an earlier run of this very preparation; empty for a new folder."""
    if not (out / "prepared.json").exists():
        others = sorted(p.name for p in out.glob("[!.]*"))
        if others:
            raise UsageError(
                f"the output folder is in use: it holds {others[0]} and is no prepared cohort.",
                remedy="Choose an empty or a new folder.",
                path=out,
                reason="in_use",
            )
        return {}
    try:
        earlier = read_prepared_json(out)
    except BadInput as error:
        raise UsageError(
            f"the output folder is in use: {error.message}",
            remedy="Choose an empty or a new folder.",
            path=out,
            reason="in_use",
        ) from error
    asked = {"study": study.name} | config.to_json()
    there = {"study": earlier["source"]["name"]} | earlier["config"]
    differing = [f"{k}: {there.get(k)} there, {asked.get(k)} asked" for k in asked if asked[k] != there.get(k)]
    if differing:
        raise UsageError(
            f"this cohort was prepared in another way ({'; '.join(differing)}).",
            remedy="Use another output folder, or the same study and options as before.",
            path=out,
            reason="other_config",
        )
    return earlier


def _facts(study: Study, config: PrepareConfig, earlier: Mapping[str, Any]) -> dict[str, Any]:
    packages = ("numpy", "scipy", "nibabel", "nilearn", "SimpleITK")
    description_path = study.root / "dataset_description.json"
    description = read_json(description_path) if description_path.exists() else {}
    licence = description.get("License", "") if isinstance(description, dict) else ""
    return {
        "kind": KIND,
        "format": FORMAT,
        "name": study.name,
        "licence": str(licence),
        "grid": grid_named(config.grid).to_json(),
        "config": config.to_json(),
        "preprocessing": earlier.get("preprocessing", {}),
        "source": {"name": study.name, "phantoms": (study.root / "phantom.json").is_file()},
        "moved_to_fill_a_split": earlier.get("moved_to_fill_a_split"),
        "versions": {"brainldm": brainldm.__version__} | {p: importlib.metadata.version(p) for p in packages},
    }


# ---------------------------------------------------------------------------------------------------- what is done


def _proven(out: Path, manifest: Manifest, *, full: bool = False) -> dict[str, dict[str, Any]]:
    """The finished records by person, in the order of their index."""
    by_index = manifest.proven(out, full=full)
    return {by_index[i]["participant_id"]: by_index[i] for i in sorted(by_index)}


def _what_is_missing(
    out: Path, manifest: Manifest, scans: Sequence[Scan], config: PrepareConfig
) -> tuple[list[ScanTask], set[str], list[str]]:
    """The scans still to prepare, who is done, and who of those was prepared of a file that cannot be read now (a drive
    that is away, an annexed file that was dropped): what was made of it is proven and stays.

    A person keeps the index they once had; the others take the free ones in the order of their ids, which gives a
    run that was killed the same indices again.
    """
    proven = _proven(out, manifest, full=True)  # milliseconds a scan; to prepare one takes many seconds
    done: set[str] = set()
    unread: list[str] = []
    for scan in scans:
        if record := proven.get(scan.participant_id):
            try:
                if is_source_of(record, scan, scan.mask if config.uses_masks else None):
                    done.add(scan.participant_id)
            except OSError:
                unread.append(scan.participant_id)
    done.update(unread)
    taken = {record["index"] for record in proven.values()}
    free = (i for i in range(len(scans) + len(taken) + 1) if i not in taken)
    tasks = []
    for scan in scans:
        if scan.participant_id in done:
            continue
        record = proven.get(scan.participant_id)
        index = next(free) if record is None else record["index"]
        tasks.append(ScanTask(index, scan, out, config, measure=config.volumes == "measure"))
    return tasks, done, unread


def _set_aside(out: Path, people: Collection[str]) -> None:
    """Moves the folders of those who are in no table out of the dataset's sight: BIDS has no folder without a row."""
    for participant_id in people:
        make_folder(out / ASIDE)
        (out / participant_id).rename(out / ASIDE / participant_id)


def _bring_back(out: Path) -> None:
    """Moves all folders that were set aside back to where the manifest says that they are."""
    for folder in (out / ASIDE).glob("*"):
        if not (out / folder.name).exists():
            folder.rename(out / folder.name)
    if (out / ASIDE).is_dir():
        shutil.rmtree(out / ASIDE)


def _prepared(task: ScanTask) -> dict[str, Any]:
    """`prepare_scan`, and nothing left of a scan that failed on the way.

    Imported only where a scan is prepared: SimpleITK, nilearn and matplotlib take seconds.
    """
    from brainldm.cohort.prepare_scan import prepare_scan

    try:
        return prepare_scan(task)
    except EnvironmentProblem:
        raise
    except Exception:
        shutil.rmtree(task.out / task.scan.participant_id, ignore_errors=True)
        raise


def _failure(scan: Scan, error: Exception, root: Path) -> Failure:
    if isinstance(error, EnvironmentProblem):
        raise error
    if isinstance(error, BrainldmError):
        return Failure(scan.participant_id, scan.file, error.reason, error.message, error.remedy)
    if isinstance(error, OSError):
        message = f"cannot be read: {error.strerror or error}."
        return Failure(scan.participant_id, scan.file, "unreadable", message, "Check the file and its permissions.")
    if isinstance(error, MemoryError):
        return Failure(scan.participant_id, scan.file, "memory", "there was not enough memory.", "Use fewer --workers.")
    message = f"an unforeseen fault ({type(error).__name__}: {error})".replace(str(root), "")
    return Failure(scan.participant_id, scan.file, "unforeseen", message, "Please report it, with the scan's header.")


# -------------------------------------------------------------------------------------------------------- the end


def _people(
    scans: Sequence[Scan], records: Sequence[dict[str, Any]], volumes: Mapping[str, Mapping[str, float]]
) -> list[CohortPerson]:
    """Everybody whose scan is prepared, whatever has become of the file since: the next call will look at it."""
    by_id = {r["participant_id"]: r for r in records}
    people = []
    for scan in scans:
        record = by_id[scan.participant_id]
        known = volumes.get(scan.participant_id) or record["measured"]
        people.append(CohortPerson(scan, record, float(known["ventricles_mm3"]), float(known["brain_mm3"])))
    return people


def _duplicates(people: list[CohortPerson], config: PrepareConfig) -> tuple[list[CohortPerson], list[Failure]]:
    """People whose scans are equal voxel for voxel, or whose prepared images are (a scan and its double): flagged, or
    with `strict` refused, all of them."""
    joined_to: dict[str, str] = {}

    def first(sha256: str) -> str:
        while joined_to.setdefault(sha256, sha256) != sha256:
            sha256 = joined_to[sha256]
        return sha256

    for person in people:
        joined_to[first(person.record["voxels_sha256"])] = first(person.record["sha256"])
    groups: dict[str, list[str]] = {}
    for person in people:
        groups.setdefault(first(person.record["sha256"]), []).append(person.id)
    kept, refused = [], []
    for person in people:
        same = [i for i in groups[first(person.record["sha256"])] if i != person.id]
        if same and config.strict:
            message = f"has the same image as {', '.join(same)}."
            refused.append(
                Failure(person.id, person.scan.file, "duplicate", message, "Find out whose scan it is; keep one.")
            )
            continue
        kept.append(replace(person, same_image_as=tuple(same)))
    return kept, refused


def _left_over(study: Study, records: Sequence[Mapping[str, Any]]) -> list[Failure]:
    """Those who were prepared once and whom the study no longer has."""
    named = {s.participant_id for s in study.scans} | {f.participant_id for f in study.failures}
    message = "was prepared earlier, and is no longer in the study; left out of the tables."
    return [
        Failure(r["participant_id"], r["file"], "no_longer_in_study", message, "Delete the folder to forget them.")
        for r in records
        if r["participant_id"] not in named
    ]


def _splits_before(out: Path) -> dict[str, Split]:
    """Who was in which split when this cohort was last finished; nobody where it was not."""
    path = out / "participants.tsv"
    if not path.is_file():
        return {}
    rows = read_table(path).rows
    return {row["participant_id"]: split for row in rows for split in SPLITS if row.get("split") == split}


def _finish(
    out: Path,
    study: Study,
    config: PrepareConfig,
    facts: dict[str, Any],
    people: Sequence[CohortPerson],
    failures: list[Failure],
    newly_prepared: int,
    begun: float,
) -> PrepareSummary:
    before = _splits_before(out)
    moved = facts["moved_to_fill_a_split"]

    # One scan under several ids must not be on both sides of a split: they go where the first of them is, or was before
    # others came. Nobody who was in a split changes sides.
    def rank(participant_id: str) -> tuple[bool, bool, str]:
        return participant_id not in before, participant_id not in (moved or {}), participant_id

    first_of = {p.id: min((p.id, *p.same_image_as), key=rank) for p in people}
    if before:
        there = {first: before[first] for first in set(first_of.values()) if first in before}
        moved = (moved or {}) | moved_people(there, seed=config.seed, holdout=config.holdout)
    of_first = assign_splits(set(first_of.values()), seed=config.seed, holdout=config.holdout, moved=moved)
    splits = {i: of_first[first] for i, first in first_of.items()}
    # Of all, not of the first of each scan alone: they may be left out, or come, without the others.
    moved_now = (moved or {}) | moved_people(splits, seed=config.seed, holdout=config.holdout)
    failures.sort(key=lambda f: (f.participant_id, f.file, f.reason))
    write_cohort_tables(out, study, config, people, splits, failures)
    counts: dict[str, int] = {split: list(splits.values()).count(split) for split in SPLITS}
    facts |= {
        "preprocessing": {
            "space": alignment(people),
            "register": config.register,
            "skull": config.skull,
            "skull_stripped": bool(people) and all(p.record["stripped"] for p in people),
            "intensities": "min-max" if config.percentile is None else f"0 to percentile {config.percentile:g}",
            "volumes": config.to_json()["volumes"],
        },
        "moved_to_fill_a_split": moved_now if people else None,
        "counts": {"people": len(people), **counts, "failures": len(failures)},
        "finished": bool(people),
    }
    write_json(out / "prepared.json", facts)
    flagged = sum(bool(p.flags) for p in people)
    seconds, left_out = time.monotonic() - begun, tuple(facts["left_out"])
    return PrepareSummary(out, len(people), counts, tuple(failures), flagged, newly_prepared, seconds, left_out)
