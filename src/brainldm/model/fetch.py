"""Getting the published weights: the only place in the package that opens a network connection, and only when asked.

A download that breaks off is kept as `NAME.part` and taken up where it stopped; a file counts only when its checksum is
the published one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from brainldm.base.errors import BadInput, EnvironmentProblem
from brainldm.base.files import locked_folder, writing
from brainldm.base.progress import Progress, Quiet
from brainldm.model.bundle import PUBLISHED
from brainldm.nets.medicalnet import MED3D_NAME, MED3D_SHA256

REPOSITORY = "MONAI/brain_image_synthesis_latent_diffusion_model"
MED3D_REPOSITORY = "TencentMedicalNet/MedicalNet-Resnet50"
_BLOCK = 1 << 20
_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Wanted:
    """A file to be downloaded, and its checksum by `algorithm` (md5 or sha256)."""

    name: str
    algorithm: str
    digest: str


def fetch_published(
    folder: Path,
    *,
    endpoint: str | None = None,
    progress: Progress = Quiet(),
) -> dict[str, Path]:
    """The bundle's two files in `folder`, downloaded where they are not there yet, proven by md5.

    `endpoint` is the host of the hub; by default the environment's HF_ENDPOINT, as for other Hugging Face tools.
    EnvironmentProblem, with what to do instead, where there is no way to the host; BadInput for a wrong file.
    """
    where = f"{_host(endpoint)}/{REPOSITORY}/resolve/main/models"
    with locked_folder(folder):
        return {
            kind: _fetch(f"{where}/{file.name}", folder / file.name, Wanted(file.name, "md5", file.md5), progress)
            for kind, file in PUBLISHED.items()
        }


def fetch_med3d(
    folder: Path,
    *,
    endpoint: str | None = None,
    progress: Progress = Quiet(),
) -> Path:
    """MedicalNet's ResNet-50 checkpoint in `folder` (185 MB), proven by SHA-256; errors as `fetch_published`."""
    wanted = Wanted(MED3D_NAME, "sha256", MED3D_SHA256[MED3D_NAME])
    with locked_folder(folder):
        url = f"{_host(endpoint)}/{MED3D_REPOSITORY}/resolve/main/{wanted.name}"
        return _fetch(url, folder / wanted.name, wanted, progress)


def _host(endpoint: str | None) -> str:
    return (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _fetch(url: str, path: Path, expected: Wanted, progress: Progress) -> Path:
    if path.exists():
        if _digest(path, expected.algorithm) == expected.digest:
            return path
        raise BadInput(
            f"is not the published file (its {expected.algorithm} differs).",
            remedy="Move it away and fetch again.",
            path=path,
            reason="checksum",
        )
    part = path.with_name(path.name + ".part")
    _download(url, part, expected, progress)
    found = _digest(part, expected.algorithm)
    if found != expected.digest:
        # Kept under another name to be looked at: resuming it could never make it right.
        with writing(part):
            part.replace(path.with_name(path.name + ".wrong"))
        raise BadInput(
            f"the download has {expected.algorithm} {found}, the published file {expected.digest}; it is kept as "
            f"{path.name}.wrong.",
            remedy=_by_hand(url, path),
            path=path,
            reason="checksum",
        )
    with writing(path):
        part.replace(path)
    return path


def _download(url: str, part: Path, expected: Wanted, progress: Progress) -> None:
    """Appends to `part` what is missing of it."""
    import requests  # no other verb needs it

    there = part.stat().st_size if part.exists() else 0
    # Not compressed: a range would be one of the compressed bytes.
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={there}-"} if there else {})}
    with _network(url, part), requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_SECONDS) as answer:
        if answer.status_code == 416:
            return  # nothing is missing; the checksum will tell
        answer.raise_for_status()
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise BadInput(
                "the host answered with a web page.", remedy=_by_hand(url, part), path=part, reason="not_a_checkpoint"
            )
        resumed = answer.status_code == 206
        total = int(answer.headers.get("Content-Length", 0)) + (there if resumed else 0)
        progress.start(f"fetching {expected.name} (MB)", total // _BLOCK, there // _BLOCK if resumed else 0)
        # What requests raises are OSErrors too: the inner one keeps them from being told as a disk's.
        with writing(part), part.open("ab" if resumed else "wb") as file, _network(url, part):
            for block in answer.iter_content(_BLOCK):
                file.write(block)
                progress.advance()


@contextlib.contextmanager
def _network(url: str, part: Path) -> Iterator[None]:
    """Where the host cannot be reached or refuses, says so as an EnvironmentProblem with what to do instead."""
    import requests

    try:
        yield
    except requests.RequestException as error:
        status = f"HTTP {error.response.status_code}" if error.response is not None else type(error).__name__
        raise EnvironmentProblem(
            f"cannot get {url} ({status}).", remedy=_by_hand(url, part), path=part, reason="network"
        ) from error


def _by_hand(url: str, path: Path) -> str:
    return (
        "The same command goes on where it stopped. Without a network here, download "
        f"{url} elsewhere, copy it to {path.with_suffix('') if path.suffix == '.part' else path} and give the command "
        "again; or set HF_ENDPOINT to a mirror."
    )


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
