"""What tests of data share."""
import logging

import pytest


@pytest.fixture
def said(caplog):
    """What was reported to the user."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
