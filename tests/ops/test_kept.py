"""What is kept between calls: never something else, within bounds, gone with its owner."""
import gc
import os
import threading
import time

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from visionattn.ops import held_bytes, kept, neighborhood_attention, release_memory
from visionattn.ops.kept import keep, workspace


@pytest.fixture(autouse=True)
def empty():
    release_memory()
    yield
    release_memory()


class Counted:
    """Makes tensors of a size and counts how often."""

    def __init__(self, size: int = 4, source: torch.Tensor | None = None):
        self.calls, self.size, self.source = 0, size, source

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return torch.zeros(self.size, dtype=torch.uint8) if self.source is None else self.source * 2


def test_made_once():
    make = Counted()
    assert keep("a", 1, make) is keep("a", 1, make)
    assert make.calls == 1
    keep("a", 2, make), keep("b", 1, make), keep("a", 1, make, owner=make)
    assert make.calls == 4


@pytest.mark.parametrize("change", [
    lambda x: x.add_(1), lambda x: x.data.mul_(3), lambda x: setattr(x, "data", x.data.double()),
    lambda x: x.data.resize_(2), lambda x: torch.optim.SGD([x], lr=1.0).step(),
], ids=["in place", "data", "dtype", "shape", "step"])
@torch.no_grad()
def test_made_again_for_other_values(change):
    x = nn.Parameter(torch.ones(3))
    x.grad = torch.ones(3)
    make = Counted(source=x)
    keep("a", 0, make, sources=[x])
    change(x)
    assert torch.equal(keep("a", 0, make, sources=[x]), x * 2)


def test_a_source_that_trains_is_not_kept():
    x = nn.Parameter(torch.ones(3))
    make = Counted(source=x)
    assert keep("a", 0, make, sources=[x]).requires_grad
    assert held_bytes() == 0
    x.requires_grad_(False)
    keep("a", 0, make, sources=[x]), keep("a", 0, make, sources=[x])
    assert make.calls == 2


def test_bytes_are_bounded_and_the_least_used_goes(monkeypatch):
    monkeypatch.setattr(kept, "_LIMIT", 1000)
    makes = [Counted(400) for _ in range(3)]
    keep("a", 0, makes[0]), keep("a", 1, makes[1]), keep("a", 0, makes[0]), keep("a", 2, makes[2])
    assert held_bytes() == 800
    keep("a", 0, makes[0])
    assert makes[0].calls == 1
    keep("a", 1, makes[1])
    assert makes[1].calls == 2
    keep("a", 3, Counted(2000))
    assert held_bytes() <= 1000


def test_sizes_that_change_at_every_call_hold_no_more():
    q = torch.randn(1, 64, 64, 2, 8)
    bias = torch.randn(2, 5, 5)
    for height in range(24, 64):
        part = q[:, :height]
        neighborhood_attention(part, part, part, 3, bias=bias)
    assert held_bytes() <= kept._LIMIT + 2 * kept._WORKSPACE_LIMIT


def test_goes_with_its_owner():
    owner = nn.Linear(2, 2)
    keep("a", 0, Counted(100), owner=owner), keep("a", 0, Counted(50))
    assert held_bytes() == 150
    del owner
    gc.collect()
    assert held_bytes() == 50
    model = nn.ParameterList([torch.randn(2, 5, 5)])
    q = torch.randn(1, 24, 24, 2, 8)
    with torch.no_grad():
        neighborhood_attention(q, q, q, 3, bias=model[0])
        before = held_bytes()
        del model
        gc.collect()
        assert held_bytes() < before


def test_release_memory_of_all_threads():
    thread = threading.Thread(target=lambda: workspace(1000, torch.float32).zero_())
    done = threading.Event()

    def work():
        workspace(1000, torch.float32).zero_()
        ready.set()
        done.wait()

    ready = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    keep("a", 0, Counted())
    assert held_bytes() == 4004
    release_memory()
    assert held_bytes() == 0
    done.set()
    thread.join()


def test_nothing_is_kept_of_what_is_not_real():
    make = Counted()
    with FakeTensorMode():
        keep("a", 0, make)
    torch.func.vmap(lambda x: x + keep("a", 0, make).sum())(torch.ones(2))
    torch.jit.trace(lambda x: x + keep("a", 0, make).sum(), torch.ones(2), check_trace=False)
    assert held_bytes() == 0
    with torch.device("meta"):
        assert keep("m", 0, lambda: torch.zeros(3, device="cpu")).device.type == "cpu"
    with torch.inference_mode():
        value = keep("a", 0, make)
    assert not value.is_inference()
    assert held_bytes() > 0


def test_threads_agree():
    wrong = []

    def work(number):
        for i in range(200):
            value = keep("a", i % 7, lambda i=i: torch.full((10,), i % 7))
            if not torch.equal(value, torch.full((10,), i % 7)):
                wrong.append((number, i))
            if i % 50 == 0:
                release_memory()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_was_forked_under_the_lock_goes_on():
    keep("a", 0, Counted())
    with kept._state.lock:
        pid = os.fork()
        if pid == 0:
            ok = held_bytes() == 0 and keep("a", 0, lambda: 5) == 5
            os._exit(0 if ok else 1)
    for _ in range(200):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    pytest.fail("the child waits for a lock that nobody will open")
