"""The published weights, in and out: the same function as MONAI's, no value changed, and nothing foreign let in.

The networks are MONAI's own at tiny widths. The grid stays the paper's, in the description only: no image is decoded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from brainldm.base.covariates import PAPER_RANGES
from brainldm.base.errors import BadInput, EnvironmentProblem, UsageError
from brainldm.model import bundle
from brainldm.model.bundle import PUBLISHED, PublishedFile, export_monai, import_monai, read_checkpoint
from brainldm.model.bundle_layout import autoencoder_config, layout_of, network_kind, renamed, unet_config
from brainldm.model.description import ScheduleDescription
from brainldm.model.folder import DESCRIPTION_NAME, load_model, read_description, save_model
from brainldm.model.latent_diffusion import LatentDiffusion
from brainldm.nets.autoencoder import Autoencoder, AutoencoderConfig
from brainldm.nets.unet import DiffusionUNet, UNetConfig
from test_nets_autoencoder import monai_autoencoder, relative_error
from test_nets_unet import monai_unet, wake

# Norms of 32 groups, which shapes cannot tell, make 32 the smallest width.
AUTOENCODER = AutoencoderConfig(channels=(32, 32), res_blocks=1)
UNET = UNetConfig(channels=(32, 32), attention=(False, True), head_channels=(0, 32), res_blocks=1)
NAMES = ("autoencoder", "unet")
LAYOUTS = ("old", "new")
UPSAMPLE = "decoder.blocks.2.postconv.conv.weight"
NORM = "encoder.blocks.1.norm1.weight"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def networks() -> dict[str, torch.nn.Module]:
    """MONAI's two networks, no parameter of theirs left at the zero it starts at."""
    return {"autoencoder": wake(monai_autoencoder(AUTOENCODER)), "unet": wake(monai_unet(UNET))}


