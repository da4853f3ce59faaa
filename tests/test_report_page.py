"""The page: one file, nothing from outside, nothing of others that could act, the same for the same results."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from brainldm.base.errors import BadInput
from brainldm.base.files import read_json, write_json
from brainldm.base.manifest import Manifest
from brainldm.base.slices import Crop, grey_png, middle_slice
from brainldm.evaluate.scorecard import evaluate_dataset
from brainldm.report import write_report
from brainldm.report.results import Brain, find_sweep
from judged_folders import TINY, BlobMeasure, blob, write_cohort, write_synthetic

HOSTILE = [
    'sub-</script><script>alert("1")</script>',
    "=cmd|' /C calc'!A0",
    '" onload="alert(2)',
    "<img src=x>",
    "sub-ok",
]


class Reader(HTMLParser):
    """What a browser would see: elements, their attributes, the text of scripts and of everything else."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        (self.scripts if self.cdata_elem == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    asked = [float(v) for v in np.tile([15e3, 25e3, 35e3, 45e3], 3)]
    synthetic = write_synthetic(
        root / "brains",
        asked,
        ages=[float(a) for a in np.repeat([50, 60, 70], 4)],
        extrapolated=[None] * 11 + ["age_years"],
    )
    real = write_cohort(root / "cohort", [float(v) for v in np.linspace(1e4, 5e4, 15)])
    log = root / "run" / "autoencoder" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps({"step": k, "loss": 100 / (k + 1)}) + "\n" for k in range(500)))
    evaluate_dataset(synthetic, real, root / "out", instrument=BlobMeasure(), workers=1, runs=root / "run")
    return root / "out"


@pytest.fixture(scope="module")
def page(evaluation: Path) -> Reader:
    return Reader(write_report(evaluation).read_text())


def test_the_page_says_what_was_found(page: Reader, evaluation: Path) -> None:
    text = page.text
    for words in (
        "12 synthetic T1-weighted brain images, made by the model “blob model” (trained on 6 images)",
        "with DDIM in 50 steps from seed 3",
        "compared with 15 real people of “cohort”",
        "Trained on 6 images",
        "Does it obey?",
        "Does it copy?",
        "MS-SSIM between pairs",
        "Asked and measured",
        "Ventricles from left to right, age from top to bottom",
        "age extrapolated",
        "slices of real people",
        "0123456789ab",
    ):
        assert words in text, words
    row = next(r for r in read_json(evaluation / "scorecard.json")["rows"] if r["key"] == "ventricles_mm3.pearson_r")
    assert f"{row['synthetic']['value']:.3f}" in text
    assert page.count("img") >= 3 * 24 + 2 * 12 + 3


def test_nothing_is_loaded_from_anywhere(page: Reader) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value[:60])
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") or name == "style" for name in attributes)


def test_the_policy_admits_only_our_style_and_script(page: Reader) -> None:
    import base64
    import hashlib

    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_drawings_hold_no_link_and_exist_for_both_papers(page: Reader) -> None:
    import base64

    drawings = [a for tag, a in page.elements if tag == "img" and a.get("class") == "drawing"]
    dark = [a for tag, a in page.elements if tag == "source"]
    assert len(drawings) == len(dark) == 3
    for uri in [a["src"] for a in drawings] + [a["srcset"] for a in dark]:
        svg = base64.b64decode(uri.split(",", 1)[1]).decode()
        assert not re.search(r"(href|src)\s*=\s*[\"'](?!#|data:)", svg)
    assert all(a["alt"] for a in drawings)


def test_the_same_results_give_the_same_page_wherever_they_lie(evaluation: Path, tmp_path: Path) -> None:
    first = write_report(evaluation).read_text()
    moved = shutil.copytree(evaluation, tmp_path / evaluation.name)
    assert write_report(moved).read_text() == first
    assert "file:" not in first and str(evaluation.parent) not in first


def test_text_of_others_is_inert(tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path / "s", [2e4, 3e4, 4e4, 5e4, 6e4], ids=HOSTILE)
    images = sorted(synthetic.rglob("*.nii.gz"))
    images[3].write_bytes(b"")
    facts = read_json(synthetic / "generation.json")
    facts["model"]["name"] = "</title><script>alert(3)</script>"
    write_json(synthetic / "generation.json", facts)
    real = write_cohort(tmp_path / "r", [1e4, 2e4, 3e4, 4e4])
    evaluate_dataset(synthetic, real, tmp_path / "out", instrument=BlobMeasure(), workers=1)
    for folder in (tmp_path / "out", synthetic):
        page = Reader(write_report(folder).read_text())
        assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
        assert page.count("title") == 1
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert not any(a.get("src") == "x" for _, a in page.elements)
        for name in (HOSTILE[0], HOSTILE[1]):
            assert name in page.text


