"""Release one package or all: raise the version, head the changelog, build, and check what was built.

    uv run python tools/release.py nnterp-core --bump minor
    uv run python tools/release.py all --bump patch
    uv run python tools/release.py all --bump none      # the versions that stand in the files already

It works on a copy of the tracked files. Only when everything holds are the changed files and `dist/` written here, and
the commands printed that commit, tag and publish. What holds: each wheel is built from its sdist and has every tracked
source file of its package and nothing else; and in a fresh environment each package is installed alone, from the wheel
and from the sdist, and imports all that it offers.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
UMBRELLA = "nnterp"
CORE = "nnterp-core"
# In the order of publishing: what others require comes first.
PACKAGES = (CORE, "nnterp-interventions", "nnterp-prompts", "nnterp-display", UMBRELLA)
UNRELEASED = "Unreleased"
PARTS = ("major", "minor", "patch")
MODULES = {
    CORE: ("nnterp",),
    "nnterp-interventions": ("nnterp.interventions",),
    "nnterp-prompts": ("nnterp.prompts", "nnterp.prompt_utils"),
    "nnterp-display": ("nnterp.display",),
    UMBRELLA: ("nnterp", "nnterp.interventions", "nnterp.prompts"),
}
IMPORT_ALL = (
    "import importlib, sys\n"
    "for name in {modules}:\n"
    "    module = importlib.import_module(name)\n"
    "    assert module.__file__.startswith(sys.prefix), module.__file__\n"
    "    for public in module.__all__:\n"
    "        getattr(module, public)\n"
)


class ReleaseError(Exception):
    """What keeps a package from being released."""


@dataclass(frozen=True)
class Package:
    """One of the distributions in a working tree."""

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.root if self.name == UMBRELLA else self.root / "packages" / self.name

    @property
    def project(self) -> Path:
        return self.folder / "pyproject.toml"

    @property
    def changelog(self) -> Path | None:
        """The changelog; the umbrella has no code and none."""
        return None if self.name == UMBRELLA else self.folder / "CHANGELOG.md"

    @property
    def version(self) -> str:
        return tomllib.loads(self.project.read_text(encoding="utf-8"))["project"]["version"]

    def raise_to(self, version: str) -> None:
        """Write the version into `pyproject.toml`."""
        text = self.project.read_text(encoding="utf-8")
        changed, times = re.subn(r'(?m)^version = "[^"]*"$', f'version = "{version}"', text, count=1)
        assert times == 1, f"{self.project} states no version"
        self.project.write_text(changed, encoding="utf-8")

    def require_together(self, versions: dict[str, str]) -> None:
        """Require siblings that are released together from their new minor versions on."""
        text = self.project.read_text(encoding="utf-8")
        for name, version in versions.items():
            major, minor, _ = version.split(".")
            text = re.sub(rf'"{name}>=[\d.]+,<\d+"', f'"{name}>={major}.{minor},<{int(major) + 1}"', text)
        self.project.write_text(text, encoding="utf-8")

    def head_changelog(self, version: str) -> None:
        """Give the unreleased section of the changelog its version.

        Raises:
            ReleaseError: There is none, or it says nothing.
        """
        if self.changelog is None:
            return
        text = self.changelog.read_text(encoding="utf-8")
        found = re.search(rf"(?ms)^## {UNRELEASED}\n(.*?)(?=^## |\Z)", text)
        if found is None or not found[1].strip():
            raise ReleaseError(
                f"{self.changelog.relative_to(self.root)} has nothing under `## {UNRELEASED}`: say there what users of "
                f"{version} will notice."
            )
        text = f"{text[: found.start()]}## {version}\n{text[found.start(1) :]}"
        self.changelog.write_text(text, encoding="utf-8")

    def sources(self) -> set[str]:
        """The tracked files of the package's code, as a wheel names them."""
        if self.name == UMBRELLA:
            return set()
        source = self.folder / "src"
        return {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}


