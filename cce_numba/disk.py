"""Files that are kept between processes and hold code: where they are, who may have written them, and how they are written.

A process runs what it finds in these files. So it takes none that another user may have written. A file and its directory must
belong to the user who runs the process, and nobody else may be allowed to write to them. What fails this test is left alone,
and one warning tells why. Directories that are made here are for their owner alone (mode 0700), and so are files (mode 0600).

Two environment variables name directories:

    CCE_CACHE_DIR           read and written. Without it, that is `~/.cache/cce_numba`. If it is empty, nothing is kept.
    CCE_SHARED_CACHE_DIR    read after the other, and never written. It may belong to another user, like an administrator or
                            the builder of a container: the caller trusts that user by naming the directory. Only its owner may
                            be able to write to it. There is none without the variable.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

MAX_FILE_BYTES = 64 * 2**20  # no larger file is read; a kernel takes some 100 KiB
_log = logging.getLogger(__name__)
_warned: set[str] = set()


class Untrusted(OSError):
    """Somebody else may have written this file, or may write to its directory."""


def directory() -> Path | None:
    """Where files are read and written, or would be; None if nothing is kept, or there is no home directory."""
    if (chosen := os.environ.get("CCE_CACHE_DIR")) is not None:
        return Path(chosen) if chosen else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cce_numba"
    except RuntimeError as error:  # there is no home
        _log.debug("nothing is kept: %s", error)
        return None


def shared_directory() -> Path | None:
    """Where files are read that the caller says are trusted; None if the caller says nothing."""
    return Path(chosen) if (chosen := os.environ.get("CCE_SHARED_CACHE_DIR")) else None


def places(path: Path | None) -> Iterator[tuple[Path, bool]]:
    """The files to look for in place of `path`: itself, then the shared one of its name. Each with whether it is shared."""
    if path is None:
        return
    shared = shared_directory()
    if path.parent != shared:
        yield path, False
    if shared is not None:
        yield shared / path.name, True


def why_untrusted(path: Path, *, shared: bool = False) -> str | None:
    """Why a directory or a file must not be used, with the way out, or None if it may be, or is not there.

    shared: it may belong to another user.
    """
    try:
        return _why_untrusted(path, os.stat(path), shared)
    except OSError:
        return None


def read(path: Path, *, shared: bool = False, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The content of a file.

    The directory is looked at first, and the file is opened in the very directory that was looked at. So nobody can exchange
    one of them in between. Raises `Untrusted`, and OSError for what cannot be read or is larger than `max_bytes`.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    with contextlib.ExitStack() as stack:
        if os.open in os.supports_dir_fd:
            place = os.open(path.parent, flags | os.O_DIRECTORY)
            stack.callback(os.close, place)
            _require_trust(path.parent, os.fstat(place), shared)
            # Without O_NONBLOCK, opening a pipe would wait for its writer.
            number = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
        else:
            number = os.open(path, flags)
        file = stack.enter_context(open(number, "rb"))
        status = os.fstat(number)
        _require_trust(path, status, shared)
        if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
            raise OSError(f"{path} is no file of at most {max_bytes} bytes")
        return file.read(max_bytes + 1)


def write(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file whole or not at all, since other processes may read or write it at the same time.

    Raises OSError, and `Untrusted` for a directory that others can write to.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_trust(path.parent, os.stat(path.parent), False)
    number, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)  # mode 0600
    try:
        with open(number, "wb") as file:
            for part in parts:
                file.write(part)
        os.replace(name, path)
    except BaseException:
        delete(Path(name))
        raise


def delete(path: Path) -> None:
    """Deletes a file, if it is there and can be deleted."""
    with contextlib.suppress(OSError):
        path.unlink()


def delete_oldest(newest: Path, max_bytes: int) -> None:
    """Deletes the oldest files until those of `newest`'s directory and suffix have at most `max_bytes`; `newest` stays."""
    files = []
    for path in newest.parent.glob(f"*{newest.suffix}"):
        with contextlib.suppress(OSError):  # another process deletes as well
            files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total > max_bytes and path != newest:
            delete(path)
            total -= size


def warn_once(about: object, message: str) -> None:
    """A RuntimeWarning, at the first call with this `about` in this process."""
    if str(about) not in _warned:
        _warned.add(str(about))
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _require_trust(path: Path, status: os.stat_result, shared: bool) -> None:
    if (reason := _why_untrusted(path, status, shared)) is not None:
        raise Untrusted(reason)


def _why_untrusted(path: Path, status: os.stat_result, shared: bool) -> str | None:
    if not hasattr(os, "geteuid"):  # Windows: homes are private, and modes say nothing
        return None
    if not shared and status.st_uid != os.geteuid():
        return (
            f"{path} belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}; name another directory in "
            "CCE_CACHE_DIR, or, if you trust that user, this one in CCE_SHARED_CACHE_DIR"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written to by other users (mode {stat.S_IMODE(status.st_mode):o}); chmod go-w it"
    return None
