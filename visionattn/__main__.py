"""``python -m visionattn`` is the command ``visionattn``."""
import sys

from .cli import main

sys.exit(main())
