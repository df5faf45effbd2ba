"""The call filter, run by an interpreter of its instructions, so that both architectures are tried on either."""

import struct

import pytest

from verl.utils.sandbox.kernel import filter_program

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED, KILLED, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
SIGCHLD = 17
# Of a thread, as glibc and musl ask for it (clone(2)): no bit of a new namespace.
THREAD = 0x003D0F00


def answer(machine: str, number: int, argument: int = 0, arch: int | None = None) -> int:
    """What the filter says of a call with this first argument (64 bits)."""
    data = struct.pack(
        "<IIQ6Q", number, ARCH[machine] if arch is None else arch, 0, argument, *[0xFFFFFFFFFFFFFFFF] * 5
    )
    program = filter_program(machine)
    word, at = 0, 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == 0x06:  # BPF_RET | BPF_K
            return operand
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            (word,) = struct.unpack_from("<I", data, operand)
        else:  # BPF_JMP | BPF_K with BPF_JEQ, BPF_JGE, BPF_JSET
            holds = {0x15: word == operand, 0x35: word >= operand, 0x45: bool(word & operand)}[code]
            at += if_true if holds else if_false


# Calls by number, from asm/unistd_64.h and asm-generic/unistd.h.
COMMON = {"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433}
COMMON |= {"mount_setattr": 442, "open_tree_attr": 467, "io_uring_setup": 425}
REFUSED = {
    "x86_64": COMMON | {"pivot_root": 155, "umount2": 166, "mount": 165, "setns": 308, "unshare": 272, "socket": 41},
    "aarch64": COMMON | {"pivot_root": 41, "umount2": 39, "mount": 40, "setns": 268, "unshare": 97, "socket": 198},
}
# read, write, close, execve, fork's relatives, exit, socketpair
USUAL = {"x86_64": (0, 1, 3, 59, 57, 58, 60, 53), "aarch64": (63, 64, 57, 221, 93, 199)}
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435


@pytest.mark.parametrize("machine", ARCH)
def test_mounts_and_namespaces_are_refused_and_usual_calls_are_not(machine):
    assert {name: answer(machine, number) for name, number in REFUSED[machine].items()} == dict.fromkeys(
        REFUSED[machine], EPERM
    )
    assert {answer(machine, number) for number in USUAL[machine]} == {ALLOWED}


@pytest.mark.parametrize("machine", ARCH)
def test_a_clone_is_refused_for_any_new_namespace_alone(machine):
    for bit in (7, 17, 25, 26, 27, 28, 29, 30):  # time, mount, cgroup, UTS, IPC, user, PID, network
        assert answer(machine, CLONE[machine], 1 << bit | SIGCHLD) == EPERM
        assert answer(machine, CLONE[machine], 1 << bit | THREAD | 0xABCD << 32) == EPERM
    for flags in (0, SIGCHLD, THREAD, 0x01200000 | SIGCHLD, 0x4000 | 0x100 | SIGCHLD):  # the last two: fork, vfork
        assert answer(machine, CLONE[machine], flags) == ALLOWED


@pytest.mark.parametrize("machine", ARCH)
def test_clone3_does_not_exist(machine):
    assert answer(machine, CLONE3, 0x7FFF00000000) == ENOSYS


@pytest.mark.parametrize("machine", ARCH)
def test_no_way_around_by_another_numbering(machine):
    assert answer(machine, 0x40000000 | CLONE[machine], SIGCHLD) == EPERM  # x32
    assert answer(machine, 120, SIGCHLD, arch=0x40000003) == KILLED  # clone of i386
