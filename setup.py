"""Only what setup.cfg cannot say: the optional compiled extension.

``SLIMSTATE_EXT=0`` leaves it out, ``SLIMSTATE_EXT=1`` insists on it. Unset, it is built for the CPU, and for CUDA
where torch and nvcc are there for it (with or without a GPU); what cannot be built is left out, and one line says so.

A build in place (``pip install -e .``, ``setup.py build_ext --inplace``) is for this machine: ``-march=native``. A
wheel may go to other machines, also one that ``pip install .`` makes and pip keeps: it assumes the baseline of its
platform and holds wider versions of the hot loops, which the loader chooses from. ``SLIMSTATE_NATIVE=1`` and ``=0``
decide otherwise. On a lesser machine than it was built for the extension does not load, and PyTorch is used. All of
them compute the same bits. CUDA kernels are built for the GPUs that are here or for ``TORCH_CUDA_ARCH_LIST``; where
there is neither, for compute capability 8.0, 9.0 and 10.0.
"""

import os
import platform
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
    # No fused multiply-add, so that kernels reach the bits of the references; no errno, so that roots are vectorised.
    optimize = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    if sys.platform == "win32":
        optimize = ["/fp:precise"]
    if cuda and torch.cuda.device_count() == 0:
        # torch asks the GPUs that it sees for their architecture, and fails where there are none.
        newest = ";10.0+PTX" if cuda_version() >= (12, 8) else "+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0" + newest)

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            if native(self.inplace):
                for module in self.extensions:
                    module.extra_compile_args["cxx"] += ["-march=native", "-DSLIMSTATE_NATIVE"]

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
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def native(inplace: bool) -> bool:
    """Whether to build for this machine alone. Other platforms than this one have no levels worth the difference."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return os.environ.get("SLIMSTATE_NATIVE", "1" if inplace else "0") == "1"


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
