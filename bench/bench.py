"""Times brainldm beside MONAI on the published network, and writes results.json.

    python bench/bench.py                 all of it: about half an hour on two cores
    python bench/bench.py --steps 5       fewer steps, to see that it runs

The published weights cannot be shipped, so files of their layout are filled with random weights by MONAI's own
networks; times and memory do not depend on their values. Every engine runs in a process of its own, one after the
other, from the same noise, covariates and files: a whole brain each, loading included in the memory, not in the time.

    ours         the default: bfloat16 with packed weights, decoded in slabs
    ours_few     the same with the default sampler of few steps
    as_shipped   MONAI as the bundle runs it: float32
    at_best      MONAI with bfloat16 autocast and channels-last weights
    ours_exact   brainldm --exact, only with --exact: proves the whole trajectory against as_shipped
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainldm.base.covariates import Covariates
from brainldm.base.files import write_json
from brainldm.diffusion.solvers import DEFAULT_SAMPLER, SAMPLERS
from brainldm.generate.run import row_noise
from brainldm.model.bundle import import_monai
from brainldm.model.cost import work_of
from brainldm.model.folder import load_model, read_description
from brainldm.model.memory import plan_memory

HERE = Path(__file__).resolve().parent
SEED = 0
PERSON = Covariates(sex=0, age_years=63.0, ventricles_mm3=40_000.0, brain_mm3=1_450_000.0)
LATENT_SHAPE_CXYZ = (3, 20, 28, 20)
FEW = DEFAULT_SAMPLER
TARGETS = {  # against MONAI as shipped, and at its best; of memory the share that is allowed
    "unet_step": (6.0, 2.0),
    "decode": (8.0, 2.0),
    "volume_ddim50": (7.0, 2.3),
    "volume_few_steps": (15.0, 5.0),
    "peak_memory": (3.0, 1.5),
}


def monai_networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The bundle's two networks, as its inference.json builds them."""
    from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

    autoencoder = AutoencoderKL(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=3, channels=(64, 128, 128, 128),
        num_res_blocks=2, norm_num_groups=32, norm_eps=1e-6, attention_levels=(False,) * 4,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    )  # fmt: skip
    unet = DiffusionModelUNet(
        spatial_dims=3, in_channels=7, out_channels=3, channels=(256, 512, 768), num_res_blocks=2,
        attention_levels=(False, True, True), norm_num_groups=32, norm_eps=1e-6, resblock_updown=True,
        num_head_channels=(0, 512, 768), with_conditioning=True, transformer_num_layers=1, cross_attention_dim=4,
    )  # fmt: skip
    return autoencoder.eval(), unet.eval()


def make_stand_ins(work: Path) -> None:
    """autoencoder.pt, model.pt and the model folder imported from them."""
    if (work / "model" / "model.json").exists():
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    torch.manual_seed(SEED)
    autoencoder, unet = monai_networks()
    for module in unet.modules():  # MONAI fills last convolutions with nought, and nought proves nothing
        if isinstance(module, torch.nn.Conv3d) and not module.weight.any():
            module.reset_parameters()
    torch.save(autoencoder.state_dict(), work / "autoencoder.pt")
    torch.save(unet.state_dict(), work / "model.pt")
    print(import_monai(work / "autoencoder.pt", work / "model.pt", work / "model"))


def run_ours(work: Path, steps: int, sampler: str, precision: str) -> dict[str, Any]:
    description = read_description(work / "model")
    device = torch.device("cpu")
    plan = plan_memory(description, batch=1, precision=precision, device=device)
    model = load_model(work / "model", precision=precision, memory=plan)
    watch = Stopwatch()
    image_XYZ = model.sample([PERSON], [row_noise(SEED, 0)], sampler=sampler, steps=steps, progress=watch)[0]
    return watch.result(image_XYZ) | {"planned_peak_bytes": plan.peak_bytes}


class Stopwatch:
    """Progress that notes when each step ends, and the decoding after them."""

    def __init__(self) -> None:
        self.marks = [time.perf_counter()]

    def start(self, what: str, total: int, done: int = 0) -> None: ...

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.marks.append(time.perf_counter())

    def result(self, image_XYZ: np.ndarray) -> dict[str, Any]:
        *steps, decode = np.diff(self.marks).tolist()
        return {"steps": steps, "decode": decode, "volume": self.marks[-1] - self.marks[0], "image": image_XYZ}


