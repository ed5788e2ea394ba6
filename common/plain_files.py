"""Files made plain: decompressed, and text in UTF-8, whatever they were; pipes and standard input too."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import mmap
import os
import select
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from common import sources
from common.errors import NOT_UTF8, Fault, UserError, one_line
from common.sources import FileOptions

STREAM_BYTES, STREAM_LINES = 4 << 30, 10_000_000  # of a stream; a longer one may have no end
# how large a compressed file may become: any size up to the first; beyond it, this many times its own size,
# which no texts reach
ANY_SIZE, TIMES_ITS_SIZE = 256 << 20, 200
SECONDS_FOR_A_PIPE = 10
# how files that are not text begin -> what they are, and the way out
SAVE_AS_CSV = "save its table as .csv"
BINARY_FILES = {
    b"PK\x03\x04": ("a zip archive or an Office file", f"unpack it, or {SAVE_AS_CSV}"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Office file", SAVE_AS_CSV),
    b"%PDF-": ("a PDF", "extract its text first"),
    b"PAR1\x15": ("a Parquet file", "let its name end with .parquet"),
    b"\x1f\x8b": ("compressed by gzip", "let its name end with .gz"),
    b"BZh91AY&SY": ("compressed by bzip2", "let its name end with .bz2"),
    b"\xfd7zXZ\x00": ("compressed by xz", "let its name end with .xz"),
    b"\x28\xb5\x2f\xfd": ("compressed by Zstandard", "let its name end with .zst"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it"),
    b"SQLite format 3\x00": ("a SQLite database", SAVE_AS_CSV),
}
HEAD = 256 << 10  # bytes at the beginning of a file from which it is found out how it is written
SAMPLE = 64 << 10  # bytes from which an encoding is found out


def source_name(name: str) -> str:
    """Return the name of a source as messages give it."""
    return "standard input" if name == "-" else name


def temporary_file(folder: str | None) -> BinaryIO:
    """Return a new file without a name in a folder (None: the system's), gone when it is closed."""
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
    return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))


@contextlib.contextmanager
def open_plain(name: str, *, encoding: str | None = None, folder: str | None = None) -> Iterator[BinaryIO]:
    """Yield a file's content, or that of standard input ("-"), decompressed and as UTF-8 in a file
    of the system: the file itself if it is so, else a temporary one in `folder` (None: the
    system's).

    Raises UserError when it can't be read, decompressed or decoded, and when it is UTF-16 and
    `encoding` does not say so.
    """
    source = source_name(name)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open_decompressed(name, source, folder))
        if os.fstat(file.fileno()).st_size == 0:
            advice = "write one text on each line, or rows with their columns"
            raise UserError(f"{source}: it is empty; {advice}")
        if sources.suffix(name) != ".parquet":
            _refuse_binary(os.pread(file.fileno(), 16, 0), source)
            file = stack.enter_context(_as_utf8(file, source, encoding, folder))
        file.seek(0)  # a copy was written to its end
        yield file


@contextlib.contextmanager
def _open_decompressed(name: str, source: str, folder: str | None) -> Iterator[BinaryIO]:
    """Yield a regular file: that of a name if it is one and not compressed, else a copy."""
    is_pipe = name != "-" and sources.kind_of_path(name) == "pipe"
    compression = Path(name).suffix.lower()
    is_compressed = compression in sources.COMPRESSED_SUFFIXES
    with contextlib.ExitStack() as stack:
        file = cast(BinaryIO, sys.stdin.buffer)
        if name != "-":
            try:
                opened = _open_pipe(name) if is_pipe else open(name, "rb")  # noqa: SIM115
                file = stack.enter_context(opened)
            except OSError as error:
                advice = "name a text file, a data file, or - for standard input"
                raise UserError(f"{source}: can't be read: {error.strerror}; {advice}") from error
        if name == "-" or is_pipe or is_compressed:
            copy = stack.enter_context(temporary_file(folder))
            if is_compressed:
                _decompress(file, copy, compression, source)
            else:
                _copy_stream(file, copy, source)
            file = copy
        yield file


def _open_pipe(name: str) -> BinaryIO:
    """Open a pipe. Raises UserError when nothing comes through it: a pipe into which nobody writes
    would be waited for without end.
    """
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(SECONDS_FOR_A_PIPE * 1000):
        os.close(descriptor)
        raise UserError(
            f"{name}: nothing came through this pipe in {SECONDS_FOR_A_PIPE} seconds; name a file,"
            " or - for standard input"
        )
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb")


def _copy_stream(stream: BinaryIO, file: BinaryIO, source: str) -> None:
    size = lines = 0
    while chunk := stream.read(1 << 20):
        size, lines = size + len(chunk), lines + chunk.count(b"\n")
        if size > STREAM_BYTES or lines > STREAM_LINES:
            raise UserError(
                f"{source}: more than {STREAM_LINES:,} lines or {STREAM_BYTES >> 30} GB have come,"
                " and it may have no end; name a file"
            )
        file.write(chunk)
    file.flush()


def _decompress(file: BinaryIO, target: BinaryIO, compression: str, source: str) -> None:
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstandard}
    size = os.fstat(file.fileno()).st_size  # 0 for a pipe
    most = min(max(ANY_SIZE, TIMES_ITS_SIZE * size) if size else STREAM_BYTES, STREAM_BYTES)
    try:
        with openers[compression](file) as content:
            while chunk := content.read(1 << 20):
                target.write(chunk)
                if target.tell() > most:  # to fill the disk may be its aim
                    was = f"its {size:,} bytes" if size else "it"
                    problem = f"decompressed, {was} became more than {most >> 20:,} MB"
                    advice = "if that is right, decompress it yourself and name the plain file"
                    raise UserError(f"{source}: {problem}; {advice}")
        target.flush()
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault
        problem = f"not readable as {compression.removeprefix('.')}: {one_line(error)}"
        raise UserError(f"{source}: {problem}; correct the file") from error


