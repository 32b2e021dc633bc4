"""The page docs/browser.html classifies a digit in a browser as the file does in Python."""
import http.server
import queue
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from visionattn import Predictor
from visionattn.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "browser.html"
RUNTIME = ["ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]
# Sends what the page shows as soon as it has done its work.
TELL = """<script>
const waiting = setInterval(() => {
  if (!byId("classes").rows.length && !byId("said").textContent) return;
  clearInterval(waiting);
  fetch("seen", {method: "POST", body: document.body.innerHTML});
}, 50);
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and keeps what pages send."""

    seen: queue.Queue = queue.Queue()

    def do_POST(self):
        self.seen.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of a folder with the page, onnxruntime-web, a trained model and digits; and the folder."""
    chromium, npm = shutil.which("chromium"), shutil.which("npm")
    if not chromium or not npm:
        pytest.skip("needs chromium and npm")
    folder = tmp_path_factory.mktemp("site")
    packed = subprocess.run([npm, "pack", "onnxruntime-web"], cwd=folder, capture_output=True, text=True)
    if packed.returncode:
        pytest.skip(f"npm cannot fetch onnxruntime-web: {packed.stderr[-200:]}")
    archive, = folder.glob("*.tgz")
    with tarfile.open(archive) as opened:
        for name in RUNTIME:
            (folder / name).write_bytes(opened.extractfile(f"package/dist/{name}").read())
    (folder / PAGE.name).write_text(PAGE.read_text() + TELL)
    root = folder / "run"
    assert main(["fit", "--config", "digits_biformer", "--trainer.max_epochs", "4",
                 "--trainer.default_root_dir", str(root)]) == 0
    assert main(["export", "--checkpoint", str(root / "checkpoints" / "best.ckpt"), "--preprocess",
                 "--out", str(folder / "digits.onnx")]) == 0
    digits = load_digits()
    for label in range(10):
        pixels = (digits.images[label] * 15.9).astype("uint8")
        assert digits.target[label] == label
        Image.fromarray(pixels).convert("RGB").resize((60, 50)).save(folder / f"{label}.png")
    (folder / "cut.onnx").write_bytes((folder / "digits.onnx").read_bytes()[:5000])
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/browser.html", folder
    server.shutdown()


def page(address):
    """What the page shows when its work is done."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # its processes write until they end
        browser = subprocess.Popen(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
             "--remote-debugging-port=0", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return Handler.seen.get(timeout=120)
        finally:
            browser.terminate()
            browser.wait()


@pytest.mark.slow
def test_a_digit_is_classified(site):
    address, folder = site
    predictor = Predictor(folder / "digits.onnx")
    right = 0
    for label in range(3):
        seen = page(f"{address}?model=digits.onnx&image={label}.png")
        rows = re.findall(r"<td>([^<]*)</td><td>([\d.]+)</td>", seen)
        assert len(rows) == 5, seen[-2000:]
        result = predictor(folder / f"{label}.png")
        assert rows[0][0] == result.name
        assert float(rows[0][1]) == pytest.approx(result.probability, abs=1e-3)
        right += result.name == str(label)
    assert right >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "said"), [
    ("model=cut.onnx&image=0.png", "the model's file is cut short"),
    ("model=0.png&image=0.png", "the model is no ONNX file"),
    ("model=gone.onnx", "gone.onnx: 404"),
])
def test_what_cannot_be_shown_is_said(site, asked, said):
    address, _ = site
    assert said in page(f"{address}?{asked}")
