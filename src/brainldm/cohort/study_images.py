"""The images of a BIDS study, and the brain masks that go with them, as their names tell."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from brainldm.base.errors import BadInput

_T1W = re.compile(r"^(sub-[^_]+)(?:_.+)?_T1w\.nii(?:\.gz)?$", re.DOTALL)


@dataclass(frozen=True)
class Failure:
    """Somebody who did not make it into the cohort: one row of failures.tsv."""

    participant_id: str
    file: str
    reason: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Image:
    """A T1w image by its name: where it is, its path below the study, session and space (empty where none)."""

    path: Path
    file: str
    session: str
    space: str


def check_is_a_study(root: Path) -> None:
    """BadInput where there is no such folder, or it is a file."""
    if not root.exists():
        raise BadInput("there is no such folder.", remedy="Check the path.", path=root, reason="missing")
    if root.is_dir():
        return
    if root.suffix.lower() in (".zip", ".tar", ".tgz", ".gz") and not root.name.lower().endswith(".nii.gz"):
        told, remedy = "is an archive; a BIDS folder is needed.", "Unpack it; DICOM is converted with dcm2niix."
    elif _is_dicom(root):
        told, remedy = "is a DICOM file; a BIDS folder is needed.", _DICOM_REMEDY
    else:
        told, remedy = "is a file; a BIDS folder is needed.", _LAYOUT_REMEDY
    raise BadInput(told, remedy=remedy, path=root, reason="not_bids")


_LAYOUT_REMEDY = (
    "Put each scan at sub-<id>/anat/sub-<id>_T1w.nii.gz (or sub-<id>/ses-<session>/anat/...), and age and sex into "
    "participants.tsv with the columns participant_id, age, sex."
)
_IMAGE_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh", ".img", ".mnc", ".nrrd")
_DICOM_REMEDY = "Convert the series to NIfTI with dcm2niix (https://github.com/rordenlab/dcm2niix), then to BIDS."


def find_images(root: Path) -> tuple[dict[str, list[Image]], list[Failure]]:
    """The T1w images by participant, and who has folders or names that cannot be taken."""
    images: dict[str, list[Image]] = {}
    failures: list[Failure] = []
    for participant in _folders(root, "sub-"):
        participant_id = composed(participant.name)
        try:
            places = [("", participant / "anat")]
            places += [(s.name, s / "anat") for s in _folders(participant, "ses-")]
            entries = [(session, entry) for session, anat in places for entry in _entries(anat)]
        except OSError as error:
            message = f"the folder cannot be read: {error.strerror}."
            failures.append(Failure(participant_id, participant.name, "unreadable", message, "Check its permissions."))
            continue
        for session, path in entries:
            entities = _entities(path.name)
            named = _T1W.match(path.name)
            if not named or entities.get("part", "mag") != "mag":
                continue
            file = path.relative_to(root).as_posix()
            if composed(named.group(1)) != participant_id or entities.get("ses", session[4:]) != session[4:]:
                place = "/".join(filter(None, (participant.name, session)))
                message = f"the file is named for {named.group(1)} and lies in the folder of {place}."
                remedy = "Find out whose scan it is, and name it so."
                if "_" in participant.name:
                    message = (
                        f"the id {label_of(participant_id)!r} holds an underscore, which ends an id in a file's name."
                    )
                    remedy = f"Rename folder and files to {participant_id.replace('_', '')}, and the row of the table."
                failures.append(Failure(participant_id, file, "mislabelled", message, remedy))
                continue
            images.setdefault(participant_id, []).append(Image(path, file, session, entities.get("space", "")))
    return images, failures


def _folders(folder: Path, prefix: str) -> list[Path]:
    return [e for e in _entries(folder) if e.name.startswith(prefix) and e.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _entities(file_name: str) -> dict[str, str]:
    return dict(part.split("-", 1) for part in file_name.split("_") if "-" in part)


def preference(image: Image) -> tuple:
    """What images of one person are ordered by, the one to use first (see bids.py)."""
    entities = _entities(image.path.name)
    rank = (image.space != "", "ce" in entities)
    return *rank, _natural(image.session), _natural(entities.get("run", "")), _natural(image.path.name)


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key in which run-2 comes before run-10."""
    return [(0, int(p), "") if p.isdigit() and p.isascii() else (1, 0, p) for p in re.split(r"([0-9]+)", text) if p]


