"""NIfTI in: every fault of a scan is found and named. NIfTI out: a header made from nothing, equal bytes each time."""

from __future__ import annotations

import gzip
import itertools
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.nifti import read_nifti, write_nifti
from brainldm.base.volume import GRIDS, Volume, canonical

SHAPE_XYZ = (9, 11, 10)
AFFINE = np.array([[2.0, 0, 0, -8], [0, 1.5, 0, -9], [0, 0, 1.0, -5], [0, 0, 0, 1]])


def asymmetric(dtype: str = "float32") -> np.ndarray:
    """An image that no flip, permutation or shift maps onto itself."""
    return (np.arange(np.prod(SHAPE_XYZ)).reshape(SHAPE_XYZ) % 97 + 1).astype(dtype)


def nifti_bytes(
    data: np.ndarray | None = None, affine: np.ndarray = AFFINE, sform: int = 1, qform: int = 1
) -> bytearray:
    image = nibabel.Nifti1Image(asymmetric() if data is None else data, affine)
    image.set_sform(affine, sform)
    if qform:
        image.set_qform(affine, qform)
    else:
        image.set_qform(None, 0)
    return bytearray(image.to_bytes())


def patched(fmt: str, offset: int, *values: float) -> bytes:
    payload = nifti_bytes()
    struct.pack_into(fmt, payload, offset, *values)
    return bytes(payload)


def gz(payload: bytes) -> bytes:
    return gzip.compress(bytes(payload), mtime=0)


def flipped(payload: bytes, at: int) -> bytes:
    changed = bytearray(payload)
    changed[at] ^= 0x10
    return bytes(changed)


WHOLE = gz(nifti_bytes(np.random.default_rng(0).integers(0, 999, SHAPE_XYZ).astype("int16")))

