"""Pages that are one file."""
import json

import pytest
from PIL import Image

from tests.pages import act
from visionattn.analysis import png_address, write_page


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_page(tmp_path / "page.html", "t", "", "", {"a": float("nan")})


@pytest.mark.slow  # it starts a browser
def test_a_page_has_its_data_and_its_pictures(tmp_path):
    said = "</script><b>& \u2028 ü"
    page = write_page(
        tmp_path / "new" / "page.html", "A <title>", '<img id="image"><p id="said"></p>',
        'byId("image").src = data.image; byId("said").textContent = data.said;',
        {"image": png_address(Image.new("RGB", (3, 2), "red")), "said": said})
    found = json.loads(act(page, 'return [byId("said").textContent, byId("image").naturalWidth, document.title];'))
    assert found == [said, 3, "A <title>"]


@pytest.mark.slow
def test_errors_of_a_page_are_seen(tmp_path):
    page = write_page(tmp_path / "page.html", "t", "", "noSuchFunction();", None)
    with pytest.raises(AssertionError, match="noSuchFunction"):
        act(page, "return 1;")
