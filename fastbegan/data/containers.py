"""What holds pictures: folders, tar, zip, TFRecord and parquet files. Each has them in an order of its own."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..errors import UserError
from . import tfrecord
from .decode import MAX_BYTES
from .folder import HEAD, HIDDEN, TARS, LeftOut, Listing, is_image, kind_of
from .workers import Entry

_COMPRESSED: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_DAMAGE = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)
_LOCAL = struct.Struct("<4s22x2H")  # a zip member's own header: its mark, and the lengths of name and extra field
_COLUMNS = ("image", "img")
_ROWS = 32  # of a parquet file, read at once
_LINKS = "links in an archive"


@dataclass
class Container:
    """The pictures of a folder or of an archive."""

    path: Path
    identity: Sequence[tuple[object, ...]]
    """Rows that tell its content from another one's, wherever it lies."""
    entries: list[Entry] = field(default_factory=list)
    """Its pictures, where each can be read by itself."""
    left_out: list[LeftOut] = field(default_factory=list)
    """What is not taken. Of a `stream` it is complete when that has been read."""
    stream: Callable[[], Iterator[Entry | LeftOut]] | None = None
    """Reads an archive without random access from front to back."""
    count: int | None = 0
    """Pictures in the stream; None where only reading tells."""

    @property
    def total(self) -> int | None:
        """Number of pictures, broken ones included; None where only reading tells."""
        return len(self.entries) if self.stream is None else self.count

    def read(self) -> Iterator[Entry]:
        """Yield all pictures, those of a stream with their content."""
        yield from self.entries
        if self.stream is not None:
            self.left_out.clear()
            for item in self.stream():
                if isinstance(item, LeftOut):
                    self.left_out.append(item)
                else:
                    yield item


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
    return Container(
        folder,
        [(file.path, file.size) for file in listing.images],
        [Entry(place + file.path, place + file.path, reason=file.reason) for file in listing.images],
        listing.left_out(folder),
    )


def _records(path: Path) -> Container:
    entries, left_out = [], []
    for number, picture in enumerate(tfrecord.pictures(path)):
        name = f"{path}:{number}"
        if isinstance(picture, list):
            kind = f"records without {tfrecord.KEY.decode()} (they have {', '.join(picture)})"
            left_out.append(LeftOut(name, kind))
        else:
            entries.append(
                Entry(name, reason=picture) if isinstance(picture, str) else Entry(name, str(path), *picture)
            )
    return _indexed(path, entries, left_out)


def _indexed(path: Path, entries: list[Entry], left_out: list[LeftOut]) -> Container:
    """An archive of ranges of bytes."""
    return Container(path, [(entry.offset, entry.length) for entry in entries], entries, left_out)


def _tar(path: Path) -> Container:
    """As webdataset writes them; of one that is not compressed, this reads the headers only."""
    try:
        with path.open("rb") as file:
            start = file.read(6)
            file.seek(max(0, path.stat().st_size - 8))
            end = file.read()  # of gzip: checksum and length
    except OSError as error:
        raise UserError(f"data {path} cannot be read ({error.strerror})") from None
    for mark, decompress in _COMPRESSED.items():
        if start.startswith(mark):
            identity = [(path.stat().st_size, end.hex())]
            return Container(path, identity, stream=partial(_unpacked, path, decompress), count=None)
    entries, left_out = [], []
    try:
        with path.open("rb") as file, tarfile.open(path, "r:") as tar:
            for member in tar:
                kind = _kind(member, partial(_at, file, member.offset_data, HEAD))
                if kind:
                    left_out.append(LeftOut(f"{path}:{member.name}", kind))
                elif kind is None:
                    entries.append(Entry(f"{path}:{member.name}", str(path), member.offset_data, member.size))
            file.seek(tar.offset)
            _require_end(path, file, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"data {path} cannot be read as a tar file: {error}") from None
    return _indexed(path, entries, left_out)