# Faults as in the issue's list of bad input: what the file holds, and the reason code it must be refused with.
BAD_CONTENT: dict[str, tuple[bytes, set[str]]] = {
    "A1 empty": (b"", {"empty"}),
    "A2 cut off": (WHOLE[: len(WHOLE) // 2], {"truncated"}),
    "A2 cut off at the very end": (WHOLE[:-4], {"truncated"}),
    "A2 compressed whole, image cut off": (gz(nifti_bytes()[:-40]), {"truncated"}),
    "A3 bit flip in the deflated data": (flipped(WHOLE, len(WHOLE) // 2), {"crc", "truncated"}),
    "A3 bit flip in the checksum": (flipped(WHOLE, len(WHOLE) - 6), {"crc"}),
    "A5 random bytes": (np.random.default_rng(1).bytes(5000), {"not_nifti"}),
    "A5 a page of HTML": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20, {"not_nifti"}),
    "A5 text": (b"hello", {"not_nifti"}),
    "DICOM": (b"\0" * 128 + b"DICM" + b"\0" * 600, {"not_nifti"}),
    "A7 claims 32767 cubed": (patched("<4h", 40, 3, 32767, 32767, 32767), {"too_large"}),
    "A8 negative size": (patched("<4h", 40, 3, 9, -11, 10), {"bad_header"}),
    "A8 size zero": (patched("<4h", 40, 3, 9, 0, 10), {"bad_header"}),
    "A8 eight dimensions": (patched("<h", 40, 8), {"bad_header"}),
    "A8 no dimensions": (patched("<h", 40, 0), {"bad_header"}),
    "A8 unknown datatype": (patched("<h", 70, 77), {"bad_header"}),
    "A8 wrong magic": (patched("<4s", 344, b"nope"), {"not_nifti"}),
    "A8 header half of a pair": (patched("<4s", 344, b"ni1\0"), {"not_nifti"}),
    "A8 wrong header size": (patched("<i", 0, 400), {"bad_header"}),
    "A9 data begin beyond the end": (patched("<f", 108, 1e6), {"bad_header"}),
    "A9 data begin nowhere": (patched("<f", 108, np.nan), {"bad_header"}),
    "A9 data begin in the header": (patched("<f", 108, 10), {"bad_header"}),
    "A12 a slice": (bytes(nifti_bytes(np.ones((90, 90), "float32") * np.arange(90, dtype="float32"))), {"shape"}),
    "A12 one dimension of 1": (bytes(nifti_bytes(asymmetric()[:, :, :1])), {"shape"}),
    "A13 complex": (bytes(nifti_bytes(asymmetric().astype("complex64"))), {"datatype"}),
    "A13 RGB": (bytes(nifti_bytes(np.zeros(SHAPE_XYZ, [("R", "u1"), ("G", "u1"), ("B", "u1")]))), {"datatype"}),
    "A15 all zero": (bytes(nifti_bytes(np.zeros(SHAPE_XYZ, "float32"))), {"constant"}),
    "A15 constant": (bytes(nifti_bytes(np.full(SHAPE_XYZ, 77, "int16"))), {"constant"}),
    "A15 nearly constant": (
        bytes(nifti_bytes(1e4 + 1e-3 * (asymmetric("float64") % 2))),
        {"constant"},
    ),
    "A17 no orientation": (bytes(nifti_bytes(sform=0, qform=0)), {"orientation"}),
    "A19 singular affine": (patched("<4f", 280, 0, 0, 0, 0), {"affine"}),
    "A19 affine not finite": (patched("<f", 280, np.nan), {"affine"}),
    "A19 sheared affine": (patched("<4f", 280, 2, 0.9, 0, -8), {"affine"}),
    "A8 voxel size zero": (patched("<f", 84, 0), {"bad_header"}),
    "A8 voxel size not finite": (patched("<f", 80, np.inf), {"bad_header"}),
    "A21 metres written as mm": (bytes(nifti_bytes(affine=np.diag([1e-3, 1e-3, 1e-3, 1]))), {"affine"}),
    "A21 microns written as mm": (bytes(nifti_bytes(affine=np.diag([1e3, 1e3, 1e3, 1]))), {"affine"}),
    "A21 voxels of 0.1 mm": (bytes(nifti_bytes(affine=np.diag([0.1, 0.1, 0.1, 1]))), {"affine"}),
    "A21 voxels of 10 mm": (bytes(nifti_bytes(affine=np.diag([10.0, 10, 10, 1]))), {"affine"}),
}


@pytest.mark.parametrize("fault", BAD_CONTENT)
@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii"])
def test_a_bad_file_is_refused_with_its_reason(fault: str, name: str, tmp_path: Path) -> None:
    content, reasons = BAD_CONTENT[fault]
    path = tmp_path / name
    if name.endswith(".gz") and content[:2] != b"\x1f\x8b" and len(content) > 348:
        content = gz(content)
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_nifti(path)
    assert caught.value.reason in reasons
    assert caught.value.path == path
    assert str(path) in str(caught.value)


def test_html_and_dicom_are_named_as_what_they_are(tmp_path: Path) -> None:
    for fault, word in (("A5 a page of HTML", "HTML"), ("DICOM", "dcm2niix")):
        path = tmp_path / "scan.nii.gz"
        path.write_bytes(BAD_CONTENT[fault][0])
        with pytest.raises(BadInput, match=word):
            read_nifti(path)


def test_a_remedy_goes_with_what_can_be_remedied(tmp_path: Path) -> None:
    for fault in ("A1 empty", "A2 cut off", "A17 no orientation", "A12 a slice"):
        path = tmp_path / "scan.nii"
        path.write_bytes(BAD_CONTENT[fault][0])
        with pytest.raises(BadInput) as caught:
            read_nifti(path)
        assert caught.value.remedy, fault


def test_compression_is_read_from_the_content_and_said(tmp_path: Path) -> None:
    """A6: the suffix lies in both directions."""
    plain, packed = tmp_path / "plain.nii.gz", tmp_path / "packed.nii"
    plain.write_bytes(nifti_bytes())
    packed.write_bytes(gz(nifti_bytes()))
    first, second = read_nifti(plain), read_nifti(packed)
    np.testing.assert_array_equal(first.data_XYZ, second.data_XYZ)
    assert any("not compressed" in n for n in first.notes)
    assert any("compressed although" in n for n in second.notes)


def test_gzip_in_several_members_is_read(tmp_path: Path) -> None:
    payload = bytes(nifti_bytes())
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gz(payload[:1000]) + gz(payload[1000:]))
    np.testing.assert_array_equal(read_nifti(path).data_XYZ, asymmetric())
    path.write_bytes(b"".join(gz(payload[at : at + 1]) for at in range(len(payload))) + b"\x1f")
    np.testing.assert_array_equal(read_nifti(path).data_XYZ, asymmetric())


def test_a_gzip_bomb_is_refused_within_bounded_memory(tmp_path: Path) -> None:
    """A10, in a process of its own so that its peak memory can be read."""
    path = tmp_path / "bomb.nii.gz"
    header = nifti_bytes(np.zeros((8, 8, 8), "uint8"))[:352]
    struct.pack_into("<4h", header, 40, 3, 1000, 1000, 1000)
    path.write_bytes(gzip.compress(bytes(header) + bytes(1 << 26), 9) + gzip.compress(bytes(1 << 26), 9) * 15)
    assert path.stat().st_size < 1.2e6  # and a gigabyte inside
    script = (
        "import sys\n"
        "from brainldm.base.nifti import read_nifti\n"
        "from brainldm.base.errors import BadInput\n"
        "try:\n    read_nifti(sys.argv[1])\n"
        "except BadInput as error:\n    print(error.reason)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    reason, kilobytes = done.stdout.split()
    assert reason == "too_large"
    # The cap is the inflation limit times the file.
    assert int(kilobytes) / 1024 < 600 * path.stat().st_size / 1e6 + 200


def test_no_more_is_kept_than_the_header_claims(tmp_path: Path) -> None:
    """What follows the voxels costs no memory, and the checksum after it counts nonetheless."""
    path = tmp_path / "scan.nii.gz"
    content = gz(bytes(nifti_bytes()) + bytes(1 << 26)) + gz(np.random.default_rng(0).bytes(1 << 18))
    path.write_bytes(content)
    tracemalloc.start()
    np.testing.assert_array_equal(read_nifti(path).data_XYZ, asymmetric())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 26
    for damaged, reason in ((flipped(content, len(content) - 6), "crc"), (content[:-1], "truncated")):
        path.write_bytes(damaged)
        with pytest.raises(BadInput) as caught:
            read_nifti(path)
        assert caught.value.reason == reason


def test_one_volume_in_4d_is_squeezed_and_many_are_refused_unless_one_is_picked(tmp_path: Path) -> None:
    """A11"""
    path = tmp_path / "scan.nii"
    path.write_bytes(nifti_bytes(asymmetric()[..., None]))
    np.testing.assert_array_equal(read_nifti(path).data_XYZ, asymmetric())
    path.write_bytes(nifti_bytes(np.stack([asymmetric(), 2 * asymmetric()], axis=-1)))
    with pytest.raises(BadInput, match="prepare takes --volume") as caught:
        read_nifti(path)
    assert caught.value.reason == "shape"
    np.testing.assert_array_equal(read_nifti(path, volume_index=1).data_XYZ, 2 * asymmetric())
    with pytest.raises(UsageError, match="holds 2"):
        read_nifti(path, volume_index=2)


def test_wide_integers_are_read_as_float32(tmp_path: Path) -> None:
    """A13: 64-bit integers hold values float32 rounds; a scan's intensities survive that."""
    path = tmp_path / "scan.nii"
    image = nibabel.Nifti1Image(asymmetric("int64") * 10**9, AFFINE, dtype="int64")
    path.write_bytes(image.to_bytes())
    np.testing.assert_allclose(read_nifti(path).data_XYZ, asymmetric() * 1e9, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_refused_or_set_to_zero_on_request(value: float, tmp_path: Path) -> None:
    """A14"""
    data = asymmetric()
    data[3, 4, 5] = value
    path = tmp_path / "scan.nii"
    path.write_bytes(nifti_bytes(data))
    with pytest.raises(BadInput, match="prepare takes --nan zero") as caught:
        read_nifti(path)
    assert caught.value.reason == "nan"
    mended = read_nifti(path, nan="zero")
    assert mended.data_XYZ[3, 4, 5] == 0
    assert any("1 non-finite" in n for n in mended.notes)
    path.write_bytes(nifti_bytes(np.full(SHAPE_XYZ, value, "float32")))
    with pytest.raises(BadInput):
        read_nifti(path, nan="zero")


def test_negative_intensities_are_remarked_on(tmp_path: Path) -> None:
    """A16"""
    path = tmp_path / "scan.nii"
    path.write_bytes(nifti_bytes((asymmetric() * 20 - 1024).astype("int16")))
    assert any("does not look like a T1w" in n for n in read_nifti(path).notes)
    path.write_bytes(nifti_bytes())
    assert read_nifti(path).notes == ()


def test_an_unsaid_orientation_can_be_assumed_and_is_noted(tmp_path: Path) -> None:
    """A17"""
    path = tmp_path / "scan.nii"
    path.write_bytes(nifti_bytes(sform=0, qform=0))
    with pytest.raises(BadInput, match="prepare takes --assume-orientation"):
        read_nifti(path)
    volume = read_nifti(path, assume_orientation=True)
    assert any("assumed" in n for n in volume.notes)


def test_where_sform_and_qform_differ_the_sform_counts_and_it_is_said(tmp_path: Path) -> None:
    """A18"""
    moved = AFFINE.copy()
    moved[0, 3] += 5
    image = nibabel.Nifti1Image(asymmetric(), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(moved, 1)
    path = tmp_path / "scan.nii"
    path.write_bytes(image.to_bytes())
    volume = read_nifti(path)
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert any("disagree" in n for n in volume.notes)


@pytest.mark.parametrize(("factor", "noted"), [(1.005, False), (1.02, True), (0.5, True)])
def test_voxel_sizes_that_contradict_the_affine_are_said(factor: float, noted: bool, tmp_path: Path) -> None:
    payload = nifti_bytes(qform=0)
    struct.pack_into("<f", payload, 80, 2.0 * factor)
    path = tmp_path / "scan.nii"
    path.write_bytes(payload)
    volume = read_nifti(path)
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert any("by pixdim and 2 x 1.5 x 1 mm by the affine" in n for n in volume.notes) is noted


ORIENTATIONS = ["".join(c) for p in itertools.permutations(("LR", "PA", "IS")) for c in itertools.product(*p)]


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_every_storage_order_of_one_image_reads_the_same(axes: str, tmp_path: Path) -> None:
    """A20: all 48 of them, LAS and LPI among them; left stays left."""
    source = nibabel.Nifti1Image(asymmetric(), AFFINE)
    wanted = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(AFFINE), nibabel.orientations.axcodes2ornt(axes)
    )
    stored = source.as_reoriented(wanted)
    assert "".join(nibabel.aff2axcodes(stored.affine)) == axes
    path = tmp_path / "scan.nii.gz"
    nibabel.save(stored, path)
    volume = read_nifti(path)
    np.testing.assert_array_equal(volume.data_XYZ, asymmetric())
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)


def test_an_oblique_image_keeps_its_voxels_and_its_millimetres() -> None:
    """A20: canonical order moves no voxel in the world."""
    angle = np.deg2rad(17)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = AFFINE.copy()
    affine[:3, :3] = turn @ AFFINE[:3, :3] @ np.diag([-1, 1, -1])
    before = Volume(asymmetric(), affine)
    after = canonical(before)
    assert nibabel.aff2axcodes(after.affine) == ("R", "A", "S")
    value = before.data_XYZ[2, 3, 4]
    here = affine @ [2, 3, 4, 1]
    there = np.rint(np.linalg.solve(after.affine, here)).astype(int)[:3]
    assert after.data_XYZ[tuple(there)] == value
    np.testing.assert_allclose(np.sort(after.data_XYZ.ravel()), np.sort(before.data_XYZ.ravel()))


@pytest.mark.parametrize(("code", "factor"), [(1, 1e-3), (3, 1e3)])
def test_units_of_metres_and_microns_are_converted_and_said(code: int, factor: float, tmp_path: Path) -> None:
    """A21"""
    affine = np.diag([2 * factor, 1.5 * factor, factor, 1])
    payload = nifti_bytes(affine=affine)
    payload[123] = code
    path = tmp_path / "scan.nii"
    path.write_bytes(payload)
    volume = read_nifti(path)
    np.testing.assert_allclose(volume.voxel_mm, [2, 1.5, 1], rtol=1e-5)
    assert any("converted to mm" in n for n in volume.notes)


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf])
def test_a_useless_scale_is_no_scale(slope: float, tmp_path: Path) -> None:
    """A23"""
    payload = nifti_bytes(asymmetric("int16"))
    struct.pack_into("<ff", payload, 112, slope, 0)
    path = tmp_path / "scan.nii"
    path.write_bytes(payload)
    np.testing.assert_array_equal(read_nifti(path).data_XYZ, asymmetric())


def test_a_scale_is_applied(tmp_path: Path) -> None:
    payload = nifti_bytes(asymmetric("int16"))
    struct.pack_into("<ff", payload, 112, 0.5, 3)
    path = tmp_path / "scan.nii"
    path.write_bytes(payload)
    np.testing.assert_allclose(read_nifti(path).data_XYZ, asymmetric() * 0.5 + 3)


def test_a_big_endian_file_reads_the_same(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(asymmetric(), AFFINE, nibabel.Nifti1Header(endianness=">"))
    path = tmp_path / "scan.nii"
    path.write_bytes(image.to_bytes())
    assert path.read_bytes()[:4] == b"\0\0\1\x5c"
    np.testing.assert_array_equal(read_nifti(path).data_XYZ, asymmetric())


@pytest.mark.parametrize(
    "name",
    [
        "with space.nii.gz",
        "日本語é.nii.gz",
        "e\u0301.nii.gz",
        "-leading.nii.gz",
        "new\nline.nii.gz",
        "a" * 248 + ".nii.gz",
    ],
)
def test_any_name_will_do(name: str, tmp_path: Path) -> None:
    """A25"""
    path = tmp_path / name
    if len(name.encode()) == 255:  # as long as a name can be: no room for a part file beside it, reading must do
        path.write_bytes(gz(nifti_bytes()))
    else:
        write_nifti(path, asymmetric() / 97, AFFINE)
    assert read_nifti(path).shape_XYZ == SHAPE_XYZ


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _broken(path: Path) -> None:
    path.symlink_to(path.with_name("nobody"))


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (_loop, {"broken_link", "unreadable"}),
        (_broken, {"broken_link"}),
        (lambda p: os.mkfifo(p), {"not_a_file"}),
        (lambda p: p.mkdir(), {"not_a_file"}),
        (lambda p: None, {"missing"}),
    ],
)
def test_what_is_no_file_is_refused_without_waiting(
    make: Callable[[Path], None], reasons: set[str], tmp_path: Path
) -> None:
    """A26"""
    path = tmp_path / "x.nii.gz"
    make(path)
    with pytest.raises(BadInput) as caught:
        read_nifti(path)
    assert caught.value.reason in reasons


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gz(nifti_bytes()))
    path.chmod(0)
    with pytest.raises(BadInput) as caught:
        read_nifti(path)
    assert caught.value.reason == "unreadable"


