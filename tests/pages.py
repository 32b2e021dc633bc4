"""Pages of ours in a headless browser: what they show after a script has acted on them, and how they look."""
import html
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

# Runs after the page's own scripts; leaves what it found, and every error, in the document.
_ACT = """<script>
(() => {
  const say = (kind, text) => {
    const line = document.createElement("pre");
    line.className = kind;
    line.textContent = text;
    document.body.append(line);
  };
  addEventListener("error", event => say("test-error", event.message));
  setTimeout(() => {
    try { say("test-found", JSON.stringify((() => { ACT })())); } catch (error) { say("test-error", error.stack); }
  }, 100);
})();
</script>"""


def act(page: Path, script: str) -> str:
    """Opens ``page``, runs the body of a JavaScript function and returns the JSON of what it returns.

    Fails where the page or the script throws or the console has an error. Skips the test where there is no browser.
    """
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / page.name
        text = page.read_text(encoding="utf-8")
        watch = '<script>const thrown = []; addEventListener("error", event => thrown.push(event.message));</script>'
        checked = f'if (thrown.length) throw new Error(thrown.join("; ")); {script}'
        changed.write_text(text.replace("<script>", watch + "<script>", 1) + _ACT.replace("ACT", checked))
        found = _browser(changed, folder, "--dump-dom", "--virtual-time-budget=5000", "--enable-logging=stderr")
    console = [line for line in found.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    said = dict(re.findall(r'<pre class="test-(\w+)">(.*?)</pre>', found.stdout, re.DOTALL))
    assert "found" in said, html.unescape(said.get("error", found.stdout[-2000:]))
    return html.unescape(said["found"])


def photograph(page: Path, picture: Path, width: int = 1200, height: int = 900) -> None:
    """Writes how ``page`` looks in a window of that size, in CSS pixels, as a PNG."""
    with tempfile.TemporaryDirectory() as folder:
        _browser(page, folder, f"--screenshot={picture}", f"--window-size={width},{height}", "--hide-scrollbars",
                 "--virtual-time-budget=5000")


def _browser(page: Path, profile: str, *options: str) -> subprocess.CompletedProcess:
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs chromium")
    return subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}/profile", *options,
         page.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True)
