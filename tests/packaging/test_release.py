"""The command that releases a package: what it writes, what it refuses, and what it finds wrong in a build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import release

ROOT = Path(__file__).parents[2]
NEWS = "## Unreleased\n\n- Prompts are read backwards.\n\n"


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)


def add_news(folder: Path, name: str) -> None:
    """An unreleased section in the changelog of a package, in place of the one that it may have."""
    changelog = release.Package(folder, name).changelog
    text = re.sub(r"(?ms)^## Unreleased\n.*?(?=^## )", "", changelog.read_text())
    changelog.write_text(text.replace("\n\n", f"\n\n{NEWS}", 1))


@pytest.fixture
def tree(tmp_path):
    """This workspace as a repository of its own, with news of nnterp-prompts."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git repository")
    folder = tmp_path / "tree"
    release.copy_of(ROOT, folder)
    add_news(folder, "nnterp-prompts")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    return folder


def state(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts}


def project(folder: Path, name: str) -> dict:
    return tomllib.loads(release.Package(folder, name).project.read_text())["project"]


@pytest.mark.parametrize(
    ("version", "bump", "expected"),
    [
        ("2.0.0", "patch", "2.0.1"),
        ("2.3.4", "minor", "2.4.0"),
        ("2.3.4", "major", "3.0.0"),
        ("2.3.4", "none", "2.3.4"),
        ("2.3.4", "2.10.0", "2.10.0"),
    ],
)
def test_a_bump(version, bump, expected):
    assert release.bumped(version, bump) == expected


@pytest.mark.parametrize("bump", ["2.3.4", "1.9.9", "2.4", "newest"])
def test_what_is_no_later_version_is_refused(bump):
    with pytest.raises(release.ReleaseError, match=bump):
        release.bumped("2.3.4", bump)


def test_the_version_and_the_changelog_are_written(tree):
    before = project(ROOT, "nnterp-prompts")["version"]
    after = release.bumped(before, "minor")
    assert release.prepare(tree, ("nnterp-prompts",), "minor") == {"nnterp-prompts": after}
    assert project(tree, "nnterp-prompts")["version"] == after
    assert project(tree, "nnterp-core")["version"] == project(ROOT, "nnterp-core")["version"]
    text = release.Package(tree, "nnterp-prompts").changelog.read_text()
    assert f"## {after}\n\n- Prompts are read backwards.\n\n## {before}" in text
    assert "Unreleased" not in text


def test_packages_that_are_released_together_require_each_other(tree):
    for name in release.MODULES:
        if name != release.UMBRELLA:
            add_news(tree, name)
    versions = release.prepare(tree, release.PACKAGES, "major")
    majors = {name: int(version.split(".")[0]) for name, version in versions.items()}
    asked = {name: f"{name}>={major}.0,<{major + 1}" for name, major in majors.items()}
    assert asked["nnterp-core"] in project(tree, "nnterp-display")["dependencies"]
    umbrella = project(tree, "nnterp")
    assert set(umbrella["dependencies"]) == {asked[f"nnterp-{name}"] for name in ("core", "interventions", "prompts")}
    assert umbrella["optional-dependencies"]["all"] == [asked["nnterp-display"]]


def test_a_package_without_news_is_not_released_and_nothing_is_written(tree):
    before = state(tree)
    with pytest.raises(release.ReleaseError, match=r"nnterp-display/CHANGELOG.md has nothing under"):
        release.release(tree, ("nnterp-display",), "patch")
    assert state(tree) == before


def test_a_version_that_has_its_tag_is_not_released_again(tree):
    version = project(tree, "nnterp-prompts")["version"]
    git(tree, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "all")
    git(tree, "tag", f"nnterp-prompts-v{version}")
    with pytest.raises(release.ReleaseError, match=f"nnterp-prompts-v{version}"):
        release.release(tree, ("nnterp-prompts",), "none")


@pytest.mark.packaging
@pytest.mark.slow
def test_one_package_is_released_by_one_command(tree, uv, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(Path(uv).parent), prepend=":")
    monkeypatch.setattr(release, "ROOT", tree)
    version = release.bumped(project(ROOT, "nnterp-prompts")["version"], "minor")
    assert release.main(["nnterp-prompts", "--bump", "minor"]) == 0
    said = capsys.readouterr().out
    assert "are complete, and work alone" in said
    assert f"git tag nnterp-prompts-v{version}" in said
    built = tree / "dist" / "nnterp-prompts"
    wheel, sdist = (built / f"nnterp_prompts-{version}{end}" for end in ("-py3-none-any.whl", ".tar.gz"))
    assert {wheel, sdist} <= set(built.iterdir())
    assert project(tree, "nnterp-prompts")["version"] == version

    package = release.Package(tree, "nnterp-prompts")
    lost = built / "lost.whl"
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(lost, "w") as part:
        for name in whole.namelist():
            if not name.endswith("_storage.py"):
                part.writestr(name, whole.read(name))
        part.writestr("nnterp/__init__.py", "")
    message = r"missing in lost.whl: nnterp/prompts/_storage.py; too much in lost.whl: nnterp/__init__.py"
    with pytest.raises(release.ReleaseError, match=message):
        release.check_contents(package, lost, sdist)
    empty = built / "empty.tar.gz"
    with tarfile.open(empty, "w:gz"):
        pass
    with pytest.raises(release.ReleaseError, match=r"missing in empty.tar.gz: .*src/nnterp/prompts/_storage.py"):
        release.check_contents(package, wheel, empty)
