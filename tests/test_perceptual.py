"""Perceptual distances: right mathematics, weights that fit or are refused, and what a run records of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import read_json, sha256_of, write_json
from brainldm.base.streams import stream
from brainldm.model.folder import load_model
from brainldm.nets.medicalnet import MedicalNet, MedicalNetConfig
from brainldm.nets.squeezenet import TAP_CHANNELS, SqueezeNetFeatures
from brainldm.train.config import Recipe
from brainldm.train.perceptual import (
    MedicalNetFeatures,
    PerceptualChoice,
    PerceptualDistance,
    SlicedLpips,
    perceptual_distance,
)
from brainldm.train.run import train
from conftest import TINY_SHAPE_XYZ, tiny_recipe

SHAPE_XYZ = (17, 20, 18)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights under torchvision's and LPIPS' names; a classifier too, as torchvision's file has."""
    draw = stream(0, "test squeezenet")
    shapes = {name: tuple(t.shape) for name, t in SqueezeNetFeatures().state_dict().items()}
    shapes["classifier.1.weight"] = (3, 512, 1, 1)
    shapes |= {f"lin{tap}.model.1.weight": (1, c, 1, 1) for tap, c in enumerate(TAP_CHANNELS)}
    tensors = {}
    for name, shape in shapes.items():
        spread = np.sqrt(2 / max(1, np.prod(shape[1:]))) if name.endswith("weight") else 0.1
        values = draw.standard_normal(shape) * spread
        tensors[name] = torch.from_numpy(np.abs(values) if name.startswith("lin") else values).float()
    return tensors


@pytest.fixture(scope="module")
def files(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    torch.save({n: t for n, t in state.items() if not n.startswith("lin")}, folder / "squeezenet1_1.pth")
    torch.save({n: t for n, t in state.items() if n.startswith("lin")}, folder / "squeeze.pth")
    save_file(state, folder / "both.safetensors")
    return {path.stem: path for path in folder.iterdir()}


def images(count: int = 1, shape_XYZ: tuple[int, ...] = SHAPE_XYZ, index: int = 0) -> torch.Tensor:
    return torch.from_numpy(stream(0, "test image", index).random((count, 1, *shape_XYZ), dtype=np.float32))


def slow_lpips(a_1HW: torch.Tensor, b_1HW: torch.Tensor, state: dict[str, torch.Tensor]) -> float:
    """LPIPS of two grey pictures as its paper and package say it, layer by layer and voxel by voxel."""

    def conv(x: torch.Tensor, name: str, **how: int) -> torch.Tensor:
        return F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **how))

    def fire(x: torch.Tensor, number: int) -> torch.Tensor:
        s = conv(x, f"features.{number}.squeeze")
        one, three = (conv(s, f"features.{number}.expand{k}", padding=p) for k, p in (("1x1", 0), ("3x3", 1)))
        return torch.cat([one, three], 1)

    def taps(picture_1HW: torch.Tensor) -> list[torch.Tensor]:
        colours = picture_1HW.repeat(3, 1, 1)
        for c, (shift, scale) in enumerate(zip((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))):
            colours[c] = (colours[c] - shift) / scale
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        found = [conv(colours[None], "features.0", stride=2)]
        found.append(fire(fire_in := pool(found[-1]), 3))
        assert fire_in.shape[1] == 64
        found[-1] = fire(found[-1], 4)
        found.append(fire(fire(pool(found[-1]), 6), 7))
        found.append(fire(pool(found[-1]), 9))
        for number in (10, 11, 12):
            found.append(fire(found[-1], number))
        return found

    total = 0.0
    for tap, (x, y) in enumerate(zip(taps(a_1HW), taps(b_1HW), strict=True)):
        weights = state[f"lin{tap}.model.1.weight"].flatten().double()
        _, channels, rows, columns = x.shape
        assert channels == len(weights)
        here = 0.0
        for r in range(rows):
            for c in range(columns):
                f, g = x[0, :, r, c].double(), y[0, :, r, c].double()
                f, g = f / (f.square().sum().sqrt() + 1e-10), g / (g.square().sum().sqrt() + 1e-10)
                here += float((weights * (f - g) ** 2).sum())
        total += here / (rows * columns)
    return total


