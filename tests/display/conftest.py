"""A real browser: pages are opened as a reader opens them, and everything it says about them is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1800,1400",
    "--force-device-scale-factor=1",
)


class Browser:
    """Chromium with one page open."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, path: Path) -> None:
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(path.resolve().as_uri())
        self.driver.set_script_timeout(60)
        # Drawn, restyled to the reader's theme, and drawn again.
        self.driver.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            const wait = () => {
              const plot = document.querySelector('.js-plotly-plot');
              if (plot && plot._fullLayout && plot.querySelector('.main-svg'))
                return requestAnimationFrame(() => setTimeout(done, 150));
              setTimeout(wait, 50);
            };
            wait();
            """
        )

    def draw(self, figure) -> None:
        """Put another figure in the place of the one on the page, without loading plotly.js again."""
        self.driver.execute_async_script(
            """
            const [figure, done] = [JSON.parse(arguments[0]), arguments[1]];
            Plotly.newPlot('figure', figure.data, figure.layout)
              .then(() => requestAnimationFrame(() => setTimeout(done, 100)));
            """,
            figure.to_json(),
        )

    def js(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def errors(self) -> list[str]:
        """What the console holds at warning level and above."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]

    def requests(self) -> list[str]:
        """Every address the page asked for; data, blobs and the browser's own pages are no network."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "blob:", "chrome:"))]

    def texts(self) -> list[str]:
        """The texts drawn on the page."""
        return self.js("return [...document.querySelectorAll('.js-plotly-plot text')].map(t => t.textContent)")

    def hover(self, x: float, y: float, subplot: str = "xy") -> str:
        """Move the mouse over a point given in axis coordinates, and return what the label says, a line each."""
        from selenium.webdriver.support.ui import WebDriverWait

        spot = """
            const plot = document.querySelector('.js-plotly-plot'), layout = plot._fullLayout;
            const box = plot.querySelector(`.nsewdrag[data-subplot="${arguments[4]}"]`).getBoundingClientRect();
            const [xa, ya] = [layout[arguments[2]], layout[arguments[3]]];
            const scale = box.width / xa._length;  // a page shrinks a figure that is wider than the window
            return [box.left + scale * xa.c2p(arguments[0]), box.top + scale * ya.c2p(arguments[1])];
        """
        xname, yname = subplot.split("y")
        axes = (xname.replace("x", "xaxis"), f"yaxis{yname}")
        _, top = self.js(spot, x, y, *axes, subplot)
        self.js("window.scrollBy(0, arguments[0])", top - 500)
        left, top = self.js(spot, x, y, *axes, subplot)
        self._move(1, 1)
        WebDriverWait(self.driver, 10, 0.05).until(
            lambda _: not self.js("return document.querySelector('g.hovertext')")
        )
        for step in (-3, 0):  # plotly answers to movement
            self._move(left + step, top + step)
        WebDriverWait(self.driver, 10, 0.05).until(lambda _: self.js("return !!document.querySelector('g.hovertext')"))
        return self.js(
            """
            return [...document.querySelectorAll('g.hovertext text.nums')].flatMap(t => {
              const lines = [...t.querySelectorAll('tspan.line')];
              return lines.length ? lines.map(l => l.textContent) : [t.textContent];
            }).join('\\n');
            """
        )

    def _move(self, x: float, y: float) -> None:
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        actions = ActionBuilder(self.driver, duration=0)
        actions.pointer_action.move_to_location(round(x), round(y))
        actions.perform()


@pytest.fixture(scope="session")
def _driver(tmp_path_factory):
    binary = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    service = shutil.which("chromedriver")
    if binary is None or service is None:
        pytest.skip("no Chromium with its driver on this machine (Debian: apt-get install chromium chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(service))
    driver.get("about:blank")
    yield driver
    driver.quit()


@pytest.fixture
def browser(_driver):
    return Browser(_driver)