def test_errors_are_listed(tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path / "s", [2e4, 3e4, 4e4])
    next(synthetic.rglob("*.nii.gz")).write_bytes(b"<html>404</html>")
    evaluate_dataset(synthetic, None, tmp_path / "out", instrument=BlobMeasure(), workers=1)
    text = Reader(write_report(tmp_path / "out").read_text()).text
    assert "1 image could not be judged" in text and "looks like HTML" in text and "Download the scan again" in text


def test_a_dataset_that_nobody_judged_has_a_page_too(tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path, [1e4, 2e4, 3e4], ages=[60.0, 60, 60])
    page = Reader(write_report(synthetic).read_text())
    assert "They have not been judged yet" in page.text and "Sweep" in page.text
    assert "Scorecard" not in page.text and page.count("img") == 3 * 3 + 2 * 3


def test_a_manifest_cannot_show_other_files(tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path / "s", [1e4, 2e4])
    write_synthetic(tmp_path / "private", [3e4])
    outside = next((tmp_path / "private").rglob("*.nii.gz")).relative_to(tmp_path)
    Manifest(synthetic / "manifest.jsonl").append(index=1, file=f"../{outside}", bytes=1, sha256="0")
    assert Reader(write_report(synthetic).read_text()).count("img") == 3


def test_phantoms_are_called_phantoms(tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path / "s", [1e4, 2e4, 3e4])
    real = write_cohort(tmp_path / "r", [1e4, 2e4, 3e4, 4e4])
    write_json(real / "prepared.json", {"name": "phantoms"})
    card = evaluate_dataset(synthetic, real, tmp_path / "out", instrument=BlobMeasure(), workers=1)
    assert any("The reference people are phantoms" in warning for warning in card.warnings)
    text = Reader(write_report(tmp_path / "out").read_text()).text
    assert "compared with 4 phantoms" in text and "slices of real people" not in text


def told(out: Path, *settings: dict) -> str:
    """The text of an evaluation's page, as its settings would have it."""
    card = read_json(out / "scorecard.json")
    for more in settings:
        card["settings"] |= more
    write_json(out / "scorecard.json", card)
    return Reader(write_report(out).read_text()).text


def test_whose_the_volumes_are_is_said_as_it_is(evaluation: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(evaluation, tmp_path / "out"))
    assert "One instrument, “blob counter 1”, measured the volumes of both." in told(out)
    assert "how far they lie from the line is the instrument’s own error." in told(out)
    tables = {"instruments": {"synthetic": "table:made.csv", "real": "table:real.csv"}}
    text = told(out, tables, {"recorded_volumes_were_measured": True})
    assert "volumes are those of “table:made.csv”, of the others those of “table:real.csv”" in text
    assert "measured the volumes of both" not in text and "the instrument’s own error" not in text
    assert "how far two measurements of one person lie apart" in text and "are no truth" in text


def test_without_real_people_none_are_spoken_of(tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path / "s", [1e4, 2e4, 3e4])
    evaluate_dataset(synthetic, None, tmp_path / "out", instrument=BlobMeasure(), workers=1)
    text = told(tmp_path / "out")
    assert "Their volumes are those of “blob counter 1”." in text
    for words in ("of both", "Crosses are", "real people", "instrument alone"):
        assert words not in text, words


def test_images_that_nobody_says_were_made_are_not_called_so(tmp_path: Path) -> None:
    """As where one half of real people is judged against the other."""
    people = write_cohort(tmp_path / "people", [1e4, 2e4, 3e4])
    others = write_cohort(tmp_path / "others", [1e4, 2e4, 3e4, 4e4])
    evaluate_dataset(people, others, tmp_path / "out", instrument=BlobMeasure(), workers=1, show_made=False)
    text = told(tmp_path / "out")
    assert "No person was scanned" not in text and "3 brain images, judged" in text
    assert "judged as if they were synthetic: their folder does not say that they are" in text


def test_ages_have_a_panel_where_a_predictor_was_asked(evaluation: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(evaluation, tmp_path / "out"))
    before = Reader(write_report(out).read_text()).count("source")
    lines = (out / "measured.tsv").read_text().splitlines()
    (out / "measured.tsv").write_text(
        "\n".join([f"{lines[0]}\tage_years_measured", *(f"{line}\t{50 + i}" for i, line in enumerate(lines[1:]))])
    )
    assert Reader(write_report(out).read_text()).count("source") == before + 1


def test_an_image_that_failed_twice_is_counted_once(evaluation: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(evaluation, tmp_path / "out"))
    card = read_json(out / "scorecard.json")
    failure = {"side": "real", "participant_id": "a", "file": "a.nii", "reason": "x", "message": "no", "remedy": ""}
    write_json(out / "scorecard.json", card | {"failures": [failure, {**failure, "message": "nor this"}]})
    assert "1 image could not be judged, or not in every way" in told(out)


