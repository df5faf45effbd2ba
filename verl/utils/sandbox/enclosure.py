"""What the sandboxed process is shut into: namespaces and a root of its own, or, without them, a folder and its rules.

Runs in the supervisor (supervisor.py), before any untrusted code does.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from . import kernel  # relative, since the supervisor imports this package without `verl`

SANDBOX = "/sandbox"  # the harness, the code and the packages, read-only
WORK = "/work"  # the one writable folder
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
LINKER_CACHE = "/etc/ld.so.cache"
OVERFLOW_ID = 65534  # "nobody"
OWN_ID_BASE = 2_000_000_000  # above every range that distributions hand out
ONLY_READ = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID
# CAP_: CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID
SWITCHING = sum(1 << capability for capability in (0, 1, 3, 5, 6, 7))
Ended = dict[int, tuple[int, float]]  # by process: exit status (negative: the signal), CPU seconds


def can_switch_user() -> bool:
    """Whether this process may give files and processes to another user, and take them back: root, as a rule."""
    status = Path("/proc/self/status").read_text()
    capabilities = int(status.split("CapEff:")[1].split()[0], 16)
    return os.geteuid() == 0 and capabilities & SWITCHING == SWITCHING


def own_id() -> int:
    """A user id that no other process has: the process id above a base. In a container that maps only the usual 65536
    ids, one of the last of these; two sandboxes may then share it."""
    wanted = OWN_ID_BASE + os.getpid()
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= wanted < first + count:
            return wanted
    return OVERFLOW_ID - os.getpid() % 4096


def enter_namespaces(privileged: bool) -> None:
    """New mount, IPC, PID and network namespaces; without privilege inside a new user namespace, in which this user is
    "nobody". The PID namespace begins with the next child."""
    flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(flags if privileged else flags | kernel.CLONE_NEWUSER)
    if not privileged:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{OVERFLOW_ID} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{OVERFLOW_ID} {group} 1")


def _bind(source: str, target: str) -> None:
    """Show `source` (below the old root) read-only at `target`."""
    kernel.mount(source, target, flags=kernel.MS_BIND | kernel.MS_REC)
    # Inside a user namespace flags of the source may not be dropped.
    kept = os.statvfs(source).f_flag & (kernel.MS_NOEXEC | kernel.MS_NODEV | kernel.MS_NOSUID)
    kernel.mount("none", target, flags=ONLY_READ | kept)


class OwnRoot:
    """Inside new namespaces: a root in memory that shows the system's programs and libraries, this interpreter and the
    packages read-only, and otherwise has one writable folder of bounded size. Nothing of it is on a disk."""

    sandbox, work = SANDBOX, WORK

    def __init__(self, files: dict[str, bytes], folders: list[str], packages: dict[str, str], disk_bytes: int):
        """`files` and `packages` by name go to the sandbox's folder; `folders` are shown at their own path."""
        self.disk_bytes = disk_bytes
        kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        base = "/tmp"
        kernel.mount("tmpfs", base, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=64m,mode=755")
        Path(base, "old").mkdir()
        kernel.pivot_root(base, f"{base}/old")
        os.chdir("/")
        for folder in SYSTEM_FOLDERS:
            if Path("/old" + folder).is_symlink():
                Path(folder).symlink_to(Path("/old" + folder).readlink())
            elif Path("/old" + folder).is_dir():
                self._show(folder)
        for path in (*folders, *DEVICES, LINKER_CACHE):
            if not Path(path).exists() and Path("/old" + path).exists():
                self._show(path)
        for name, target in (("stdin", 0), ("stdout", 1), ("stderr", 2), ("fd", "")):
            Path("/dev", name).symlink_to(f"/proc/self/fd/{target}")
        for name, content in files.items():
            Path(SANDBOX).mkdir(exist_ok=True)
            Path(SANDBOX, name).write_bytes(content)
        for name, source in packages.items():
            self._show(source, f"{SANDBOX}/packages/{name}")
        Path(WORK).mkdir()
        Path("/proc").mkdir()
        with contextlib.suppress(PermissionError):  # a container that masks parts of /proc: the code goes without
            flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
            kernel.mount("proc", "/proc", "proc", flags, "hidepid=2")
        kernel.unmount("/old")
        Path("/old").rmdir()
        kernel.mount("none", "/", flags=ONLY_READ | kernel.MS_NODEV)

    def _show(self, path: str, at: str | None = None) -> None:
        target = Path(at or path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path("/old" + path).is_dir():
            target.mkdir()
        else:
            target.touch()
        _bind("/old" + path, str(target))

    def new_work(self, user: int) -> None:
        """An empty work folder, in the place of the one before."""
        if os.path.ismount(WORK):
            kernel.unmount(WORK)
        flags = kernel.MS_NOSUID | kernel.MS_NODEV
        kernel.mount("tmpfs", WORK, "tmpfs", flags, f"size={self.disk_bytes},nr_inodes=4096,mode=700")
        os.chown(WORK, user, user)

    def confine(self) -> None:
        """The root is the confinement."""

    def kill_all(self, user: int) -> Ended:
        """End every process of the namespace but this one, its first."""
        assert os.getpid() == 1  # or else -1 would mean every process of the machine
        _kill(-1)
        return _reap()

    def remove(self) -> None:
        """The kernel removes it with its last process."""


class OwnFolder:
    """Without namespaces: a temporary folder; Landlock where the kernel has it keeps the process away from others."""

    def __init__(self, files: dict[str, bytes], folders: list[str], packages: dict[str, str], user: int | None):
        """As OwnRoot; `user` is the user that the code gets, None to stay this process's."""
        top = Path(tempfile.mkdtemp(prefix="verl-sandbox-"))
        self.sandbox, self.work = str(top), str(top / "work")
        os.chown(top, os.geteuid(), os.getegid() if user is None else user)
        top.chmod(0o750)
        for name, content in files.items():
            (top / name).write_bytes(content)
            (top / name).chmod(0o644)
        (top / "packages").mkdir()
        (top / "packages").chmod(0o755)
        for name, source in packages.items():
            (top / "packages" / name).symlink_to(source)
        self.readable = [*SYSTEM_FOLDERS, *folders, *packages.values(), LINKER_CACHE, *DEVICES, self.sandbox]
        self.switches_user = user is not None
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)

    def new_work(self, user: int) -> None:
        """An empty work folder, in the place of the one before."""
        _delete(self.work)
        Path(self.work).mkdir(mode=0o700)
        os.chown(self.work, user, user if self.switches_user else -1)

    def confine(self) -> None:
        """In the sandboxed process: end with the supervisor, and see no other files."""
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if kernel.landlock_abi():
            readable = [path for path in self.readable if Path(path).exists()]
            kernel.restrict_files(readable, [self.work, "/dev/null"])

    def kill_all(self, user: int) -> Ended:
        """End every process of the sandbox: all of its user; where that is this process's own user, all descendants, of
        which orphaned ones become children."""
        if self.switches_user:
            killer = os.fork()
            if killer == 0:
                in_child(lambda: _kill_as(user))
            os.waitpid(killer, 0)
            return _reap()
        ended: Ended = {}
        while _descendants():
            stopped: set[int] = set()
            while found := _descendants() - stopped:  # stopped ones cannot fork, but keep their place below the limit
                for process in found:
                    _kill(process, signal.SIGSTOP)
                stopped |= found
            for process in stopped:
                _kill(process)
            ended |= _reap(then=os.WNOHANG)
        return ended

    def remove(self) -> None:
        _delete(self.sandbox)


def in_child(act: Callable[[], None]) -> NoReturn:
    """In a forked child: act, and end without the parent's clean-up."""
    status = 1
    try:
        act()
        status = 0
    finally:
        os._exit(status)


def _delete(folder: str) -> None:
    """By commands, which manage any depth and folders without permissions."""
    if Path(folder).exists():
        subprocess.run(["chmod", "-R", "u+rwx", folder], check=True, env={"PATH": "/usr/bin:/bin"})
        subprocess.run(["rm", "-rf", folder], check=True, env={"PATH": "/usr/bin:/bin"})


def _kill_as(user: int) -> None:
    os.setresuid(user, user, user)
    assert user > 0 and os.getresuid() == (user, user, user)
    _kill(-1)  # every process that this user may signal: its own


def _kill(process: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(process, number)


def _descendants() -> set[int]:
    """All descendants of this process, ended ones that nobody has waited for included."""
    found: set[int] = set()
    unseen = [os.getpid()]
    while unseen:
        for file in Path(f"/proc/{unseen.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended in between
                children = {int(child) for child in file.read_text().split()} - found
                found |= children
                unseen += children
    return found


def _reap(then: int = 0) -> Ended:
    """Wait for a child, and then for all others; with `then=os.WNOHANG` only for those that have ended already."""
    ended: Ended = {}
    options = 0
    while True:
        try:
            process, status, usage = os.wait4(-1, options)
        except ChildProcessError:
            return ended
        if process == 0:
            return ended
        ended[process] = (os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime)
        options = then
