"""Code in C, compiled at its first use for the processor that it runs on, kept in the cache, and called
through ctypes.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from common.errors import NotSupported, one_line
from common.files import cache_home

# contracting lets the compiler use fused multiply-add; numbers keep their order otherwise
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
VECTORS = Path(__file__).with_name("vectors.h")  # which the sources include
INCLUDES = [f"-I{VECTORS.parent}"]
COMPILE_SECONDS = 120  # it takes 2 to 4


def find_compiler() -> list[str] | None:
    """Return the command of a C compiler: $CC, cc, gcc, clang, or the one in the package
    ziglang; None if there is none.
    """
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in ([chosen] if chosen else []) + [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    return None


def processor() -> str:
    """Return what the compiled code depends on: the processor's kind, name and instructions."""
    lines = []
    if Path("/proc/cpuinfo").exists():
        names = ("model name", "flags", "Features", "CPU part")
        text = Path("/proc/cpuinfo").read_text()
        lines = sorted({line for line in text.splitlines() if line.startswith(names)})
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *lines])


def load(
    source: Path,
    cache_dir: str | None,
    *,
    declare: Callable[[ctypes.CDLL], ctypes.CDLL],
    check: Callable[[ctypes.CDLL], None],
) -> ctypes.CDLL:
    """Return the library that a source file is compiled to, from the cache if it is there for this
    source, these flags and this processor.

    `declare` gives the types of its functions, and raises AttributeError for one that is missing;
    `check` raises NotSupported when what was just compiled computes something wrong. Raises
    NotSupported, with the reason, also when there is no compiler, and when it fails.

    Two processes at once each compile their own file and rename it to the same name. Where the
    cache can't be written, the file lives as long as it takes to load it.
    """
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    key = "\n".join([source.read_text("utf-8"), VECTORS.read_text("utf-8"), *FLAGS, native, processor()])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    folder = cache_home(cache_dir) / "kernels"
    with contextlib.suppress(OSError, AttributeError):  # not there, or cut off by a full disk
        return declare(ctypes.CDLL(str(folder / name)))
    return _compiled(source, native, folder / name, declare=declare, check=check)


def _compiled(
    source: Path,
    native: str,
    path: Path,
    *,
    declare: Callable[[ctypes.CDLL], ctypes.CDLL],
    check: Callable[[ctypes.CDLL], None],
) -> ctypes.CDLL:
    """Compile a source file for this processor, check it, keep it as `path`, and return it."""
    compiler, folder = find_compiler(), path.parent
    if compiler is None:
        raise NotSupported("no C compiler (cc, gcc, clang, or pip install ziglang)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".making-")
    except OSError:
        scratch = tempfile.TemporaryDirectory()
    with scratch as scratch_name:
        compiled = Path(scratch_name) / path.name
        compile_file([*compiler, *FLAGS, *INCLUDES, native, str(source), "-o", str(compiled), "-lm"])
        try:
            library = declare(ctypes.CDLL(str(compiled)))  # stays loaded when the file is gone
        except (OSError, AttributeError) as error:
            problem = f"the C compiler {compiler[0]} made no library: {one_line(error)}"
            raise NotSupported(problem) from error
        check(library)
        if compiled.parent.parent == folder:
            os.replace(compiled, path)
    return library


def compile_file(command: list[str]) -> None:
    """Run a compiler. Raises NotSupported, with the first line that says why, when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotSupported(f"the C compiler failed: {one_line(error)}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        lines = lines or [f"code {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise NotSupported(f"the C compiler {command[0]} failed: {reason.strip()}")
