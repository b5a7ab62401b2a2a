"""The page in a real browser: what it shows, how the keyboard drives it, narrow screens, hostile text."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi.responses import HTMLResponse

from pulse_ray.config import ServeConfig
from pulse_ray.serving import api, guard
from tests.serving.conftest import free_port
from tests.serving.fake_backend import HOSTILE, REASON, TITLES, FakeBackend

PAGE = Path(api.__file__).parent / "page"

DRIVER = """<!DOCTYPE html><body>
<iframe src="/" style="border:0;width:360px;height:800px"></iframe><pre id="seen"></pre>
<script>
const frame = document.querySelector("iframe");
const until = async (found) => {
  for (let tries = 0; tries < 200; tries++) {
    try { const value = found(); if (value) return value; } catch {}
    await new Promise((done) => setTimeout(done, 50));
  }
  throw new Error(String(found));
};
frame.onload = async () => {
  const page = frame.contentDocument, log = {};
  const at = (id) => page.getElementById(id);
  const press = (id, key) => {
    const event = new frame.contentWindow.KeyboardEvent("keydown", {key, bubbles: true, cancelable: true});
    at(id).dispatchEvent(event);
  };
  const write = (id, text) => {
    at(id).focus();
    at(id).value = text;
    at(id).dispatchEvent(new frame.contentWindow.Event("input"));
  };
  try {
    await until(() => at("facts").textContent.includes("thought_space@"));
    write("user", "u");
    await until(() => at("user-options").children.length === 1 && !at("user-options").hidden);
    press("user", "ArrowDown");
    log.active = at("user").getAttribute("aria-activedescendant");
    press("user", "Enter");
    await until(() => !at("ranking-section").hidden);
    log.ranked = page.querySelectorAll("#ranking li:not(.head)").length;
    log.width = page.documentElement.scrollWidth;
    page.querySelector("input[value=typed]").click();
    for (const word of ["balm", "towel quick"]) {
      write("item", word);
      await until(() => at("item-options").children.length === 1 && !at("item-options").hidden);
      press("item", "ArrowDown");
      press("item", "Enter");
    }
    log.typed = [...page.querySelectorAll("#typed .name")].map((node) => node.textContent);
    write("item", "zzzz");
    await until(() => at("item-options").textContent.includes("Nothing"));
    press("item", "Escape");
    log.closed = at("item-options").hidden;
    log.typed_width = page.documentElement.scrollWidth;
    at("go").click();
    await until(() => at("reason").textContent.includes("reasoner is off"));
    log.tree_hidden = at("tree-section").hidden;
    log.history = page.querySelectorAll("#history li").length;
  } catch (error) { log.error = error.message; }
  document.getElementById("seen").textContent = JSON.stringify(log);
};
</script>"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The API over the fake backend, with a second page that drives the first."""
    app = api.create(FakeBackend(), ServeConfig())

    @app.get("/driver")
    async def driver() -> HTMLResponse:
        return HTMLResponse(DRIVER)

    yield from _served(app)


def _served(app: object) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def _dom(address: str, folder: Path, *options: str) -> str:
    """The page's document after its scripts ran."""
    if shutil.which("chromium") is None:
        pytest.skip("needs the package chromium")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder}",
    ]
    command += ["--virtual-time-budget=15000", *options, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_a_user_is_shown_with_ranking_reason_tree_and_history(address: str, tmp_path: Path) -> None:
    dom = _dom(f"{address}/#user=u1", tmp_path)
    shown = re.sub(r"<[^>]*>", " ", dom)
    assert REASON in shown
    assert "agreement with the history +0.630" in shown
    assert dom.count('class="thought chosen"') == 1
    assert dom.count('class="thought') == 5
    assert "agreement +0.510" in shown
    assert len(re.findall("left behind", shown)) == 1
    assert "chosen by the Thought Space" in shown
    assert dom.count('class="place"') == 4
    assert all(TITLES[f"i{n}"] in shown for n in range(7))
    assert "4 candidates, found by SASRec" in shown
    assert "width: 40%" in dom
    # What users and models wrote is text, also where it looks like markup.
    assert "<img" not in dom
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in dom


def test_the_keyboard_drives_it_on_a_narrow_screen(address: str, tmp_path: Path) -> None:
    dom = _dom(f"{address}/driver", tmp_path)
    (seen,) = re.findall(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert '"error"' not in seen, seen
    assert '"active":"user-options-0"' in seen
    assert '"ranked":4,"width":360' in seen
    assert f'"typed":["{TITLES["i4"]}","{TITLES["i2"]}"]' in seen
    assert '"closed":true,"typed_width":360,"tree_hidden":true,"history":2' in seen


def test_both_themes_are_drawn(address: str, tmp_path: Path) -> None:
    pictures = []
    for scheme in (0, 1):
        picture = tmp_path / f"{scheme}.png"
        _dom(
            f"{address}/#user=u1",
            tmp_path / "profile",
            *(f"--blink-settings=preferredColorScheme={scheme}", "--window-size=800,1400", f"--screenshot={picture}"),
        )
        pictures.append(picture.read_bytes())
    assert all(len(picture) > 20_000 for picture in pictures)
    assert pictures[0] != pictures[1]


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    digests = guard.token_digests(ServeConfig(tokens_file=str(_written(tmp_path / "tokens", "secret"))))
    for address in _served(api.create(FakeBackend(), ServeConfig(), digests)):
        dom = _dom(f"{address}/#user=u1", tmp_path / "profile")
    assert re.search(r'<form id="token-form">', dom)
    assert "a bearer token is needed" in dom


def test_nothing_comes_from_elsewhere(address: str) -> None:
    for path in PAGE.iterdir():
        assert not re.search(r"(?:https?:)?//[a-z]", path.read_text(encoding="utf-8")), path
        assert "innerHTML" not in path.read_text(encoding="utf-8")


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
