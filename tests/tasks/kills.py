"""Repeats a fit that is killed at random places until it lives: ``python -m tests.tasks.kills KILLS ARGUMENTS OF FIT``.

A process that has imported all is forked for each try, which takes a second in place of ten.
"""
import os
import random
import signal
import sys

import lightning.pytorch as pl

from visionattn.cli import main
from visionattn.tasks import run  # noqa: F401  (before the forks)


class Killed(pl.Callback):
    """Kills the process at a random one of what happens: between hooks, in a step, in a validation, while it saves.

    The ``n``-th try draws the same place each time.
    """

    def on_train_start(self, trainer, pl_module):
        self.left = 0
        if "KILL" in os.environ:
            self.left = random.Random(os.environ["KILL"]).randint(9, 24)  # of which a step has four
            sync = os.fsync

            def saves(number):
                self._happens()
                sync(number)

            os.fsync = saves

    def _happens(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, *_):
        self._happens()

    def on_before_optimizer_step(self, *_):
        self._happens()

    def on_train_batch_end(self, *_):
        self._happens()

    def on_validation_batch_start(self, *_):
        self._happens()

    def on_train_epoch_end(self, *_):
        self._happens()


def repeat(kills, argv):
    """The exit codes of all tries."""
    codes = []
    while not codes or codes[-1] != 0:
        pid = os.fork()
        if pid == 0:
            if len(codes) < kills:
                os.environ["KILL"] = str(len(codes))
            os._exit(main(argv))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if codes[-1] > 0 or len(codes) > kills + 1:
            break
    return codes


if __name__ == "__main__":
    print("exit codes:", *repeat(int(sys.argv[1]), sys.argv[2:]))
