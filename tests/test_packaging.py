import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import slimstate

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "csrc/python": "slimstate",
    "csrc/python/ops": "slimstate/ops",
    "optim": "slimstate/optim",
    "projections": "slimstate/projections",
}


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, encoding="utf-8", check=False
    )


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """What git tracks, or would with the next `git add`."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def build_wheel(files: list[Path], folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel, and what was printed."""
    for file in files:  # a copy, so that nothing left from other builds gets in
        (folder / "source" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / "source" / file)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    built = run(*command, cwd=folder / "source", **environment)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, built.stdout + built.stderr


def python_with(wheel: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python on an unpacked wheel, without site (-S): an editable install would fill in what the wheel lacks."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    path = os.pathsep.join([str(folder), *sys.path])
    return run(sys.executable, "-S", "-W", "error", *arguments, cwd=folder, PYTHONPATH=path)


@pytest.fixture(scope="module")
def pure_wheel(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(files, tmp_path_factory.mktemp("pure"), SLIMSTATE_EXT="0")[0]


def test_pure_wheel_holds_the_package_and_nothing_else(pure_wheel, files):
    expected = {
        f"{PACKAGES[str(file.parent.as_posix())]}/{file.name}"
        for file in files
        if file.parent.as_posix() in PACKAGES and file.suffix in {".py", ".pyi", ".typed"}
    }
    assert pure_wheel.name == f"slimstate-{slimstate.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(pure_wheel) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (license_file,) = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
        license_text = wheel.read(license_file).decode()
    assert found == expected
    assert {
        "slimstate/__init__.py",
        "slimstate/ops/__init__.py",
        "slimstate/py.typed",
        "slimstate/optim/__init__.py",
    } <= found
    assert "Apache License" in license_text


def test_pure_wheel_runs(pure_wheel, tmp_path):
    code = "import slimstate.ops, slimstate.optim; print(slimstate.ops.__file__, slimstate.ops.COMPILED)"
    result = python_with(pure_wheel, tmp_path, "-c", code)
    assert result.stdout.split() == [str(tmp_path / "slimstate" / "ops" / "__init__.py"), "False"], result.stderr


def test_metadata(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as wheel:
        metadata = message_from_bytes(wheel.read(f"slimstate-{slimstate.__version__}.dist-info/METADATA"))
    assert metadata["Version"] == slimstate.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    extras = {"8bit", "bench", "check", "docs", "finetune", "pretrain", "test", "vision"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    required = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {"numpy", "torch>=2.10"}


@pytest.mark.slow
def test_wheel_with_the_extension(files, tmp_path):
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "cl"))):
        pytest.skip("no C++ compiler")
    wheel, _ = build_wheel(files, tmp_path, SLIMSTATE_EXT="1")
    assert re.fullmatch(rf"slimstate-{re.escape(slimstate.__version__)}-cp310-abi3-\w+\.whl", wheel.name)
    checked = python_with(wheel, tmp_path / "installed", "-m", "slimstate.ops")
    assert checked.returncode == 0 and "equals the reference" in checked.stdout, checked.stdout + checked.stderr
    assert "for any machine" in checked.stdout  # pip keeps wheels, and people copy them
    if sys.platform == "linux" and shutil.which("nm"):
        library = tmp_path / "installed" / "slimstate" / "_C.abi3.so"
        symbols = run("nm", "-D", "--undefined-only", str(library), cwd=tmp_path).stdout
        assert "aoti_torch_library_def" in symbols
        # Nothing of torch's C++ interface, which changes with every release.
        assert not re.search(r"_ZNK?(2at|3c10|5torch)", symbols)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hindrance", "message"),
    [
        ({"CXX": "no-such-compiler"}, r"the extension does not build for the CPU \(.*"),
        ({"CXX": "false"}, r"the extension does not build for the CPU \(.*"),
        ({"PYTHONPATH": "{folder}"}, r"no compiled extension, since torch cannot be imported \(none here\)"),
    ],
    ids=["no compiler", "an error while compiling", "no torch"],
)
def test_without_what_the_extension_needs_the_wheel_is_pure_and_says_why(files, tmp_path, hindrance, message):
    (tmp_path / "torch.py").write_text("raise ImportError('none here')")
    hindrance = {name: value.format(folder=tmp_path) for name, value in hindrance.items()}
    wheel, printed = build_wheel(files, tmp_path, SLIMSTATE_EXT="", CUDA_HOME="", **hindrance)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert re.search(rf"^ *slimstate: {message}", printed, re.MULTILINE), printed


@pytest.mark.parametrize("folder", ["optim", "projections"])
def test_a_folder_imported_from_the_clone_says_what_to_do(folder):
    result = run(sys.executable, "-c", f"import {folder}", cwd=ROOT)
    assert result.returncode != 0
    assert "ImportError" in result.stderr and f"import slimstate.{folder}" in result.stderr


def test_submodules_load_on_first_use():
    code = "import slimstate; slimstate.optim; slimstate.projections; slimstate.ops; print(slimstate.__version__)"
    assert run(sys.executable, "-W", "error", "-c", code, cwd=ROOT).stdout.strip() == slimstate.__version__
    with pytest.raises(AttributeError, match="no attribute 'optimizers'"):
        _ = slimstate.optimizers


def test_changelog_begins_with_this_version():
    latest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert latest is not None and latest[1] == slimstate.__version__


def test_no_file_names_one_machine(files):
    own = re.compile(r"(?<![\w.:/~-])/(?:home|root|tmp|work|opt|mnt|Users)/|extra-index-url|find-links|pythonhosted")
    found = []
    for file in files:
        try:
            text = (ROOT / file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file}: {match[0]}" for match in own.finditer(text) if file != Path("tests/test_packaging.py")]
    assert not found
