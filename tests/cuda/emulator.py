"""Builds csrc/cuda/*.cu for the CPU; see cuda_runtime.h here."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def build(folder: Path, sanitized: bool = False) -> Path:
    """The library that registers the CUDA kernels under ``torch.ops.slimstate_emulated``, compiled if it is not in
    `folder` yet. Sanitized it can be loaded only where their libraries are loaded before all others (LD_PRELOAD).
    """
    if sys.platform != "linux":
        pytest.skip("the emulator of CUDA needs Linux")
    import fcntl

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler to build the emulator of CUDA with")
    folders = [HERE, CSRC, *include_paths(), sysconfig.get_path("include")]
    command = [compiler, "-std=c++20", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
    command += ["-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in folders)]
    command += SANITIZED if sanitized else ("-fsanitize=alignment", "-DEMULATED_ALIGNMENT")
    command += ["-include", str(HERE / "cuda_runtime.h"), "-c", "-x", "c++"]
    headers = sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.glob("*.h")])
    common = repr(command).encode() + b"".join(path.read_bytes() for path in headers)

    def compile_one(source: Path) -> Path:
        key = hashlib.sha256(common + source.read_bytes()).hexdigest()[:16]
        target = folder / f"{source.stem}-{key}.o"
        if not target.exists():
            run(*command, str(source), "-o", f"{target}.part")
            os.replace(f"{target}.part", target)
        return target

    sources = [CSRC / "ops.cpp", *sorted(CSRC.glob("cuda/*.cu")), HERE / "machinery.cu"]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one builds
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compile_one, sources))
        library = folder / f"emulated-{hashlib.sha256(repr(objects).encode()).hexdigest()[:16]}.so"
        if not library.exists():
            link = [*SANITIZED] if sanitized else []
            link += [f"-L{TORCH_LIB_PATH}", f"-Wl,-rpath,{TORCH_LIB_PATH}", "-ltorch_cpu", "-lc10"]
            run(compiler, "-shared", *map(str, objects), *link, "-o", f"{library}.part")
            os.replace(f"{library}.part", library)
    return library


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