FUZZED_FIELDS = {  # offset and struct code of what a reader looks at
    "sizeof_hdr": (0, "i"),
    **{f"dim[{i}]": (40 + 2 * i, "h") for i in range(8)},
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    **{f"pixdim[{i}]": (76 + 4 * i, "f") for i in range(8)},
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "B"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    **{f"quatern_{i}": (256 + 4 * i, "f") for i in range(6)},
    **{f"srow_{i}": (280 + 4 * i, "f") for i in range(12)},
}
VALUES = {
    "i": st.integers(-(2**31), 2**31 - 1),
    "h": st.one_of(st.integers(-2, 20), st.integers(-(2**15), 2**15 - 1)),
    "B": st.integers(0, 255),
    "f": st.one_of(st.sampled_from([0.0, -1.0, 1e-30, 1e30, np.nan, np.inf, -np.inf]), st.floats(width=32)),
}
changes = st.lists(
    st.sampled_from(sorted(FUZZED_FIELDS)).flatmap(
        lambda name: st.tuples(st.just(name), VALUES[FUZZED_FIELDS[name][1]])
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=changes, seed=st.integers(0, 3))
def test_whatever_a_header_says_the_scan_is_usable_or_refused(changes: list, seed: int, tmp_path: Path) -> None:
    payload = nifti_bytes(
        np.random.default_rng(seed).integers(0, 255, SHAPE_XYZ).astype(("u1", "i2", "f4", "i4")[seed])
    )
    for name, value in changes:
        offset, code = FUZZED_FIELDS[name]
        struct.pack_into(f"<{code}", payload, offset, value)
    path = tmp_path / "scan.nii"
    path.write_bytes(payload)
    try:
        volume = read_nifti(path)
    except BadInput as error:
        assert error.reason and error.reason != "error"
        return
    assert volume.data_XYZ.ndim == 3 and volume.data_XYZ.dtype == np.float32
    assert np.isfinite(volume.data_XYZ).all()
    assert np.isfinite(volume.affine).all() and abs(np.linalg.det(volume.affine[:3, :3])) > 0
    assert (volume.voxel_mm > 0.1).all() and (volume.voxel_mm < 10).all()
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(WHOLE) - 1), bit=st.integers(0, 7), cut=st.booleans())
def test_any_flipped_bit_or_cut_of_a_compressed_scan_is_found(at: int, bit: int, cut: bool, tmp_path: Path) -> None:
    """A2 and A3 at every place; the ten bytes of gzip's own header hold flags and a time that change no voxel."""
    damaged = bytearray(WHOLE)
    damaged[at] ^= 1 << bit
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(WHOLE[:at] if cut else damaged)
    if not cut and at < 10:
        return
    try:
        found = read_nifti(path)
    except BadInput:
        return
    assert not cut  # bits that fill up deflate's last byte mean nothing
    path.write_bytes(WHOLE)
    np.testing.assert_array_equal(found.data_XYZ, read_nifti(path).data_XYZ)


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(("dtype", "step"), [("float32", 0), ("int16_unit", 1 / 32767), ("uint8_unit", 1 / 255)])
def test_what_is_written_is_read(dtype: str, step: float, tmp_path: Path) -> None:
    data = np.random.default_rng(0).random(SHAPE_XYZ).astype("float32")
    written = write_nifti(tmp_path / "a.nii.gz", data, AFFINE, dtype=dtype)
    volume = read_nifti(written.path)
    np.testing.assert_allclose(volume.data_XYZ, data, atol=step / 2 + 1e-7)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    assert volume.notes == ()
    assert written.bytes == written.path.stat().st_size


