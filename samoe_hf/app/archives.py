"""Zip files that came from outside: looked at before anything of them is unpacked."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from samoe_hf.data.video_io import SampleError

from .limits import Limits

# Files in a zip, beside one for each frame. Each costs memory before a byte of it is unpacked.
MAX_OTHER_FILES = 1000
PART = 2**20


class Archive:
    """An opened zip: names of its files -> their bytes. Made by [`open_archive`]."""

    def __init__(self, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]):
        self._archive, self._entries = archive, entries

    @property
    def names(self) -> list[str]:
        """Of its files, as paths below the archive, in the archive's order."""
        return list(self._entries)

    def read(self, name: str, max_bytes: int) -> bytes:
        """A file's bytes.

        Raises:
            SampleError: there is no such file, it is damaged, or holds more bytes than `max_bytes`.
        """
        return b"".join(self._parts(name, max_bytes))

    def unpack(self, name: str, target: Path, max_bytes: int) -> None:
        """Writes a file of the archive to `target`; errors as in [`read`]."""
        parts = self._parts(name, max_bytes)
        with target.open("wb") as file:
            file.writelines(parts)

    def _parts(self, name: str, max_bytes: int) -> Iterator[bytes]:
        if name not in self._entries:
            raise SampleError(f"the zip has no file {name[:80]}")
        total = 0
        try:
            with self._archive.open(self._entries[name]) as file:
                while part := file.read(PART):
                    total += len(part)  # what the directory says may be a lie
                    if total > max_bytes:
                        raise SampleError(f"{name} in the zip is larger than {max_bytes} bytes")
                    yield part
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            raise SampleError(f"{name} in the zip cannot be read ({error})") from error


@contextmanager
def open_archive(path: Path, limits: Limits) -> Iterator[Archive]:
    """Opens a zip after a look at its directory; nothing is unpacked.

    Folders, hidden files and what macOS adds (`__MACOSX`) are left out.

    Raises:
        SampleError: it is no zip, a name leads out of it or comes twice, a file is encrypted or a link, or there are
            too many files or bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield Archive(archive, _checked_entries(archive.infolist(), limits))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise SampleError(f"this is no zip that can be read ({error})") from error


def _checked_entries(infos: list[zipfile.ZipInfo], limits: Limits) -> dict[str, zipfile.ZipInfo]:
    if len(infos) > limits.frames + MAX_OTHER_FILES:
        raise SampleError(f"the zip has {len(infos)} files; {limits.frames + MAX_OTHER_FILES} are the most")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        parts = PurePosixPath(info.filename).parts
        if info.filename.startswith("/") or ".." in parts or "\\" in info.filename or "\0" in info.filename:
            raise SampleError(f"{info.filename!r} in the zip is no path within it")
        if info.is_dir() or any(part.startswith((".", "__MACOSX")) for part in parts):
            continue
        if info.flag_bits & 1:
            raise SampleError(f"{info.filename} in the zip is encrypted")
        if (info.external_attr >> 16) & 0o170000 == 0o120000:
            raise SampleError(f"{info.filename} in the zip is a link")
        if info.filename in entries:
            raise SampleError(f"{info.filename} is in the zip twice")
        entries[info.filename] = info
    total = sum(info.file_size for info in entries.values())
    if total > limits.upload_bytes:
        raise SampleError(f"the zip holds {total} bytes when it is unpacked; {limits.upload_bytes} are the most")
    return entries
