"""Disks to do harm to: one that keeps only what was fsynced, and small ones mounted for a child alone.

What a power cut leaves is for the file system to say. POSIX promises what `fsync` was called on and no more: of a file
its bytes as they were then, of a folder its names as they were then. `PowerCut` keeps account of that by inode and lays
out what is left in one of three ways:

    strict     nothing but what was promised
    eager      all names at once, bytes as promised: a rename that overtook the data of what it renamed
    mixed      of each folder and each file the one or the other, by chance

Mounts are made in a child with a mount namespace of its own (for those who aren't root: with users of its own, too) and
are gone with it.
"""

import ctypes
import os
import random
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.faults.common import Ended, child

STYLES = ("strict", "eager", "mixed")
NEW_MOUNTS, NEW_USERS = 0x20000, 0x10000000  # of unshare(2)
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18  # of mount(2)


class Cut(BaseException):
    """The power is gone. No Exception: nobody is left to handle it."""


class PowerCut:
    """Inside `with PowerCut(…)` the `at`th fsync below `root` raises Cut, and `left` is what the disk holds then.
    `synced` counts; without a cut `left` is what would be left at the end of the block."""

    def __init__(self, root: Path, at: int, left: Path, style: str, seed: int = 0) -> None:
        self.root, self.at, self.left, self.style, self.synced = root, at, left, style, 0
        self._chance = random.Random(seed)
        self._bytes: dict[int, bytes] = {}  # by inode
        self._names: dict[int, dict[str, os.stat_result]] = {}
        self._open: list[int] = []  # a descriptor of each, so that its inode isn't given to another file meanwhile
        self._fsync = os.fsync

    def __enter__(self) -> "PowerCut":
        for path in (self.root, *self.root.rglob("*")):
            self._keep(path)
        os.fsync = self._follow
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        os.fsync = self._fsync
        if self.synced < self.at:
            self._lay_out()
        for descriptor in self._open:
            os.close(descriptor)

    def _follow(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(self.root):
            self.synced += 1
            if self.synced == self.at:
                self._lay_out()
            if self.synced >= self.at:  # what is done in a `finally` comes too late
                raise Cut
            self._keep(path)

    def _keep(self, path: Path) -> None:
        self._open.append(os.open(path, os.O_RDONLY))
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            self._names[found.st_ino] = _listing(path)
        else:
            self._bytes[found.st_ino] = path.read_bytes()

    def _lay_out(self) -> None:
        now = {path.stat().st_ino: path for path in (self.root, *self.root.rglob("*"))}

        def is_eager(inode: int) -> bool:
            return inode in now and (self.style == "eager" or (self.style == "mixed" and self._chance.random() < 0.5))

        def lay(inode: int, to: Path) -> None:
            to.mkdir()
            names = _listing(now[inode]) if is_eager(inode) else self._names.get(inode, {})
            for name, found in names.items():
                if stat.S_ISDIR(found.st_mode):
                    lay(found.st_ino, to / name)
                elif self.style == "mixed" and is_eager(found.st_ino):
                    (to / name).write_bytes(now[found.st_ino].read_bytes())
                else:
                    (to / name).write_bytes(self._bytes.get(found.st_ino, b""))

        lay(self.root.stat().st_ino, self.left)


def _listing(folder: Path) -> dict[str, os.stat_result]:
    return {entry.name: entry.stat() for entry in os.scandir(folder)}


def with_mounts(work: Callable[[], object]) -> Ended:
    """Run `work` in a child that may mount: what it mounts, nobody else sees."""

    def privately() -> None:
        user, group = os.getuid(), os.getgid()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(NEW_MOUNTS):
            _must(libc.unshare(NEW_MOUNTS | NEW_USERS))
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        _mount("none", Path("/"), "none", RECURSIVE | PRIVATE)
        work()

    return child(privately)


def small_disk(at: Path, options: str) -> Path:
    """Mount a disk in memory at `at`: `size=1m`, `nr_inodes=8`."""
    at.mkdir(parents=True, exist_ok=True)
    _mount("tmpfs", at, "tmpfs", 0, options)
    return at


def read_only(folder: Path, remount: bool = False) -> Path:
    """Make `folder` (`remount`: which is a mount) one that can't be written to."""
    if not remount:
        _mount(str(folder), folder, "none", BIND)
    _mount(str(folder), folder, "none", READ_ONLY | REMOUNT | (0 if remount else BIND))
    return folder


def _mount(source: str, at: Path, kind: str, flags: int, options: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    _must(libc.mount(source.encode(), os.fsencode(at), kind.encode(), ctypes.c_ulong(flags), options.encode()))


def _must(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@cache
def can_mount() -> bool:
    """Whether this user may mount on this machine; checks that need it aren't listed elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        return with_mounts(lambda: small_disk(Path(folder), "size=64k")).code == 0
