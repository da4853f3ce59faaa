"""The distance of local histograms sees what L1 does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from brainldm.train.local_histogram import BLOCK_VOXELS, local_histogram_distance
from brainldm.train.run import train
from conftest import tiny_recipe


def sulci(at: int) -> torch.Tensor:
    """Grey with a dark sheet, one voxel thin, at that place of each block."""
    image_B1XYZ = torch.full((1, 1, 16, 16, 16), 0.6)
    image_B1XYZ[:, :, at::BLOCK_VOXELS] = 0.2
    return image_B1XYZ


def test_a_moved_sulcus_costs_nothing_and_a_closed_one_costs() -> None:
    here, there, closed = sulci(2), sulci(5), torch.full((1, 1, 16, 16, 16), 0.6)
    assert local_histogram_distance(here, here) == 0
    assert float(local_histogram_distance(here, there)) == pytest.approx(0, abs=1e-6)
    # L1 prefers the closed one, the median of all places; the histogram says what it takes away.
    assert F.l1_loss(closed, here) < F.l1_loss(there, here)
    # An eighth of the voxels lies below the four thresholds from 0.2 to 0.6, of eight.
    assert float(local_histogram_distance(closed, here)) == pytest.approx(4 / 8 / 8, rel=0.15)


def test_it_is_a_distance_with_a_gradient_that_opens_what_was_closed() -> None:
    here, closed = sulci(2), torch.full((1, 1, 16, 16, 16), 0.6).requires_grad_()
    distance = local_histogram_distance(closed, here)
    torch.testing.assert_close(distance, local_histogram_distance(here, closed))
    distance.backward()
    assert closed.grad is not None
    assert (closed.grad >= 0).all() and float(closed.grad.sum()) > 0  # darker lessens it


def test_stage_1_trains_with_it_and_logs_it(tiny_cohort: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    recipe = replace(recipe, autoencoder=replace(recipe.autoencoder, local_histogram_weight=1.0, steps=3))
    train(recipe, tiny_cohort, tmp_path / "run", stage="autoencoder")
    log = [json.loads(line) for line in (tmp_path / "run" / "autoencoder" / "log.jsonl").read_text().splitlines()]
    assert all(0 < step["local_histogram"] < 1 for step in log)
    assert log[0]["loss"] > log[0]["l1"] + 0.9 * log[0]["local_histogram"]