@pytest.fixture(scope="session")
def checkpoints(networks: dict[str, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their state dicts as files, `LAYOUT/NAME.pt`."""
    folder = tmp_path_factory.mktemp("bundle")
    for layout in LAYOUTS:
        (folder / layout).mkdir()
        for name, network in networks.items():
            torch.save(in_layout(network.state_dict(), layout), folder / layout / f"{name}.pt")
    return folder


@pytest.fixture(scope="session")
def model_folder(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "model"
    import_files(checkpoints / "old", out)
    return out


@pytest.fixture(scope="session")
def model(model_folder: Path) -> LatentDiffusion:
    return load_model(model_folder)


def in_layout(tensors: Tensors, layout: Any) -> Tensors:
    return {renamed(name, layout): tensor for name, tensor in tensors.items()}


def import_files(folder: Path, out: Path, **other: Path) -> bundle.ImportSummary:
    """Imports the pair in `folder`, with one of them or both from elsewhere."""
    return import_monai(**{name: folder / f"{name}.pt" for name in NAMES} | other, out=out)


def bits_equal(found: Tensors, true: Tensors) -> bool:
    """Names, types, shapes and every bit."""
    return found.keys() == true.keys() and all(
        found[name].dtype == tensor.dtype
        and torch.equal(found[name].contiguous().view(torch.int32), tensor.contiguous().view(torch.int32))
        for name, tensor in true.items()
    )


def refused(
    out: Path, folder: Path, error: type[Exception] = BadInput, *, reason: str, told: str, **other: Path
) -> None:
    """The import is refused for that reason, in these words, and leaves nothing behind."""
    with pytest.raises(error, match=told) as caught:
        import_files(folder, out, **other)
    assert caught.value.reason == reason  # type: ignore[attr-defined]
    assert caught.value.remedy  # type: ignore[attr-defined]
    assert not out.exists()


# --------------------------------------------------------------------------------------------------- names and shapes


def test_the_published_architecture_is_told_by_names_and_shapes() -> None:
    with torch.device("meta"):
        theirs = {"autoencoder": monai_autoencoder(AutoencoderConfig()), "unet": monai_unet(UNetConfig())}
    for name, infer, config, differ in (
        ("autoencoder", autoencoder_config, AutoencoderConfig(), 2 * 3),
        ("unet", unet_config, UNetConfig(), 2 * 2 * (2 * 2 + 1 + 2 * 3)),
    ):
        new = {key: tuple(tensor.shape) for key, tensor in theirs[name].state_dict().items()}
        old = {renamed(key, "old"): shape for key, shape in new.items()}
        assert len(old.keys() - new.keys()) == len(new.keys() - old.keys()) == differ
        assert {renamed(key, "new"): shape for key, shape in old.items()} == new
        assert (layout_of(new), layout_of(old)) == ("new", "old")
        assert network_kind(new) == network_kind(old) == name
        assert infer(new) == config


@pytest.mark.parametrize(
    "config",
    [
        AUTOENCODER,
        AutoencoderConfig(channels=(32,), res_blocks=3),
        AutoencoderConfig(in_channels=2, latent_channels=4, channels=(64, 32, 96, 32), res_blocks=2),
    ],
)
def test_autoencoders_of_any_width_are_told_by_shapes(config: AutoencoderConfig) -> None:
    with torch.device("meta"):
        tensors = Autoencoder(config).state_dict()
    assert autoencoder_config({name: tuple(tensor.shape) for name, tensor in tensors.items()}) == config


@pytest.mark.parametrize(
    "config",
    [
        UNET,
        UNetConfig(channels=(32,), attention=(True,), head_channels=(32,), res_blocks=3, context_features=2),
        replace(UNetConfig(), channels=(64, 32, 96), attention=(True, True, False), head_channels=(64, 32, 96)),
    ],
)
def test_unets_of_any_width_are_told_by_shapes(config: UNetConfig) -> None:
    with torch.device("meta"):
        tensors = DiffusionUNet(config).state_dict()
    assert unet_config({name: tuple(tensor.shape) for name, tensor in tensors.items()}) == config


def test_one_level_without_attention_is_the_same_in_both_layouts() -> None:
    with torch.device("meta"):
        names = list(Autoencoder(AutoencoderConfig(channels=(32,))).state_dict())
    assert names == [renamed(name, "old") for name in names]
    assert layout_of(names) == "new"


# ------------------------------------------------------------------------------------------------------ same function


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_imported_is_the_function_that_monai_has(
    layout: str, checkpoints: Path, networks: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    summary = import_files(checkpoints / layout, tmp_path / "model")
    assert summary.layouts == dict.fromkeys(NAMES, layout)
    assert summary.version is None
    assert f"autoencoder in the {layout} layout" in str(summary) and "md5 is not that" in str(summary)
    model = load_model(tmp_path / "model")

    draw = torch.Generator().manual_seed(0)
    image, latent = torch.rand(1, 1, 8, 12, 8, generator=draw), torch.randn(2, 3, 4, 6, 4, generator=draw)
    maps_and_latent, context = torch.randn(2, 7, 4, 6, 4, generator=draw), torch.randn(2, 1, 4, generator=draw)
    steps = torch.tensor([3, 999])
    mean, sigma = networks["autoencoder"].encode(image)
    encoded = model.autoencoder.encode(image)
    assert relative_error(encoded.mean_BCXYZ, mean) <= 1e-5
    assert relative_error((encoded.log_variance_BCXYZ / 2).exp(), sigma) <= 1e-5
    assert relative_error(model.autoencoder.decode(latent), networks["autoencoder"].decode(latent)) <= 1e-5
    expected = networks["unet"](maps_and_latent, steps, context)
    assert expected.std() > 0.01
    assert relative_error(model.unet(maps_and_latent, steps, context), expected) <= 1e-5


@torch.no_grad()
def test_the_old_layout_is_the_one_that_monai_converts(
    checkpoints: Path, networks: dict[str, torch.nn.Module], capsys: pytest.CaptureFixture
) -> None:
    """MONAI's own `load_old_state_dict` brings every tensor to where our renaming does."""
    torch.manual_seed(7)
    for name, blank in (("autoencoder", monai_autoencoder(AUTOENCODER)), ("unet", monai_unet(UNET))):
        old = torch.load(checkpoints / "old" / f"{name}.pt", weights_only=True)
        assert old.keys() - networks[name].state_dict().keys()  # so there is something to convert
        blank.load_old_state_dict(old)
        assert bits_equal(blank.state_dict(), networks[name].state_dict())
    assert "All keys match" not in capsys.readouterr().out


def test_the_model_folder_says_what_the_publication_says(model_folder: Path) -> None:
    description = read_description(model_folder)
    assert description.name == "monai-import"
    assert description.licence == "unknown"
    assert description.grid.shape_XYZ == (160, 224, 160)
    assert description.grid.network_x == "right_to_left"
    assert description.latent.shape_CXYZ == (3, 80, 112, 80)
    assert description.latent.scale == 1.0
    assert description.schedule == ScheduleDescription()
    assert description.target == "eps"
    assert description.covariates.ranges["age_years"]["low"] == 44.0
    assert "training_images" not in description.training
    assert set(description.training["md5"]) == set(NAMES)


def test_the_published_files_are_known_by_their_md5(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: checkpoints / "old" / f"{name}.pt" for name in NAMES}
    stand_in = {
        name: replace(PUBLISHED[name], md5=hashlib.md5(path.read_bytes()).hexdigest()) for name, path in files.items()
    }
    monkeypatch.setattr(bundle, "PUBLISHED", stand_in)
    summary = import_files(checkpoints / "old", tmp_path / "model")
    assert summary.version == bundle.PUBLISHED_VERSION
    assert "proven by md5" in str(summary)
    description = read_description(tmp_path / "model")
    assert description.name == "ukb-ldm"
    assert description.licence == "Apache-2.0"
    assert description.training["training_images"] == 31740
    assert description.training["md5"] == {name: file.md5 for name, file in stand_in.items()}

    # One of the two proves nothing.
    other = import_files(checkpoints / "old", tmp_path / "mixed", unet=checkpoints / "new" / "unet.pt")
    assert other.version is None
    assert other.layouts == {"autoencoder": "old", "unet": "new"}
    assert read_description(tmp_path / "mixed").licence == "unknown"


def test_the_list_of_published_files_is_well_formed() -> None:
    assert {name: file.name for name, file in PUBLISHED.items()} == {
        "autoencoder": "autoencoder.pt",
        "unet": "model.pt",
    }
    assert all(isinstance(file, PublishedFile) and len(bytes.fromhex(file.md5)) == 16 for file in PUBLISHED.values())


# --------------------------------------------------------------------------------------------------------- loss-free


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_and_in_again_changes_no_bit(layout: Any, checkpoints: Path, model_folder: Path, tmp_path: Path) -> None:
    written = export_monai(model_folder, tmp_path / "out", layout)
    assert [path.name for path in written] == ["autoencoder.pt", "model.pt"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["autoencoder.pt", "model.pt"]
    for name, path in zip(NAMES, written):
        original = torch.load(checkpoints / layout / f"{name}.pt", weights_only=True)
        assert bits_equal(torch.load(path, weights_only=True), original)
    again = import_monai(*written, tmp_path / "again")
    assert again.layouts == dict.fromkeys(NAMES, layout)
    for file in ("autoencoder.safetensors", "unet.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (model_folder / file).read_bytes()


def test_the_published_layout_is_the_default_of_an_export(model_folder: Path, tmp_path: Path) -> None:
    assert [layout_of(read_checkpoint(path)) for path in export_monai(model_folder, tmp_path)] == ["old", "old"]


def test_an_export_replaces_no_file(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"the published one")
    with pytest.raises(UsageError, match="already"):
        export_monai(model_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == b"the published one"


class FullDisk:
    """A file on a disk that has room for so many bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: Any) -> int:
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(content))

    def flush(self) -> None:
        self.file.flush()


@pytest.mark.parametrize("room", [0, 5000])
def test_an_export_to_a_full_disk_is_the_machine_s_and_can_be_done_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    whole, saves = torch.save, 0

    def save(tensors: Tensors, file: Any) -> None:
        nonlocal saves
        saves += 1
        whole(tensors, file if saves == 1 else FullDisk(file, room))

    with monkeypatch.context() as now, pytest.raises(EnvironmentProblem, match="disk is full") as caught:
        now.setattr(torch, "save", save)
        export_monai(model_folder, tmp_path)
    assert caught.value.path == tmp_path / "model.pt"
    assert not list(tmp_path.iterdir())
    assert len(export_monai(model_folder, tmp_path)) == 2


OTHER_AGES = {**PAPER_RANGES.to_json(), "age_years": {"low": 20.0, "high": 90.0, "units": "year"}}


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("latent", {"scale": 0.5}, "latent scale is 0.5"),
        ("target", "v", "predicts v"),
        ("schedule", {"steps": 500}, "noise schedule"),
        ("autoencoder", {"norm_groups": 16}, r"\(groups, epsilon\) \(16, 1e-06\), \(32, 1e-06\)"),
        ("unet", {"head_channels": [0, 16]}, "32 channels into heads of 16"),
        ("grid", {"network_x": "left_to_right"}, "another grid or run from left to right"),
        (
            "covariates",
            {"ranges": OTHER_AGES},
            "ranges of its own",
        ),
    ],
)
def test_what_the_files_cannot_tell_is_not_exported(
    part: str, change: Any, told: str, model_folder: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    content = json.loads((model / DESCRIPTION_NAME).read_text())
    content[part] = {**content[part], **change} if isinstance(change, dict) else change
    (model / DESCRIPTION_NAME).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=told):
        export_monai(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folding_autoencoder_is_not_exported(model: LatentDiffusion, tmp_path: Path) -> None:
    folding = AutoencoderConfig(channels=(32,), res_blocks=1, fold=2)
    description = model.description.model_copy(update={"autoencoder": folding})
    save_model(tmp_path / "model", replace(model, description=description, autoencoder=Autoencoder(folding)))
    with pytest.raises(UsageError, match="folds 2 voxels"):
        export_monai(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------- what is let in as well


def wrapped(tensors: Tensors) -> dict[str, Any]:
    return {"epoch": 3, "state_dict": tensors, "optimiser": {"state": {}, "param_groups": [{"lr": 1e-4}]}}


def prefixed(tensors: Tensors) -> Tensors:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def in_one_storage(tensors: Tensors) -> Tensors:
    """All parameters as views of one piece of memory, as some trainers keep them."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts)}


@pytest.mark.parametrize(
    "shape_of_file", [wrapped, prefixed, in_one_storage, lambda tensors: wrapped(prefixed(tensors))]
)
def test_the_usual_wrappings_are_undone(
    shape_of_file: Callable[[Tensors], Any], checkpoints: Path, networks: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    for name, network in networks.items():
        torch.save(shape_of_file(in_layout(network.state_dict(), "old")), tmp_path / f"{name}.pt")
    import_files(tmp_path, tmp_path / "model")
    assert bits_equal(load_model(tmp_path / "model").unet.state_dict(), networks["unet"].state_dict())


def test_legacy_pickles_and_safetensors_are_read_too(
    networks: dict[str, torch.nn.Module], checkpoints: Path, tmp_path: Path
) -> None:
    """Files of torch before 1.6, and safetensors with the prefix of data-parallel training."""
    tensors = in_layout(networks["autoencoder"].state_dict(), "old")
    torch.save(tensors, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(prefixed(tensors), tmp_path / "prefixed.safetensors")
    for file in ("legacy.pt", "prefixed.safetensors"):
        out = tmp_path / f"{file}.model"
        assert import_files(checkpoints / "new", out, autoencoder=tmp_path / file).layouts["autoencoder"] == "old"
        assert bits_equal(load_model(out).autoencoder.state_dict(), networks["autoencoder"].state_dict())


def test_half_precision_is_widened_and_shared_memory_parted(
    networks: dict[str, torch.nn.Module], checkpoints: Path, tmp_path: Path
) -> None:
    tensors = dict(networks["autoencoder"].state_dict())
    twin = "encoder.blocks.1.norm2.weight"
    tensors[twin] = tensors[NORM]
    tensors[UPSAMPLE] = tensors[UPSAMPLE].half()
    torch.save(tensors, tmp_path / "autoencoder.pt")
    import_files(checkpoints / "new", tmp_path / "model", autoencoder=tmp_path / "autoencoder.pt")
    found = load_model(tmp_path / "model").autoencoder.state_dict()
    assert torch.equal(found[twin], found[NORM])
    assert torch.equal(found[UPSAMPLE], tensors[UPSAMPLE].float())


# ------------------------------------------------------------------------------------------------------------ refusals


def test_swapped_files_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    files = {"autoencoder": checkpoints / "old" / "unet.pt", "unet": checkpoints / "old" / "autoencoder.pt"}
    told = "given as the autoencoder and holds the U-Net.*Swap --autoencoder and --unet"
    refused(tmp_path / "model", checkpoints, reason="swapped", told=told, **files)
    told = "given as the U-Net and holds the autoencoder"
    files["autoencoder"] = checkpoints / "old" / "autoencoder.pt"
    refused(tmp_path / "model", checkpoints, reason="swapped", told=told, **files)


def test_a_missing_file_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    refused(tmp_path / "model", checkpoints / "old", reason="missing", told="no such file", unet=tmp_path / "no.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [1, 2, 10, 100, 600, 0.3, 0.7, 0.95, -100, -1])
def test_truncated_files_are_refused(
    kept: float, zipped: bool, networks: dict[str, torch.nn.Module], checkpoints: Path, tmp_path: Path
) -> None:
    path = tmp_path / "autoencoder.pt"
    torch.save(networks["autoencoder"].state_dict(), path, _use_new_zipfile_serialization=zipped)
    size = path.stat().st_size
    os.truncate(path, int(kept * size) if 0 < kept < 1 else int(kept) % size)
    refused(tmp_path / "model", checkpoints / "old", reason="damaged", told="truncated or damaged", autoencoder=path)


def test_truncated_safetensors_are_refused(
    networks: dict[str, torch.nn.Module], checkpoints: Path, tmp_path: Path
) -> None:
    path = tmp_path / "autoencoder.safetensors"
    save_file(networks["autoencoder"].state_dict(), path)
    for size in (path.stat().st_size - 1, path.stat().st_size // 2, 100, 4, 0):
        os.truncate(path, size)
        refused(tmp_path / "model", checkpoints / "old", reason="damaged", told="truncated", autoencoder=path)


@pytest.mark.parametrize(
    ("content", "reason", "told"),
    [
        (b"", "damaged", "it is empty"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "not_a_checkpoint", "web page"),
        (b"\xef\xbb\xbf\r\n  <html>", "not_a_checkpoint", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "not_a_checkpoint", "Git LFS"),
        (b'{"error": "Repository not found"}', "damaged", "no checkpoint"),
        (b"PK\x03\x04 and nothing else", "damaged", "its end is missing"),
        (bytes(range(256)) * 20, "damaged", "no checkpoint"),
    ],
)
def test_what_a_failed_download_leaves_is_refused(
    content: bytes, reason: str, told: str, checkpoints: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    refused(tmp_path / "model", checkpoints / "old", reason=reason, told=told, unet=path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_whatever_bytes_are_damaged_the_answer_is_bad_input(zipped: bool, tmp_path: Path) -> None:
    path, draw = tmp_path / "w.pt", random.Random(0)
    torch.save({"a": torch.ones(2), "b": torch.ones(1)}, path, _use_new_zipfile_serialization=zipped)
    original = path.read_bytes()
    found = set()
    for _ in range(200):
        content = bytearray(original)
        for _ in range(draw.choice((1, 2, 5))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            read_checkpoint(path)
        except BadInput as error:
            found.add(error.reason)
    assert "damaged" in found


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def save_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def save_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_plain(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [save_zip, save_legacy, save_plain])
@pytest.mark.parametrize("function", [Path.touch, os.system, eval])
@pytest.mark.parametrize("wrap", [lambda call, tensors: call, lambda call, tensors: {**tensors, "extra": call}])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(
    function: Callable,
    save: Callable,
    wrap: Callable,
    networks: dict[str, torch.nn.Module],
    checkpoints: Path,
    tmp_path: Path,
) -> None:
    canary, path = tmp_path / "canary", tmp_path / "autoencoder.pt"
    arguments = {Path.touch: canary, os.system: f"touch '{canary}'", eval: f"open({str(canary)!r}, 'w').close()"}
    call = Call(function, arguments[function])
    pickle.loads(pickle.dumps(call))  # it would, if it were unpickled
    assert canary.exists()
    canary.unlink()
    save(wrap(call, networks["autoencoder"].state_dict()), path)
    told = "holds more than tensors.*nothing of it was executed"
    refused(tmp_path / "model", checkpoints / "old", reason="unsafe", told=told, autoencoder=path)
    assert not canary.exists()


def test_a_whole_module_is_refused_by_the_name_of_its_class(checkpoints: Path, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    told = r"torch\.nn\.modules\.linear\.Linear"
    refused(tmp_path / "model", checkpoints / "old", reason="unsafe", told=told, unet=tmp_path / "m.pt")


def without(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_extra(**extra: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): tensor for name, tensor in extra.items()}}


def with_value(value: float) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> Any:
        changed = tensors[NORM].clone()
        changed[-1] = value
        return {**tensors, NORM: changed}

    return change


def half_old(tensors: Tensors) -> Any:
    """One upsampling in the old layout and one in the new."""
    other = UPSAMPLE.replace("blocks.2", "blocks.9")
    return {**in_layout(tensors, "old"), other: tensors[UPSAMPLE]}


MATRIX = torch.zeros(32, 32)


@pytest.mark.parametrize(
    ("change", "reason", "told"),
    [
        (without(NORM), "architecture", f"{NORM} is missing"),
        (without("encoder.blocks.0.conv.weight"), "architecture", "encoder.blocks.0.conv.weight is missing"),
        (without("encoder.blocks.1.conv2.conv.weight"), "architecture", "must have equally many"),
        (without("quant_conv_mu.conv.weight"), "architecture", "holds neither network"),
        (with_extra(loss__weight=MATRIX), "architecture", "loss.weight is not part"),
        (with_extra(**{NORM: torch.ones(33)}), "architecture", r"has shape \(33,\) instead of \(32,\)"),
        (with_extra(encoder__blocks__4__proj_attn__weight=MATRIX), "ambiguous", "proj_attn.*plain attention block"),
        (with_extra(decoder__blocks__1__attn__to_q__weight=MATRIX), "ambiguous", "plain attention block"),
        (half_old, "ambiguous", "partly in MONAI's old layout, partly in its new"),
        (lambda tensors: {**tensors, **in_layout(tensors, "old")}, "ambiguous", "partly in MONAI's old layout"),
        (lambda tensors: {**tensors, **prefixed(tensors)}, "ambiguous", "holds parameters twice"),
        (lambda tensors: {"model": tensors, "ema": tensors}, "ambiguous", "holds 2 sets of weights, not one"),
        (lambda tensors: {"epoch": 3}, "not_a_checkpoint", "holds 0 sets"),
        (lambda tensors: {**tensors, "epoch": 3}, "not_a_checkpoint", "no state dict"),
        (lambda tensors: {}, "not_a_checkpoint", "holds 0 sets"),
        (lambda tensors: list(tensors.values()), "not_a_checkpoint", "no state dict"),
        (lambda tensors: tensors[NORM], "not_a_checkpoint", "no state dict"),
        (with_value(torch.nan), "nan", f"{NORM} holds values that are not finite"),
        (with_value(torch.inf), "nan", f"{NORM} holds values that are not finite"),
        (with_extra(**{NORM: torch.full((32,), 1e300, dtype=torch.float64)}), "nan", "not finite"),
        (with_extra(**{NORM: torch.ones(32, dtype=torch.int64)}), "damaged", "not a floating-point tensor"),
        (with_extra(**{NORM: torch.ones(32, dtype=torch.complex64)}), "damaged", "not a floating-point tensor"),
        (with_extra(**{NORM: torch.ones(32, device="meta")}), "damaged", "not a floating-point tensor"),
    ],
)
def test_other_tensors_than_the_autoencoder_s_are_refused(
    change: Callable[[Tensors], Any],
    reason: str,
    told: str,
    networks: dict[str, torch.nn.Module],
    checkpoints: Path,
    tmp_path: Path,
) -> None:
    torch.save(change(dict(networks["autoencoder"].state_dict())), tmp_path / "a.pt")
    refused(tmp_path / "model", checkpoints / "old", reason=reason, told=told, autoencoder=tmp_path / "a.pt")


ATTENTION = "middle_block.attention.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    ("change", "reason", "told"),
    [
        (without(f"{ATTENTION}.to_k.weight"), "architecture", f"{ATTENTION}.to_k.weight is missing"),
        (with_extra(down_blocks__1__attentions__0__proj_attn__weight=MATRIX), "ambiguous", "plain attention block"),
        (with_extra(**{f"{ATTENTION}.to_out.0.weight": MATRIX}), "ambiguous", "partly in MONAI's old layout"),
        (with_extra(class_embedding__weight=MATRIX), "architecture", "class_embedding.weight is not part"),
    ],
)
def test_other_tensors_than_the_unet_s_are_refused(
    change: Callable[[Tensors], Any],
    reason: str,
    told: str,
    networks: dict[str, torch.nn.Module],
    checkpoints: Path,
    tmp_path: Path,
) -> None:
    torch.save(change(dict(networks["unet"].state_dict())), tmp_path / "u.pt")
    refused(tmp_path / "model", checkpoints / "old", reason=reason, told=told, unet=tmp_path / "u.pt")


@pytest.mark.parametrize(
    ("autoencoder", "unet", "told"),
    [
        (replace(AUTOENCODER, latent_channels=4), UNET, "U-Net's channels do not fit the latent channels"),
        (replace(AUTOENCODER, in_channels=2), UNET, "images of 2 channels"),
        (AUTOENCODER, replace(UNET, context_features=5), "told 5 covariates instead of 4"),
        (replace(AUTOENCODER, channels=(32,) * 7), UNET, "image grid is .* divisible by 64"),
        (
            replace(AUTOENCODER, channels=(32,) * 4),
            UNetConfig(channels=(32,) * 4, attention=(False,) * 4, head_channels=(0, 0, 0, 32), res_blocks=1),
            "latent grid is .* divisible by 8",
        ),
    ],
)
def test_two_networks_that_make_no_model_together_are_refused(
    autoencoder: AutoencoderConfig, unet: UNetConfig, told: str, tmp_path: Path
) -> None:
    torch.save(Autoencoder(autoencoder).state_dict(), tmp_path / "autoencoder.pt")
    torch.save(DiffusionUNet(unet).state_dict(), tmp_path / "unet.pt")
    refused(tmp_path / "model", tmp_path, reason="architecture", told=told)


def test_widths_that_no_norm_divides_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    torch.save(Autoencoder(replace(AUTOENCODER, channels=(8,), norm_groups=4)).state_dict(), tmp_path / "a.pt")
    told = "another architecture than the autoencoder.*8 channels"
    refused(tmp_path / "model", checkpoints / "old", reason="architecture", told=told, autoencoder=tmp_path / "a.pt")


def test_the_published_files_are_told_by_the_md5_of_their_model_zoo() -> None:
    assert {name: (file.name, file.md5) for name, file in PUBLISHED.items()} == {
        "autoencoder": ("autoencoder.pt", "329e97b3085643ff235f11f049856242"),
        "unet": ("model.pt", "21c3047556fb671caf0556f1cce6ef22"),
    }


def test_an_imported_model_has_the_publications_schedule_and_scale(model: LatentDiffusion) -> None:
    schedule = model.description.schedule.build()
    assert schedule.steps == 1000 and schedule.alpha_bars[999] == pytest.approx(9.69e-5, rel=1e-3)
    assert model.description.target == "eps" and model.description.latent.scale == 1


def test_a_model_that_is_there_is_not_replaced(checkpoints: Path, model_folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(model_folder, tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UsageError, match=r"a model already.*another folder"):
        import_files(checkpoints / "new", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