def test_other_folders_are_refused(evaluation: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="neither an evaluation"):
        write_report(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "scorecard.json").write_text('{"schema_version": 1')
    with pytest.raises(BadInput, match="not valid JSON"):
        write_report(tmp_path)
    write_json(tmp_path / "scorecard.json", read_json(evaluation / "scorecard.json") | {"schema_version": 2})
    with pytest.raises(BadInput, match="version 1"):
        write_report(tmp_path)


def test_what_is_missing_is_left_out(evaluation: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(evaluation / "scorecard.json", bare)
    page = Reader(write_report(bare).read_text())
    assert page.count("img") == 0 and "Does it obey?" in page.text


def test_a_page_imports_neither_torch_nor_the_judge(evaluation: Path) -> None:
    code = (
        "import sys; from brainldm.report import write_report; write_report(sys.argv[1]); "
        "print([m for m in ('torch', 'monai', 'brainldm.evaluate', 'SimpleITK', 'nilearn') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code, str(evaluation)], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ sweeps and pictures


def brain(number: int, **asked: float) -> Brain:
    return Brain(f"sub-{number}", "F", asked, {}, (), {"axial": "", "coronal": "", "sagittal": ""})


def test_a_sweep_is_recognised_among_drawn_covariates() -> None:
    brains = [
        brain(i, age_years=a, ventricles_mm3=v, brain_mm3=1.1e6 + 137.0 * i**2)
        for i, (a, v) in enumerate((a, v) for a in (50.0, 60.0, 70.0) for v in (1e4, 2e4))
    ]
    sweep = find_sweep(brains[::-1])
    assert (sweep.row, sweep.row_values, sweep.column, sweep.column_values) == (
        "age_years",
        [50, 60, 70],
        "ventricles_mm3",
        [1e4, 2e4],
    )
    assert [[b.participant_id for b in line] for line in sweep.cells] == [
        ["sub-0", "sub-1"],
        ["sub-2", "sub-3"],
        ["sub-4", "sub-5"],
    ]
    single = find_sweep([brain(i, age_years=50.0 + 5 * (i % 3), brain_mm3=1e6 + 99.0 * i**2) for i in range(6)])
    assert single.row == "" and single.column == "age_years" and len(single.cells) == 2


def test_what_is_no_sweep_is_not_drawn_as_one() -> None:
    assert find_sweep([]) is None
    assert find_sweep([brain(i, age_years=50 + i**1.5, ventricles_mm3=1e4 + i**2) for i in range(9)]) is None
    broken = [brain(i, age_years=a) for i, a in enumerate((50.0, 60.0, 70.0, 70.0))]
    assert find_sweep(broken) is None


def test_left_is_left_and_up_is_up() -> None:
    image = np.zeros((6, 8, 10), np.float32)
    image[0, 4, 5], image[3, 7, 5], image[3, 4, 9] = 1, 2, 3  # left, front, top
    axial, coronal, sagittal = (middle_slice(image, view) for view in ("axial", "coronal", "sagittal"))
    assert axial.shape == (8, 6) and coronal.shape == (10, 6) and sagittal.shape == (10, 8)
    assert axial[3, 0] == 1 and axial[0, 3] == 2  # left on the left, nose up
    assert coronal[4, 0] == 1 and coronal[0, 3] == 3
    assert sagittal[0, 4] == 3 and sagittal[4, 7] == 2  # nose on the right


def test_a_crop_holds_every_head() -> None:
    one, two = np.zeros((20, 20, 20)), np.zeros((10, 10, 10))
    one[6:10, 4:16, 10:12], two[4:9, 3:5, 1:9] = 1, 1
    crop = Crop.around(one, 0.5).joined(Crop.around(two, 0.5))
    for image in (one, two):
        for view in ("axial", "coronal", "sagittal"):
            plane = middle_slice(image, view)
            assert crop.of(plane, view).sum() == plane.sum()
            assert crop.of(plane, view).size < plane.size
    assert Crop.around(np.zeros((5, 5, 5)), 0.5) == Crop()


def test_grey_is_the_same_for_all() -> None:
    from io import BytesIO

    from PIL import Image

    slice_RC = middle_slice(blob(2e4, 1), "axial")
    image = np.asarray(Image.open(BytesIO(grey_png(slice_RC, white=0.8))))
    assert image.shape == (TINY.shape_XYZ[1], TINY.shape_XYZ[0]) and image.dtype == np.uint8
    assert np.abs(image / 255 - np.clip(slice_RC / 0.8, 0, 1)).max() < 0.003
