"""Pages that are one file each: what they show and what they compute with lies in them, nothing is fetched."""
import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["png_address", "write_page"]

_STYLE = """
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 1.5rem auto; padding: 0 1rem; color: #222; }
  h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: 0.15rem 0.6rem; text-align: left; } th { border-bottom: 1px solid #999; }
"""


def write_page(path: str | Path, title: str, body: str, script: str, data: Any, style: str = "") -> Path:
    """Writes a page whose ``script`` finds ``data`` as the constant of that name, and ``byId(id)``.

    Args:
        path: HTML file; its folder is made.
        title: Its title, as text.
        body: HTML of the page, between the title's heading and the script.
        script: JavaScript, which runs once ``body`` is there.
        data: What JSON can say; numbers that are not finite are refused.
        style: CSS, besides that of all pages.

    Returns:
        The path.

    Raises:
        ValueError: A number of the data is not finite.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # no tag ends the script
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}{style}</style>\n<h1>{html.escape(title)}</h1>\n{body}\n"
        f'<script>\n"use strict";\nconst data = {text};\nconst byId = id => document.getElementById(id);\n{script}\n'
        f"</script>\n", encoding="utf-8")
    return path


def png_address(image: Image.Image) -> str:
    """An address that is the picture itself, for ``src`` in a page."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
