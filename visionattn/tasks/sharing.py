"""One set of weights for several models of the same backbone, which differ in their windows and what they return."""
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["share_weights"]


def share_weights(first: nn.Module, other: nn.Module, name: str, of: str) -> int:
    """Gives ``other`` the weights of ``first`` in all modules that both have.

    What modules compute stays their own, such as the windows of an attention: parameters are shared, and innermost
    modules as a whole where they are set up alike. Statistics of batch norms stay their own too, as the images of the
    tasks are unlike.

    Args:
        first: Whose weights are taken.
        other: The model that gets them.
        name: Of the backbone, for messages.
        of: What ``other`` is for, for messages.

    Returns:
        Number of parameters that are shared.

    Raises:
        ValueError: The two have weights of different shapes or kinds in a module.
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
        if path and not isinstance(module, _BatchNorm) and _alike(module, mine):
            parent, _, child = path.rpartition(".")
            setattr(other.get_submodule(parent), child, mine)
        else:
            module._parameters.update({key: mine._parameters[key] for key, weight in module._parameters.items()
                                       if weight is not None})
    if not shared:
        raise ValueError(f"the model of {of} has no weights in common with the other tasks'")
    return sum(weight.numel() for weight in shared.values())


def _alike(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules without others in them are set up alike."""
    if type(module) is not type(other) or any(True for _ in module.children()):
        return False
    plain = (bool, int, float, str, tuple, type(None))
    return all(vars(other).get(key) == value for key, value in vars(module).items()
               if isinstance(value, plain) and key != "training")
