"""Calls of the kernel that Python has no function for: namespaces, mounts, process controls, Landlock, call filters.

Numbers and structures are those of the Linux user-space headers (linux/sched.h, linux/mount.h, linux/prctl.h,
linux/landlock.h, linux/filter.h, linux/seccomp.h).
"""

import ctypes
import errno
import os
import platform
import struct
from pathlib import Path

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 1 << 17, 1 << 27, 1 << 28
CLONE_NEWPID, CLONE_NEWNET = 1 << 29, 1 << 30
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38

_libc = ctypes.CDLL(None, use_errno=True)
# Of pivot_root, which libc does not wrap.
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# These have the same numbers on every architecture.
_SECCOMP_SET_MODE_FILTER = 1
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` for new ones; a new PID namespace begins with the next child."""
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _checked(result, f"mount {target}")


def unmount(target: str) -> None:
    """Take a mount out of view at once; it ends when nothing uses it any more."""
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    """Make the mount `new` the root and put the present root at `old`, a folder inside `new`."""
    _checked(_libc.syscall(_PIVOT_ROOT[platform.machine()], new.encode(), old.encode()), "pivot_root")


def prctl(option: int, value: int) -> None:
    unused = ctypes.c_ulong(0)
    _checked(_libc.prctl(option, ctypes.c_ulong(value), unused, unused, unused), f"prctl {option}")


def landlock_abi() -> int:
    """Version of Landlock that the kernel offers, 0 without it."""
    return max(0, _libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


# Rights by the version that brought them (linux/landlock.h): execute, write, read and read a folder; remove and make
# entries; refer (2), truncate (3), device ioctl (5). TCP bind and connect (4); signals and abstract sockets (6).
_READ = 1 << 0 | 1 << 2 | 1 << 3
_FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15


def restrict_files(readable: list[str], writable: list[str]) -> None:
    """By Landlock: this process and its descendants read and execute only below `readable`, and read and write only
    below `writable` (paths that exist); nor do they use TCP, or signal a process outside, where the kernel can tell."""
    abi = landlock_abi()
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = struct.pack("QQQ", handled, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = ctypes.c_size_t(len(attributes))
    ruleset = _checked(_libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, size, 0), "landlock_create_ruleset")
    for paths, rights in ((readable, _READ), (writable, handled)):
        for path in paths:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights & handled & (handled if Path(path).is_dir() else _FILE_RIGHTS)
            rule = struct.pack("=Qi", allowed, descriptor)
            _checked(_libc.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
            os.close(descriptor)
    _checked(_libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


# Refused system calls, as (x86_64, aarch64). Network: sockets of any kind (socketpair stays), and the ring that could
# open one unseen. Memory that no limit counts. Namespaces and mounts, the latter by either interface. What reaches into
# other processes or widens the kernel's surface.
_REFUSED = {
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
}
# Processes and threads begin with these. The first tells its flags, as its first argument; all that ask for namespaces
# are in its lower half. The second has them behind a pointer, where no filter can look; told that there is no such
# call, libc uses the first.
_CLONE, _CLONE3 = (56, 220), 435
_CLONE_NEW = 0x7E020080
_MACHINES = ("x86_64", "aarch64")  # both little-endian
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_SECCOMP = (317, 277)


def can_filter_calls() -> bool:
    """Whether the table of system calls knows this machine and the kernel was built with filters."""
    return platform.machine() in _MACHINES and Path("/proc/sys/kernel/seccomp").exists()


def filter_program(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter for "x86_64" or "aarch64", as instructions of classic BPF: code, jump if true, jump if false, operand.
    A jump is the number of instructions left out. The data are struct seccomp_data: nr at 0, arch at 4, the lower half
    of the first argument at 16."""
    column = _MACHINES.index(machine)
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # ld word; jumps if ==, >=, &; return
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    refuse, unknown = (give, 0, 0, error | errno.EPERM), (give, 0, 0, error | errno.ENOSYS)
    program = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH[column]), (give, 0, 0, kill)]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), refuse]  # x86's second numbering of the same calls
    for numbers in _REFUSED.values():
        program += [(equal, 0, 1, numbers[column]), refuse]
    program += [(equal, 0, 1, _CLONE3), unknown]
    program += [(equal, 0, 3, _CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, _CLONE_NEW), refuse]
    return [*program, (give, 0, 0, allow)]


def filter_calls() -> None:
    """From here on this process and its descendants get EPERM from every call of `_REFUSED` and from a clone into new
    namespaces, ENOSYS from clone3, and are killed for a call of a foreign architecture. Needs no privilege once
    PR_SET_NO_NEW_PRIVS is set."""
    program = filter_program(platform.machine())
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(instructions))
    seccomp = _SECCOMP[_MACHINES.index(platform.machine())]
    _checked(_libc.syscall(seccomp, _SECCOMP_SET_MODE_FILTER, 0, header), "seccomp")
