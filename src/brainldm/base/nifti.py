"""NIfTI in, with every fault found before it can do harm; NIfTI out, with a header made from nothing.

nibabel reads lazily and repairs silently, so the header is checked here before any voxel is read, the voxels are
always read, and whatever had to be assumed is said in the volume's notes.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import nibabel
import numpy as np

from brainldm.base.errors import BadInput, UsageError
from brainldm.base.files import atomic_path, sha256_of, unreadable
from brainldm.base.volume import Volume, canonical

# A 0.5 mm whole head is 512 x 512 x 400, a tenth of this; the largest claims are refused before memory is asked for.
MAX_VOXELS = 1_000_000_000
MAX_BYTES = 8_000_000_000
# Real scans deflate by less than 40 and label maps by less than 300; a gigabyte of zeros by about 1000.
MAX_INFLATION = 600
MIN_VOXEL_MM, MAX_VOXEL_MM = 0.2, 8.0
_UNIT_IN_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_READABLE_KINDS = "iuf"
_HEADER_READ_BYTES = 4096  # of a compressed file: 348 bytes swell from fewer
_START_BYTES = 512  # enough to tell what a file is that is no scan
_PIECE_BYTES = 1 << 12  # swell to 4.2 MB at most: deflate's ratio ends at 1032

Dtype = Literal["float32", "int16", "uint8", "int16_unit", "uint8_unit"]


# ---------------------------------------------------------------------------------------------------------- reading


def read_nifti(
    path: str | Path,
    *,
    nan: Literal["error", "zero"] = "error",
    volume_index: int | None = None,
    assume_orientation: bool = False,
) -> Volume:
    """The scan in a .nii or .nii.gz file as float32 in RAS+ order, nothing resampled.

    `nan` says what to do with voxels that are not finite: refuse the scan, or set them to 0 (noted). `volume_index`
    picks one volume of a 4-D file. `assume_orientation` accepts a header that does not say where the image lies.
    Raises BadInput with a reason code for whatever makes the scan unusable.
    """
    path = Path(path)
    payload, notes = _checked_bytes(path)
    header = _checked_header(path, payload)
    _check_length(path, header, len(payload))
    notes += _header_notes(path, header, assume_orientation)
    try:
        image = nibabel.Nifti1Image.from_bytes(payload)
        raw = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel raises whatever its parts raise
        raise BadInput(
            f"cannot be read as NIfTI ({error}).",
            remedy="Convert the scan again from its source.",
            path=path,
            reason="bad_header",
        ) from error
    raw = _three_dimensional(path, raw, volume_index)
    data_XYZ, value_notes = _usable_values(path, raw, nan)
    affine = np.array(image.affine, dtype=np.float64)
    pixdim = header["pixdim"][1:4].astype(float)
    unit = _UNIT_IN_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    if unit != 1.0:
        affine[:3] *= unit
        pixdim *= unit
        notes.append("header units were not mm; converted to mm")
    _check_affine(path, affine)
    voxel_mm = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if not np.allclose(pixdim, voxel_mm, rtol=0.01, atol=0):
        sizes = [" x ".join(f"{v:.4g}" for v in sizes) for sizes in (pixdim, voxel_mm)]
        notes.append(f"voxels are {sizes[0]} mm by pixdim and {sizes[1]} mm by the affine; the affine was used")
    return canonical(Volume(data_XYZ, affine, tuple(notes + value_notes)))


def read_header(path: Path) -> nibabel.Nifti1Header:
    """The header alone, compressed or not whatever the file's name says; nothing of it is checked. Raises whatever a
    file that has none makes nibabel, zlib or the system raise."""
    with path.open("rb") as file:
        start = file.read(_HEADER_READ_BYTES)
    if start[:2] == b"\x1f\x8b":
        start = zlib.decompressobj(wbits=31).decompress(start, 348)
    return nibabel.Nifti1Header.from_fileobj(io.BytesIO(start[:348]), check=False)


def _checked_bytes(path: Path) -> tuple[bytes, list[str]]:
    """The decompressed file, bounded in size; how it is compressed is read from its content, not its name."""
    check_is_regular_file(path)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            payload = _inflated(path, file) if packed else file.read()
    except OSError as error:
        raise unreadable(error, path) from error
    if not (payload or packed):
        raise BadInput("the file is empty (0 bytes).", remedy="Copy it again.", path=path, reason="empty")
    if packed == path.name.endswith(".gz"):
        return payload, []
    return payload, ["compressed although not named .gz" if packed else "named .gz but not compressed"]


def check_is_regular_file(path: Path) -> None:
    """BadInput for what cannot be opened as a file, or would not end (a pipe); nothing is read."""
    if path.is_symlink() and not path.exists():
        raise BadInput("is a broken link.", remedy="Point it at the scan.", path=path, reason="broken_link")
    if not path.exists():
        raise BadInput("there is no such file.", remedy="Check the path.", path=path, reason="missing")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise BadInput(f"is {kind}, not a NIfTI file.", remedy="Name a file.", path=path, reason="not_a_file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise BadInput(
            f"has {size:,} bytes; the limit is {MAX_BYTES:,}.",
            remedy="Give a single 3-D T1w image.",
            path=path,
            reason="too_large",
        )


def _inflated(path: Path, file: BinaryIO) -> bytes:
    """What is compressed in `file`, no further than (by a piece) where its header says that the voxels end.

    What follows is decompressed too, because the checksum is at the end, but not kept; nothing goes on when more comes
    out than a scan of this size can hold.
    """
    size = path.stat().st_size
    limit = min(MAX_BYTES, max(size * MAX_INFLATION, 1 << 20))
    kept = io.BytesIO()  # grows in place and is given away without a copy, which a list of pieces is not
    wanted, seen = _START_BYTES, 0
    try:
        rest = file.read(_PIECE_BYTES)
        while rest.startswith(b"\x1f\x8b"):  # gzip allows several members one after the other
            inflater = zlib.decompressobj(wbits=31)
            while not inflater.eof:
                if not rest:
                    raise EOFError
                piece = inflater.decompress(rest)
                rest = b"" if inflater.eof else file.read(_PIECE_BYTES)
                seen += len(piece)
                if seen > limit:
                    raise BadInput(
                        f"{size:,} compressed bytes swell to more than {limit:,}; no scan does that.",
                        remedy="Do not trust this file; get the scan from its source.",
                        path=path,
                        reason="too_large",
                    )
                if kept.tell() < wanted:
                    kept.write(piece)
                    if wanted == _START_BYTES:
                        wanted = max(wanted, _claimed_bytes(path, kept.getvalue()))
            rest = inflater.unused_data + file.read(2)  # the next one's magic, whole
    except zlib.error as error:
        raise BadInput(
            f"the compressed data are damaged ({error}).",
            remedy="Copy the file again and compare checksums.",
            path=path,
            reason="crc",
        ) from error
    except EOFError:
        raise BadInput(
            "the compressed data end too early.",
            remedy="Copy the file again: it was cut off.",
            path=path,
            reason="truncated",
        ) from None
    return kept.getvalue()


def _claimed_bytes(path: Path, start: bytes) -> int:
    """Where the voxels end by the header in `start`; 0 where it is none, which is told once nothing else is wrong."""
    try:
        return _end_of_voxels(_checked_header(path, start))
    except BadInput:
        return 0


def _checked_header(path: Path, payload: bytes) -> np.ndarray:
    """The NIfTI-1 header's fields after every check that can be made without the voxels."""
    if len(payload) < 348 or payload[344:347] not in (b"n+1", b"ni1"):
        head = payload[:512].lstrip().lower()
        if payload[4:7] == b"n+2":
            told, fix = "is NIfTI-2, which is for data far larger than a scan.", "Save it as NIfTI-1."
        elif head.startswith((b"<!doctype", b"<html", b"<?xml")):
            told = "is not a NIfTI file; it looks like HTML (an error page saved under this name?)."
            fix = "Download the scan again."
        elif payload[128:132] == b"DICM":
            told, fix = "is DICOM, not NIfTI.", "Convert the series with dcm2niix."
        else:
            told, fix = "is not a NIfTI file (its header lacks the magic).", "Convert it to NIfTI."
        raise BadInput(told, remedy=fix, path=path, reason="not_nifti")
    if payload[344:347] == b"ni1":
        raise BadInput(
            "is the header half of an .hdr/.img pair.",
            remedy="Save the pair as one .nii.gz file.",
            path=path,
            reason="not_nifti",
        )
    order = "<" if struct.unpack("<i", payload[:4])[0] == 348 else ">"
    header = np.frombuffer(payload[:348], dtype=nibabel.nifti1.header_dtype.newbyteorder(order))[0]

    def refuse(what: str, reason: str = "bad_header") -> BadInput:
        return BadInput(what, remedy="Convert the scan again from its source.", path=path, reason=reason)

    if int(header["sizeof_hdr"]) != 348:
        raise refuse(f"header field sizeof_hdr is {int(header['sizeof_hdr'])}, it must be 348.")
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise refuse(f"header field dim[0] is {dim[0]}, it must be 1 to 7.")
    shape = dim[1 : dim[0] + 1]
    if any(n < 1 for n in shape):
        raise refuse(f"header field dim gives the shape {shape}; every size must be at least 1.")
    dtype = nibabel.nifti1.data_type_codes.dtype.get(int(header["datatype"]))
    if dtype is None or dtype.itemsize == 0:
        raise refuse(f"header field datatype is {int(header['datatype'])}, which NIfTI does not define.")
    if dtype.kind not in _READABLE_KINDS:
        raise BadInput(
            f"holds {dtype} voxels; an image of one real number a voxel is needed.",
            remedy="Export the magnitude (or one channel) as int16 or float32.",
            path=path,
            reason="datatype",
        )
    voxels = math.prod(shape)
    if voxels > MAX_VOXELS:
        raise refuse(f"the header claims {shape} = {voxels:,} voxels; the limit is {MAX_VOXELS:,}.", "too_large")
    offset = float(header["vox_offset"])
    if not 348 <= offset <= MAX_BYTES:
        raise refuse(f"header field vox_offset is {offset:g}; voxels begin at 348 or later, within the file.")
    zooms = header["pixdim"][1:4].astype(float)
    if not (np.isfinite(zooms).all() and (zooms[: min(3, len(shape))] > 0).all()):
        raise refuse(f"header field pixdim gives voxel sizes {zooms.tolist()}; they must be above 0.")
    return header