def test_integers_are_written_as_they_are(tmp_path: Path) -> None:
    for dtype in ("int16", "uint8"):
        written = write_nifti(tmp_path / f"{dtype}.nii.gz", asymmetric("int64"), AFFINE, dtype=dtype)
        np.testing.assert_array_equal(read_nifti(written.path).data_XYZ, asymmetric())


def test_the_header_is_made_from_nothing(tmp_path: Path) -> None:
    """Promise 5: sform = qform, code 4 or 2, mm, nothing inherited, no name or time in the gzip header."""
    for space, code in (("mni", 4), ("aligned", 2)):
        path = tmp_path / f"{space}.nii.gz"
        grid = GRIDS["4mm"]
        write_nifti(path, np.random.default_rng(0).random(grid.shape_XYZ), grid.affine, dtype="int16_unit", space=space)
        image = nibabel.load(path)
        header = image.header
        assert (int(header["qform_code"]), int(header["sform_code"])) == (code, code)
        np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-4)
        np.testing.assert_allclose(header.get_sform(), grid.affine, atol=1e-5)
        assert header.get_xyzt_units() == ("mm", "sec")
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        assert len(header.extensions) == 0 and int(header["magic"] == b"n+1")
        assert bytes(header["aux_file"]).strip(b"\0") == b"" == bytes(header["db_name"]).strip(b"\0")
        raw = path.read_bytes()
        assert raw[3] == 0 and raw[4:8] == b"\0\0\0\0"  # no name, no comment; no time


def test_equal_images_are_equal_files(tmp_path: Path) -> None:
    data = np.random.default_rng(0).random(SHAPE_XYZ)
    shas = {write_nifti(tmp_path / n, data, AFFINE, dtype="int16_unit").sha256 for n in ("a.nii.gz", "b.nii.gz")}
    assert len(shas) == 1


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    data = asymmetric()
    data[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        write_nifti(tmp_path / "a.nii.gz", data, AFFINE)
    assert list(tmp_path.iterdir()) == []


def test_grids_are_one_box() -> None:
    corners = {}
    for name, grid in GRIDS.items():
        low = np.array(grid.origin_mm) - grid.voxel_mm / 2
        corners[name] = (*low.round(6), *(low + np.array(grid.shape_XYZ) * grid.voxel_mm).round(6))
    assert len(set(corners.values())) == 1
    assert GRIDS["paper"].shape_XYZ == (160, 224, 160)