@torch.no_grad()
def run_monai(work: Path, steps: int, at_best: bool) -> dict[str, Any]:
    """The bundle's own loop, at the timesteps its weights were published with (980, 960, ..., 0 for 50 steps)."""
    from monai.networks.schedulers import DDIMScheduler

    autoencoder, unet = monai_networks()
    autoencoder.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True))
    unet.load_state_dict(torch.load(work / "model.pt", weights_only=True))
    if at_best:
        autoencoder = autoencoder.to(memory_format=torch.channels_last_3d)
        unet = unet.to(memory_format=torch.channels_last_3d)
    scheduler = DDIMScheduler(
        1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0205, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    scheduler.timesteps = torch.arange(0, 1000, 1000 // steps).flip(0)
    ranges = read_description(work / "model").covariates.fitted_ranges()
    condition = torch.from_numpy(ranges.normalise(PERSON.as_array()[None]).astype(np.float32))
    maps = condition[:, :, None, None, None].expand(-1, -1, *LATENT_SHAPE_CXYZ[1:])
    latent = torch.from_numpy(row_noise(SEED, 0)(0, LATENT_SHAPE_CXYZ))[None]
    watch = Stopwatch()
    with torch.autocast("cpu", torch.bfloat16, enabled=at_best):
        for t in scheduler.timesteps:
            joined = torch.cat([latent, maps], dim=1)
            eps = unet(joined, timesteps=t[None], context=condition[:, None])
            latent, _ = scheduler.step(eps.float(), int(t), latent)
            watch.advance()
        image = autoencoder.decode_stage_2_outputs(latent)
    watch.advance()
    image_XYZ = image[0, 0].float().numpy()[::-1]  # as stored, right to left, to RAS+
    return watch.result(image_XYZ)


def run_engine(engine: str, work: Path, steps: int) -> None:
    """In a process of its own: one brain, its arrays and times left in `work`."""
    if engine == "profile":
        (work / "profile.json").write_text(json.dumps(run_profile(work)))
        return
    with torch.no_grad():
        found = {
            "ours": lambda: run_ours(work, steps, "ddim", "bf16"),
            "ours_few": lambda: run_ours(work, SAMPLERS[FEW].default_steps, FEW, "bf16"),
            "ours_exact": lambda: run_ours(work, steps, "ddim", "fp32"),
            "as_shipped": lambda: run_monai(work, steps, at_best=False),
            "at_best": lambda: run_monai(work, steps, at_best=True),
        }[engine]()
    np.save(work / f"{engine}.npy", found.pop("image"))
    found["peak_memory"] = peak_bytes()
    (work / f"{engine}.json").write_text(json.dumps(found))


@torch.no_grad()
def run_profile(work: Path) -> dict[str, Any]:
    """Seconds by operator of one step and of one decode, as ours: where the time goes. Profiling costs a little."""
    model = load_model(
        work / "model",
        precision="bf16",
        memory=plan_memory(read_description(work / "model"), batch=1, precision="bf16", device=torch.device("cpu")),
    )
    noise = [row_noise(SEED, 0)]
    latent = model.sample_latents([PERSON], noise, SAMPLERS["ddim"], 1)  # packs the weights
    found = {}
    for name, work_to_do in (
        ("unet_step", lambda: model.sample_latents([PERSON], noise, SAMPLERS["ddim"], 1)),
        ("decode", lambda: model.decode(latent)),
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            work_to_do()
        seconds = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
        largest = sorted(seconds.items(), key=lambda item: -item[1])
        found[name] = dict(largest[:10]) | {"all": sum(seconds.values())}
    return found


def peak_bytes() -> int:
    """Most memory this process held; not `getrusage`, which counts what the parent held when it started us."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the peak of a process: run the bench on Linux")


def compare(work: Path, engines: list[str], steps: int) -> dict[str, Any]:
    found = {engine: json.loads((work / f"{engine}.json").read_text()) for engine in engines}
    images = {engine: np.load(work / f"{engine}.npy") for engine in engines}

    def row(name: str, key: str, ours: str, unit: str) -> dict[str, Any]:
        values = {
            role: float(np.median(found[engine][key]))
            for role, engine in (("ours", ours), ("peer_as_shipped", "as_shipped"), ("peer_best", "at_best"))
        }
        ratios = {
            "ratio_as_shipped": values["peer_as_shipped"] / values["ours"],
            "ratio_best": values["peer_best"] / values["ours"],
        }
        spread = {
            f"{role}_interval_95": np.percentile(found[engine][key], [2.5, 97.5]).tolist()
            for role, engine in (("ours", ours), ("peer_as_shipped", "as_shipped"), ("peer_best", "at_best"))
            if key == "steps"
        }
        target = dict(zip(("target_as_shipped", "target_best"), TARGETS[name]))
        return {**values, **ratios, **target, **spread, "unit": unit, "n": int(np.size(found[ours][key]))}

    work_flop = work_of(read_description(work / "model"))
    reference = images["as_shipped"]
    return {
        "unet_step": row("unet_step", "steps", "ours", "s"),
        "decode": row("decode", "decode", "ours", "s"),
        "volume_ddim50": row("volume_ddim50", "volume", "ours", "s"),
        "volume_few_steps": row("volume_few_steps", "volume", "ours_few", "s"),
        "peak_memory": row("peak_memory", "peak_memory", "ours", "bytes"),
        "same_result": {
            engine: {
                "psnr_db_to_float32": psnr_db(images[engine], reference),
                "relative_error": relative_error(images[engine], reference),
            }
            for engine in engines
            if engine not in ("as_shipped", "ours_few")
        },
        "profile_seconds": json.loads((work / "profile.json").read_text()),
        "planned_peak_bytes": found["ours"]["planned_peak_bytes"],
        "counts": {
            "steps": steps,
            "few_steps": SAMPLERS[FEW].default_steps,
            "few_steps_sampler": FEW,
            "volumes_each": 1,
            "seed": SEED,
            "unet_step_flop": work_flop.unet_call_flop,
            "decode_flop": work_flop.decode_flop,
        },
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx_bf16": torch.cpu._is_amx_tile_supported(),
            "convolution_tflop_per_s": convolution_speeds(),
        },
        "versions": {name: importlib.metadata.version(name) for name in ("brainldm", "torch", "monai", "numpy")}
        | {"python": platform.python_version()},
    }


def convolution_speeds() -> dict[str, float]:
    """What this machine's 3 x 3 x 3 convolutions reach at most, 256 to 256 channels: the bound on every ratio."""
    x = torch.randn(1, 256, 20, 28, 20).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(256, 256, 3, 3, 3)
    flop = 2 * weight.numel() * x[0, 0].numel()
    speeds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = x.to(dtype), weight.to(dtype).contiguous(memory_format=torch.channels_last_3d)
        times = []
        for _ in range(8):
            begun = time.perf_counter()
            torch.nn.functional.conv3d(a, b, padding=1)
            times.append(time.perf_counter() - begun)
        speeds[name] = flop / min(times) / 1e12
    return speeds


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def psnr_db(found: np.ndarray, reference: np.ndarray) -> float:
    spread = float(reference.max() - reference.min())
    return float(10 * np.log10(spread**2 / np.square(found - reference).mean(dtype=np.float64)))


def relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def table(results: dict[str, Any]) -> str:
    lines = [f"{'':<17} {'ours':>8} {'shipped':>8} {'best':>8}   {'ratio':>6} (target) {'ratio':>8} (target)"]
    for name in TARGETS:
        row = results[name]
        scale, digits = (1e9, 2) if row["unit"] == "bytes" else (1.0, 2)
        values = [f"{row[role] / scale:>8.{digits}f}" for role in ("ours", "peer_as_shipped", "peer_best")]
        lines.append(
            f"{name:<17} {' '.join(values)}   {row['ratio_as_shipped']:>6.2f} ({row['target_as_shipped']:g})"
            f"   {row['ratio_best']:>8.2f} ({row['target_best']:g})"
        )
    for engine, same in results["same_result"].items():
        lines.append(
            f"{engine}: PSNR to float32 {same['psnr_db_to_float32']:.1f} dB, "
            f"relative error {same['relative_error']:.2g}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--exact", action="store_true", help="also brainldm --exact, to prove the trajectory")
    parser.add_argument("--work", type=Path, default=HERE / "stand-ins", help="5 GB of stand-in weights go here")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--reuse", action="store_true", help="do not run again what an interrupted bench has run")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.engine:
        run_engine(asked.engine, asked.work, asked.steps)
        return
    make_stand_ins(asked.work)
    engines = ["ours", "ours_few", "at_best", "as_shipped", *(["ours_exact"] if asked.exact else [])]
    for engine in ["profile", *engines]:
        if asked.reuse and (asked.work / f"{engine}.json").exists():
            continue
        print(f"{engine} ...", flush=True)
        call = [sys.executable, __file__, "--engine", engine, "--work", str(asked.work), "--steps", str(asked.steps)]
        subprocess.run(call, check=True)
        found = json.loads((asked.work / f"{engine}.json").read_text())
        if engine == "profile":
            continue
        print(f"  {found['volume']:.0f} s a brain, {found['peak_memory'] / 1e9:.2f} GB at most", flush=True)
    results = compare(asked.work, engines, asked.steps)
    write_json(asked.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
