"""Processes that work together as those of torchrun do.

They are forked from a server that has imported everything and computed nothing: autograd's threads, which a test before
may have started, do not survive a fork of the test's own process.
"""
import faulthandler
import multiprocessing
import os
import socket
import sys
import traceback

import torch

TIME = 200  # seconds that processes may take


def together(processes, function, *args):
    """Runs ``function(*args)``, all of which can be pickled, in processes that find themselves started by torchrun.

    Raises:
        AssertionError: One of them failed (its traceback is shown) or took too long.
    """
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["visionattn.data", "visionattn.tasks"])  # what takes seconds to import
    started = [context.Process(target=_run, args=(rank, processes, port, function, args), daemon=True)
               for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(TIME)
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()
    assert [process.exitcode for process in started] == [0] * processes


def free_port():
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(rank, processes, port, function, args):
    faulthandler.dump_traceback_later(TIME - 5, file=sys.__stderr__)  # where processes wait for each other
    try:
        os.environ.update({
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "RANK": str(rank),
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "test"})
        torch.set_num_threads(1)
        function(*args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # not what pytest would do at the end of a process