def _end_of_voxels(header: np.ndarray) -> int:
    """How long the file must be, by a header that passed its checks."""
    shape = [int(n) for n in header["dim"][1 : int(header["dim"][0]) + 1]]
    itemsize = nibabel.nifti1.data_type_codes.dtype[int(header["datatype"])].itemsize
    return int(header["vox_offset"]) + math.prod(shape) * itemsize


def _check_length(path: Path, header: np.ndarray, length: int) -> None:
    offset = float(header["vox_offset"])
    if offset > length:
        raise BadInput(
            f"header field vox_offset is {offset:g} in a file of {length:,} bytes.",
            remedy="Convert the scan again from its source.",
            path=path,
            reason="bad_header",
        )
    missing = _end_of_voxels(header) - length
    if missing > 0:
        raise BadInput(
            f"the voxels end {missing:,} bytes too early.",
            remedy="Copy the file again: it was cut off.",
            path=path,
            reason="truncated",
        )


def _header_notes(path: Path, header: np.ndarray, assume_orientation: bool) -> list[str]:
    notes = []
    qform_code, sform_code = int(header["qform_code"]), int(header["sform_code"])
    if qform_code <= 0 and sform_code <= 0:
        if not assume_orientation:
            raise BadInput(
                "the header does not say how the image lies (qform and sform codes are 0), so left and right "
                "cannot be told apart.",
                remedy="Set the orientation at its source, or have it assumed: prepare takes --assume-orientation, "
                "by which the axes are right to left, back to front, down to up.",
                path=path,
                reason="orientation",
            )
        notes.append("orientation assumed: qform and sform codes are 0; the first axis was taken as right to left")
    if qform_code > 0 and sform_code > 0:
        nifti_header = nibabel.Nifti1Header(header.tobytes(), endianness=_endianness(header), check=False)
        try:
            apart_mm = _apart_mm(nifti_header.get_sform(), nifti_header.get_qform())
        except Exception:
            apart_mm = np.inf  # a quaternion that is not one
        if not apart_mm <= 1.0:  # NaN is no agreement
            notes.append("sform and qform disagree by more than 1 mm; the sform was used")
    slope = float(header["scl_slope"])
    if slope == 0 or not np.isfinite(slope):
        if not (slope == 0 or np.isnan(slope)):
            notes.append("scl_slope is not finite; voxels were taken unscaled")
    elif not np.isfinite(float(header["scl_inter"])):
        notes.append("scl_inter is not finite; voxels were taken unscaled")
    return notes