def bumped(version: str, bump: str) -> str:
    """The version after a bump: "major", "minor", "patch", "none", or the version itself.

    Raises:
        ReleaseError: It is no version, or not a later one.
    """
    if bump == "none":
        return version
    numbers = [int(number) for number in version.split(".")]
    if bump in PARTS:
        place = PARTS.index(bump)
        numbers = [*numbers[:place], numbers[place] + 1, *[0] * (2 - place)]
        return ".".join(map(str, numbers))
    if not re.fullmatch(r"\d+\.\d+\.\d+", bump):
        raise ReleaseError(f"{bump!r} is no version: give {', '.join(PARTS)}, none, or three numbers such as 2.1.0.")
    if [int(number) for number in bump.split(".")] <= numbers:
        raise ReleaseError(f"{bump} does not come after {version}.")
    return bump


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command.

    Raises:
        ReleaseError: It failed; with all that it said.
    """
    dropped = {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "UV_PROJECT_ENVIRONMENT"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    if "UV_FIND_LINKS" not in environment and environment.get("PIP_FIND_LINKS"):
        environment["UV_FIND_LINKS"] = ",".join(environment["PIP_FIND_LINKS"].split())
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def copy_of(root: Path, folder: Path) -> None:
    """Copy the tracked files of a working tree."""
    for name in run("git", "ls-files", "-z", cwd=root).split("\0"):
        if name and (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)


def prepare(root: Path, names: tuple[str, ...], bump: str) -> dict[str, str]:
    """Raise the versions of packages and head their changelogs; return the new versions."""
    versions = {name: bumped(Package(root, name).version, bump) for name in names}
    for name, version in versions.items():
        package = Package(root, name)
        if bump == "none":
            continue
        package.head_changelog(version)
        package.raise_to(version)
        package.require_together({other: new for other, new in versions.items() if other != name})
    return versions


def build(root: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """Build the sdist of a package, and the wheel from the sdist."""
    run("uv", "build", "--quiet", "--package", name, "--out-dir", folder, cwd=root)
    stem = f"{name.replace('-', '_')}-{Package(root, name).version}"
    wheel, sdist = next(folder.glob(f"{stem}-*.whl")), folder / f"{stem}.tar.gz"
    return wheel, sdist


def check_contents(package: Package, wheel: Path, sdist: Path) -> None:
    """Every source file is in the wheel and in the sdist, and nothing else is in the wheel.

    Raises:
        ReleaseError: Names what is missing and what is too much.
    """
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    sources = package.sources()
    wanted = {"pyproject.toml", "README.md", "LICENSE", *(f"src/{name}" for name in sources)}
    wrong = {
        f"missing in {wheel.name}": sources - held,
        f"too much in {wheel.name}": held - sources,
        f"missing in {sdist.name}": wanted - inside,
    }
    if any(wrong.values()):
        raise ReleaseError("; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names))


def check_alone(root: Path, package: Package, built: tuple[Path, ...], siblings: Path, folder: Path) -> None:
    """Install a package alone in a fresh environment, from each of its files, and import all that it offers.

    Args:
        root: Where uv finds the workspace's settings.
        package: The package.
        built: Its wheel and its sdist.
        siblings: A folder with wheels of what it requires of this workspace.
        folder: Where the environment goes.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run("uv", "venv", "--quiet", "--no-project", "--clear", "--python", sys.executable, folder, cwd=root)
    program = folder.parent / "import_all.py"
    program.write_text(IMPORT_ALL.format(modules=MODULES[package.name]), encoding="utf-8")
    install = ("uv", "pip", "install", "--quiet", "--python", python, "--find-links", siblings)
    for file in built:
        run(*install, "--reinstall-package", package.name, file, cwd=root)
        run("uv", "pip", "check", "--python", python, cwd=root)
        run(python, program, cwd=folder.parent)


def release(root: Path, names: tuple[str, ...], bump: str) -> dict[str, str]:
    """Do all of it; what is written in `root` is written last.

    Returns:
        The version of each package that is released.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy, wheels, dist = (Path(scratch) / name for name in ("copy", "wheels", "dist"))
        copy_of(root, copy)
        versions = prepare(copy, names, bump)
        tags = set(run("git", "tag", cwd=root).split())
        if taken := sorted({f"{name}-v{version}" for name, version in versions.items()} & tags):
            raise ReleaseError(f"Released already: {', '.join(taken)}. Give --bump.")
        run("uv", "build", "--quiet", "--all-packages", "--wheel", "--out-dir", wheels, cwd=copy)
        for name, version in versions.items():
            package = Package(copy, name)
            built = build(copy, name, dist / name)
            check_contents(package, *built)
            check_alone(copy, package, built, wheels, Path(scratch) / "environment")
            print(
                f"{name} {version}: {', '.join(file.name for file in built)} are complete, and work alone", flush=True
            )
        for name in names:
            package = Package(copy, name)
            for file in filter(None, (package.project, package.changelog)):
                shutil.copy2(file, root / file.relative_to(copy))
            shutil.copytree(dist / name, root / "dist" / name, dirs_exist_ok=True)
    return versions


def what_is_left(versions: dict[str, str]) -> str:
    """The commands that make it public."""
    title = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = ["Left to do, when .ci/run passes:", f'  git commit -am "Release {title}"']
    for name, version in versions.items():
        stem = f"{name.replace('-', '_')}-{version}"
        lines += [f"  git tag {name}-v{version}", f"  uv publish dist/{name}/{stem}*"]
    return "\n".join([*lines, "  git push --follow-tags"])


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Raise versions, head changelogs, build, and check what was built.")
    parser.add_argument("package", choices=[*PACKAGES, "all"])
    parser.add_argument("--bump", required=True, help="major, minor, patch, none, or a version such as 2.1.0")
    given = parser.parse_args(words)
    names = PACKAGES if given.package == "all" else (given.package,)
    try:
        versions = release(ROOT, names, given.bump)
    except ReleaseError as error:
        print(f"Nothing is released, and nothing here was changed. {error}", file=sys.stderr)
        return 1
    print(what_is_left(versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
