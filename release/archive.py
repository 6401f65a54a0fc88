"""Packs a directory so that the same files give the same bytes.

    python3 release/archive.py DIRECTORY ARCHIVE.tar.gz|ARCHIVE.zip

Order, owners, modes and times are fixed; the time is SOURCE_DATE_EPOCH.
"""

import gzip
import os
import stat
import sys
import tarfile
import time
import zipfile
from pathlib import Path

# Of zlib: the higher ones take twice as long for a hundredth.
LEVEL = 6


def mode(path: Path) -> int:
    """What anybody may do with a file, whatever the umask was."""
    if path.is_dir() or path.stat().st_mode & stat.S_IXUSR:
        return 0o755
    return 0o644


def entries(directory: Path) -> list[Path]:
    """The directory and all that is in it."""
    return [directory, *sorted(directory.rglob("*"), key=lambda path: path.relative_to(directory).as_posix())]


def write_tar(directory: Path, archive: Path, when: int) -> None:
    """Writes a tar file compressed by gzip, whose header has no time and no name."""
    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", LEVEL, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for path in entries(directory):
            entry = tar.gettarinfo(path, path.relative_to(directory.parent).as_posix())
            # Two names of one file would be a link or a copy, as it happens to be here.
            if entry.islnk():
                entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", path.stat().st_size
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = when
            entry.mode = 0o777 if entry.issym() else mode(path)
            if entry.isreg():
                with path.open("rb") as file:
                    tar.addfile(entry, file)
            else:
                tar.addfile(entry)


def write_zip(directory: Path, archive: Path, when: int) -> None:
    """Writes a zip file, whose times are in UTC."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as packed:
        for path in entries(directory):
            if path.is_dir():
                continue
            entry = zipfile.ZipInfo(path.relative_to(directory.parent).as_posix(), time.gmtime(when)[:6])
            entry.compress_type = zipfile.ZIP_DEFLATED
            # Unix, on whatever system this runs.
            entry.create_system = 3
            entry.external_attr = (stat.S_IFREG | mode(path)) << 16
            packed.writestr(entry, path.read_bytes(), compresslevel=LEVEL)


def main() -> None:
    """The command line."""
    directory, archive = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    write = write_zip if archive.suffix == ".zip" else write_tar
    write(directory, archive, int(os.environ["SOURCE_DATE_EPOCH"]))


if __name__ == "__main__":
    main()
