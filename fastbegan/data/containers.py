"""What holds pictures: folders, tar, zip, TFRecord and parquet files. Each has them in an order of its own."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import lzma
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..errors import UserError
from . import tfrecord
from .decode import MAX_BYTES
from .folder import FIRST_BYTES, HIDDEN, TARS, LeftOut, Listing, is_image, kind_of
from .workers import Entry

_COMPRESSED: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_LOCAL = struct.Struct("<4s22x2H")  # a zip member's own header: its mark, and the lengths of name and extra field
_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp")  # in any case
_ROWS = 32  # of a parquet file, read at once
_NAMED = 5  # keys or columns that a line names
_LINKS, _SPECIAL = "links in an archive", "sparse or special files in a tar"


@dataclass
class Container:
    """The pictures of a folder or of an archive."""

    path: Path
    identity: Sequence[tuple[object, ...]]
    """Rows that tell its content from another one's, wherever it lies."""
    room: int
    """Bytes of its pictures; of an archive without random access, all of its bytes."""
    entries: list[Entry] = field(default_factory=list)
    """Its pictures, where each can be read by itself."""
    left_out: list[LeftOut] = field(default_factory=list)
    """What is not taken. Of a `stream` it is complete when that has been read."""
    stream: Callable[[], Iterator[Entry]] | None = None
    """Reads an archive without random access from front to back, contents included."""
    count: int | None = 0
    """Pictures in the stream; None where only reading tells."""

    @property
    def total(self) -> int | None:
        """Number of pictures, broken ones included; None where only reading tells."""
        return len(self.entries) if self.stream is None else self.count

    def read(self) -> Iterator[Entry]:
        """Yield all pictures, those of a stream with their content."""
        yield from self.entries if self.stream is None else self.stream()


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever libraries raise on damaged archives into a UserError that names the archive."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # among them errors of tarfile, zipfile, four decompressors and pyarrow
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"data {path} cannot be read as a {kind} file: {why}") from None


def open_archive(path: Path) -> Container:
    """Open an archive by its name. Raises UserError where it is damaged, or needs a package that is missing."""
    name = path.name.lower()
    if name.endswith(TARS):
        return _tar(path)
    if name.endswith(".zip"):
        return _zip(path)
    return _parquet(path) if name.endswith(".parquet") else _records(path)


def from_listing(folder: Path, listing: Listing) -> Container:
    """The image files of a folder."""
    place = f"{folder}{os.sep}"
    entries = [Entry(place + file.path, place + file.path, reason=file.reason) for file in listing.images]
    identity = [(file.path, file.size) for file in listing.images]
    room = sum(file.size for file in listing.images)
    return Container(folder, identity, room, entries, listing.left_out(folder))


def _indexed(path: Path, entries: list[Entry], left_out: list[LeftOut]) -> Container:
    """An archive of ranges of bytes."""
    places = [(entry.offset, entry.length) for entry in entries]
    return Container(path, places, sum(entry.length or 0 for entry in entries), entries, left_out)


def _records(path: Path) -> Container:
    entries, left_out = [], []
    for number, picture in enumerate(tfrecord.pictures(path)):
        name = f"{path}:{number}"
        if isinstance(picture, str):
            entries.append(Entry(name, reason=picture))
        elif isinstance(picture, list):
            left_out.append(LeftOut(name, f"records without {tfrecord.KEY.decode()}, which have {_few(picture)}"))
        else:
            entries.append(Entry(name, str(path), *picture))
    return _indexed(path, entries, left_out)


