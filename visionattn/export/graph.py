"""PyTorch's models as ONNX graphs, and what is read of such graphs."""
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["explained", "graph_of", "graphs", "lengths"]


def graph_of(model: nn.Module, images: Tensor, opset: int, **options: Any) -> Any:
    """The ONNX graph of a model, through torch.export."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass
    from onnxscript import optimizer

    with explained("PyTorch cannot export this model"):
        program = torch.onnx.export(
            model, (images,), dynamo=True, opset_version=opset, verbose=False, optimize=False, **options)
        assert program is not None
        # The optimiser's time is that of the square of the nodes, and most of them say sizes.
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
        CommonSubexpressionEliminationPass()(program.model)
        program.optimize()
    return program.model_proto


def graphs(graph: Any) -> Iterator[Any]:
    """An ONNX graph, and those of the branches and loops in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def lengths(value: Any) -> list[int | str]:
    """The shape of an input or output; what is free has a name."""
    return [length.dim_param or length.dim_value or "?" for length in value.type.tensor_type.shape.dim]


@contextmanager
def explained(failure: str) -> Iterator[None]:
    """Within the context others' code works: in silence, and its failure is an error of one line.

    PyTorch's attention is the plain one: of others, torch.export believes strides that their decomposition has not.
    """
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # of the tracer on each size that it takes as fixed
            yield
    except Exception as error:
        raise RuntimeError(f"{failure}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    seen = {id(error)}
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        if id(inner) in seen:
            break
        seen.add(id(inner))
        error = inner
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
