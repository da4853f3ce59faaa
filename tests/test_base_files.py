"""Files are whole or not there, folders belong to one run at a time, the manifest outlives a crash."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from brainldm.base.errors import (
    BadInput,
    BrainldmError,
    EnvironmentProblem,
    PartialFailure,
    UsageError,
)
from brainldm.base.files import (
    PART_PREFIX,
    atomic_path,
    check_output_apart,
    locked_folder,
    make_folder,
    read_json,
    read_json_object,
    remove_stale_parts,
    sha256_of,
    write_json,
    write_text,
)
from brainldm.base.manifest import Manifest


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as part:
        part.write_text("half of the n")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_path(path) as part:
        assert part.suffix == ".txt" and part.name.startswith(PART_PREFIX)
        part.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_full_disk_is_an_environment_problem_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="disk is full") as caught, atomic_path(tmp_path / "a") as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_the_old_file_and_a_part_that_the_next_run_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    script = (
        "import sys, time\nfrom brainldm.base.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as part:\n"
        "    part.write_text('half')\n    print('x', flush=True)\n    time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.read(1) == b"x"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert path.read_text() == "old"
    assert len(list(tmp_path.glob(f"{PART_PREFIX}*"))) == 1
    with locked_folder(tmp_path):
        assert [p.name for p in tmp_path.iterdir() if "lock" not in p.name] == ["a.txt"]


def part_of(process: int, place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    part = place / f"{PART_PREFIX}{process}-a"
    part.touch()
    return part


NOBODY = 2**22 + 1  # beyond the largest number that Linux gives a process


def test_stale_parts_are_found_anywhere_below(tmp_path: Path) -> None:
    parts = [part_of(NOBODY, tmp_path), part_of(NOBODY, tmp_path / "x" / "y"), part_of(os.getpid(), tmp_path)]
    other = tmp_path / f"{PART_PREFIX}of-another-program"
    other.touch()
    assert remove_stale_parts(tmp_path) == len(parts)
    assert other.exists() and not any(part.exists() for part in parts)


def test_what_others_are_writing_is_left(tmp_path: Path) -> None:
    """A run locks a folder above another's: parts of processes that live here, and all below a lock (of any machine)"""
    run = tmp_path / "project" / "run"
    with locked_folder(run):
        below = part_of(NOBODY, run / "model")
        unlocked = part_of(os.getppid(), tmp_path / "project")
        with locked_folder(tmp_path):
            assert below.exists() and unlocked.exists()
    assert remove_stale_parts(tmp_path) == 1 and not below.exists()


def test_a_part_of_a_dead_process_that_nobody_waited_for_is_stale(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    part_of(dead.pid, tmp_path)
    assert remove_stale_parts(tmp_path) == 1
    dead.wait()


def test_a_file_system_without_locks_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("brainldm.base.files.fcntl.flock", refuses)
    with pytest.raises(EnvironmentProblem, match="cannot lock files"), locked_folder(tmp_path):
        pass


def test_a_folder_in_use_is_refused_and_says_by_whom(tmp_path: Path) -> None:
    """Fault 43"""
    script = (
        "import sys, time\nfrom brainldm.base.files import locked_folder\n"
        "with locked_folder(sys.argv[1]):\n    print('x', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.read(1) == b"x"
        with pytest.raises(UsageError, match=f"process {holder.pid}"), locked_folder(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked_folder(tmp_path):  # a killed holder holds nothing
        pass
    assert list(tmp_path.iterdir()) == []


def test_only_one_of_many_gets_the_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom brainldm.base.files import locked_folder\nfrom brainldm.base.errors import UsageError\n"
        "try:\n    with locked_folder(sys.argv[1]):\n        print('got it', flush=True)\n        sys.stdin.read()\n"
        "except UsageError:\n    print('refused', flush=True)"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    said = sorted(run.stdout.readline().strip() for run in runs)
    for run in runs:
        run.communicate()
    assert said == ["got it", "refused", "refused", "refused"]


def test_a_file_where_a_folder_must_be_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError):
            make_folder(path)


def test_what_is_read_is_not_written_to(tmp_path: Path) -> None:
    study = tmp_path / "a" / "study"
    for out in (study, tmp_path / "a", study / "out", study / "derivatives", study / ".." / "study" / "x"):
        with pytest.raises(UsageError, match="only read"):
            check_output_apart(out, tmp_path / "other", study)
    for out in (tmp_path / "b", tmp_path / "a" / "study2", study / "derivatives" / "brainldm"):
        check_output_apart(out, study)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UsageError, match="a folder is needed"):
        check_output_apart(loop, study)
        make_folder(loop)
    check_output_apart(study, loop)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_one_may_not_write_to_is_an_environment_problem(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentProblem):
        write_text(tmp_path / "a", "x")


def test_json_round_trip_and_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, 2.5, None]})
    assert read_json(path) == {"é": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"é": [1, 2.5, None]}
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(BadInput) as caught:
            read_json(path)
        assert caught.value.path == path
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(BadInput) as caught:
            read_json(path)
        assert caught.value.remedy


