"""How fast training images are read: inflated from scans, from one uncompressed file, from memory. Writes loader.json.

    python bench/loader.py                    both grids, a minute or two
    python bench/loader.py --grids 2mm        one of them
    python bench/loader.py --folder /scratch  on another disk

Images are made up: noise in an ellipsoid that fills a third of the box, zero outside, so that two thirds deflate to
nothing and the rest hardly (`deflated_to` is the share left). Each way is gone through in one thread, no augmentation:

    inflated           the scan's SHA-256 proven, inflated, decoded: what every epoch costs without a cache
    laid_out           the same, and written to the uncompressed file: once a cohort
    mapped_first       from the file, each image's SHA-256 proven: the first epoch of a run
    mapped             from the file, later epochs, its pages in the operating system's memory
    mapped_from_disk   the same after those pages were dropped: a file much larger than memory
    memory             from 16-bit integers in the process' memory

Rates are images a second of wall time, and of this process' processor time: on a machine that does other things the
second is the one to look at, but for mapped_from_disk, which mostly waits.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from brainldm.base.files import write_json
from brainldm.base.manifest import Manifest
from brainldm.base.nifti import write_nifti
from brainldm.base.streams import stream
from brainldm.base.tables import write_table
from brainldm.base.volume import Grid, grid_named
from brainldm.cohort.dataset import FORMAT, KIND, PreparedCohort, VolumeDataset

HERE = Path(__file__).resolve().parent
GRIDS = {"2mm": "2mm", "1mm": "paper"}


def made_up_image(grid: Grid, index: int) -> np.ndarray:
    """Grey noise in an ellipsoid of a third of the box."""
    x, y, z = np.meshgrid(
        *(np.linspace(-1, 1, n, dtype=np.float32) for n in grid.shape_XYZ), indexing="ij", sparse=True
    )
    inside = x**2 + y**2 + z**2 < 0.74  # (4/3 pi 0.74^1.5) / 8 is a third
    noise = stream(0, "bench/loader", index).standard_normal(grid.shape_XYZ, dtype=np.float32)
    return np.where(inside, np.clip(0.55 + 0.12 * noise, 0.01, 1), 0)


def write_cohort(folder: Path, grid: Grid, images: int) -> None:
    """A prepared cohort, as `brainldm prepare` leaves it."""
    rows, manifest = [], Manifest(folder / "manifest.jsonl")
    for index in range(images):
        name = f"sub-{index:03d}"
        file = f"{name}/anat/{name}_T1w.nii.gz"
        written = write_nifti(folder / file, made_up_image(grid, index), grid.affine, dtype="int16_unit")
        manifest.append(index=index, participant_id=name, file=file, bytes=written.bytes, sha256=written.sha256)
        person = {"sex": "F", "age_years": 50.0 + index, "ventricles_mm3": 3e4, "brain_mm3": 1.4e6}
        rows.append({"participant_id": name, **person, "split": "train"})
    write_table(folder / "participants.tsv", list(rows[0]), rows)
    facts = {"kind": KIND, "format": FORMAT, "finished": True, "name": "bench", "grid": grid.to_json()}
    write_json(folder / "prepared.json", facts | {"preprocessing": {}, "config": {}, "licence": "CC0-1.0"})


def rate(work: Callable[[], object], images: int) -> dict[str, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {"images_per_second": images / wall, "images_per_processor_second": images / max(processor, 1e-9)}


def epoch(dataset: VolumeDataset) -> None:
    for index in range(len(dataset)):
        dataset.image_XYZ(index)


def drop_pages(path: Path) -> None:
    """Asks the operating system to forget the file's pages; nobody may have it mapped."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(grid: Grid, images: int, folder: Path) -> dict[str, Any]:
    write_cohort(folder / "cohort", grid, images)
    cohort, cache = PreparedCohort.open(folder / "cohort"), folder / "cache"
    found: dict[str, Any] = {"grid": grid.name, "shape_XYZ": list(grid.shape_XYZ), "images": images}
    found["deflated_to"] = float(np.mean([row.bytes for row in cohort.people])) / (2 * np.prod(grid.shape_XYZ))

    dataset = VolumeDataset(cohort, "train", cache_bytes=0)
    found["inflated"] = rate(lambda: epoch(dataset), images)
    found["laid_out"] = rate(lambda: dataset.keep_uncompressed(cache), images)
    found["mapped_first"] = rate(lambda: epoch(dataset), images)
    found["mapped"] = rate(lambda: epoch(dataset), images)
    dataset._uncompressed = None  # unmapped, so that its pages can be dropped
    gc.collect()
    drop_pages(cache / "train.int16")
    dataset.keep_uncompressed(cache)
    found["mapped_from_disk"] = rate(lambda: epoch(dataset), images)

    dataset = VolumeDataset(cohort, "train")
    epoch(dataset)
    found["memory"] = rate(lambda: epoch(dataset), images)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="where to put cohort and cache (default: the temporary folder)")
    parser.add_argument("--out", type=Path, default=HERE / "loader.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "machine": {"processors": os.cpu_count(), "system": platform.system(), "numpy": np.__version__},
        "load_average_before": os.getloadavg()[0],
        "niceness": os.nice(0),
    }
    for name in arguments.grids:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            results[name] = measure(grid_named(GRIDS[name]), arguments.images, Path(folder))
        print(name, {way: told for way, told in results[name].items() if isinstance(told, dict)}, flush=True)
    write_json(arguments.out, results)


if __name__ == "__main__":
    main()
