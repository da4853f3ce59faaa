"""A model in half the room is the same model, and the shipped one is found by its name wherever a model is taken."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainldm.base import shipped
from brainldm.base.covariates import Covariates
from brainldm.base.describe import describe
from brainldm.base.errors import BadInput, UsageError
from brainldm.generate.run import row_noise
from brainldm.model.folder import find_model, load_model, read_description, save_model
from brainldm.model.latent_population import LatentPopulation
from brainldm.model.package import MOST_BYTES, package_model
from test_cli import COMMAND, run

PERSON = Covariates(1, 60.0, 3e4, 1.45e6)


def brain_of(folder: Path) -> np.ndarray:
    return load_model(folder).sample([PERSON], [row_noise(0, 0)], sampler="ddim", steps=4)


def test_a_package_is_half_as_large_and_gives_the_same_brain(tiny_run: Path, tmp_path: Path) -> None:
    packed = package_model(tiny_run, tmp_path / "packed", licence="CC0-1.0")
    for name in ("autoencoder.safetensors", "unet.safetensors"):
        tensors = load_file(tmp_path / "packed" / name)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    before = sum(path.stat().st_size for path in (tiny_run / "model").glob("*.safetensors"))
    after = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert after < 0.7 * before  # headers of so small files count
    assert packed.bytes == after + (tmp_path / "packed" / "model.json").stat().st_size
    assert packed.rounding < 2**-11 and packed.description.licence == "CC0-1.0"
    loaded = load_model(tmp_path / "packed")
    assert {p.dtype for net in (loaded.autoencoder, loaded.unet) for p in net.parameters()} == {torch.float32}
    assert np.abs(brain_of(tmp_path / "packed") - brain_of(tiny_run)).max() < 2e-2
    assert describe(tmp_path / "packed")["weights_dtype"] == "float16"


def test_the_population_is_packed_too(tiny_run: Path, tmp_path: Path) -> None:
    model = load_model(tiny_run)
    shape = model.description.latent.shape_CXYZ
    latent = model.description.latent.model_copy(update={"by_population": True})
    model = replace(
        model,
        description=model.description.model_copy(update={"latent": latent}),
        population=LatentPopulation(torch.rand(shape), torch.rand(4, *shape), torch.rand(shape) + 0.5),
    )
    save_model(tmp_path / "whole", model)
    package_model(tmp_path / "whole", tmp_path / "packed")
    assert load_file(tmp_path / "packed" / "latent_population.safetensors")["mean"].dtype == torch.float16
    assert load_model(tmp_path / "packed").population.mean_CXYZ.dtype == torch.float32
    assert np.abs(brain_of(tmp_path / "packed") - brain_of(tmp_path / "whole")).max() < 2e-2


def test_what_does_not_fit_is_refused_before_anything_is_written(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"MB in float16; a package may take 0\.01 MB"):
        package_model(tiny_run, tmp_path / "out", most_bytes=10_000)
    model = load_model(tiny_run)
    for wrong in (7e4, torch.nan):
        weights = next(model.unet.parameters()).data
        weights[(0,) * weights.dim()] = wrong
        with pytest.raises(UsageError, match=r"unet\.safetensors holds .*; float16 ends at 65504"):
            save_model(tmp_path / "out", model, weights_dtype="float16")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="a model in full precision"):
        package_model(tiny_run, Path(shutil.copytree(tiny_run / "model", tmp_path / "other")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"holds other things \(notes.txt\)"):
        package_model(tiny_run, tmp_path / "full")


def test_old_descriptions_do_not_say_how_weights_are_stored(tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    content = json.loads((folder / "model.json").read_text())
    del content["weights_dtype"]
    (folder / "model.json").write_text(json.dumps(content))
    assert read_description(folder).weights_dtype == "float32"
    assert np.array_equal(brain_of(folder), brain_of(tiny_run))


def test_the_name_is_the_shipped_model_unless_a_model_lies_there(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "_ROOT", tmp_path / "installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="this installation has none"):
        find_model(Path("demo"))
    packed = tmp_path / "installed" / "demo"
    package_model(tiny_run, packed)
    assert find_model(Path("demo")) == packed and describe(Path("demo"))["weights_dtype"] == "float16"
    Path("demo").mkdir()  # what `brainldm demo demo` writes is no model
    assert find_model(Path("demo")) == packed
    (Path("demo") / "run.json").write_text("{}")
    with pytest.raises(BadInput, match="has not finished a model"):
        find_model(Path("demo"))
    shutil.copytree(tiny_run / "model", Path("demo") / "model")
    assert find_model(Path("demo")) == Path("demo/model")
    with pytest.raises(BadInput, match="no such model folder"):
        find_model(tmp_path / "installed" / "nothing" / "demo")


def test_export_package_by_command(tiny_run: Path, tmp_path: Path) -> None:
    result = run("export", "package", tiny_run, tmp_path / "packed", "--licence", "CC0-1.0")
    assert result.returncode == 0, result.stderr
    assert "MB" in result.stdout and "brainldm card" in result.stdout
    assert read_description(tmp_path / "packed").licence == "CC0-1.0"


# ------------------------------------------------------------------------------------------- the shipped model itself


@pytest.fixture
def shipped_demo() -> Path:
    try:
        return shipped.shipped_folder("demo")
    except BadInput:
        pytest.skip("this checkout holds no shipped model")


def test_the_shipped_model_is_small_and_whole(shipped_demo: Path) -> None:
    assert sum(path.stat().st_size for path in shipped_demo.rglob("*") if path.is_file()) <= MOST_BYTES
    for name in ("model.json", "results.json", "README.md", "mosaic.png"):
        assert (shipped_demo / name).is_file(), name
    assert set(describe(Path("demo"))["weights"].values()) == {"whole"}
    results = json.loads((shipped_demo / "results.json").read_text())
    assert results["model"]["id"] == read_description(shipped_demo).identity
    for key in ("ventricles", "brain", "age", "sex", "ms_ssim", "reconstruction", "extrapolation"):
        assert {"value", "n", "interval_95", "seed", "target", "met", "verdict"} <= results[key].keys(), key


def test_the_shipped_model_makes_a_brain(shipped_demo: Path, tmp_path: Path) -> None:
    result = run("generate", "demo", tmp_path / "out", "--n", 1, "--age", 70, "--sex", "F", "--ventricles", "40ml",
                 cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").glob("sub-*/anat/*.nii.gz"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_takes_three_minutes(shipped_demo: Path, tmp_path: Path) -> None:
    """On two cores that nothing else uses."""
    begun = time.monotonic()
    done = subprocess.run([*COMMAND, "demo", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report" / "index.html").is_file()
    assert time.monotonic() - begun < 180
