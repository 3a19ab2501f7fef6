"""The code a run was submitted with: copied into its folder, hashed, and proved to be what a job imports."""

import hashlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("launcher", "mvit", "data_pipeline")


class SnapshotError(ValueError):
    """The code that would run is not the code that was submitted."""


def take_snapshot(target: Path) -> str:
    """Copy the project's packages into `target` and return the SHA-256 over their files."""
    for package in PACKAGES:
        shutil.copytree(package_dir(package), target / package, ignore=shutil.ignore_patterns("__pycache__"))
    return hash_code({package: target / package for package in PACKAGES})


def running_code_hash() -> str:
    """Return the SHA-256 over the packages that this process would import."""
    return hash_code({package: package_dir(package) for package in PACKAGES})


def verify_snapshot(code_dir: Path, expected_sha256: str) -> None:
    """Check that this process imports the packages from `code_dir` and that no file there has changed.

    Raises SnapshotError naming the package or the two hashes.
    """
    for package in PACKAGES:
        found = package_dir(package)
        if found != (code_dir / package).resolve():
            raise SnapshotError(
                f"The job would import {package} from {found}, not from its snapshot {code_dir / package}. "
                "Something puts another copy ahead of PYTHONPATH (a sitecustomize, a .pth file?): remove it."
            )
    actual = hash_code({package: code_dir / package for package in PACKAGES})
    if actual != expected_sha256:
        raise SnapshotError(
            f"The code in {code_dir} was changed after the submission: sha256 {actual[:12]}…, recorded "
            f"{expected_sha256[:12]}…. Restore it, or submit the changed code as a new run."
        )


def package_dir(package: str) -> Path:
    """Return the folder a package would be imported from, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SnapshotError(f"The package {package} cannot be imported: is mvit installed in this Python?")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def hash_code(packages: dict[str, Path]) -> str:
    """Return the SHA-256 over names and bytes of all files of the packages, compiled files apart."""
    digest = hashlib.sha256()
    for package, folder in sorted(packages.items()):
        for path in _source_files(folder):
            content = path.read_bytes()
            digest.update(f"{package}/{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def _source_files(folder: Path) -> Iterator[Path]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return iter(sorted(files))
