"""Settings of every test: one thread (the suite runs two processes) and no network."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

torch.set_num_threads(1)