def _endianness(header: np.ndarray) -> str:
    return "<" if header.dtype["dim"].base.byteorder in ("<", "=", "|") else ">"


def _apart_mm(first: np.ndarray, second: np.ndarray) -> float:
    """The largest distance between where two affines put the corners of a head-sized cube."""
    corners = np.array(np.meshgrid([0, 100], [0, 100], [0, 100])).reshape(3, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        moved = (first[:3, :3] - second[:3, :3]) @ corners + (first[:3, 3] - second[:3, 3])[:, None]
    return float(np.sqrt((moved**2).sum(axis=0)).max())


def _three_dimensional(path: Path, raw: np.ndarray, volume_index: int | None) -> np.ndarray:
    while raw.ndim > 3 and raw.shape[-1] == 1:
        raw = raw[..., 0]
    if raw.ndim == 4 and volume_index is not None:
        if not 0 <= volume_index < raw.shape[3]:
            raise UsageError(
                f"volume {volume_index} was asked for; the file holds {raw.shape[3]}, counted from 0.",
                remedy=f"Ask for one of 0 to {raw.shape[3] - 1}.",
                path=path,
            )
        raw = raw[..., volume_index]
    if raw.ndim != 3:
        fix = "Give a single 3-D T1w image."
        if raw.ndim == 4:
            fix = "Save one of its volumes as a file of its own; prepare takes --volume to pick one, from 0."
        raise BadInput(f"has the shape {raw.shape}; a 3-D image is needed.", remedy=fix, path=path, reason="shape")
    if min(raw.shape) < 8:
        raise BadInput(
            f"has the shape {raw.shape}; a brain needs at least 8 voxels along each axis.",
            remedy="Give a 3-D T1w image, not a slice.",
            path=path,
            reason="shape",
        )
    return raw


def _usable_values(path: Path, raw: np.ndarray, nan: str) -> tuple[np.ndarray, list[str]]:
    notes = []
    with np.errstate(over="ignore", invalid="ignore"):
        data_XYZ = raw.astype(np.float32)
    finite = np.isfinite(data_XYZ)
    bad = int(data_XYZ.size - finite.sum())
    if bad:
        if nan == "error" or bad == data_XYZ.size:
            fix = "" if bad == data_XYZ.size else "Mend the scan; prepare takes --nan zero to set those voxels to 0."
            raise BadInput(
                f"{bad:,} of {data_XYZ.size:,} voxels are not finite numbers.",
                remedy=fix,
                path=path,
                reason="nan",
            )
        data_XYZ = np.where(finite, data_XYZ, np.float32(0))
        notes.append(f"{bad} non-finite voxels set to 0")
    low, high = float(data_XYZ.min()), float(data_XYZ.max())
    if not high - low > 1e-6 * max(abs(low), abs(high), 1e-30):
        raise BadInput(
            f"every voxel has the value {low:g}; there is no image.",
            remedy="Check the conversion of this scan.",
            path=path,
            reason="constant",
        )
    if low < -0.25 * high:
        notes.append(f"intensities reach from {low:g} to {high:g}: this does not look like a T1w scan")
    return data_XYZ, notes


def _check_affine(path: Path, affine: np.ndarray) -> None:
    fix = "Correct the header's orientation at its source."
    linear = affine[:3, :3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(linear)) < 1e-9:
        raise BadInput(
            "the affine is singular or not finite, so the image lies nowhere.",
            remedy=fix,
            path=path,
            reason="affine",
        )
    voxel_mm = np.sqrt((linear**2).sum(axis=0))
    if voxel_mm.min() < MIN_VOXEL_MM or voxel_mm.max() > MAX_VOXEL_MM:
        sizes = " x ".join(f"{v:g}" for v in voxel_mm)
        raise BadInput(
            f"voxels are {sizes} mm; between {MIN_VOXEL_MM:g} and {MAX_VOXEL_MM:g} mm are expected.",
            remedy="Check the units in the header.",
            path=path,
            reason="affine",
        )
    directions = linear / voxel_mm
    if np.abs(directions.T @ directions - np.eye(3)).max() > 0.05:
        raise BadInput("the affine is sheared.", remedy=fix, path=path, reason="affine")


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Written:
    """What a manifest states about a file."""

    path: Path
    bytes: int
    sha256: str


def write_nifti(
    path: str | Path,
    data_XYZ: np.ndarray,
    affine: np.ndarray,
    *,
    dtype: Dtype = "float32",
    space: Literal["mni", "aligned"] = "mni",
    description: str = "",
) -> Written:
    """Writes a .nii.gz with a header made from nothing: sform = qform, code 4 (`mni`) or 2 (`aligned`), mm.

    `int16_unit` and `uint8_unit` store 0..1 with the scale in the header; values outside are clipped. The bytes are a
    function of the arguments alone. The file is read back before it gets its name.
    """
    path = Path(path)
    stored, slope = _encode(np.asarray(data_XYZ), dtype)
    image = nibabel.Nifti1Image(stored, None)
    code = 4 if space == "mni" else 2
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    header = image.header
    header.set_xyzt_units("mm", "sec")
    header["descrip"] = description.encode("ascii", "replace")[:79]
    header["cal_min"], header["cal_max"] = (0, 1) if dtype.endswith("_unit") else (0, 0)
    payload = bytearray(image.to_bytes())
    # nibabel has no way to keep the stored integers and set a scale: the two fields are at bytes 112 and 116.
    payload[112:120] = struct.pack("<ff", slope, 0.0)
    compressed = _deterministic_gzip(bytes(payload))
    with atomic_path(path) as part:
        part.write_bytes(compressed)
        if gzip.decompress(part.read_bytes()) != bytes(payload):
            raise OSError(5, f"what was read back differs from what was written: {os.fspath(path)}")
    return Written(path, len(compressed), sha256_of(path))


def _encode(data_XYZ: np.ndarray, dtype: Dtype) -> tuple[np.ndarray, float]:
    if not np.isfinite(data_XYZ).all():
        raise ValueError("the image holds values that are not finite numbers; nothing was written")
    if dtype == "int16_unit":
        return np.rint(np.clip(data_XYZ, 0, 1) * 32767).astype("<i2"), 1 / 32767
    if dtype == "uint8_unit":
        return np.rint(np.clip(data_XYZ, 0, 1) * 255).astype(np.uint8), 1 / 255
    return data_XYZ.astype(np.dtype(dtype).newbyteorder("<")), 1.0


def _deterministic_gzip(payload: bytes) -> bytes:
    """gzip without a name or a time of writing, so that equal images are equal files."""
    deflater = zlib.compressobj(6, zlib.DEFLATED, 31)
    return deflater.compress(payload) + deflater.flush()
