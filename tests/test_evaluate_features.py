"""Feature spaces: what they forgive and what they see, kept rows, and MedicalNet's network against MONAI's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.progress import Quiet
from brainldm.base.streams import stream
from brainldm.evaluate.examine import examine
from brainldm.evaluate.features import FeatureStore, extract
from brainldm.evaluate.grids import JudgingGrid
from brainldm.evaluate.images import open_images
from brainldm.evaluate.networks import MedicalNetSpace, RandomSpace, space_named
from brainldm.nets.medicalnet import MED3D_NAME, MED3D_SHA256, MedicalNet, MedicalNetConfig, read_medicalnet
from judged_folders import TINY, blob, write_synthetic

SPACE = RandomSpace(channels=(4, 8, 8), boxes_XYZ=(2, 2, 2))


def person_like(drawn: np.random.Generator) -> np.ndarray:
    """A smooth random field in an ellipsoid."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (20, 28, 20)), indexing="ij")
    field = ndimage.gaussian_filter(drawn.standard_normal(x.shape), 2)
    inside = x**2 + y**2 + z**2 < 0.8
    return np.where(inside, np.clip(0.5 + 0.15 * field / field.std(), 0, 1), 0).astype(np.float32)


def test_the_same_person_is_nearer_than_another_noisy_shifted_or_brighter() -> None:
    noise = stream(0, "test/features")
    people = [person_like(noise) for _ in range(8)]
    features = np.stack([SPACE(person) for person in people])
    for change in (
        lambda x: np.clip(x + 0.02 * noise.standard_normal(x.shape).astype(np.float32), 0, 1),
        lambda x: 0.8 * x,
        lambda x: ndimage.shift(x, (0.2, 0, 0), order=1),
    ):
        for number, person in enumerate(people):
            apart = np.linalg.norm(features - SPACE(change(person)), axis=1)
            assert apart.argmin() == number
    assert np.linalg.norm(features[0] - SPACE(0.8 * people[0])) < 1e-4


def test_random_features_are_a_function_of_the_seed() -> None:
    image = blob(4e4, 0)
    assert (SPACE(image) == SPACE(image)).all()
    assert not np.allclose(SPACE(image), RandomSpace(1, SPACE.channels, SPACE.boxes_XYZ)(image))
    assert SPACE(np.zeros_like(image)).shape == (64,) and RandomSpace()(image).shape == (1152,)


def test_rows_are_kept_and_a_torn_one_is_made_again(tmp_path: Path) -> None:
    folder = open_images(write_synthetic(tmp_path / "made", [2e4, 3e4, 4e4]), "synthetic")
    grid = JudgingGrid.of(TINY.shape_XYZ, TINY.affine)
    looks = examine(folder.images, "synthetic", grid, sketched=(), workers=1, progress=Quiet()).images
    store = FeatureStore(tmp_path / "features", SPACE, grid)
    first = extract(looks[:2], "synthetic", store, workers=1, progress=Quiet())
    path = tmp_path / "features" / f"{SPACE.name}.f32"
    with path.open("ab") as file:
        file.write(b"torn")
    calls: list[int] = []

    class Counted(RandomSpace):
        def __call__(self, image_XYZ: np.ndarray) -> np.ndarray:
            calls.append(1)
            return super().__call__(image_XYZ)

    counted = FeatureStore(tmp_path / "features", Counted(0, SPACE.channels, SPACE.boxes_XYZ), grid)
    again = extract(looks[::-1], "synthetic", counted, workers=1, progress=Quiet())
    assert len(calls) == 1
    assert (again[::-1][:2] == first).all()
    mirrored = extract(looks, "synthetic", counted, mirrored=True, workers=1, progress=Quiet())
    assert len(calls) == 4 and not np.allclose(mirrored, again[::-1])
    with path.open("ab") as file:
        file.write(b"torn")
    assert (extract(looks[:2], "synthetic", store, workers=1, progress=Quiet()) == first).all()  # nothing is added here


def test_rows_of_another_grid_are_not_taken(tmp_path: Path) -> None:
    grid = JudgingGrid.of(TINY.shape_XYZ, TINY.affine)
    FeatureStore(tmp_path, SPACE, grid).append("image", np.zeros(3, dtype=np.float32))
    assert FeatureStore(tmp_path, SPACE, grid).known() == {"image": 0}
    elsewhere = TINY.affine.copy()
    elsewhere[0, 3] += 8
    for other in (JudgingGrid.of((7, 8, 9), TINY.affine), JudgingGrid.of(TINY.shape_XYZ, elsewhere)):
        assert FeatureStore(tmp_path, SPACE, other).known() == {}


