"""Blocks that repeat are captured once: a graph takes time for the kinds of blocks, not for their number.

PyTorch's capture, its decomposition and the optimiser take seconds for a block. A network is captured with a
placeholder for each block that repeats another; beside it one block of each kind is captured, and its nodes are copied
to the places of its kind with the weights of the block there.
"""
import copy
from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Repeats", "find_repeats"]

DOMAIN, PLACEHOLDER = "visionattn", "Repeated"


class _Seen(NamedTuple):
    """A block that was called with a tensor, and maybe numbers, and gave a tensor of that shape."""

    path: str
    block: nn.Module
    example: Tensor
    numbers: tuple[Any, ...]


class Repeats(nn.Module):
    """A network whose repeating blocks are placeholders, and beside it one block of each kind.

    It takes images and an example for each kind, and gives what the network gives and the blocks' answers.

    Args:
        model: The network.
        kinds: Blocks of which each does what the others of its kind would do with its weights.
    """

    def __init__(self, model: nn.Module, kinds: list[list[_Seen]]):
        super().__init__()
        self.blocks = nn.ModuleList(_with_other_weights(members[0].block) for members in kinds)
        self.model, self.kinds = model, kinds

    @property
    def examples(self) -> tuple[Tensor, ...]:
        """What the first block of each kind is called with."""
        return tuple(members[0].example for members in self.kinds)

    def forward(self, images: Tensor, *examples: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """What the network gives, with placeholders, and the answers of one block of each kind."""
        return self.model(images), tuple(
            block(x, *members[0].numbers) for block, x, members in zip(self.blocks, examples, self.kinds, strict=True))

    @contextmanager
    def placeholders(self) -> Iterator[None]:
        """Within the context placeholders stand in the network."""
        members = [member for kind in self.kinds for member in kind]
        try:
            for place, member in enumerate(members):
                self.model.set_submodule(member.path, _Placeholder(place))
            yield
        finally:
            for member in members:
                self.model.set_submodule(member.path, member.block)

    def complete(self, graph: Any) -> bool:
        """Whether all placeholders are in a graph: a block that is not called by its name has been captured itself."""
        places = sum(node.op_type == PLACEHOLDER for node in graph)
        return places == sum(len(members) for members in self.kinds)

    def open(self, graph: Any) -> None:
        """Makes inputs of the blocks' weights, so that nothing is computed of them before the nodes are copied."""
        for kind, block in enumerate(self.blocks):
            for name in _state(block):
                if weight := graph.initializers.pop(f"blocks.{kind}.{name}", None):
                    graph.inputs.append(weight)

    def close(self, graph: Any) -> None:
        """Puts copies of the blocks' nodes where the placeholders are; the blocks beside the network lose their use."""
        images, *inputs = graph.inputs
        examples, weights = inputs[:len(self.kinds)], inputs[len(self.kinds):]
        answers = [graph.outputs.pop() for _ in self.kinds][::-1]
        names = [value.name for value in graph.outputs]
        places = {node.attributes["place"].as_int(): node for node in graph if node.op_type == PLACEHOLDER}
        parts = [_nodes_to(answer, graph) for answer in answers]
        place = 0
        for kind, (members, answer) in enumerate(zip(self.kinds, answers, strict=True)):
            prefix = f"blocks.{kind}."
            own = {value: value.name.removeprefix(prefix) for value in weights if value.name.startswith(prefix)}
            for member in members:
                node = places[place]
                # Of other examples only the length of the batch can be asked, which is that of this one.
                values = dict.fromkeys(examples, node.inputs[0])
                values |= {value: _weight(graph, member, name) for value, name in own.items()}
                for inner in parts[kind]:
                    graph.insert_before(node, _copy(inner, values, member.path))
                node.outputs[0].replace_all_uses_with(values[answer], replace_graph_outputs=True)
                graph.remove(node, safe=True)
                place += 1
        for value, name in zip(graph.outputs, names, strict=True):
            value.name = name  # a block's answer may be the network's too
        for value in examples:
            value.replace_all_uses_with(images)
        for node in reversed([node for part in parts for node in part]):
            if not any(value.uses() for value in node.outputs) and node.graph is graph:
                graph.remove(node, safe=True)
        del graph.inputs[1:]
        for name in [name for name in graph.initializers if name.startswith("model.")]:
            value = graph.initializers.pop(name)
            value.name = name.removeprefix("model.")
            graph.register_initializer(value)


class _Placeholder(nn.Module):
    """Stands for a block of a graph that is captured elsewhere."""

    def __init__(self, place: int):
        super().__init__()
        self.place = place

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{PLACEHOLDER}", (x,), {"place": self.place}, dtype=x.dtype, shape=x.shape, version=1)


def find_repeats(model: nn.Module, images: Tensor) -> Repeats | None:
    """The network with its blocks by kind, where one repeats another; None if none does.

    Two are of a kind if they are built alike and give the same numbers with the same random weights.

    Args:
        model: In eval mode.
        images: An example of the network's input.
    """
    kinds: dict[Hashable, list[_Kind]] = defaultdict(list)
    repeating: list[str] = []
    for member in _calls(model, images):
        if member.path.startswith(tuple(repeating)):
            continue
        alike = kinds[_form(member)]
        kind = next((kind for kind in alike if torch.equal(_answer(member, kind.members[0]), kind.answer)), None)
        if kind:
            kind.members.append(member)
            repeating.append(f"{member.path}.")
        else:
            alike.append(_Kind([member], _answer(member, member)))
    repeated = [kind.members for alike in kinds.values() for kind in alike if len(kind.members) > 1]
    inner = tuple(f"{members[0].path}." for members in repeated)
    outermost = [[member for member in members if not member.path.startswith(inner)] for members in repeated]
    outermost = [members for members in outermost if len(members) > 1]
    return Repeats(model, outermost) if outermost else None


class _Kind(NamedTuple):
    """Blocks that are alike."""

    members: list[_Seen]
    answer: Tensor  # of each of them with the same random weights


def _calls(model: nn.Module, images: Tensor) -> list[_Seen]:
    """Blocks of several layers that are called once, with one tensor, of whose shape their answer is."""
    seen: dict[str, list[_Seen | None]] = defaultdict(list)
    batch = len(images) if images.ndim == 4 else 1

    def record(path: str, block: nn.Module, inputs: Any, named: Any, answer: Any) -> None:
        x, *numbers = inputs or (None,)
        fits = not named and isinstance(x, Tensor) and isinstance(answer, Tensor) and x.is_floating_point() and (
            answer.shape, answer.dtype, len(answer)) == (x.shape, x.dtype, batch)
        fits &= all(isinstance(number, (int, float, NoneType)) for number in numbers)
        seen[path].append(_Seen(path, block, torch.randn_like(inputs[0]), tuple(numbers)) if fits else None)

    hooks = [block.register_forward_hook(
        lambda block, inputs, named, answer, path=path: record(path, block, inputs, named, answer), with_kwargs=True)
        for path, block in model.named_modules() if path and any(block.children())]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    once = {path: calls[0] for path, calls in seen.items() if len(calls) == 1 and calls[0]}
    return [once[path] for path, _ in model.named_modules() if path in once]


def _form(member: _Seen) -> Hashable:
    """What blocks of a kind have in common for certain."""
    layers = tuple((name, nn.Identity if isinstance(layer, (DropPath, nn.Dropout)) else type(layer))
                   for name, layer in member.block.named_modules())
    state = tuple((name, x.shape, x.dtype) for name, x in _state(member.block).items())
    x = member.example
    return layers, state, x.shape, x.stride(), x.dtype, member.numbers


def _answer(member: _Seen, first: _Seen) -> Tensor:
    """What a block gives with random weights in place of those of the first of its kind."""
    generator = torch.Generator().manual_seed(0)
    state = {name: _random(x, generator) if x.is_floating_point() else x for name, x in _state(first.block).items()}
    x = torch.randn(first.example[:1].shape, generator=generator).to(first.example)
    with torch.no_grad():
        return functional_call(member.block, state, (x, *member.numbers))


def _random(x: Tensor, generator: torch.Generator) -> Tensor:
    """A weight of the shape of ``x`` of a size that keeps values near 1.

    Larger ones make a softmax pick one token whatever masks and biases say, and blocks that differ in these give the
    same.
    """
    weight = torch.rand(x.shape, generator=generator)
    if x.ndim > 1:
        weight = (weight - 0.5) * (12 / x[0].numel()) ** 0.5
    return weight.to(x)


def _state(block: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names, those too that are not saved."""
    return dict(block.named_parameters(remove_duplicate=False)) | dict(block.named_buffers(remove_duplicate=False))


def _with_other_weights(block: nn.Module) -> nn.Module:
    """A copy of a block. Whatever its graph computes of these weights for good is far from what is right."""
    block = copy.deepcopy(block)
    with torch.no_grad():
        for x in _state(block).values():
            if x.is_floating_point():
                x.uniform_()
    return block


def _nodes_to(value: Any, graph: Any) -> list[Any]:
    """The nodes that a value is computed by, in the graph's order."""
    found, open_values = set(), [value]
    while open_values:
        node = open_values.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            open_values.extend(inner for inner in node.inputs if inner is not None)
    return [node for node in graph if node in found]


def _copy(node: Any, values: dict[Any, Any], path: str) -> Any:
    """A node with other inputs, those in ``values``, to which its outputs are added."""
    import onnx_ir

    made = onnx_ir.Node(
        node.domain, node.op_type, [values.get(value, value) for value in node.inputs], list(node.attributes.values()),
        overload=node.overload, num_outputs=len(node.outputs), version=node.version, name=f"{path}/{node.name}")
    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.name, new.type, new.shape = f"{path}/{old.name}", old.type, old.shape
        values[old] = new
    return made


def _weight(graph: Any, member: _Seen, name: str) -> Any:
    """A block's weight as a value of the graph."""
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    name, tensor = f"{member.path}.{name}", _state(member.block)[name].detach()
    if name not in graph.initializers:
        weight = TorchTensor(tensor, name)
        graph.register_initializer(onnx_ir.Value(
            name=name, type=onnx_ir.TensorType(weight.dtype), shape=weight.shape, const_value=weight))
    return graph.initializers[name]
