"""Code that is kept on disk: whose files are taken, and who can read or write what is made here."""

from __future__ import annotations

import os
import signal
import stat
import warnings

import pytest

from cce_numba import disk

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no owners and modes here")


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """The cache's directory, which is not there yet; no warning has been given."""
    monkeypatch.setenv("CCE_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    monkeypatch.delenv("CCE_SHARED_CACHE_DIR", raising=False)
    monkeypatch.setattr(disk, "_warned", set())
    return tmp_path / "deep" / "cache"


@pytest.fixture
def kept(directory):
    """A file of the cache."""
    disk.write(directory / "a.code", (b"so", b"me"))
    return directory / "a.code"


@pytest.fixture
def another_user(monkeypatch):
    """Makes this process one of another user, as far as `disk` can see."""
    owner = os.geteuid()
    return lambda: monkeypatch.setattr(disk.os, "geteuid", lambda: owner + 1)


def test_only_the_owner_can_read_and_write_what_is_made(directory):
    old = os.umask(0)
    try:
        disk.write(directory / "a.code", (b"some",))
    finally:
        os.umask(old)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "a.code").stat().st_mode) == 0o600
    assert disk.read(directory / "a.code") == b"some"


def test_what_another_user_owns_is_not_read(kept, another_user):
    another_user()
    with pytest.raises(disk.Untrusted, match=r"belongs to user \d+, and this process runs as user \d+.*CCE_SHARED_CACHE_DIR"):
        disk.read(kept)
    with pytest.raises(disk.Untrusted, match="belongs to user"):
        disk.write(kept, (b"new",))
    assert disk.why_untrusted(kept.parent) is not None
    assert disk.why_untrusted(kept.parent / "absent") is None


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("of", ["file", "directory"])
def test_what_others_can_write_to_is_not_read(kept, of, mode, shared):
    path = kept if of == "file" else kept.parent
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(disk.Untrusted, match=rf"{path} can be written to by other users \(mode \d+\); chmod go-w it"):
        disk.read(kept, shared=shared)


def test_a_directory_that_others_can_write_to_gets_no_file(kept):
    kept.parent.chmod(0o777)
    with pytest.raises(disk.Untrusted):
        disk.write(kept.parent / "b.code", (b"new",))
    assert list(kept.parent.iterdir()) == [kept]


def test_a_shared_directory_may_belong_to_another_user(kept, another_user):
    another_user()
    assert disk.read(kept, shared=True) == b"some"


def test_the_shared_directory_comes_second(directory, monkeypatch, tmp_path):
    own = directory / "a.code"
    assert list(disk.places(own)) == [(own, False)]
    monkeypatch.setenv("CCE_SHARED_CACHE_DIR", str(tmp_path / "shared"))
    assert list(disk.places(own)) == [(own, False), (tmp_path / "shared" / "a.code", True)]
    assert list(disk.places(tmp_path / "shared" / "a.code")) == [(tmp_path / "shared" / "a.code", True)]
    assert list(disk.places(None)) == []
    monkeypatch.setenv("CCE_SHARED_CACHE_DIR", "")
    assert disk.shared_directory() is None


def test_a_link_is_not_followed(kept):
    """It could lead to any file of this user."""
    (kept.parent / "link.code").symlink_to(kept)
    with pytest.raises(OSError, match=r"link\.code"):
        disk.read(kept.parent / "link.code")


def test_a_pipe_is_not_waited_for(kept):
    os.mkfifo(kept.parent / "pipe.code", 0o600)
    signal.alarm(20)
    try:
        with pytest.raises(OSError, match="is no file"):
            disk.read(kept.parent / "pipe.code")
    finally:
        signal.alarm(0)


def test_no_memory_is_taken_for_a_file_that_is_too_large(kept):
    with open(kept, "wb") as file:
        file.truncate(disk.MAX_FILE_BYTES + 1)  # takes no room on the disk
    with pytest.raises(OSError, match="at most"):
        disk.read(kept)


def test_a_warning_is_given_once():
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for about in ("a", "b", "a", "a"):
            disk.warn_once(about, f"about {about}")
    assert [str(warning.message) for warning in given] == ["about a", "about b"]