def test_lpips_is_its_slow_transcription(state: dict[str, torch.Tensor], files: dict[str, Path]) -> None:
    network = perceptual_distance("lpips-squeeze", [files["squeezenet1_1"], files["squeeze"]], 0)
    assert isinstance(network, SlicedLpips)
    image, other = images(2), images(2, index=1)
    draws, total = stream(0, "slices", 5), 0.0
    for axis in (2, 3, 4):
        chosen = draws.permutation(image.shape[axis])[: image.shape[axis] // 4]
        assert len(chosen) >= 4
        values = [
            slow_lpips(image[b].select(axis - 1, int(i)), other[b].select(axis - 1, int(i)), state)
            for b in range(2)
            for i in chosen
        ]
        total += float(np.mean(values))
    found = float(network.distance(image, other, stream(0, "slices", 5)))
    assert found == pytest.approx(total, rel=1e-4)
    assert found > 1e-3


def test_one_file_or_two_is_one_network(files: dict[str, Path]) -> None:
    two = perceptual_distance("lpips-squeeze", [files["squeeze"], files["squeezenet1_1"]], 0)
    one = perceptual_distance("lpips-squeeze", [files["both"]], 0)
    given = (images(), images(index=1))
    # To rounding: where weights lie in memory decides how a convolution adds up.
    torch.testing.assert_close(two.distance(*given, stream(0, "s")), one.distance(*given, stream(0, "s")))


def test_slices_are_a_draw_of_the_stream(files: dict[str, Path]) -> None:
    network = perceptual_distance("lpips-squeeze", [files["both"]], 0)
    given = (images(), images(index=1))
    first, again, other = (network.distance(*given, stream(0, "s", i)) for i in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def every_distance(files: dict[str, Path], tiny_run: Path) -> dict[str, PerceptualDistance]:
    torch.manual_seed(0)
    tiny = MedicalNet(MedicalNetConfig(blocks=(1, 1, 1, 1), widths=(2, 2, 2, 2)))
    return {
        "random": perceptual_distance("random", [], 0),
        "lpips-squeeze": perceptual_distance("lpips-squeeze", [files["both"]], 0),
        "medicalnet": MedicalNetFeatures(tiny).requires_grad_(False).eval(),
        "encoder": perceptual_distance("encoder", [tiny_run], 0),
    }


@pytest.mark.parametrize("name", ["random", "lpips-squeeze", "medicalnet", "encoder"])
def test_contract_of_every_distance(name: str, files: dict[str, Path], tiny_run: Path) -> None:
    """0 for equal images, growing with noise, a finite gradient even where images are empty, none into the weights, and
    the mean over a batch: shared by processes it is the same."""
    distance = every_distance(files, tiny_run)[name]
    shape_XYZ = (18, 20, 18)  # even, for the encoder folds by 2
    image = images(2, shape_XYZ)
    noise = images(2, shape_XYZ, 1) - 0.5

    def found(x: torch.Tensor, y: torch.Tensor = image) -> torch.Tensor:
        return distance.distance(x, y, stream(0, "draw"))

    assert float(found(image)) == 0
    little, much = float(found(image + 0.05 * noise)), float(found(image + 0.4 * noise))
    assert 0 < little < much
    halves = [float(found(image[i : i + 1] + 0.4 * noise[i : i + 1], image[i : i + 1])) for i in range(2)]
    assert np.mean(halves) == pytest.approx(much, rel=1e-5)
    empty = torch.zeros(1, 1, *shape_XYZ, requires_grad=True)
    found(empty, torch.zeros(1, 1, *shape_XYZ)).backward()
    assert torch.isfinite(empty.grad).all()
    moving = (image + 0.1 * noise).requires_grad_()
    found(moving).backward()
    assert torch.isfinite(moving.grad).all() and moving.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["lpips-squeeze", "medicalnet", "encoder"])
def test_missing_weights_are_refused_with_what_is_needed(name: str) -> None:
    with pytest.raises(UsageError, match=r"needs weights.*--perceptual-weights"):
        PerceptualChoice.of(name, [], (160, 224, 160))  # type: ignore[arg-type]


def test_weights_that_do_not_fit_are_refused(
    files: dict[str, Path], state: dict[str, torch.Tensor], tiny_run: Path, tmp_path: Path
) -> None:
    grid = (160, 224, 160)
    with pytest.raises(BadInput, match=r"lin0.model.1.weight is missing") as caught:
        PerceptualChoice.of("lpips-squeeze", [files["squeezenet1_1"]], grid)
    assert "squeeze.pth" in caught.value.remedy and caught.value.path == files["squeezenet1_1"]
    save_file(state | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "grey.safetensors")
    with pytest.raises(BadInput, match=r"features.0.weight has shape \(64, 1, 3, 3\) instead of \(64, 3, 3, 3\)"):
        PerceptualChoice.of("lpips-squeeze", [tmp_path / "grey.safetensors"], grid)
    save_file(state | {"features.0.bias": torch.full((64,), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(BadInput, match="not finite"):
        PerceptualChoice.of("lpips-squeeze", [tmp_path / "nan.safetensors"], grid)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(BadInput, match="cannot be read as weights"):
        PerceptualChoice.of("lpips-squeeze", [tmp_path / "text.pth"], grid)
    with pytest.raises(BadInput, match="no such file"):
        PerceptualChoice.of("lpips-squeeze", [tmp_path / "nowhere.pth"], grid)
    with pytest.raises(BadInput, match="no MedicalNet ResNet-50"):
        PerceptualChoice.of("medicalnet", [files["squeezenet1_1"]], grid)
    with pytest.raises(BadInput, match="no such checkpoint"):
        PerceptualChoice.of("medicalnet", [tmp_path / "nowhere.pth"], grid)
    with pytest.raises(BadInput, match="no such model folder"):
        PerceptualChoice.of("encoder", [tmp_path / "nowhere"], grid)
    with pytest.raises(UsageError, match="takes no weights"):
        PerceptualChoice.of("random", [files["both"]], grid)
    with pytest.raises(UsageError, match="one path"):
        PerceptualChoice.of("encoder", [tiny_run, tiny_run], grid)
    with pytest.raises(UsageError, match=r"at least 17.*\(16, 24, 16\)"):
        PerceptualChoice.of("lpips-squeeze", [files["both"]], TINY_SHAPE_XYZ)
    with pytest.raises(UsageError, match="divide by 2"):
        PerceptualChoice.of("encoder", [tiny_run], (17, 24, 16))


class Executed:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (Path("executed"),))


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": Executed()}, tmp_path / "evil.pth")
    with pytest.raises(BadInput, match="cannot be read"):
        PerceptualChoice.of("lpips-squeeze", [tmp_path / "evil.pth"], (160, 224, 160))
    assert not (tmp_path / "executed").exists()


# --------------------------------------------------------------------------------------------------------------- runs


def encoder_recipe() -> Recipe:
    recipe = tiny_recipe()
    return replace(recipe, autoencoder=replace(recipe.autoencoder, perceptual="encoder"))


def test_a_run_records_the_distance_and_its_weights(tiny_run: Path, tiny_cohort: Path, tmp_path: Path) -> None:
    """Trained with the encoder of another run; stopped, gone on with, and stage 2 without the weights at hand."""
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="needs weights"):
        train(encoder_recipe(), tiny_cohort, out)
    assert not (out / "run.json").exists()
    train(encoder_recipe(), tiny_cohort, out, stage="autoencoder", steps=3, perceptual_weights=[tiny_run])
    sha256 = sha256_of(tiny_run / "model" / "autoencoder.safetensors")
    assert read_json(out / "run.json")["perceptual_weights_sha256"] == [sha256]
    assert read_json(out / "run.json")["recipe"]["autoencoder"]["perceptual"] == "encoder"
    train(encoder_recipe(), tiny_cohort, out, stage="diffusion", steps=2)
    training = load_model(out).description.training
    assert (training["perceptual"], training["perceptual_weights_sha256"]) == ("encoder", [sha256])
    train(encoder_recipe(), tiny_cohort, out, stage="autoencoder", steps=6, perceptual_weights=[tiny_run / "model"])
    unbroken = tmp_path / "unbroken"
    train(encoder_recipe(), tiny_cohort, unbroken, stage="autoencoder", steps=6, perceptual_weights=[tiny_run])
    assert sha256_of(out / "autoencoder" / "log.jsonl") == sha256_of(unbroken / "autoencoder" / "log.jsonl")
    losses = [json.loads(line)["perceptual"] for line in (out / "autoencoder" / "log.jsonl").read_text().splitlines()]
    assert all(value > 0 for value in losses)
    with pytest.raises(UsageError, match="perceptual_weights_sha256"):  # another encoder is another run
        train(encoder_recipe(), tiny_cohort, out, stage="autoencoder", perceptual_weights=[out])


def test_a_run_of_an_earlier_version_goes_on(tiny_cohort: Path, tmp_path: Path) -> None:
    """Before distances could be chosen, run.json said nothing of them: that was `random`."""
    train(tiny_recipe(), tiny_cohort, tmp_path / "run", stage="autoencoder", steps=1)
    recorded = read_json(tmp_path / "run" / "run.json")
    del recorded["perceptual_weights_sha256"], recorded["recipe"]["autoencoder"]["perceptual"]
    write_json(tmp_path / "run" / "run.json", recorded)
    train(tiny_recipe(), tiny_cohort, tmp_path / "run", stage="autoencoder", steps=2)
    with pytest.raises(UsageError, match=r"recipe\.autoencoder\.perceptual"):
        train(encoder_recipe(), tiny_cohort, tmp_path / "run", stage="diffusion", steps=2)


def test_the_fixture_has_weights_of_every_part(state: dict[str, torch.Tensor], files: dict[str, Path]) -> None:
    assert set(load_file(files["both"])) == set(state)
    assert sum(name.startswith("lin") for name in state) == 7
