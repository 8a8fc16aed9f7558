"""What a sandboxed child gives up for ever: other programs and processes, the network, changing files.

A filter in the kernel answers such system calls with EPERM. Reading files stays, for modules that Python
imports late. Linux on x86-64 and arm64; elsewhere the other limits have to do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

# Name: its number on x86-64 and on arm64; None: there is none.
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # Other programs and processes.
    **{"clone": (56, 220), "fork": (57, None), "vfork": (58, None)},
    **{"execve": (59, 221), "execveat": (322, 281), "unshare": (272, 97), "setns": (308, 268)},
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138)},
    **{"rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438)},
    **{"pidfd_send_signal": (424, 424), "ptrace": (101, 117), "kcmp": (312, 272)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    # The network and other ways to talk.
    **{"socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200)},
    **{"listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "shmget": (29, 194)},
    **{"msgget": (68, 186), "semget": (64, 190)},
    # Changing files.
    **{"creat": (85, None), "truncate": (76, 45), "rename": (82, None), "renameat": (264, 38)},
    **{"renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None)},
    **{"link": (86, None), "linkat": (265, 37), "unlink": (87, None), "unlinkat": (263, 35)},
    **{"symlink": (88, None), "symlinkat": (266, 36), "chmod": (90, None), "fchmodat": (268, 53)},
    **{"fchmodat2": (452, 452), "chown": (92, None), "lchown": (94, None), "fchownat": (260, 54)},
    **{"mknod": (133, None), "mknodat": (259, 33), "mount": (165, 40), "umount2": (166, 39)},
    **{"utimensat": (280, 88), "setxattr": (188, 5), "fsetxattr": (190, 7)},
    # The kernel's wider doors.
    **{"perf_event_open": (298, 241), "bpf": (321, 280), "userfaultfd": (323, 282)},
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218)},
}
# These the C library tries first, and then the older ones above and below.
_UNKNOWN = {"clone3": (435, 435), "openat2": (437, 437)}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Name: number, and which argument has which bits that are not allowed.
_SOME: dict[str, tuple[tuple[int | None, int | None], int, int]] = {
    "open": ((2, None), 1, _WRITES),
    "openat": ((257, 56), 2, _WRITES),
    "prlimit64": ((302, 261), 0, 0xFFFF_FFFF),  # of other processes than this one
}
# Machine: which of the two numbers, how its kernel calls it, and bits of numbers of its other ABI.
_MACHINES = {"x86_64": (0, 0xC000_003E, 0x4000_0000), "aarch64": (1, 0xC000_00B7, 0)}

_LOAD, _EQUAL, _SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_ALLOW, _KILL, _ERROR = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2

_Instruction = tuple[int, int, int, int]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def give_up() -> bool:
    """Give all that up, for this thread and those it begins; return whether the kernel took it."""
    if os.uname().machine not in _MACHINES:
        return False
    code = b"".join(struct.pack("=HBBI", *one) for one in program(os.uname().machine))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    wanted = _Program(len(code) // 8, code)
    return not libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(wanted), 0, 0)


def program(machine: str) -> list[_Instruction]:
    """Return the filter for a machine: (code, jump if true, jump if not, value), as the kernel takes it."""
    index, architecture, other_abi = _MACHINES[machine]
    code: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if other_abi:
        code += [(_SET, 0, 1, other_abi), (_RETURN, 0, 0, _KILL)]
    code += _answer(_UNKNOWN.values(), index, _ERROR | errno.ENOSYS)
    code += _answer(_NUMBERS.values(), index, _ERROR | errno.EPERM)
    for numbers, argument, bits in _SOME.values():
        number = numbers[index]
        if number is not None:
            code += [
                (_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument),  # its lower half
                (_SET, 0, 1, bits),
                (_RETURN, 0, 0, _ERROR | errno.EPERM),
                (_RETURN, 0, 0, _ALLOW),
            ]
    return [*code, (_RETURN, 0, 0, _ALLOW)]


def _answer(
    calls: Iterable[tuple[int | None, int | None]], index: int, answer: int
) -> list[_Instruction]:
    code: list[_Instruction] = []
    for numbers in calls:
        number = numbers[index]
        if number is not None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]
    return code
