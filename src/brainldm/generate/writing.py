"""Brains go to disk in threads: compressing one takes about as long as a GPU takes to make it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainldm.base.manifest import Manifest
from brainldm.base.nifti import Dtype, Written
from brainldm.base.pool import usable_cpus
from brainldm.base.volume import Grid
from brainldm.generate.dataset import image_name, write_image
from brainldm.generate.plan import PlanRow

MOST_THREADS = 8


@dataclass(frozen=True)
class Brain:
    """A brain to write, and how many attempts were thrown away before it."""

    row: PlanRow
    image_XYZ: np.ndarray
    attempt: int


@contextmanager
def writing_brains(
    out: Path, grid: Grid, dtype: Dtype, manifest: Manifest, *, meanwhile: bool
) -> Iterator[Callable[[list[Brain]], None]]:
    """A function that writes the brains of a batch and enters them in the manifest, in their order.

    With `meanwhile` it returns at once, so that a GPU makes the next batch while this one is compressed, and waits for
    the batch before; without, it waits for its own, since the processors that compress are those that make brains. At
    the end, however it comes, all that was handed over is on disk. An error of writing is raised by whoever waits.
    """
    begun: list[tuple[Brain, Future[Written]]] = []

    def settle() -> None:
        errors = []
        while begun:
            brain, future = begun.pop(0)
            try:
                written = future.result()
            except Exception as error:  # the others are entered all the same
                errors.append(error)
                continue
            manifest.append(
                index=brain.row.index,
                participant_id=brain.row.participant_id,
                file=image_name(brain.row),
                bytes=written.bytes,
                sha256=written.sha256,
                attempt=brain.attempt,
            )
        if errors:
            raise errors[0]

    with ThreadPoolExecutor(min(MOST_THREADS, usable_cpus()), thread_name_prefix="writing") as pool:

        def write(brains: list[Brain]) -> None:
            settle()
            for brain in brains:
                begun.append((brain, pool.submit(write_image, out, brain.row, brain.image_XYZ, grid, dtype)))
            if not meanwhile:
                settle()

        try:
            yield write
        finally:
            settle()
