"""The command line: help at once, exit codes by rule, no traceback unless asked for."""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from brainldm import cli

COMMAND = [sys.executable, "-c", "from brainldm.cli import main; main()"]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, **options
    )


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported everything: what `main` calls, with its exit code."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = cli._run([str(argument) for argument in arguments], debug=False)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def test_help_imports_nothing_heavy() -> None:
    """torch alone would take a second."""
    script = (
        "import atexit, sys\n"
        "heavy = ('torch', 'numpy', 'scipy', 'nibabel', 'matplotlib', 'monai', 'pydantic')\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr))\n"
        "sys.argv = ['brainldm', '--help']\n"
        "from brainldm.cli import main\nmain()"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for verb in ("demo", "phantom", "prepare", "train", "generate", "evaluate", "report", "info", "doctor"):
        assert verb in shown.stdout
    assert shown.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["generat"], 2, "generate"),
        (["generate"], 2, "MODEL"),
        (["train", "huge", "--data", "x", "--out", "y"], 2, "no recipe is named 'huge'"),
        (["generate", "{tmp}/nowhere", "{tmp}/out"], 3, "no such model folder"),
        (["prepare", "{tmp}/nowhere", "{tmp}/out"], 3, "nowhere"),
        (["train", "demo", "--data", "{tmp}/nowhere", "--out", "{tmp}/out"], 3, "there is no such folder"),
        (["info", "{tmp}"], 3, "nothing that brainldm makes or reads"),
        (["phantom", "{tmp}/out", "--grid", "3mm"], 2, "no grid is named '3mm'"),
        (["export", "package", "demo", "{tmp}/out", "--max-megabytes", "nan"], 2, "--max-megabytes is nan"),
        (["export", "package", "demo", "{tmp}/out", "--max-megabytes", "inf"], 2, "--max-megabytes is inf"),
        (["train", "lsgan", "--data", "{tmp}", "--out", "{tmp}/out"], 2, "only read"),
        (["reconstruct", "demo", "{tmp}", "{tmp}/out"], 2, "only read"),
        (["table1", "{tmp}/out/cohort", "{tmp}/out"], 2, "only read"),
        (["card", "demo", "{tmp}/cohort", "{tmp}/out/card", "--phantoms", "{tmp}/out"], 2, "only read"),
    ],
)
def test_what_goes_wrong_is_said_and_has_its_code(arguments: list[str], code: int, told: str, tmp_path: Path) -> None:
    result = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.returncode == code, result.stderr
    assert told in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_process_ends_with_the_code(tmp_path: Path) -> None:
    result = run("report", tmp_path / "nowhere")
    assert result.returncode == 3, result.stderr
    assert "nowhere" in result.stderr and "Traceback" not in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in run("info", tmp_path / "nowhere", "--debug").stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_no_bug(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    assert cli._run([], debug=False) == 5
    told = capsys.readouterr().err
    assert "the memory does not suffice" in told and "--max-memory" in told and "bug" not in told


def test_generate_and_describe(tiny_run: Path, tmp_path: Path) -> None:
    """Through the command line: a plan shown, brains made, the folder described, the same again, another refused."""
    command = ["generate", tiny_run, tmp_path / "out", "--n", 2, "--sex", "F:M", "--steps", 2]
    planned = call(*command, "--dry-run")
    assert planned.returncode == 0
    assert planned.stdout.count("sub-") == 2
    assert "ventricles ml" in planned.stdout and "Covariates(" not in planned.stdout
    assert not (tmp_path / "out").exists()
    made = call(*command)
    assert made.returncode == 0, made.stderr
    facts = json.loads(call("info", tmp_path / "out", "--json").stdout)
    assert (facts["kind"], facts["done"], facts["missing"]) == ("synthetic dataset", 2, 0)
    assert "0 brains made, 2 were there" in call(*command).stdout
    assert call(*command, "--seed", 9).returncode == 2
    assert json.loads(call("info", tiny_run / "model", "--json").stdout)["weights"]["unet.safetensors"] == "whole"


def test_what_would_be_passed_over_is_refused(tiny_cohort: Path, tiny_run: Path, tmp_path: Path) -> None:
    for recipe in ("lsgan", "age"):
        planned = call("train", recipe, "--data", tiny_cohort, "--out", tmp_path / "run", "--dry-run")
        assert planned.returncode == 0 and "learning_rate" in json.loads(planned.stdout)
        staged = call("train", recipe, "--data", tiny_cohort, "--out", tmp_path / "run", "--stage", "diffusion")
        assert staged.returncode == 2 and "--stage" in staged.stderr
    wide = call("train", "age", "--data", tiny_cohort, "--out", tmp_path / "run", "--averaging", "100")
    assert wide.returncode == 2 and "averaging over 100 voxels" in wide.stderr
    assert not (tmp_path / "run").exists()
    unreal = call("evaluate", tiny_run, "--out", tmp_path / "judged", "--held-out")
    assert unreal.returncode == 2 and "--real" in unreal.stderr


def test_wrong_use_is_told_before_anything_else(tiny_run: Path, tiny_cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for wrong in (("--steps", 0), ("--batch", 0), ("--max-memory", "much"), ("--guidance", -1), ("--n", 10**9)):
        refused = call("generate", tiny_run, out, "--dry-run", *wrong)
        assert refused.returncode == 2 and not refused.stdout, refused.stdout
    for verb in (("measure", tiny_cohort), ("evaluate", tiny_cohort, "--out"), ("phantom",), ("demo",)):
        refused = call(*verb, out, "--workers", 0)
        assert refused.returncode == 2 and "0 workers were asked for" in refused.stderr
    assert not out.exists()
    for flag, value, example in (("--age", "50:80", "50:80:4"), ("--ventricles", "1ml:2ml", "15ml:60ml:4")):
        refused = call("generate", tiny_run, out, flag, value)
        assert refused.returncode == 2 and example in refused.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: the system refused: Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file", Path("a")), "a: the system refused: No such file."),
        (OSError(errno.EIO, "Input/output error"), "brainldm: the system refused: Input/output error. Check "),
        (OSError(errno.EBADF, "Bad file descriptor", 7), "brainldm: the system refused: Bad file"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: the disk is full"),
        (OSError(errno.ENOSPC, "No space left on device"), "brainldm: the disk is full"),
    ],
)
def test_what_the_system_refuses_is_no_bug(
    error: OSError, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    assert cli._run([], debug=False) == 5
    said = capsys.readouterr().err
    assert told in said and "bug" not in said and " again" in said
    with pytest.raises(OSError):
        cli._run([], debug=True)


def test_a_library_s_error_without_a_number_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda *_, **__: (_ for _ in ()).throw(OSError("cannot identify image file")))
    assert cli._run([], debug=False) == 1


@pytest.mark.parametrize("device", ["mps", "meta", "xpu", "vulkan"])
def test_other_devices_than_we_know_are_wrong_use(device: str, tiny_run: Path, tmp_path: Path) -> None:
    result = call("generate", tiny_run, tmp_path / "out", "--n", 1, "--device", device)
    assert result.returncode == 2
    assert "cpu and cuda" in result.stderr and device in result.stderr
    assert not (tmp_path / "out").exists()


def test_next_commands_are_quoted_and_counts_have_their_noun(tiny_run: Path, tmp_path: Path) -> None:
    made = call("generate", tiny_run, tmp_path / "a b", "--n", 1, "--steps", 1)
    assert "1 brain made, 0 were there" in made.stdout
    told = call("phantom", tmp_path / "a phantom", "--n", 1).stdout
    assert f"1 phantom is in {tmp_path}/a phantom. Next: brainldm prepare '{tmp_path}/a phantom' COHORT" in told


def test_a_name_that_is_no_text_can_be_told() -> None:
    script = "from brainldm import cli\ncli.app = lambda *_, **__: cli._say('a\\udcff')\ncli.main()"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (told.returncode, told.stdout) == (0, "a\\udcff\n"), told.stderr


def test_the_work_goes_on_when_nobody_reads(tiny_run: Path, tmp_path: Path) -> None:
    command = [*COMMAND, *map(str, ("generate", tiny_run, tmp_path / "out", "--n", 1, "--steps", 2))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert len(list((tmp_path / "out").rglob("*_T1w.nii.gz"))) == 1


def test_volumes_need_a_unit_and_a_plan_stands_alone(tiny_run: Path, tmp_path: Path) -> None:
    unitless = call("generate", tiny_run, tmp_path / "out", "--ventricles", "40")
    assert unitless.returncode == 2
    assert "40ml or 40mm3" in unitless.stderr
    both = call("generate", tiny_run, tmp_path / "out", "--plan", "plan.tsv", "--age", "70")
    assert both.returncode == 2
    assert "--plan fixes every row" in both.stderr


def test_ctrl_c_exits_130_and_the_same_command_goes_on(tiny_run: Path, tmp_path: Path) -> None:
    command = ["generate", tiny_run, tmp_path / "out", "--n", 4, "--steps", 2, "--batch", 2]
    interrupted = (
        "import os, signal\nfrom brainldm.base.manifest import Manifest\nwhole = Manifest.append\n"
        "def append(self, **record):\n    whole(self, **record)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "Manifest.append = append\nfrom brainldm.cli import main\nmain()"
    )
    stopped = subprocess.run(
        [sys.executable, "-c", interrupted, *map(str, command)], capture_output=True, text=True, timeout=120
    )
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr and "the same command goes on with the rest" in stopped.stderr
    finished = call(*command)
    assert finished.returncode == 0, finished.stderr
    assert "2 brains made, 2 were there" in finished.stdout  # both of the first batch had been handed over
    assert len(list((tmp_path / "out").glob("sub-*/anat/*.nii.gz"))) == 4


def test_a_damaged_model_is_refused_before_anything_is_written(tiny_run: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    (model / "unet.safetensors").write_bytes(b"\0" * 100)
    result = call("generate", model, tmp_path / "out", "--n", 1)
    assert result.returncode == 3
    assert "SHA-256" in result.stderr
    assert not (tmp_path / "out").exists()


def test_output_is_plain_where_nobody_looks(tiny_run: Path, tmp_path: Path) -> None:
    result = run("generate", tiny_run, tmp_path / "out", "--n", 1, "--steps", 1)
    assert "\x1b" not in result.stdout + result.stderr
    assert "1 of 1 brains" in result.stderr


def stand_ins(folder: Path) -> tuple[Path, Path]:
    """Tiny files of the published layout, by MONAI's networks."""
    from brainldm.nets.autoencoder import AutoencoderConfig
    from brainldm.nets.unet import UNetConfig
    from test_nets_autoencoder import monai_autoencoder
    from test_nets_unet import monai_unet, wake

    unet_config = UNetConfig(channels=(32, 32, 32), head_channels=(0, 32, 32))
    networks = monai_autoencoder(AutoencoderConfig(channels=(32, 32, 32, 32))), wake(monai_unet(unet_config))
    paths = folder / "autoencoder.pt", folder / "model.pt"
    for network, path in zip(networks, paths):
        torch.save(network.state_dict(), path)
    return paths


def test_published_files_become_a_model_and_go_back(tmp_path: Path) -> None:
    autoencoder, unet = stand_ins(tmp_path)
    result = call("import", "monai", "--autoencoder", autoencoder, "--unet", unet, "--out", tmp_path / "model")
    assert result.returncode == 0, result.stderr
    assert "not that of the published files" in result.stdout and "Next: brainldm generate" in result.stdout
    planned = call("generate", tmp_path / "model", tmp_path / "out", "--n", 4, "--age", 63, "--sex", "F",
                  "--ventricles", "40ml", "--brain", "1450ml", "--max-memory", "64GB", "--dry-run")  # fmt: skip
    assert planned.returncode == 0, planned.stderr
    assert "4 brains" in planned.stdout and "of memory" in planned.stdout
    assert not (tmp_path / "out").exists()
    result = call("export", "monai", tmp_path / "model", tmp_path / "back", "--layout", "new")
    assert result.returncode == 0, result.stderr
    for path in (autoencoder, unet):
        before, after = (torch.load(p, weights_only=True) for p in (path, tmp_path / "back" / path.name))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    result = call("import", "monai", "--autoencoder", unet, "--unet", autoencoder, "--out", tmp_path / "swapped")
    assert result.returncode == 3
    assert "Swap --autoencoder and --unet" in result.stderr
    assert not (tmp_path / "swapped").exists()


def test_the_command_samples_as_the_library_does() -> None:
    from brainldm.cli import figure, generate
    from brainldm.diffusion.solvers import DEFAULT_SAMPLER

    for command in (generate, figure):
        assert inspect.signature(command).parameters["sampler"].default == DEFAULT_SAMPLER


def test_fetching_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = run("fetch", "ukb", tmp_path / "ukb")
    assert result.returncode == 5
    assert "http://127.0.0.1:9/MONAI/" in result.stderr and "copy it to" in result.stderr


def test_exact_is_float32_one_at_a_time(tiny_run: Path, tmp_path: Path) -> None:
    for wrong in (("--precision", "bf16"), ("--batch", 2)):
        result = call("generate", tiny_run, tmp_path / "out", "--n", 1, "--exact", *wrong)
        assert result.returncode == 2 and "--exact is float32" in result.stderr
    for folder, command in (("a", call), ("b", run)):  # another process gives the same bytes
        assert command("generate", tiny_run, tmp_path / folder, "--n", 2, "--exact", "--steps", 2).returncode == 0
    images = [sorted((tmp_path / folder).glob("sub-*/anat/*.nii.gz")) for folder in ("a", "b")]
    assert [p.read_bytes() for p in images[0]] == [p.read_bytes() for p in images[1]]
    facts = json.loads((tmp_path / "a" / "generation.json").read_text())
    assert facts["precision"] == "fp32" and facts["batch"] == 1
    result = call("generate", tiny_run, tmp_path / "c", "--n", 1, "--max-memory", "10MB")
    assert result.returncode == 5 and "Allow" in result.stderr
