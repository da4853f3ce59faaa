"""Stage 1's loss, term by term, and when its discriminator joins in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from brainldm.cohort.dataset import PreparedCohort, VolumeDataset
from brainldm.train.autoencoder_stage import AutoencoderStage
from brainldm.train.loop import run_stage
from conftest import tiny_recipe

STEPS, ADVERSARIAL_FROM = 4, 2  # counted from 0


@pytest.fixture
def stage(tiny_cohort: Path) -> AutoencoderStage:
    """The tiny recipe's, with weights that let every term be seen in the sum."""
    config = replace(
        tiny_recipe().autoencoder,
        steps=STEPS,
        adversarial_from_step=ADVERSARIAL_FROM,
        kl_weight=1e-3,
        perceptual_weight=0.1,
        local_histogram_weight=0.2,
        adversarial_weight=0.3,
    )
    cohort = PreparedCohort.open(tiny_cohort)
    train, validation = VolumeDataset(cohort, "train"), VolumeDataset(cohort, "validation")
    return AutoencoderStage(config, train, validation, seed=0, device=torch.device("cpu"), precision="fp32")


def test_the_loss_is_the_sum_of_its_terms_the_adversarial_one_from_its_step_on(
    stage: AutoencoderStage, tmp_path: Path
) -> None:
    run_stage(stage, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "adversarial" in row] == [3, 4]  # the log counts from 1
    for row in log:
        terms = [row["l1"], 1e-3 * row["kl"], 0.1 * row["perceptual"], 0.2 * row["local_histogram"]]
        terms.append(0.3 * row.get("adversarial", 0.0))
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-5)
        assert all(term > 1e-4 * row["loss"] for term in terms[:4] + terms[4:] * ("adversarial" in row))


def test_the_discriminator_learns_from_its_step_on_and_not_before(stage: AutoencoderStage) -> None:
    assert stage.discriminator is not None
    changed = []
    for step in range(STEPS):
        before = {name: tensor.clone() for name, tensor in stage.discriminator.state_dict().items()}
        stage.step(step)
        after = stage.discriminator.state_dict()
        changed.append([name for name in before if not torch.equal(before[name], after[name])])
    assert changed[:ADVERSARIAL_FROM] == [[], []]
    assert all(any(name.endswith("weight") for name in names) for names in changed[ADVERSARIAL_FROM:])
