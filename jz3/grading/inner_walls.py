"""The walls that a sandbox process builds around itself; runs inside, so standard library only.

Namespaces give a private view of files, network and processes; Landlock restricts which files can be
opened; seccomp leaves only the system calls of a pure computation; capabilities and the user id are
given up. Every function raises OSError where the kernel refuses.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_NOATIME, MS_NODIRATIME, MS_BIND = 32, 1024, 2048, 4096
MS_REC, MS_PRIVATE, MS_RELATIME = 16384, 1 << 18, 1 << 21
MNT_DETACH = 2
CLONE_FLAGS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""New mount, cgroup, host name, IPC, user, process and network namespaces."""
PR_CAPBSET_DROP, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 24, 22, 38, 36
PR_SET_PDEATHSIG = 1
INNER_ID = 1000
"""The user and group id seen inside a user namespace."""
NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _call(name: str, *arguments: object) -> int:
    if _libc is None:
        raise OSError(f"{name} needs Linux")
    return _check(getattr(_libc, name)(*arguments), name)


def _prctl(option: int, value: object, *rest: object) -> None:
    padded = [*rest, *([ctypes.c_ulong(0)] * (3 - len(rest)))]
    _call("prctl", option, value if not isinstance(value, int) else ctypes.c_ulong(value), *padded)


def no_new_privileges() -> None:
    """Make it impossible to gain rights by executing a file."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent() -> None:
    """Ask for SIGKILL when the parent dies."""
    _prctl(PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Become the parent of every orphaned descendant, so that none escapes."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def drop_capabilities() -> None:
    """Give up all capabilities for good."""
    for capability in range(64):
        try:
            _prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # beyond the last capability of this kernel, or none to drop with
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    _call("capset", header, ctypes.create_string_buffer(24))


def become_nobody() -> None:
    """Give up root's user id."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())


