"""Settings of every test: one thread (the suite runs two processes) and no network."""
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def said(caplog):
    """What was reported to the user."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