def _unpacked(path: Path, decompress: Callable[[Path], Any]) -> Iterator[Entry | LeftOut]:
    """The members of a compressed tar file."""
    try:
        with decompress(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else io.BytesIO()
                start = content.read(HEAD) if content is not None else b""
                name, kind = f"{path}:{member.name}", _kind(member, partial(bytes, start))
                if kind:
                    yield LeftOut(name, kind)
                elif kind is None and content is not None:
                    yield _loaded(name, member.size, partial(_rest, start, content))
            assert tar.fileobj is not None
            _require_end(path, tar.fileobj, tar.offset)
            while file.read(1 << 20):  # to the checksum
                pass
    except _DAMAGE as error:
        raise UserError(f"data {path} cannot be read as a compressed tar file: {error}") from None


def _rest(start: bytes, content: IO[bytes]) -> bytes:
    return start + content.read()


def _at(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _require_end(path: Path, file: Any, start: int) -> None:
    """Raise UserError where anything but zeros follows: tarfile takes a damaged header for the end of the archive."""
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise UserError(f"data {path} is damaged: what follows byte {start:,} is no entry of a tar file")


def _kind(member: tarfile.TarInfo, head: Callable[[], bytes]) -> str | None:
    """None for a picture, the kind of what is left out, nothing for a folder."""
    if member.isdir():
        return ""
    if _is_hidden(member.name):
        return HIDDEN
    if member.issym() or member.islnk():
        return _LINKS
    if not member.isreg() or member.issparse():
        return "sparse or special files in a tar"
    return None if is_image(member.name, head) else kind_of(member.name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in PurePosixPath(name).parts)


def _loaded(name: str, size: int, read: Callable[[], bytes]) -> Entry:
    """A picture with its content, unless it is too large."""
    if size > MAX_BYTES:
        return Entry(name, reason=f"{size / 2**20:,.0f} MiB; accepted: up to {MAX_BYTES >> 20} MiB")
    return Entry(name, data=read())


def _zip(path: Path) -> Container:
    """Members that are stored as they are can be read by themselves; else the file is read from front to back."""
    pictures, left_out = [], []
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for member in archive.infolist():
                if member.is_dir():
                    continue
                if kind := _zip_kind(archive, member):
                    left_out.append(LeftOut(f"{path}:{member.filename}", kind))
                else:
                    pictures.append(member)
            if all(member.compress_type == zipfile.ZIP_STORED and not _is_encrypted(member) for member in pictures):
                return _indexed(path, [_stored(path, file, member) for member in pictures], left_out)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"data {path} cannot be read as a zip file: {error}") from None
    identity = [(member.CRC, member.file_size) for member in pictures]
    stream = partial(_inflated, path, pictures, left_out)
    return Container(path, identity, left_out=list(left_out), stream=stream, count=len(pictures))


def _zip_kind(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    """The kind of a member that is left out, nothing for a picture."""

    def head() -> bytes:
        try:
            with archive.open(member) as content:
                return content.read(HEAD)
        except (RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError):  # encrypted, or damaged
            return b""

    if _is_hidden(member.filename):
        return HIDDEN
    if stat.S_ISLNK(member.external_attr >> 16):
        return _LINKS
    return "" if is_image(member.filename, head) else kind_of(member.filename)


def _is_encrypted(member: zipfile.ZipInfo) -> bool:
    return bool(member.flag_bits & 1)


def _stored(path: Path, file: IO[bytes], member: zipfile.ZipInfo) -> Entry:
    """The place of a member's content, behind its own header."""
    name, header = f"{path}:{member.filename}", _at(file, member.header_offset, _LOCAL.size)
    if len(header) < _LOCAL.size or (fields := _LOCAL.unpack(header))[0] != b"PK\x03\x04":
        return Entry(name, reason="its place in the zip file holds no member")
    return Entry(name, str(path), member.header_offset + _LOCAL.size + fields[1] + fields[2], member.file_size)


def _inflated(path: Path, pictures: list[zipfile.ZipInfo], left_out: list[LeftOut]) -> Iterator[Entry | LeftOut]:
    """The members of a zip file that compresses some of them."""
    yield from left_out
    with zipfile.ZipFile(path) as archive:
        for member in pictures:
            name = f"{path}:{member.filename}"
            if _is_encrypted(member):
                yield Entry(name, reason="encrypted")
                continue
            try:
                yield _loaded(name, member.file_size, partial(archive.read, member))
            except (NotImplementedError, zipfile.BadZipFile, *_DAMAGE) as error:
                yield Entry(name, reason=str(error))


def _parquet(path: Path) -> Container:
    """As Hugging Face stores data sets: a column of encoded pictures, or of records with their bytes and path."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"data {path} needs pyarrow: pip install 'fastbegan[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
        rows, columns = file.metadata.num_rows, file.schema_arrow.names
        file.close()
    except Exception as error:  # pyarrow's errors share no base but ValueError and OSError
        raise UserError(f"data {path} cannot be read as a parquet file: {str(error).splitlines()[0]}") from None
    column = next((name for name in _COLUMNS if name in columns), None)
    if column is None:
        kind = f"parquet files without a column {' or '.join(_COLUMNS)} (they have {', '.join(columns)})"
        return Container(path, [(rows,)], left_out=[LeftOut(str(path), kind)])
    identity = [(rows, path.stat().st_size)]
    return Container(path, identity, stream=partial(_rows, parquet, path, column), count=rows)


def _rows(parquet: Any, path: Path, column: str) -> Iterator[Entry]:
    """The pictures of a parquet file's column."""
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield _cell(f"{path}:{number}", value)
                    number += 1
    except (OSError, importlib.import_module("pyarrow").ArrowException) as error:
        raise UserError(f"data {path} is damaged behind row {number}: {str(error).splitlines()[0]}") from None


def _cell(name: str, value: Any) -> Entry:
    """A picture from a value of the column."""
    if isinstance(value, dict):
        name = f"{name} {value['path']}" if value.get("path") else name
        value = value.get("bytes")
    if not isinstance(value, bytes):
        return Entry(name, reason="the row has no bytes" if value is None else f"the row has a {type(value).__name__}")
    return _loaded(name, len(value), lambda: value)
