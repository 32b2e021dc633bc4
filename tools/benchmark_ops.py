"""``visionattn bench ops`` for those who have not installed the command: see ``--help`` and visionattn/bench."""
import sys

from visionattn.bench import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", *sys.argv[1:]]))
