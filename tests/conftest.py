"""Fixtures that several rooms share."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainldm.base.files import write_json
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import read_nifti, write_nifti
from brainldm.base.streams import stream
from brainldm.base.tables import write_table
from brainldm.base.volume import Grid, Volume
from brainldm.cohort.dataset import FORMAT, KIND
from brainldm.cohort.register import Registration, register_to_template
from brainldm.nets.atlas import AtlasAutoencoderConfig
from brainldm.nets.autoencoder import AutoencoderConfig
from brainldm.train.config import AutoencoderStageConfig, DiffusionStageConfig, Recipe
from brainldm.train.run import train

# A shell's background jobs ignore Ctrl-C and hand that down; tests that interrupt a command need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests are a processor's on every machine, unless one of a GPU is among them. Early enough: torch looks for GPUs
    when it is first asked for one, which no module of tests does while it is imported."""
    if not any(item.get_closest_marker("gpu") for item in session.items):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Nothing in this process asks for another machine: `brainldm` does so only where a person wants a file fetched.
    What is refused here is no OSError, which code may take for a machine without a network."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def is_here(host: object) -> bool:
        if host in (None, "", "localhost", b"localhost"):
            return True
        try:
            return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host)).is_loopback
        except ValueError:
            return False

    def connect_here(self: socket.socket, address: tuple[object, ...]) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_here(address[0]):
            pytest.fail(f"a connection to {address} was asked for")
        connect(self, address)

    def look_up_here(host: object, *rest: object, **more: object) -> object:
        if not is_here(host):
            pytest.fail(f"the address of {host!r} was asked for")
        return look_up(host, *rest, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "connect", connect_here)
        patched.setattr(socket, "getaddrinfo", look_up_here)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scans that development is checked against; it is never part of the repository."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("BRAINLDM_TEST_DATA", default))
    if not (folder / "oasis17").is_dir():
        pytest.skip(f"no real scans here: set BRAINLDM_TEST_DATA to a folder that holds oasis17/ (looked in {folder})")
    return folder


@pytest.fixture(scope="session")
def colin(real_data: Path) -> tuple[Volume, Registration]:
    """A real whole head, which lies in MNI space, and how it was found to lie."""
    head = read_nifti(real_data / "colin27" / "colin27_T1w.nii.gz")
    return head, register_to_template(head)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test builds of torch's own random numbers is the same whichever tests ran before."""
    torch.manual_seed(0)


TINY_SHAPE_XYZ = (16, 24, 16)
TINY_GRID = Grid("tiny", TINY_SHAPE_XYZ, 8.0, (-64.0, -96.0, -64.0))


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared cohort of ten ellipsoids on a tiny grid whose dark centre grows with `ventricles_mm3`."""
    folder = tmp_path_factory.mktemp("tiny") / "cohort"
    write_tiny_cohort(folder, people=10)
    return folder


def write_tiny_cohort(folder: Path, people: int, grid: Grid = TINY_GRID) -> None:
    """Writes such a cohort with the package's own writers, the last two people held out."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in grid.shape_XYZ), indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    rows, manifest = [], Manifest(folder / "manifest.jsonl")
    for index in range(people):
        draw = stream(0, "tiny cohort", index)
        hole = 0.2 + 0.3 * draw.random()
        image = (radius < 0.9) * (0.7 + 0.05 * draw.standard_normal(grid.shape_XYZ)) * (radius > hole)
        file = f"sub-{index:02d}/anat/sub-{index:02d}_space-MNI152rigid_T1w.nii.gz"
        image[0, 0, 0], image[8, 20, 8] = 0.0, 1.0
        written = write_nifti(folder / file, image, grid.affine, dtype="int16_unit")
        participant = f"sub-{index:02d}"
        manifest.append(index=index, participant_id=participant, file=file, bytes=written.bytes, sha256=written.sha256)
        rows.append(
            {
                "participant_id": participant,
                "sex": "FM"[index % 2],
                "age_years": 45.0 + 3 * (index % 25) + draw.random(),
                "ventricles_mm3": 1e5 * hole,
                "brain_mm3": 1.4e6 + 1e5 * draw.random(),
                "split": "train" if index < people - 2 else ("validation", "test")[index - people],
            }
        )
    write_table(folder / "participants.tsv", list(rows[0]), rows)
    write_json(
        folder / "prepared.json",
        {
            "kind": KIND,
            "format": FORMAT,
            "finished": True,
            "name": "tiny",
            "grid": grid.to_json(),
            "preprocessing": {"skull_stripped": True},
            "config": {"holdout": 0.2, "seed": 0},
            "licence": "CC0-1.0",
        },
    )


# Of images registered to the tiny grid
TINY_ATLASES = AtlasAutoencoderConfig(
    grid_XYZ=TINY_GRID.shape_XYZ,
    cell=4,
    latent_channels=4,
    channels=8,
    res_blocks=1,
    norm_groups=8,
    atlases=2,
    passes=2,
)


def tiny_recipe(**changes: object) -> Recipe:
    """A recipe for the tiny cohort whose every term is on: seconds of training."""
    autoencoder = AutoencoderStageConfig(
        net=AutoencoderConfig(channels=(8, 16), res_blocks=1, norm_groups=4, fold=2),
        steps=6,
        batch=2,
        learning_rate=1e-3,
        adversarial_from_step=2,
        discriminator_channels=8,
        discriminator_layers=1,
    )
    diffusion = DiffusionStageConfig(
        channels=(16, 32),
        attention=(False, True),
        head_channels=(0, 32),
        res_blocks=1,
        norm_groups=4,
        steps=6,
        batch=3,
        learning_rate=1e-3,
        gradient_clip=1.0,
    )
    return replace(Recipe("tiny", autoencoder, diffusion), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tiny_run(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run on the tiny cohort; its model folder is `tiny_run / "model"`."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    train(tiny_recipe(), tiny_cohort, out)
    return out
