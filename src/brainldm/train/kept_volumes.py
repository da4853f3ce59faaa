"""How much of each volume the autoencoder keeps: what is measured in a decoded latent over what is in its image.

Decoding changes the volumes a little, and not in everybody alike. A U-Net that is told the recorded volumes learns that
much noise between what is asked and what is shown; told what the decoded latents show, it learns none of it.

RUN/latents/kept.json    the shares of every training person, and which latents they are of
RUN/latents/kept.jsonl   those found so far, while it is measured
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainldm.base.derivative import SPACE
from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import read_json, write_json
from brainldm.base.manifest import Manifest
from brainldm.base.pool import each_in_a_pool, usable_cpus
from brainldm.base.progress import Progress, Quiet
from brainldm.base.volume import Volume
from brainldm.cohort.dataset import PreparedRow, VolumeDataset
from brainldm.cohort.measure import TemplateMeasure
from brainldm.cohort.register import Registration, register_to_template


@dataclass(frozen=True)
class KeptVolumes:
    """Decoded over original by person: `shares_NV` are of ventricles and brain. 1 where either image could not be
    measured: `unmeasured` counts those."""

    shares_NV: np.ndarray
    unmeasured: int


@dataclass(frozen=True)
class _Pair:
    index: int
    image_XYZ: np.ndarray
    decoded_XYZ: np.ndarray
    affine: np.ndarray
    registration: Registration | None


def kept_volumes(
    folder: Path,
    dataset: VolumeDataset,
    decoded_XYZ: Callable[[int], np.ndarray],
    key: str,
    *,
    progress: Progress = Quiet(),
) -> KeptVolumes:
    """The shares of all people of `dataset`, whose image `decoded_XYZ` gives back by index; from `folder` when they are
    there with the same `key` and instrument. By the built-in measure, in one registration for both images, so that its
    error cancels; a second or two a person on every core. UsageError where more than half could not be measured."""
    path, made_by = folder / "kept.json", {"key": key, "instrument": TemplateMeasure.name}
    facts = read_json(path) if path.is_file() else {}
    if {name: facts.get(name) for name in made_by} != made_by:
        found = _measured(folder, dataset, decoded_XYZ, made_by, progress)
        unmeasured = found.count(None)
        if 2 * unmeasured > len(dataset):
            raise UsageError(
                f"{unmeasured} of {len(dataset)} decoded images show no brain that could be measured.",
                remedy="Train the autoencoder for longer, or choose a recipe without volumes_as_decoded.",
                path=folder,
            )
        facts = {**made_by, "unmeasured": unmeasured, "shares": [share or (1.0, 1.0) for share in found]}
        write_json(path, facts)
        (folder / "kept.jsonl").unlink(missing_ok=True)
    return KeptVolumes(np.array(facts["shares"], np.float64).reshape(-1, 2), int(facts["unmeasured"]))


def _measured(
    folder: Path,
    dataset: VolumeDataset,
    decoded_XYZ: Callable[[int], np.ndarray],
    made_by: dict[str, str],
    progress: Progress,
) -> list[tuple[float, float] | None]:
    """The shares by person, None where they could not be measured. Each is on disk as soon as it is found, and none is
    measured again after an interruption."""
    so_far = Manifest(folder / "kept.jsonl")
    found = {r["index"]: r["shares"] for r in so_far.records() if {name: r.get(name) for name in made_by} == made_by}
    progress.start("measuring what decoding keeps", len(dataset), len(found))
    pairs = _Pairs(dataset, decoded_XYZ, [index for index in range(len(dataset)) if index not in found])
    with contextlib.closing(each_in_a_pool(_shares, pairs, workers=usable_cpus())) as outcomes:
        for pair, outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, (BadInput, ValueError)):
                raise outcome
            found[pair.index] = None if isinstance(outcome, Exception) else outcome
            so_far.append(**made_by, index=pair.index, shares=found[pair.index])
            progress.advance()
    return [found[index] for index in range(len(dataset))]


@dataclass(frozen=True)
class _Pairs(Sequence[_Pair]):
    """Those of some people; each is made when it is asked for."""

    dataset: VolumeDataset
    decoded_XYZ: Callable[[int], np.ndarray]
    people: list[int]

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, position):  # type: ignore[no-untyped-def]
        index = self.people[position]
        decoded_XYZ = np.clip(self.decoded_XYZ(index), 0.0, 1.0)
        known = _known_registration(self.dataset.rows[index])
        return _Pair(index, self.dataset.image_XYZ(index), decoded_XYZ, self.dataset.grid.affine, known)


def _known_registration(row: PreparedRow) -> Registration | None:
    """How the prepared image maps onto the template; None where preparing it did not find out."""
    transform = row.path.with_name(f"{row.participant_id}_from-T1w_to-{SPACE}_xfm.json")
    facts = read_json(transform) if transform.is_file() else {}
    if facts.get("mni_from_scan") is None:
        return None
    rigid, affine = np.array(facts["mni_from_scan"]), np.array(facts["mni_from_scan_affine"])
    if np.array_equal(affine, rigid):
        return None
    return Registration(np.eye(4), affine @ np.linalg.inv(rigid), {}, "none")


def _shares(pair: _Pair) -> tuple[float, float]:
    """What decoding kept of ventricles and brain. BadInput or ValueError where there is nothing to compare."""
    image, measure = Volume(pair.image_XYZ, pair.affine), TemplateMeasure()
    registration = pair.registration or register_to_template(image, aligned=True)
    before = measure(image, registration)
    after = measure(Volume(pair.decoded_XYZ, pair.affine), registration)
    shares = after.ventricles_mm3 / max(before.ventricles_mm3, 1.0), after.brain_mm3 / max(before.brain_mm3, 1.0)
    if not all(0.2 < share < 5 for share in shares):
        raise ValueError(f"decoding changes volumes by {shares}: there is no such brain in one of the images")
    return shares