def enter_namespaces(view: list) -> None:
    """Move into new namespaces whose whole file system is `view`, read-only.

    The process that returns is the first of its process namespace (id 1): when it ends, so does
    every process inside. The calling process stays outside only to wait for it.

    Args:
        view: pairs (path, link target or ""), in an order in which parents come first.
    """
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", CLONE_FLAGS)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INNER_ID} {uid} 1"),
        ("gid_map", f"{INNER_ID} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)
    child = os.fork()
    if child:
        os.closerange(0, 2)
        status = os.waitpid(child, 0)[1]
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    die_with_parent()
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    os.mkdir("/tmp/outside")
    _call("syscall", _pivot_root_number(), b"/tmp", b"/tmp/outside")
    os.chdir("/")
    for path, target in view:
        _show(path, target)
    _call("umount2", b"/outside", MNT_DETACH)
    os.rmdir("/outside")
    _mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _pivot_root_number() -> int:
    numbers = {"x86_64": 155, "aarch64": 41}
    if platform.machine() not in numbers:
        raise OSError(f"pivot_root is not known for {platform.machine()}")
    return numbers[platform.machine()]


def _show(path: str, target: str) -> None:
    """Make `path` of the outside visible at the same place, read-only."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    if target:
        os.symlink(target, path)
        return
    source = "/outside" + path
    if os.path.isdir(source):
        os.makedirs(path, mode=0o755, exist_ok=True)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o444))
    _mount(source, path, "", MS_BIND | MS_REC)
    # flags that the outside has locked must be kept, or the kernel refuses the remount
    kept = os.statvfs(path).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME)
    if os.statvfs(path).f_flag & 4096:
        kept |= MS_RELATIME
    _mount("none", path, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)


def restrict_files(paths: list) -> int:
    """Let this process and its children open only what lies under `paths`, for reading (Landlock).

    Where the kernel's version has it, TCP, abstract sockets and signals to the outside are cut too.

    Returns:
        The kernel's Landlock version.
    """
    version = _call("syscall", 444, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    rights = (1 << 13) - 1
    for needed, bit in ((2, 13), (3, 14), (5, 15)):
        if version >= needed:
            rights |= 1 << bit
    network = 3 if version >= 4 else 0
    scoped = 3 if version >= 6 else 0
    text = struct.pack("QQQ", rights, network, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _call(
        "syscall", 444, ctypes.create_string_buffer(text, 24), ctypes.c_size_t(size), ctypes.c_uint(0)
    )
    execute, read_file, read_directory = 1, 4, 8
    for path in paths:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        allowed = execute | read_file | (read_directory if os.path.isdir(path) else 0)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, handle), 12)
        _call("syscall", 445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
        os.close(handle)
    no_new_privileges()
    _call("syscall", 446, ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)
    return version


def limit_resources(memory: int, seconds: int, processes: bool) -> None:
    """Set the limits that the kernel keeps for each process.

    Args:
        memory: bytes of address space, the interpreter included.
        seconds: of processor time.
        processes: False forbids new processes and threads by number (it does not hold for root).
    """
    limits = [
        ("RLIMIT_CORE", 0, 0),
        ("RLIMIT_FSIZE", 0, 0),
        ("RLIMIT_NOFILE", 64, 64),
        ("RLIMIT_MEMLOCK", 0, 0),
        ("RLIMIT_STACK", 8 << 20, 8 << 20),
        ("RLIMIT_CPU", seconds, seconds + 1),
        ("RLIMIT_AS", memory, memory),
    ]
    if not processes:
        limits.append(("RLIMIT_NPROC", 0, 0))
    for name, soft, hard in limits:
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        highest = resource.getrlimit(kind)[1]
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (OSError, ValueError):
            if sys.platform == "linux":
                raise  # macOS refuses RLIMIT_AS; there the outer deadline is all there is


_NUMBERS = {
    # name: (x86_64, aarch64); None where the architecture lacks the call
    "read": (0, 63), "write": (1, 64), "mmap": (9, 222), "munmap": (11, 215), "brk": (12, 214),
    "futex": (202, 98), "mremap": (25, 216), "madvise": (28, 233), "mprotect": (10, 226),
    "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68), "lseek": (8, 62),
    "close": (3, 57), "close_range": (436, 436), "fstat": (5, 80), "newfstatat": (262, 79),
    "stat": (4, None), "lstat": (6, None), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17),
    "set_robust_list": (273, 99), "get_robust_list": (274, 100), "set_tid_address": (218, 96),
    "rseq": (334, 293), "membarrier": (324, 283), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158),
    "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156), "getresuid": (118, 148),
    "getresgid": (120, 150), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "getrusage": (98, 165), "getrlimit": (97, 163), "sysinfo": (99, 179),
    "uname": (63, 160), "getcpu": (309, 168), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "getrandom": (318, 278), "get_mempolicy": (239, 236), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "wait4": (61, 260), "waitid": (247, 95),
    "setitimer": (38, 103), "getitimer": (36, 102), "alarm": (37, None), "pause": (34, None),
    "umask": (95, 166), "fadvise64": (221, 223), "arch_prctl": (158, None), "exit": (60, 93),
    "exit_group": (231, 94),
    "open": (2, None), "openat": (257, 56), "openat2": (437, 437), "clone": (56, 220),
    "clone3": (435, 435), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "prlimit64": (302, 261), "prctl": (157, 167), "ioctl": (16, 29), "fcntl": (72, 25),
}  # fmt: skip
_CONDITIONAL = ("open", "openat", "openat2", "clone", "clone3", "kill", "tkill", "tgkill", "prlimit64",
                "prctl", "ioctl", "fcntl")  # fmt: skip
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_EPERM, _EACCES, _ENOTTY, _ENOSYS = 1, 13, 25, 38
_WRITING = 0o3 | 0o100 | 0o1000
"""O_WRONLY, O_RDWR, O_CREAT and O_TRUNC."""
_CLONE_THREAD = 0x00010000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def allow_computation_only() -> None:
    """Leave this process only the system calls of a pure computation (seccomp), for good.

    Refused: new processes and programs, sockets, opening a file for writing or changing one,
    signals to others, other processes' memory and limits. Threads work.
    """
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(f"no seccomp filter for {platform.machine()}")
    program = _filter(platform.machine(), os.getpid())
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    no_new_privileges()
    _prctl(PR_SET_SECCOMP, 2, header)


def _filter(machine: str, pid: int) -> list:
    """Assemble the BPF program; each block compares the call's number and ends in a return."""
    column, architecture = _ARCHITECTURES[machine]
    program = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":  # numbers of the x32 interface alias others
        program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for name, numbers in _NUMBERS.items():
        if numbers[column] is not None:
            block = _conditions(name, pid) if name in _CONDITIONAL else [(_RETURN, 0, 0, _ALLOW)]
            program += [(_EQUAL, 0, len(block), numbers[column]), *block]
    program.append((_RETURN, 0, 0, _ERRNO | _EPERM))
    return program


def _conditions(name: str, pid: int) -> list:
    if name in ("openat2", "clone3"):  # their flags lie in memory; the C library then uses the old call
        return [(_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    if name in ("open", "openat"):
        return [
            (_LOAD, 0, 0, _argument(1 if name == "open" else 2)),
            (_ANY_BIT, 0, 1, _WRITING),
            (_RETURN, 0, 0, _ERRNO | _EACCES),
            (_RETURN, 0, 0, _ALLOW),
        ]
    if name == "clone":
        return [
            (_LOAD, 0, 0, _argument(0)),
            (_ANY_BIT, 1, 0, _CLONE_THREAD),
            (_RETURN, 0, 0, _ERRNO | _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    if name == "prlimit64":  # reading this process's own limits
        return [
            *_one_of(0, (0, pid), _EPERM)[:-1],
            (_LOAD, 0, 0, _argument(2)),
            (_EQUAL, 0, 3, 0),
            (_LOAD, 0, 0, _argument(2) + 4),
            (_EQUAL, 0, 1, 0),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _ERRNO | _EPERM),
        ]
    position, values, error = {
        "kill": (0, (pid,), _EPERM),
        "tkill": (0, (pid,), _EPERM),
        "tgkill": (0, (pid,), _EPERM),
        "prctl": (0, (15, 16, 0x53564D41), _EPERM),  # get and set the thread's name, name a mapping
        "fcntl": (1, (0, 1, 2, 3, 4, 1030, 1032), _EPERM),  # duplicate, flags, size of a pipe
        "ioctl": (
            1,
            (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
            _ENOTTY,
        ),  # terminal?, flags
    }[name]
    return _one_of(position, values, error)


def _one_of(position: int, values: tuple, error: int) -> list:
    """Allow if the argument is one of `values`; the last instruction is the return that allows."""
    block = [(_LOAD, 0, 0, _argument(position))]
    for i, value in enumerate(values):
        block.append((_EQUAL, len(values) - i, 0, value))
    return [*block, (_RETURN, 0, 0, _ERRNO | error), (_RETURN, 0, 0, _ALLOW)]


def _argument(position: int) -> int:
    return 16 + 8 * position
