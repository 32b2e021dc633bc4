"""One set of weights for several models of the same backbone, which differ in their windows and what they return."""
from torch import nn

__all__ = ["share_weights"]


def share_weights(first: nn.Module, other: nn.Module, name: str, of: str) -> int:
    """Gives ``other`` the weights of ``first`` in all modules that both have.

    What modules compute stays their own, such as the windows of an attention: parameters are shared; innermost modules
    and batch norms, where they are set up alike, as a whole, so that their statistics are the same too.

    Args:
        first: Whose weights are taken.
        other: The model that gets them.
        name: Of the backbone, for messages.
        of: What ``other`` is for, for messages.

    Returns:
        Number of parameters that are shared.

    Raises:
        ValueError: The two have weights of different shapes or kinds in a module, or statistics that cannot be shared.
    """
    known = dict(first.named_modules(remove_duplicate=False))
    shared: dict[int, nn.Parameter] = {}
    for path, module in list(other.named_modules(remove_duplicate=False)):
        mine = known.get(path)
        if mine is None:
            continue
        for key, weight in module.named_parameters(recurse=False):
            ours = mine._parameters.get(key)
            if ours is None or ours.shape != weight.shape:
                there = "nothing" if ours is None else list(ours.shape)
                raise ValueError(f"{name} has no common weights for {of} and the other tasks: {path}.{key} is "
                                 f"{list(weight.shape)} here and {there} there; give model_args that suit all tasks")
            shared[id(ours)] = ours
        kept = [key for key, buffer in module.named_buffers(recurse=False)
                if key not in module._non_persistent_buffers_set and buffer.is_floating_point()]
        whole = kept or not any(True for _ in module.children())  # batch norms of timm's have an activation in them
        if path and whole and _alike(module, mine):
            parent, _, child = path.rpartition(".")
            setattr(other.get_submodule(parent), child, mine)
        elif kept:
            raise ValueError(f"{name} has statistics that {of} and the other tasks cannot share ({path}.{kept[0]}): "
                             "take another backbone")
        else:
            module._parameters.update({key: mine._parameters[key] for key, weight in module._parameters.items()
                                       if weight is not None})
    if not shared:
        raise ValueError(f"the model of {of} has no weights in common with the other tasks'")
    return sum(weight.numel() for weight in shared.values())


def _alike(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are set up alike, with all that is in them."""
    plain = (bool, int, float, str, tuple, type(None))
    parts, others = dict(module.named_children()), dict(other.named_children())
    return (type(module) is type(other) and parts.keys() == others.keys()
            and all(vars(other).get(key) == value for key, value in vars(module).items()
                    if isinstance(value, plain) and key != "training")
            and all(_alike(part, others[key]) for key, part in parts.items()))
