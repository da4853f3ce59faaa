"""How much of each volume the autoencoder keeps: what is measured in a decoded latent over what is in its image.

Decoding changes the volumes a little, and not in everybody alike. A U-Net that is told the recorded volumes learns that
much noise between what is asked and what is shown; told what the decoded latents show, it learns none of it.

RUN/latents/kept.json   the shares of every training person, and which latents they are of
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
    progress: Progress = Quiet(),  # noqa: B008  # stateless
) -> KeptVolumes:
    """The shares of all people of `dataset`, whose image `decoded_XYZ` gives back by index; from `folder` when they are
    there with the same `key` and instrument. By the built-in measure, in one registration for both images, so that its
    error cancels; a second or two a person on every core. UsageError where more than half could not be measured."""
    path = folder / "kept.json"
    facts = read_json(path) if path.is_file() else {}
    if (facts.get("key"), facts.get("instrument")) != (key, TemplateMeasure.name):
        shares, unmeasured = np.ones((len(dataset), 2)), 0
        progress.start("measuring what decoding keeps", len(dataset))
        pairs = _Pairs(dataset, decoded_XYZ)
        with contextlib.closing(each_in_a_pool(_shares, pairs, workers=usable_cpus())) as outcomes:
            for pair, outcome in outcomes:
                if isinstance(outcome, (BadInput, ValueError)):
                    unmeasured += 1
                elif isinstance(outcome, Exception):
                    raise outcome
                else:
                    shares[pair.index] = outcome
                progress.advance()
        if 2 * unmeasured > len(dataset):
            raise UsageError(
                f"{unmeasured} of {len(dataset)} decoded images show no brain that could be measured.",
                remedy="Train the autoencoder for longer, or choose a recipe without volumes_as_decoded.",
                path=folder,
            )
        facts = {"key": key, "instrument": TemplateMeasure.name, "unmeasured": unmeasured, "shares": shares.tolist()}
        write_json(path, facts)
    return KeptVolumes(np.array(facts["shares"], np.float64).reshape(-1, 2), int(facts["unmeasured"]))


@dataclass(frozen=True)
class _Pairs(Sequence[_Pair]):
    """Each pair is made when it is asked for."""

    dataset: VolumeDataset
    decoded_XYZ: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if not 0 <= index < len(self):
            raise IndexError(index)
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
