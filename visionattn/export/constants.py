"""Programs in the form that converters for phones take: constants for what depends on no input, products for squares.

These have no kernels for some operators that compute positions or their weights in a resized table from nothing, and an
image of one size needs them once.
"""
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["with_constants"]

_OF_SHAPE = {"new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like"}  # whatever their input holds


def with_constants(program: torch.export.ExportedProgram) -> nn.Module:
    """The module of a program of fixed shapes, in which what depends on no input and no weight is a buffer.

    Squares, also those of Euclidean norms, are products: LiteRT's converter refuses the powers of TransNeXt.
    """
    module = program.run_decompositions(_SQUARES).module(check_guards=False)  # without writing in place
    assert isinstance(module, fx.GraphModule)
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and _is_pure(node.target) and (
                _is_of_shape(node.target) or all(item in known for item in node.all_input_nodes)):
            args, options = fx.map_arg(
                (node.args, node.kwargs), lambda item: known[item] if item in known else _shaped(item))
            known[node] = node.target(*args, **options)
    for number, (node, value) in enumerate(known.items()):
        used = [user for user in node.users if user not in known]
        if isinstance(value, Tensor) and used:
            name = f"constant_{number}"
            module.register_buffer(name, value.contiguous())
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(name)
            for user in used:
                user.replace_input_with(node, constant)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _power(x: Tensor, exponent: float) -> Tensor:
    return x * x if exponent == 2 else NotImplemented


def _norm(x: Tensor, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return (x * x).sum(dim, keepdim).sqrt() if order == 2 and dim and dtype is None else NotImplemented


_SQUARES: dict[Any, Any] = {
    torch.ops.aten.pow.Tensor_Scalar: _power,
    torch.ops.aten.linalg_vector_norm.default: _norm,
}


def _is_pure(target: Any) -> bool:
    """Whether an operator only computes, and always the same."""
    return not isinstance(target, torch._ops.OpOverload) or (
        bool(target._schema.returns) and torch.Tag.nondeterministic_seeded not in target.tags)


def _is_of_shape(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._opname in _OF_SHAPE


def _shaped(node: fx.Node) -> Tensor:
    """A tensor of the shape and dtype that a node's value has."""
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype)
