"""`docs/compatibility.md`: its rows are what ran, and they are of the bounds that the packages declare now."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import lock
import versions

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="holds"/>
<testcase classname="tests.a" name="fails"><failure message="no">no</failure></testcase>
<testcase classname="tests.a" name="breaks"><error message="no">no</error></testcase>
<testcase classname="tests.a" name="waits"><skipped message="later"/></testcase>
</testsuite></testsuites>"""


def rows() -> dict[str, dict[str, str]]:
    table = versions.rows_of(versions.PAGE.read_text(encoding="utf-8"))
    return {name: dict(zip(versions.HEADING, cells, strict=True)) for name, cells in table.items()}


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[\d.]+", version)[0].strip(".").split("."))


def test_the_report_of_pytest_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    outcome = versions.Outcome(versions.SETTINGS[0])
    versions.read_report(report, outcome)
    assert outcome.counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert outcome.failed == ["tests.a::fails", "tests.a::breaks"]
    assert outcome.cells()[-3:] == ["1", "1", "2"]


def test_rows_that_did_not_run_again_stay():
    ran = ["lowest", *map(str, range(1, len(versions.HEADING)))]
    kept = versions.rows_of(versions.page({"lowest": ran}))
    assert kept["lowest"] == ran
    assert list(kept) == [setting.name for setting in versions.SETTINGS]
    assert {row[-4] for name, row in kept.items() if name != "lowest"} == {"untested"}
    absent = versions.Outcome(versions.SETTINGS[-1], untested=versions.UNTESTED).cells()
    assert versions.rows_of(versions.page({**kept, absent[0]: absent}))[absent[0]][-4] == versions.UNTESTED


def test_an_unknown_setting_is_refused(capsys):
    with pytest.raises(SystemExit):
        versions.main(["newest"])
    assert "no setting is called newest" in capsys.readouterr().err


def test_the_tests_that_run_are_there():
    for files, _ in versions.TESTS.values():
        assert [file for file in files if not (versions.ROOT / file).is_file()] == []


def test_the_lowest_row_has_the_lower_bounds():
    """Who lowers or raises a bound runs `tools/versions.py lowest` again."""
    bounds: dict[str, tuple[int, ...]] = {}
    for project in (versions.ROOT / "packages").glob("*/pyproject.toml"):
        for requirement in tomllib.loads(project.read_text())["project"]["dependencies"]:
            name, least = re.match(r"([\w.-]+)>=([\d.]+)", requirement).groups()
            name = name.replace("_", "-")
            bounds[name] = max(bounds.get(name, ()), number(least))
    lowest = rows()["lowest"]
    assert {"transformers", "torch", "nnsight", "plotly"} <= bounds.keys() & set(versions.SHOWN)
    for name in bounds.keys() & set(versions.SHOWN):
        assert number(lowest[name])[: len(bounds[name])] == bounds[name], name


def test_the_highest_rows_are_no_older_than_the_versions_of_the_tests():
    pinned = lock.pinned(lock.LOCK.read_text(encoding="utf-8"))
    tested = [row for name, row in rows().items() if name.startswith("highest") and row["passed"].isdigit()]
    assert tested
    for row in tested:
        for name in ("transformers", "torch", "nnsight"):
            assert number(row[name]) >= number(pinned[name]), (row["setting"], name)


def test_nothing_failed():
    for name, row in rows().items():
        assert row["failed"] in ("0", "–"), name
