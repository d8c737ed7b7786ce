"""Builds csrc/ for tests: CUDA kernels for the CPU (see cuda_runtime.h here), and kernels with sanitizers."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
# Code that a sanitizer instruments can be loaded only where its library was loaded before all others (LD_PRELOAD).
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")


def emulator(folder: Path, sanitized: bool = False) -> Path:
    """The library that registers the CUDA kernels under ``torch.ops.slimstate_emulated``."""
    checks = SANITIZED if sanitized else ("-fsanitize=alignment", "-DEMULATED_ALIGNMENT")
    sources = [CSRC / "ops.cpp", *CSRC.glob("cuda/*.cu"), HERE / "machinery.cu"]
    flags = (f"-I{HERE}", "-include", str(HERE / "cuda_runtime.h"), "-fno-strict-aliasing", "-Wno-unknown-pragmas")
    return build(folder / ("emulator_sanitized" if sanitized else "emulator"), sources, *flags, *checks)


def sanitized_extension(folder: Path) -> Path:
    """``slimstate._C`` for the CPU."""
    return build(
        folder / "extension_sanitized", [CSRC / "ops.cpp", *CSRC.glob("cpu/*.cpp")], "-DSLIMSTATE_NATIVE", *SANITIZED
    )


def build(folder: Path, sources: Iterable[Path], *flags: str) -> Path:
    """A shared library in `folder`, of which only what has changed since the last time is compiled."""
    if sys.platform != "linux":
        pytest.skip("built on Linux only")
    import fcntl

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folders = [CSRC, *include_paths(), sysconfig.get_path("include")]
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fno-math-errno", *flags]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in folders), "-x", "c++", "-c"]
    headers = sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.glob("*.h")])
    common = repr(command).encode() + b"".join(path.read_bytes() for path in headers)

    def compiled(source: Path) -> Path:
        key = hashlib.sha256(common + source.read_bytes()).hexdigest()[:16]
        target = folder / f"{source.stem}-{key}.o"
        if not target.exists():
            run(*command, str(source), "-o", f"{target}.part")
            os.replace(f"{target}.part", target)
        return target

    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one builds
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compiled, sorted(sources)))
        library = folder / f"{hashlib.sha256(repr(objects).encode()).hexdigest()[:16]}.so"
        if not library.exists():
            checks = [flag for flag in flags if flag in SANITIZED]
            libraries = [f"-L{TORCH_LIB_PATH}", f"-Wl,-rpath,{TORCH_LIB_PATH}", "-ltorch_cpu", "-lc10"]
            run(compiler, "-shared", *map(str, objects), *checks, *libraries, "-o", f"{library}.part")
            os.replace(f"{library}.part", library)
        for path in {*folder.glob("*.o"), *folder.glob("*.so")} - {library, *objects}:
            path.unlink()
    return library


def sanitizer_environment() -> dict[str, str]:
    """What a Python needs that loads instrumented code."""
    compiler = os.environ.get("CXX", "g++")
    asked = [[compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    paths = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in asked]
    if not all(map(os.path.isabs, paths)):
        pytest.skip(f"{compiler} has no sanitizers")
    # Python keeps what it allocates, and the kernels allocate nothing.
    return {"LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