# --------------------------------------------------------------------------------------------------------- MedicalNet


def monai_resnet_50() -> torch.nn.Module:
    """MONAI's, with running figures that do something and the stem's stride as published, which is 1 there."""
    from monai.networks.nets import resnet50

    network = resnet50(
        spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type="B", bias_downsample=False
    ).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    network.conv1.stride = (2, 2, 2)
    return network


def dilated(network: torch.nn.Module) -> torch.nn.Module:
    """The third and fourth stage as published: they halve no more, and look further instead."""
    for stage, dilation in ((network.layer3, 2), (network.layer4, 4)):
        stage[0].downsample[0].stride = (1, 1, 1)
        for block in stage:
            block.conv2.stride, block.conv2.dilation = (1, 1, 1), (dilation,) * 3
            block.conv2.padding = (dilation,) * 3
    return network


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (lambda network: network, MedicalNetConfig(strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1))),
        (dilated, MedicalNetConfig()),
    ],
    ids=["undilated", "as published"],
)
def test_medicalnet_is_monais_resnet_50(
    change: Callable[[torch.nn.Module], torch.nn.Module], config: MedicalNetConfig
) -> None:
    theirs, ours = change(monai_resnet_50()), MedicalNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(1, 1, 32, 40, 36)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the published layout, filled at random."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("medicalnet") / "resnet_50_23dataset.pth"
    state = {f"module.{name}": tensor for name, tensor in MedicalNet().state_dict().items() if "batches" not in name}
    torch.save({"state_dict": state | {"module.conv_seg.0.weight": torch.zeros(1)}}, path)
    return path


def test_a_checkpoint_of_the_published_layout_gives_2048_features(checkpoint: Path) -> None:
    space = space_named(f"med3d={checkpoint}")
    assert isinstance(space, MedicalNetSpace) and space.sha256[:12] in space.name
    assert space.name.startswith("unknown-") and "unknown" in space.title  # only the published file is Med3D
    assert MedicalNetSpace(checkpoint, MED3D_SHA256[MED3D_NAME]).title == "Med3D"
    image = blob(4e4, 0)
    features = space(image)
    assert features.shape == (2048,) and np.isfinite(features).all()
    assert np.allclose(features, space(0.5 * image + 0.2), atol=1e-3)  # each image is brought to mean 0, deviation 1
    signed = space_named(f"med3d-signed={checkpoint}")
    assert signed.name != space.name
    with torch.no_grad():
        expected = read_medicalnet(checkpoint)(torch.from_numpy(2 * image - 1)[None, None])[0].numpy()
    assert np.allclose(signed(image), expected) and not np.allclose(features, expected)


def test_a_checkpoint_from_before_archives_is_read_too(tmp_path: Path, checkpoint: Path) -> None:
    old = tmp_path / "old.pth"
    torch.save(torch.load(checkpoint, weights_only=True), old, _use_new_zipfile_serialization=False)
    image = blob(4e4, 0)
    assert np.array_equal(space_named(f"med3d={old}")(image), space_named(f"med3d={checkpoint}")(image))


def test_spaces_that_are_none_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="no feature space 'inception'"):
        space_named("inception")
    with pytest.raises(BadInput, match="no such checkpoint"):
        space_named(f"med3d={tmp_path / 'none.pth'}")
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(b"no pickle")
    with pytest.raises(BadInput, match="cannot be read"):
        space_named(f"med3d={wrong}")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    del state["module.layer3.2.conv2.weight"]
    torch.save({"state_dict": state}, wrong)
    with pytest.raises(BadInput, match=r"1 of its .* tensors are missing.*layer3\.2\.conv2\.weight"):
        space_named(f"med3d={wrong}")


def test_inputs_of_another_scaling_are_another_space_by_name_and_title() -> None:
    published = next(iter(MED3D_SHA256.values()))
    spaces = [MedicalNetSpace(Path("weights"), published, scaling) for scaling in ("zscore", "signed")]
    assert [space.title for space in spaces] == ["Med3D", "Med3D, -1 to 1"]
    assert len({space.name for space in spaces}) == 2