def test_a_name_that_is_no_utf_8_spoils_no_file(tmp_path: Path) -> None:
    """Names of files come from the system with their stray bytes as surrogates."""
    name = os.fsdecode(b"sub-\xff.nii.gz")
    write_json(tmp_path / "a.json", {"file": name})
    assert read_json(tmp_path / "a.json") == {"file": name}
    Manifest(tmp_path / "manifest.jsonl").append(file=name)
    assert Manifest(tmp_path / "manifest.jsonl").records() == [{"file": name}]
    write_text(tmp_path / "a.txt", name)
    assert (tmp_path / "a.txt").read_text() == r"sub-\udcff.nii.gz"


def test_an_object_is_demanded_with_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"n": 2, "name": "x"})
    assert read_json_object(path, n=int, name=str) == {"n": 2, "name": "x"}
    for content, told in (([], "no JSON object"), ({}, "'n' is missing"), ({"n": "2"}, "'n' is missing or of another")):
        write_json(path, content)
        with pytest.raises(BadInput, match=told) as caught:
            read_json_object(path, n=int)
        assert caught.value.path == path


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


# ------------------------------------------------------------------------------------------------------------ manifest


def finished(root: Path, index: int, content: bytes) -> dict:
    path = root / f"{index}.bin"
    path.write_bytes(content)
    return {"index": index, "file": path.name, "bytes": len(content), "sha256": sha256_of(path)}


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "manifest.jsonl")
    assert manifest.records() == [] and manifest.proven(tmp_path) == {}
    for index in range(4):
        manifest.append(**finished(tmp_path, index, b"x" * (index + 1)))
    assert sorted(manifest.proven(tmp_path)) == [0, 1, 2, 3]
    (tmp_path / "0.bin").unlink()
    (tmp_path / "1.bin").write_bytes(b"longer than it was")
    (tmp_path / "2.bin").write_bytes(b"yyy")  # as long as it was
    assert sorted(manifest.proven(tmp_path)) == [2, 3]
    assert sorted(manifest.proven(tmp_path, full=True)) == [3]
    manifest.append(**finished(tmp_path, 0, b"again"))
    manifest.append(index=0)
    manifest.append(index=5, file="5.bin", bytes="12", sha256="")
    assert manifest.proven(tmp_path, full=True)[0]["bytes"] == 5


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_ignored_and_does_not_swallow_the_next(cut: int, tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "manifest.jsonl")
    manifest.append(index=0, name="first")
    whole = manifest.path.read_bytes()
    manifest.append(index=1, name="torn, with an é in it")
    manifest.path.write_bytes(manifest.path.read_bytes()[:-cut])
    manifest.append(index=2, name="after")
    told = [r["index"] for r in manifest.records()]
    # Cut by one, only the newline is gone and the record is whole.
    assert told == ([0, 1, 2] if cut == 1 else [0, 2])
    assert manifest.path.read_bytes().startswith(whole)


def test_any_text_may_stand_in_a_record(tmp_path: Path) -> None:
    """Unicode has line separators that JSON writes as they are."""
    manifest = Manifest(tmp_path / "m.jsonl")
    manifest.append(index=0, text="a\u2028b\x85c\r\nd</script>\U0001f600")
    manifest.append(index=1)
    assert [r["index"] for r in manifest.records()] == [0, 1]


def test_a_manifest_cell_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Manifest(tmp_path / "m.jsonl").append(index=0, value=float("inf"))


def test_records_survive_kill_9(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom brainldm.base.manifest import Manifest\n"
        "m = Manifest(Path(sys.argv[1]))\n"
        "for i in range(10**6):\n    m.append(index=i, text='x' * 50)\n    print(i, flush=True)"
    )
    path = tmp_path / "m.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    said = [int(writer.stdout.readline()) for _ in range(20)]
    writer.kill()
    said += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    writer.wait()
    kept = [r["index"] for r in Manifest(path).records()]
    assert kept == list(range(len(kept)))
    assert len(kept) >= len(said), "a record was reported as written and is not there"
    assert all(json.loads(line) for line in path.read_text().splitlines()[: len(kept)])


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kind", "code"), [(UsageError, 2), (BadInput, 3), (PartialFailure, 4), (EnvironmentProblem, 5), (BrainldmError, 1)]
)
def test_an_error_says_all_and_crosses_processes(kind: type[BrainldmError], code: int) -> None:
    error = kind("is 7.", remedy="Make it 8.", path="/x/y", reason="seven")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and again.exit_code == code
    assert str(again) == str(error) == "/x/y: is 7. Make it 8."
    assert (again.reason, again.remedy, again.path) == ("seven", "Make it 8.", Path("/x/y"))
