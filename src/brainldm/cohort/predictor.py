"""A trained instrument: age or sex from a brain, by the network of Cole et al. 2017. Its folder, and how to ask it.

PREDICTOR/predictor.json          what it predicts, for images on which grid, trained on whom, how well it does
PREDICTOR/predictor.safetensors   the weights
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from brainldm.base.errors import BadInput
from brainldm.base.files import read_json, sha256_of, write_bytes, write_json
from brainldm.base.volume import Grid, Volume, same_voxels
from brainldm.cohort.normalise import to_unit
from brainldm.nets.cole import ColeConfig, ColeNet

KIND = "brainldm predictor"
FORMAT = 1
_JSON, _WEIGHTS = "predictor.json", "predictor.safetensors"
Target = Literal["age_years", "sex"]


@dataclass(frozen=True)
class PredictedAge:
    age_years: float


@dataclass(frozen=True)
class PredictedSex:
    """`sex` is the probability of being male, 0 (female) to 1."""

    sex: float


@dataclass(frozen=True)
class Predictor:
    """Predicts `target` from images on `grid`. The network's number x `scale` + `offset` is the age in years; for sex
    it is a logit. `training` says on whom it was trained and how well it does on held-out people."""

    target: Target
    grid: Grid
    channels: tuple[int, ...]
    averaging: int
    offset: float
    scale: float
    training: Mapping[str, Any]
    folder: Path
    weights_sha256: str = ""

    @property
    def name(self) -> str:
        return f"cole2017-{self.target}-{self.weights_sha256[:12]}"

    @torch.no_grad()
    def __call__(self, image: Volume) -> PredictedAge | PredictedSex:
        """The prediction for one image of any intensity scale; BadInput for one on another grid."""
        if not same_voxels(image, self.grid):
            raise BadInput(
                f"lies on another grid ({' x '.join(map(str, image.shape_XYZ))}) than {self.grid.name}, which the "
                f"predictor of {self.target} was trained on.",
                remedy="Train one on a cohort of this grid: brainldm train age --data COHORT --out RUN.",
                reason="grid",
            )
        data_XYZ, _ = to_unit(image.data_XYZ)  # it has learnt from images in 0..1
        tensor = torch.from_numpy(np.ascontiguousarray(data_XYZ, dtype=np.float32))[None, None]
        config = ColeConfig(self.grid.shape_XYZ, self.channels, self.averaging)
        number = float(_network(self.folder / _WEIGHTS, self.weights_sha256, config)(tensor)[0])
        if self.target == "sex":
            return PredictedSex(1 / (1 + math.exp(-max(-60.0, min(60.0, number)))))
        return PredictedAge(self.offset + self.scale * number)


@functools.lru_cache(maxsize=4)
def _network(path: Path, sha256: str, config: ColeConfig) -> ColeNet:
    """Read once a process, whichever copies of the predictor ask."""
    network = ColeNet(config)
    network.load_state_dict(_read_weights(path, sha256))
    return network.eval()


def write_predictor(folder: Path, predictor: Predictor, network: ColeNet) -> Predictor:
    """Writes the folder, weights first, and returns the predictor as it can be read from there."""
    weights = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    write_bytes(folder / _WEIGHTS, save(weights))
    sha256 = sha256_of(folder / _WEIGHTS)
    content = {
        "kind": KIND,
        "format": FORMAT,
        "target": predictor.target,
        "grid": predictor.grid.to_json(),
        "channels": list(predictor.channels),
        "averaging": predictor.averaging,
        "offset": predictor.offset,
        "scale": predictor.scale,
        "training": dict(predictor.training),
        "weights_sha256": sha256,
    }
    write_json(folder / _JSON, content)
    return read_predictor(folder)


def read_predictor(folder: Path) -> Predictor:
    """The predictor in `folder`, or in the `predictor` folder of a training run; BadInput when there is none."""
    found = next((f for f in (folder, folder / "predictor") if (f / _JSON).is_file()), None)
    if found is None:
        raise BadInput(
            f"is no predictor: it has no {_JSON}.",
            remedy="Train one: brainldm train age --data COHORT --out RUN.",
            path=folder,
            reason="not_a_predictor",
        )
    content = read_json(found / _JSON)
    if content.get("kind") != KIND or content.get("format") != FORMAT:
        raise BadInput(
            f"is {content.get('kind')!r} of format {content.get('format')!r}; this program reads {KIND!r}, {FORMAT}.",
            path=found / _JSON,
            reason="format",
        )
    try:
        return Predictor(
            content["target"],
            Grid.from_json(content["grid"]),
            tuple(int(c) for c in content["channels"]),
            int(content.get("averaging", 1)),
            float(content["offset"]),
            float(content["scale"]),
            content["training"],
            found,
            str(content["weights_sha256"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"is incomplete ({error}).", path=found / _JSON, reason="bad_description") from error


def _read_weights(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    if not path.is_file() or sha256_of(path) != sha256:
        raise BadInput(
            "the weights are missing or not those that predictor.json describes.",
            remedy="Copy the folder again, whole.",
            path=path,
            reason="checksum",
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"is not a safetensors file ({error}).", path=path, reason="damaged") from error