def _open_zstandard(file: BinaryIO) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")


def _refuse_binary(head: bytes, source: str) -> None:
    """Raise UserError for the beginning of a file that holds no text, whatever its name says."""
    for start, (kind, advice) in BINARY_FILES.items():
        if head.startswith(start):
            raise UserError(f"{source}: this is {kind}, and no text; {advice}")


@contextlib.contextmanager
def _as_utf8(file: BinaryIO, source: str, encoding: str | None, folder: str | None) -> Iterator[BinaryIO]:
    """Yield a file with the same text in UTF-8."""
    if encoding is None:
        refuse_utf16(os.pread(file.fileno(), SAMPLE, 0), source)
    if encoding is None or codecs.lookup(encoding).name == "utf-8":
        yield file
        return
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    with (
        open(file.fileno(), encoding=encoding, newline="\n", closefd=False) as text,
        temporary_file(folder) as target,
    ):
        lines = 0
        try:
            for line in text:
                target.write(line.encode())
                lines += 1
        except UnicodeDecodeError as error:  # of a block of lines
            lines += error.object[: error.start].decode(encoding, "ignore").count("\n")
            raise not_encoded(f"{source}, line {lines + 1}", encoding, error) from error
        except UnicodeError as error:  # without the mark that the encoding wants
            problem = f"not {encoding} ({one_line(error)})"
            raise UserError(f"{source}: {problem}; name another --encoding") from error
        target.flush()
        yield target


def not_encoded(location: str, encoding: str, error: UnicodeDecodeError) -> UserError:
    """Return what is wrong with a text that is not in its encoding."""
    byte = f"{error.object[error.start]:#04x}"
    return UserError(f"{location}: not {encoding} (byte {byte}); name another --encoding")


def refuse_utf16(head: bytes, source: str) -> None:
    """Raise UserError for the beginning of a file in UTF-16 or UTF-32: its mark, or zeros where
    these have them, which UTF-8 allows too.
    """
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "utf-32"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        encoding = _encoding_by_zeros(head)
    if encoding is not None:
        advice = f"convert it, or give --encoding {encoding}"
        raise UserError(f"{source}, line 1: not UTF-8 but {encoding.upper()}; {advice}")


def _encoding_by_zeros(head: bytes) -> str | None:
    """Return the encoding of a text without a mark, as the places of its zeros show it: in UTF-32
    half of all bytes, in UTF-16 the upper byte of each digit, comma and line end at least.
    """
    if head.count(0) < 4:
        return None
    zeros = [head[start::4].count(0) / max(len(head) // 4, 1) for start in range(4)]
    if min(zeros[2:]) > 0.9:
        return "utf-32-le"
    if min(zeros[:2]) > 0.9:
        return "utf-32-be"
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    if min(even, odd) > 0.05 * max(even, odd):
        return None
    encoding = "utf-16-be" if even > odd else "utf-16-le"
    try:  # zeros in single places may be no more than damage
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return None
    line_end = "\n".encode(encoding)
    return encoding if line_end in head or max(even, odd) > 0.6 else None


def decode_utf8(content: bytes, source: str) -> str:
    """Return UTF-8 bytes as text, without a byte order mark. Raises UserError, naming `source`,
    for other bytes.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x} at {error.start + 1}"
        raise UserError(
            f"{source}: {NOT_UTF8} (byte {byte}); convert it to UTF-8 first, or name its --encoding"
        ) from error


@dataclass(frozen=True)
class DataFile:
    """A file that is to be read as a table, made plain, and what is known about it."""

    file: BinaryIO  # text is UTF-8
    name: str
    options: FileOptions
    as_text: tuple[str, ...]  # columns whose cells stay as they are written
    folder: str | None  # of temporary files
    # where rows that can't be read are noted; the others get the column ROW. None: the first ends
    # the reading
    faults: list[Fault] | None = None

    def note(self, row: int, problem: str, content: str) -> None:
        """Note a row that can't be read."""
        assert self.faults is not None
        readable = content.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        self.faults.append(Fault(self.name, row, problem, readable))

    def head(self) -> str:
        """Return the beginning of a text."""
        return os.pread(self.file.fileno(), HEAD, 0).decode("utf-8-sig", "replace")

    def text(self, newline: str | None = "", errors: str = "strict") -> io.TextIOWrapper:
        """Return the text from its beginning; line ends stay as they are unless `newline` is None."""
        number = self.file.fileno()
        os.lseek(number, 0, os.SEEK_SET)
        return open(number, encoding="utf-8-sig", newline=newline, errors=errors, closefd=False)

    def mapped(self) -> mmap.mmap:
        """Return the bytes of the file without reading them."""
        return mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)

    def not_utf8(self) -> UserError:
        """Return what is wrong with a text that is no UTF-8, with the line."""
        os.lseek(self.file.fileno(), 0, os.SEEK_SET)
        with open(self.file.fileno(), "rb", closefd=False) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    decode_utf8(line, f"{self.name}, line {number}")
                except UserError as error:
                    return error
        raise AssertionError("every line is UTF-8")
