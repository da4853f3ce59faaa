"""The gate on images of any origin: who is kept, who is rejected and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from brainldm.base.streams import stream
from brainldm.base.tables import read_table
from brainldm.cohort.quality import FALSE_POSITIVE_RATE, FIGURES
from brainldm.evaluate.examine import Examined
from brainldm.evaluate.gate import gate, write_gate
from brainldm.evaluate.images import JudgedImage


def looks(n: int, seed: int, shift: float = 0.0) -> list[Examined]:
    drawn = stream(seed, "test/gate").normal(1.0, 0.1, (n, len(FIGURES)))
    drawn[:, 0] += shift
    images = [JudgedImage(f"sub-{i}", Path(f"sub-{i}.nii.gz"), f"sub-{i}.nii.gz") for i in range(n)]
    return [Examined(image, str(i), False, False, (), None, row) for i, (image, row) in enumerate(zip(images, drawn))]


def test_people_are_kept_and_the_implausible_rejected_with_the_reason(tmp_path: Path) -> None:
    real = looks(60, 0)
    kept = gate(looks(40, 1), real)
    assert kept.rejected.value == 0 and kept.by_design.value == FALSE_POSITIVE_RATE
    headless = Examined(real[0].image, "x", False, False, (), None, None)
    made = [*looks(5, 2), *looks(5, 3, shift=3.0), headless]
    found = gate(made, real)
    assert [bool(objection) for objection in found.objections] == [False] * 5 + [True] * 6
    assert FIGURES["head_ml"] in found.objections[6] and "no head" in found.objections[-1]
    write_gate(tmp_path / "gate.tsv", made, found)
    table = read_table(tmp_path / "gate.tsv")
    assert [row["verdict"] for row in table.rows] == ["keep"] * 5 + ["reject"] * 6
    assert table.rows[0]["objection"] == "n/a" and np.isclose(
        float(table.rows[0]["head_ml"]), made[0].figures[0], rtol=1e-4
    )


def test_few_people_cannot_say_what_is_usual() -> None:
    found = gate(looks(5, 1), looks(10, 0))
    assert found.objections == () and found.rejected.value is None and "20 real" in found.rejected.reason
