"""MoSA: mixtures of sparse adapters, of which training draws one at a time and evaluation sees the mean.

Paper: "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning" (arXiv 2312.02923). The copies ("experts") of an
adapter's matrices start alike; the entries are dealt out among them at random, and a copy learns its own alone. Merged,
they are one adapter of the usual size.
"""
import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._adapter import Adapter
from ._places import Attention, Block, find_attention, find_blocks

__all__ = ["ExpertLinear", "MoSA", "SparseAdapter", "SparseLowRank", "deal", "deep_difference", "symmetric_kl"]

Shape = Literal["adaptformer", "pfeiffer", "houlsby", "swin", "lora"]
Share = Literal["down", "up", "none"]
Merging = Literal["add", "joint"]


class MoSA(Adapter):
    """Bottlenecks or low-rank changes in copies, of which a training step draws one a layer, twice.

    Where it goes, with ``h`` the tokens after the attention's branch and ``m`` what the perceptron's branch adds:

    * ``adaptformer``: a bottleneck with norm and GELU of ``h``, beside the perceptron's branch;
    * ``pfeiffer``: one with norm and ReLU of ``m``, added to it;
    * ``houlsby``: two with SiLU, of the tokens after each branch, added to them;
    * ``swin``: one with GELU of the perceptron's input, inside its branch (scale and stochastic depth act on it too);
    * ``lora``: low-rank changes of queries, keys, values (of the matrix ``qkv``), and, for ``o``, of the attention's
      input, added to its output.

    It trains these, and the head beside them. A step's loss is that of one draw and how far the answers of a second one
    are from it, so that it takes two forwards and the backward of both. A file holds what the copies make together and
    what has none. Merging leaves one copy; queries, keys and values of ``lora`` go into the backbone's weights.

    Unlike the authors' optimiser, PyTorch's, by whichever name, sees the copies of a layer as one tensor: copies that
    were not drawn have a gradient of zero, and weight decay is of all entries.

    Args:
        shape: See above.
        bottleneck: Channels between the two projections of each; None for 64, or 16 of ``lora``.
        experts: Number of copies.
        share: Which projection is dense, one matrix for all copies: ``down``, ``up`` or ``none``.
        scale: Factor on what is added; None for 0.1 of ``adaptformer`` and ``swin``, 1 of ``lora``. The other two
            have none. ``learnt``, of ``adaptformer`` alone, is a number that learns, from 1.
        targets: Of ``lora``: some of the letters q, k, v, o.
        divide_biases: Deal out the entries of biases too; otherwise every copy learns all of its own.
        merging: ``add``, the mean of the copies; ``joint``, each entry of its owner's, divided by the number of copies.
        regulariser: Weight of the symmetric divergence of the two draws' answers.
        second: Weight of the loss of the second draw.
        deep: Whether the regulariser is also of the outputs of the first six blocks.
        seed: Of the dealing, with the name of each matrix.

    Raises:
        ValueError: There are no such options, or they do not go together.
    """

    summary = "mixture of sparse adapters: copies that learn entries of their own, merged into one (arXiv 2312.02923)"

    def __init__(
            self,
            shape: Shape = "adaptformer",
            bottleneck: int | None = None,
            experts: int = 4,
            share: Share = "down",
            scale: float | Literal["learnt"] | None = None,
            targets: str = "qv",
            divide_biases: bool = False,
            merging: Merging = "add",
            regulariser: float = 1.0,
            second: float = 0.0,
            deep: bool = False,
            seed: int = 0,
    ):
        super().__init__(
            shape=shape, bottleneck=bottleneck, experts=experts, share=share, scale=scale, targets=targets,
            divide_biases=divide_biases, merging=merging, regulariser=regulariser, second=second, deep=deep, seed=seed)
        for name, value, known in (("shape", shape, Shape), ("share", share, Share), ("merging", merging, Merging)):
            if value not in get_args(known):
                raise ValueError(f"mosa's {name} must be one of {', '.join(get_args(known))}, got {value!r}")
        for name, number in (("experts", experts), ("bottleneck", 1 if bottleneck is None else bottleneck)):
            if number < 1:
                raise ValueError(f"mosa's {name} must be at least 1, got {number}")
        if not targets or set(targets) - set("qkvo") or len(set(targets)) < len(targets):
            raise ValueError(f"mosa's targets must be some of the letters q, k, v, o, got {targets!r}")
        if scale is not None and shape in ("pfeiffer", "houlsby"):
            raise ValueError(f"mosa's shape {shape} has no scale, got {scale}")
        if scale == "learnt" and shape != "adaptformer":
            raise ValueError(f"mosa's scale is learnt in the shape adaptformer alone, not in {shape}")
        if min(regulariser, second) < 0:
            raise ValueError(f"mosa's weights must not be negative, got regulariser {regulariser}, second {second}")
        self.shape, self.experts, self.share, self.targets, self.seed = shape, experts, share, targets, seed
        self.bottleneck = bottleneck or (16 if shape == "lora" else 64)
        self.factor = {"adaptformer": 0.1, "swin": 0.1}.get(shape, 1.0) if scale is None else scale
        self.common: dict[str, Any] = {"share": share, "divide_bias": divide_biases, "merging": merging}
        self.regulariser, self.second, self.deep = regulariser, second, deep
        self.blocks: list[nn.Module] = []  # of the backbone, for the deep regulariser
        self.layers = nn.ModuleDict()

    def inject(self, backbone: Any) -> None:
        """Makes the layers and binds them to a timm model.

        Raises:
            ValueError: The model has no places for them, or more copies than entries to deal out.
        """
        self.blocks = [block.module for block in find_blocks(backbone)] if self.deep else []
        if self.shape == "lora":
            for attention in find_attention(backbone):
                self._change(attention)
        else:
            for block in find_blocks(backbone):
                self._add(block)

    def _add(self, block: Block) -> None:
        """Binds the bottlenecks of one block."""
        weight = next(block.module.parameters())
        norm = next((part.eps for part in block.module.children() if isinstance(part, nn.LayerNorm)), 1e-6)
        kinds: dict[str, tuple[type[nn.Module], float | None, float]] = {
            "adaptformer": (nn.GELU, norm, 0.1), "pfeiffer": (nn.ReLU, norm, 0.0), "houlsby": (nn.SiLU, None, 0.0),
            "swin": (nn.GELU, None, 0.1)}
        activation, eps, dropout = kinds[self.shape]
        scale = None if self.factor == "learnt" else float(self.factor)

        def layer(branch: str) -> nn.Module:
            name = f"{block.name}.{branch}"
            made = SparseAdapter(
                block.width, self.bottleneck, activation, self.experts, norm=eps, scale=scale, dropout=dropout,
                generator=self._generator(name), device=weight.device, dtype=weight.dtype, **self.common)
            self.layers[name.replace(".", "-")] = made
            return made

        if self.shape == "adaptformer":
            self.on_branch(block, "mlp", partial(_of_tokens, layer("mlp")))
        elif self.shape == "pfeiffer":
            self.on_branch(block, "mlp", partial(_of_branch, layer("mlp")))
        elif self.shape == "houlsby":
            self.on_branch(block, "attn", partial(_of_sum, layer("attn")))
            self.on_branch(block, "mlp", partial(_of_sum, layer("mlp")))
        else:
            self.on_call(block.module.mlp, partial(_of_tokens, layer("mlp")))

    def _change(self, attention: Attention) -> None:
        """Binds the low-rank changes of one attention."""
        weight = attention.qkv.weight
        layers = nn.ModuleDict()
        for target in "qkvo":
            if target in self.targets:
                out = attention.width if target == "o" else attention.rows
                layers[target] = SparseLowRank(
                    attention.width, out, self.bottleneck, self.experts, scale=float(self.factor),
                    generator=self._generator(f"{attention.name}.{target}"), device=weight.device, dtype=weight.dtype,
                    **self.common)
        self.layers[attention.name.replace(".", "-")] = layers
        if set(self.targets) - {"o"}:
            self.on_call(attention.qkv, partial(_of_rows, layers, attention.rows))
        if "o" in self.targets:
            self.on_call(attention.module, partial(_of_tokens, layers["o"]))

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}.{name}".encode()))

    @property
    def steps_itself(self) -> bool:
        """Whether there is a second draw."""
        return bool(self.regulariser or self.second)

    def loss(
            self, model: Callable[[Tensor], Tensor], images: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of a training step: two draws of all layers (section 3.3).

        Args:
            model: Takes images to logits ``[batch, classes]``.
            images: What it is given, twice.
            criterion: Takes logits to their loss.
        """
        answers, outputs = [], []
        for _ in range(2 if self.steps_itself else 1):
            kept: list[Tensor] = []
            hooks = [block.register_forward_hook(partial(_keep, kept)) for block in self.blocks]
            try:
                answers.append(model(images))
            finally:
                for hook in hooks:
                    hook.remove()
            outputs.append(kept)
        loss = criterion(answers[0])
        if self.second:
            loss = loss + self.second * criterion(answers[1])
        if self.regulariser:
            apart = symmetric_kl(*answers)
            if self.deep:
                apart = apart + deep_difference(*outputs)
            loss = loss + self.regulariser * apart
        return loss

    def merge(self, backbone: Any) -> bool:
        """Leaves one copy of each matrix, and adds the changes of queries, keys and values to the backbone's weights.

        Returns:
            Whether nothing is left to compute: of ``lora`` without ``o``.
        """
        for layer in self._copies().values():
            layer.unite()
        if self.shape != "lora":
            return False
        for attention in find_attention(backbone):
            layers: Any = self.layers[attention.name.replace(".", "-")]
            for number, target in enumerate("qkv"):
                if target in layers:
                    with torch.no_grad():
                        change = layers[target].product().to(attention.qkv.weight.dtype)
                        attention.qkv.weight[number * attention.rows:(number + 1) * attention.rows] += change
                    del layers[target]
        return "o" not in self.targets

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps: of matrices in copies the merged ones."""
        copies = self._copies()
        kept = {key: x for key, x in self.state_dict().items() if key.rpartition(".")[0] not in copies}
        for name, layer in copies.items():
            kept |= {f"{name}.{part}": x.detach() for part, x in zip(("weight", "bias"), layer.merged(), strict=True)
                     if x is not None}
        return kept

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes what :meth:`tensors` gave: the copies are alike then, and make what the file has.

        Raises:
            RuntimeError: They are not of this adapter.
        """
        own = {key: x.shape for key, x in self.tensors().items()}
        wrong = sorted(own.keys() ^ tensors.keys()) or [key for key in own if own[key] != tensors[key].shape]
        if wrong:
            raise RuntimeError(f"the tensors are not of this adapter: {wrong[0]} is missing, of another shape or "
                               "not of it")
        copies = self._copies()
        for name, layer in copies.items():
            layer.spread(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), merged=True)
        others = {key: x for key, x in tensors.items() if key.rpartition(".")[0] not in copies}
        self.load_state_dict(others, strict=False)

    def _copies(self) -> dict[str, "ExpertLinear"]:
        return {name: module for name, module in self.named_modules() if isinstance(module, ExpertLinear)}


def _of_tokens(layer: nn.Module, tokens: Tensor, out: Tensor) -> Tensor:
    return out + layer(tokens)


def _of_branch(layer: nn.Module, tokens: Tensor, branch: Tensor) -> Tensor:
    return branch + layer(branch)


def _of_sum(layer: nn.Module, tokens: Tensor, branch: Tensor) -> Tensor:
    return branch + layer(tokens + branch)


def _of_rows(layers: Any, rows: int, tokens: Tensor, qkv: Tensor) -> Tensor:
    if not set("qkv") & set(layers):  # merged
        return qkv
    parts = list(qkv.split(rows, dim=-1))
    for number, target in enumerate("qkv"):
        if target in layers:
            parts[number] = parts[number] + layers[target](tokens)
    return torch.cat(parts, dim=-1)


def _keep(kept: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    kept.append(output)


def deal(scores: Tensor, experts: int, within: Literal["all", "row", "column"] = "all") -> Tensor:
    """Number of the expert that owns each entry: those of the lowest scores are the first's, and so on (section 3.2).

    Every entry has one owner, and no expert owns more than one entry more than another.

    Args:
        scores: A random number for each entry; equal ones count in the order of the entries.
        experts: Number of experts.
        within: What is divided evenly: the whole tensor, each row or each column of a matrix.

    Returns:
        The owners, int16, of the shape of ``scores``.

    Raises:
        ValueError: There are fewer entries than experts.
    """
    if within == "column":
        return deal(scores.mT, experts, "row").mT
    rows = scores.flatten() if within == "all" else scores
    count = rows.shape[-1]
    if count < experts:
        raise ValueError(f"{count} entries cannot be divided among {experts} experts: take fewer experts")
    # Of ranks from 0, expert i owns those from i count // experts to (i + 1) count // experts.
    borders = ((torch.arange(count, device=scores.device) + 1) * experts - 1) // count
    order = rows.argsort(dim=-1, stable=True)
    owners = torch.empty(rows.shape, dtype=torch.int16, device=scores.device)
    return owners.scatter_(-1, order, borders.to(torch.int16).expand_as(order)).reshape(scores.shape)


class ExpertLinear(nn.Module):
    """A linear layer in copies that each learn entries of their own; in training one of them, drawn anew, computes.

    In eval mode all are merged into one: ``add``, their mean; ``joint``, each entry of its owner's, divided by the
    number of copies too. Of a bias every copy owns all entries unless ``divide_bias`` is set.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        experts: Number of copies; 1 makes it a plain linear layer.
        bias: Whether it has a bias.
        divide_bias: Whether the entries of the bias are dealt out too.
        merging: How copies are merged.
        generator: Where the dealing is drawn from; None for the global one.
        device: Device of the parameters and buffers.
        dtype: Dtype of the parameters.

    Attributes:
        weight: Of the copies, ``[experts, out_features, in_features]``.
        bias: Likewise, or None.
        owner: Number of the copy that owns each entry of the weight; None of one copy.
        bias_owner: Likewise of the bias; None where all own all.

    Raises:
        ValueError: There are fewer entries than copies.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    owner: Tensor | None
    bias_owner: Tensor | None

    def __init__(
            self,
            in_features: int,
            out_features: int,
            experts: int,
            bias: bool = True,
            divide_bias: bool = False,
            merging: Merging = "add",
            generator: torch.Generator | None = None,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.experts, self.merging = experts, merging
        self.weight = nn.Parameter(torch.zeros(experts, out_features, in_features, **dd))
        self.bias = nn.Parameter(torch.zeros(experts, out_features, **dd)) if bias else None
        several = experts > 1
        self.register_buffer("owner", self._dealt((out_features, in_features), generator) if several else None)
        divided = several and bias and divide_bias
        self.register_buffer("bias_owner", self._dealt((out_features,), generator) if divided else None)

    def _dealt(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        # Drawn on the CPU, so that a seed gives the same on every device.
        return deal(torch.rand(shape, generator=generator), self.experts).to(self.weight.device)

    def spread(self, weight: Tensor, bias: Tensor | None = None, merged: bool = False) -> None:
        """Sets all copies to one weight, and bias if given; those that they make ``merged`` if that is said."""
        factor = self.experts if merged and self.merging == "joint" else 1
        with torch.no_grad():
            self.weight.copy_(weight * factor)
            if bias is not None and self.bias is not None:
                self.bias.copy_(bias * factor)

    def unite(self) -> None:
        """Becomes the one layer that all copies make, for good."""
        weight, bias = self.merged()
        self.experts, self.owner, self.bias_owner = 1, None, None
        self.weight = nn.Parameter(weight.detach()[None], self.weight.requires_grad)
        if bias is not None and self.bias is not None:
            self.bias = nn.Parameter(bias.detach()[None], self.bias.requires_grad)

    def fuse(self) -> nn.Linear:
        """The plain linear layer that all copies make."""
        weight, bias = self.merged()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
        linear.weight.data = weight.detach()
        if bias is not None:
            linear.bias.data = bias.detach()
        return linear.train(self.training)

    def drawn(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a copy drawn at random; gradients reach the entries that it owns."""
        number = self.draw()
        return _own(self.weight, self.owner, number), _own(self.bias, self.bias_owner, number)

    def draw(self) -> Tensor:
        """The number of a copy, drawn at random on the device of the weights, as a tensor without axes."""
        return torch.randint(self.experts, (), device=self.weight.device)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the one layer that all copies make."""
        return self._merge(self.weight, self.owner), self._merge(self.bias, self.bias_owner)

    def _merge(self, copies: Tensor | None, owner: Tensor | None) -> Any:
        if copies is None or self.experts == 1:
            return None if copies is None else copies[0]
        if self.merging == "add":
            return copies.mean(dim=0)
        if owner is None:  # of a bias that all own
            return copies[-1] / self.experts  # the authors' rule: each copy writes over the one before
        return copies.gather(0, owner.long()[None])[0] / self.experts

    def current(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias to compute with: of one copy in training, else the merged ones."""
        return self.drawn() if self.training and self.experts > 1 else self.merged()

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[..., in_features]`` to ``[..., out_features]``."""
        return F.linear(x, *self.current())

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        experts, out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, experts={experts}, bias={self.bias is not None}"


def _own(copies: Tensor | None, owner: Tensor | None, number: Tensor) -> Any:
    if copies is None:
        return None
    own = copies.index_select(0, number[None])[0]  # no [number], which would wait for the number
    return own if owner is None else torch.where(owner == number, own, own.detach())


class SparseAdapter(nn.Module):
    """What a block's bottleneck adds: ``scale * up(dropout(activation(down(norm x))))``, with experts (section 3).

    The down projection starts as a linear layer does, the up projection at zero.

    Args:
        dim: Channels.
        bottleneck: Channels between the projections.
        activation: Makes the activation.
        experts: Number of experts.
        share: Which projection is one dense matrix, without experts.
        norm: Epsilon of a layer norm before it; None for no norm.
        scale: Factor; None for one that is learnt, from 1.
        dropout: Rate after the activation.
        options: Of :class:`ExpertLinear`.
        device: Device of the parameters and buffers.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            bottleneck: int,
            activation: Callable[[], nn.Module],
            experts: int,
            share: Share = "down",
            norm: float | None = None,
            scale: float | None = 1.0,
            dropout: float = 0.0,
            device=None,
            dtype=None,
            **options: Any,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.Identity() if norm is None else nn.LayerNorm(dim, eps=norm, **dd)
        self.down = _linear(dim, bottleneck, 1 if share == "down" else experts, True, options | dd)
        self.act = activation()
        self.drop = nn.Dropout(dropout)
        self.up = _linear(bottleneck, dim, 1 if share == "up" else experts, True, options | dd)
        self.scale = nn.Parameter(torch.ones((), **dd)) if scale is None else scale
        self.down.spread(_uniform(self.down.weight[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Takes tokens ``[..., dim]`` to what is added to them."""
        return self.up(self.drop(self.act(self.down(self.norm(x))))) * self.scale


class SparseLowRank(nn.Module):
    """Low-rank change ``scale * up(down x)`` of a projection, with experts and without biases (MoSL).

    Args:
        dim: Channels of the input.
        out_dim: Channels of the projection's output.
        rank: Channels between.
        experts: Number of experts.
        share: Which of the two is one dense matrix, without experts.
        scale: Factor.
        options: Of :class:`ExpertLinear`.
        device: Device of the parameters and buffers.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            out_dim: int,
            rank: int,
            experts: int,
            share: Share = "down",
            scale: float = 1.0,
            device=None,
            dtype=None,
            **options: Any,
    ):
        super().__init__()
        options |= {"device": device, "dtype": dtype}
        self.down = _linear(dim, rank, 1 if share == "down" else experts, False, options)
        self.up = _linear(rank, out_dim, 1 if share == "up" else experts, False, options)
        self.scale = scale
        self.down.spread(_uniform(self.down.weight[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Takes tokens ``[..., dim]`` to what is added to their projection, ``[..., out_dim]``."""
        return self.up(self.down(x)) * self.scale

    def product(self) -> Tensor:
        """What it adds to the projection's weight once merged, ``[out_dim, dim]``."""
        return self.up.merged()[0] @ self.down.merged()[0] * self.scale


def _linear(dim: int, out_dim: int, experts: int, bias: bool, options: dict[str, Any]) -> ExpertLinear:
    return ExpertLinear(dim, out_dim, experts, bias, **options)


def _uniform(weight: Tensor) -> Tensor:
    """Initial values of a linear layer, for a weight of this shape."""
    return nn.init.kaiming_uniform_(torch.empty_like(weight), a=math.sqrt(5))


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """Half the sum of both Kullback-Leibler divergences of two answers, each towards the other as it stands.

    Args:
        first: Logits ``[batch, classes]``; computed in float32 of half precision.
        second: Likewise.

    Returns:
        The sum over classes, mean over the batch, a scalar.
    """
    dtype = torch.promote_types(first.dtype, torch.float32)
    logs = [logits.to(dtype).log_softmax(dim=1) for logits in (first, second)]
    towards = [F.kl_div(own, other.detach(), reduction="batchmean", log_target=True)
               for own, other in (logs, logs[::-1])]
    return 0.5 * (towards[0] + towards[1])


def deep_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """How far the blocks' outputs of two passes are apart: squared differences of the first six, over all blocks.

    Args:
        first: Outputs of all blocks in one pass.
        second: In the other.

    Returns:
        A scalar, times the paper's factor of 0.01.
    """
    apart = [(a - b).square().mean() for a, b in zip(first[:6], second[:6], strict=True)]
    return 0.01 * torch.stack(apart).sum() / len(first)


adapter = MoSA