def _few(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _tar(path: Path) -> Container:
    """As webdataset writes them; of one that is not compressed, this reads the headers only."""
    left_out: list[LeftOut] = []
    with _reading(path, "tar"):
        size = path.stat().st_size
        with path.open("rb") as file:
            start, end = file.read(6), _at(file, max(0, size - 8), 8)  # gzip ends with a checksum and a length
            for mark, decompress in _COMPRESSED.items():
                if start.startswith(mark):
                    stream = partial(_unpacked, path, decompress, left_out)
                    return Container(path, [(size, end.hex())], size, [], left_out, stream, count=None)
            entries: list[Entry] = []
            with tarfile.open(path, "r:") as tar:
                for member in _members(tar):
                    kind = _tar_kind(member, partial(_at, file, member.offset_data, FIRST_BYTES))
                    name = f"{path}:{member.name}"
                    if kind:
                        left_out.append(LeftOut(name, kind))
                    else:
                        entries.append(Entry(name, str(path), member.offset_data, member.size))
                file.seek(tar.offset)
                _check_end(path, file, tar.offset, left_out)
    return _indexed(path, entries, left_out)


def _unpacked(path: Path, decompress: Callable[[Path], Any], left_out: list[LeftOut]) -> Iterator[Entry]:
    """The pictures of a compressed tar file; lists what is left out anew."""
    left_out.clear()
    with _reading(path, "compressed tar"), decompress(path) as file:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for member in _members(tar):
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                start = content.read(FIRST_BYTES) if content is not None else b""
                name, kind = f"{path}:{member.name}", _tar_kind(member, partial(bytes, start))
                if kind:
                    left_out.append(LeftOut(name, kind))
                elif content is not None:
                    yield _loaded(name, member.size, partial(_rest, start, content))
            assert tar.fileobj is not None
            _check_end(path, tar.fileobj, tar.offset, left_out)
        while file.read(1 << 20):  # to the checksum
            pass


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members but folders; a tar file keeps a record of each, which may be a million."""
    for member in tar:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        if not member.isdir():
            yield member


def _rest(start: bytes, content: IO[bytes]) -> bytes:
    return start + content.read()


def _at(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _check_end(path: Path, file: Any, start: int, left_out: list[LeftOut]) -> None:
    """Raise UserError where anything but zeros follows, and tell where nothing does.

    tarfile takes a damaged header, and the end of the file, for the end of the archive.
    """
    length = file.tell() - start
    while block := file.read(1 << 20):
        length += len(block)
        if block.strip(b"\0"):
            raise UserError(f"data {path} is damaged: what follows byte {start:,} is no entry of a tar file")
    if not length:
        left_out.append(LeftOut(str(path), "what may have followed in a tar file without an end mark"))


def _tar_kind(member: tarfile.TarInfo, first_bytes: Callable[[], bytes]) -> str:
    special = not member.isreg() or member.issparse()
    return _kind(member.name, _LINKS if member.issym() or member.islnk() else _SPECIAL if special else "", first_bytes)


def _kind(name: str, other: str, first_bytes: Callable[[], bytes]) -> str:
    """Why a member of an archive is left out, nothing for a picture; `other` is the kind of what is no plain file."""
    if _is_hidden(name):
        return HIDDEN
    return other or ("" if is_image(name, first_bytes) else kind_of(name))


def _is_hidden(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts  # some Windows programs write backslashes
    return any(part.startswith(".") and part not in (".", "..") for part in parts)


def _loaded(name: str, size: int, read: Callable[[], bytes]) -> Entry:
    """A picture with its content, unless it is too large."""
    if size > MAX_BYTES:
        return Entry(name, reason=f"{size / 2**20:,.0f} MiB; accepted: up to {MAX_BYTES >> 20} MiB")
    return Entry(name, data=read())


def _zip(path: Path) -> Container:
    """Members that are stored as they are can be read by themselves; else the file is read from front to back."""
    pictures, left_out = [], []
    with _reading(path, "zip"), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            if member.is_dir():
                continue
            link = _LINKS if stat.S_ISLNK(member.external_attr >> 16) else ""
            if kind := _kind(member.filename, link, partial(_first_bytes, archive, member)):
                left_out.append(LeftOut(f"{path}:{member.filename}", kind))
            else:
                pictures.append(member)
        if all(member.compress_type == zipfile.ZIP_STORED and not _is_encrypted(member) for member in pictures):
            return _indexed(path, [_stored(path, file, member) for member in pictures], left_out)
    identity = [(member.CRC, member.file_size) for member in pictures]
    room = sum(member.compress_size for member in pictures)
    return Container(path, identity, room, [], left_out, partial(_inflated, path, pictures), len(pictures))


def _first_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(member) as content:
            return content.read(FIRST_BYTES)
    except Exception:  # encrypted, or damaged in the way of any of four compressions: no picture that anything tells
        return b""


def _is_encrypted(member: zipfile.ZipInfo) -> bool:
    return bool(member.flag_bits & 1)


def _stored(path: Path, file: IO[bytes], member: zipfile.ZipInfo) -> Entry:
    """The place of a member's content, behind its own header."""
    name, header = f"{path}:{member.filename}", _at(file, member.header_offset, _LOCAL.size)
    if len(header) < _LOCAL.size or (fields := _LOCAL.unpack(header))[0] != b"PK\x03\x04":
        return Entry(name, reason="its place in the zip file holds no member")
    return Entry(name, str(path), member.header_offset + _LOCAL.size + fields[1] + fields[2], member.file_size)


def _inflated(path: Path, pictures: list[zipfile.ZipInfo]) -> Iterator[Entry]:
    """The pictures of a zip file that compresses some of them; a damaged one costs no other."""
    with _reading(path, "zip"), zipfile.ZipFile(path) as archive:
        for member in pictures:
            name = f"{path}:{member.filename}"
            try:
                if _is_encrypted(member):
                    raise ValueError("encrypted")
                entry = _loaded(name, member.file_size, partial(archive.read, member))
            except Exception as error:
                entry = Entry(name, reason=str(error) or type(error).__name__)
            yield entry


def _parquet(path: Path) -> Container:
    """As Hugging Face stores data sets: a column of encoded pictures, or of records with their bytes and path."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"data {path} needs pyarrow: pip install 'fastbegan[parquet]'") from None
    with _reading(path, "parquet"), parquet.ParquetFile(path) as file:
        rows, columns = file.metadata.num_rows, file.schema_arrow.names
        size = path.stat().st_size
    column = next((column for name in _COLUMNS for column in columns if column.lower() == name), None)
    if column is None:
        kind = f"parquet files without a column of pictures ({', '.join(_COLUMNS)}), which have {_few(columns)}"
        return Container(path, [(rows,)], 0, left_out=[LeftOut(str(path), kind)])
    return Container(path, [(rows, size)], size, stream=partial(_rows, parquet, path, column), count=rows)


def _rows(parquet: Any, path: Path, column: str) -> Iterator[Entry]:
    """The pictures of a parquet file's column."""
    number = 0
    with _reading(path, "parquet"), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _cell(f"{path}:{number}", value)
                number += 1


def _cell(name: str, value: Any) -> Entry:
    """A picture from a value of the column."""
    if isinstance(value, dict):
        name = f"{name} {value['path']}" if value.get("path") else name
        value = value.get("bytes")
    if not isinstance(value, bytes):
        return Entry(name, reason="the row has no bytes" if value is None else f"the row has a {type(value).__name__}")
    return _loaded(name, len(value), partial(bytes, value))
