"""Keeps a tensor that is composed from parameters, an attention bias above all, from one inference call to the next."""
from collections.abc import Callable, Hashable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["cached"]

_ENTRIES = 8  # that a module keeps at most; the oldest goes first

# Beside the modules, not on them: so the values are neither copied, pickled, moved nor saved with them.
_kept: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[list[Tensor], Tensor]]] = WeakKeyDictionary()


def cached(module: nn.Module, key: Hashable, compose: Callable[[], Tensor], sources: Sequence[Tensor]) -> Tensor:
    """Returns ``compose()``, or what it gave before if that is certain to be the same.

    Nothing is kept while gradients are recorded, while a graph is traced, compiled or exported, under transforms of
    ``torch.func``, and on other devices than the CPU: there ``compose()`` runs every time. On the CPU the sources'
    *values* decide, so that no way of changing them goes unnoticed (version counters do not see writes through
    ``.data``, and an address can be another tensor's next time). That costs a few microseconds for a small table; on
    an accelerator it would have to wait for the device, which is dearer than composing anew.

    Args:
        module: Whose value it is; the values of a module die with it and are not shared with its copies.
        key: Which value of the module, and all that it depends on besides the sources, e.g. the size of the map.
        compose: Computes the value; it must depend on the key and the sources only.
        sources: The tensors that the value is computed from.

    Returns:
        The value, not to be written to.
    """
    if (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
            or not all(map(_comparable, sources))):
        return compose()
    entries = _kept.setdefault(module, {})
    entry = entries.get(key)
    if entry is not None and all(map(_same, entry[0], sources)):
        return entry[1]
    value = compose()
    entries.pop(key, None)  # threads may share a module: nothing here fails if another was faster
    if len(entries) >= _ENTRIES:
        entries.pop(list(entries)[0], None)  # noqa: RUF015
    entries[key] = [source.detach().clone() for source in sources], value
    return value


def _comparable(source: Tensor) -> bool:
    """Whether the tensor's values can be looked at now, at no cost to speak of."""
    return (source.device.type == "cpu" and type(source) in (Tensor, nn.Parameter)
            and not torch._C._functorch.is_functorch_wrapped_tensor(source))


def _same(before: Tensor, source: Tensor) -> bool:
    return before.dtype == source.dtype and before.shape == source.shape and torch.equal(before, source)
