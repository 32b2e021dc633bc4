"""PyTorch's models as ONNX graphs, and what is read of such graphs."""
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .repeats import find_repeats

__all__ = ["explained", "graph_of", "graphs", "lengths", "silent"]

_TABLE = 1 << 20  # elements of the largest constants that are looked at for equal ones


def graph_of(model: nn.Module, images: Tensor, opset: int, **options: Any) -> Any:
    """The ONNX graph of a model, through torch.export.

    Args:
        model: In eval mode; answers a tensor, or several.
        images: An example of its input.
        opset: Version of ONNX's operators.
        options: Of ``torch.onnx.export``.
    """
    lengths = options.pop("dynamic_shapes", None)
    free = lengths[0] if lengths else {}
    repeats = find_repeats(model, images) if set(free) <= {0} else None
    program = None
    if repeats:
        shapes = (free, (free,) * len(repeats.examples)) if lengths else None
        # Whoever looks into blocks that are placeholders is captured as a whole.
        with suppress(RuntimeError), repeats.placeholders():
            program = _captured(repeats, (images, *repeats.examples), opset, dynamic_shapes=shapes, **options)
        if program is not None and not repeats.complete(program.model.graph):
            program = None
    if repeats and program is not None:
        repeats.open(program.model.graph)
        _optimise(program)
        repeats.close(program.model.graph)
        _fold(program.model)
    else:
        program = _captured(model, (images,), opset, dynamic_shapes=lengths, **options)
        _optimise(program)
    return program.model_proto


def _captured(model: nn.Module, inputs: tuple[Tensor, ...], opset: int, **options: Any) -> Any:
    with explained("PyTorch cannot export this model"):
        program = torch.onnx.export(
            model, inputs, dynamo=True, opset_version=opset, verbose=False, optimize=False, **options)
    assert program is not None
    return program


def _optimise(program: Any) -> None:
    # The optimiser's time is that of the square of the nodes, and most of them say sizes.
    _fold(program.model)
    program.optimize()


def _fold(model: Any) -> None:
    """Computes what hangs on weights and constants alone, and leaves out what is there twice or for nothing."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateInitializersPass, NameFixPass
    from onnxscript import optimizer

    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    DeduplicateInitializersPass(size_limit=_TABLE)(model)  # tables that blocks have in common
    CommonSubexpressionEliminationPass()(model)
    NameFixPass()(model)  # folding may name two values alike


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


@contextmanager
def silent() -> Iterator[None]:
    """Within the context nothing is printed, by converters' native code either, warned of, or logged below errors."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    before = logging.root.manager.disable
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), \
                warnings.catch_warnings():
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _first_line(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    seen = {id(error)}
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        if id(inner) in seen:
            break
        seen.add(id(inner))
        error = inner
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
