"""Only what setup.cfg cannot say: the optional compiled extension.

``SLIMSTATE_EXT=0`` leaves it out, ``SLIMSTATE_EXT=1`` insists on it. Unset, it is built for the CPU, and for CUDA
where torch and nvcc are there for it (with or without a GPU); what cannot be built is left out, and one line says so.
"""

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

CSRC = Path("csrc")


def extension(cuda: bool) -> dict[str, Any]:
    """The arguments of ``setup`` that build ``slimstate._C``, once for all Python >= 3.10 and torch >= 2.10."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(["-DUSE_CUDA"] if cuda else [])]
    # No fused multiply-add, so that kernels reach the bits of the references; no errno, so that roots are vectorised;
    # sums in lanes where a loop asks for them.
    optimize = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
    if sys.platform == "win32":
        optimize = ["/fp:precise"]
    if cuda and torch.cuda.device_count() == 0:
        # torch asks the GPUs that it sees for their architecture, and fails where there are none.
        newest = ";10.0+PTX" if cuda_version() >= (12, 8) else "+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0" + newest)
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp"), *(CSRC.glob("cuda/*.cu") if cuda else [])]
    module = (CUDAExtension if cuda else CppExtension)(
        "slimstate._C",
        sorted(map(str, sources)),
        include_dirs=[str(CSRC.resolve())],
        depends=sorted(map(str, CSRC.glob("**/*.h"))),
        extra_compile_args={"cxx": optimize + defines, "nvcc": ["-O3", "-fmad=false", *defines]},
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def cuda_version() -> tuple[int, ...]:
    """CUDA's version if torch was built with CUDA and nvcc is here, else ``()``."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None or CUDA_HOME is None:
        return ()
    return tuple(map(int, torch.version.cuda.split(".")))


def build() -> None:
    """Tries the extension with CUDA, then for the CPU alone, then does without."""
    wanted = os.environ.get("SLIMSTATE_EXT", "")
    if wanted == "0":
        setup()
        return
    try:
        attempts = [True, False] if cuda_version() else [False]
    except ImportError as error:
        if wanted == "1":
            raise
        print(f"slimstate: no compiled extension, since torch cannot be imported ({error})")
        attempts = []
    for cuda in attempts:
        try:
            setup(**extension(cuda))
            return
        except (Exception, SystemExit) as error:
            if wanted == "1":
                raise
            print(f"slimstate: the extension does not build for {'CUDA' if cuda else 'the CPU'} ({error})")
    setup()


build()