def no_images(root: Path, failures: list[Failure]) -> BadInput:
    """What to say of a study without images: why, as far as the folder tells."""
    looked_for = "no T1w scan was found; looked for sub-*/anat/*_T1w.nii[.gz] and sub-*/ses-*/anat/*_T1w.nii[.gz]"
    if failures:
        first = failures[0]
        return BadInput(
            f"{looked_for}. {first.file}: {first.message}", remedy=first.remedy, path=root, reason=first.reason
        )
    found, remedy = "", _LAYOUT_REMEDY
    below = _some_files_below(root)
    if any(_is_dicom(path) for path in below[:50]):
        found, remedy = "; what is there is DICOM", _DICOM_REMEDY
    elif any(path.suffix.lower() == ".zip" for path in below):
        found, remedy = "; what is there is zipped", "Unpack it; DICOM is converted with dcm2niix."
    else:
        derivatives = [d.name for d in _folders(root / "derivatives", "") if find_images(d)[0]]
        loose = [path for path in below if path.name.lower().endswith(_IMAGE_SUFFIXES)]
        if derivatives:
            found = f"; there are some in derivatives/{derivatives[0]}"
            remedy = "Give that folder instead, with a participants.tsv in it."
        elif loose:
            some = ", ".join(path.relative_to(root).as_posix() for path in loose[:3])
            found = f"; there are {len(loose)} other images, such as {some}"
            if not all(path.name.endswith((".nii", ".nii.gz")) for path in loose):
                remedy = f"Convert what is no .nii or .nii.gz (FreeSurfer's mri_convert), rename .NII.GZ. {remedy}"
        elif not below:
            found = "; the folder is empty"
    return BadInput(f"{looked_for}{found}.", remedy=remedy, path=root, reason="not_bids")


def _some_files_below(root: Path, limit: int = 2000) -> list[Path]:
    found: list[Path] = []
    for folder, _, names in os.walk(root):  # does not follow links, so a loop cannot catch it
        found += [Path(folder) / name for name in sorted(names)]
        if len(found) >= limit:
            break
    return found


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    try:
        if not path.is_file():
            return False
        with path.open("rb") as handle:
            return handle.read(132)[128:] == b"DICM"
    except OSError:
        return False


def mask_of(participant_id: str, scan: Image, masks: Mapping[tuple[str, str, str], Sequence[Path]]) -> Path | None:
    """The brain mask that names the scan most closely, and nothing that the scan is not: a mask of run 2 is none of
    run 1. The first by path where several do."""
    wanted = _entities(scan.path.name)

    def named(path: Path) -> dict[str, str]:
        return {name: value for name, value in _entities(path.name).items() if name in ("run", "acq", "rec", "ce")}

    fitting = [
        path
        for path in masks.get((participant_id, scan.session, scan.space), ())
        if all(wanted.get(name) == value for name, value in named(path).items())
    ]
    return max(fitting, key=lambda path: len(named(path)), default=None)


def find_masks(root: Path, *, given: bool) -> dict[tuple[str, str, str], list[Path]]:
    """Brain masks by participant, session (of the name, or of the folder) and space, in the order of their paths."""
    if given and not root.is_dir():
        raise BadInput("there is no such folder of masks.", remedy="Check the path.", path=root, reason="missing")
    patterns = ["sub-*/anat/*_mask.nii*", "sub-*/ses-*/anat/*_mask.nii*"]
    patterns += [f"derivatives/*/{p}" for p in patterns] + (["*_mask.nii*"] if given else [])
    masks: dict[tuple[str, str, str], list[Path]] = {}
    for path in sorted({p for pattern in patterns for p in root.glob(pattern)}):
        entities = _entities(path.name)
        if entities.get("desc", "brain") != "brain" or entities.get("label", "brain") != "brain":
            continue
        folder = next((part for part in path.relative_to(root).parts[:-1] if part.startswith("ses-")), "")
        session = f"ses-{entities['ses']}" if "ses" in entities else folder
        key = composed(f"sub-{entities.get('sub', '')}"), session, entities.get("space", "")
        masks.setdefault(key, []).append(path)
    return masks


def label_of(text: str, prefix: str = "sub-") -> str:
    """An id without its prefix."""
    text = composed(text)
    return text[len(prefix) :] if text.lower().startswith(prefix) else text


def composed(text: str) -> str:
    """File systems and editors write one accented letter in two ways; both are the same person."""
    return unicodedata.normalize("NFC", text.strip())
