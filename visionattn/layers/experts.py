"""Mixtures of experts in attention and perceptron, with a router for every task, and models cut to one task.

"Mod-Squad" (CVPR 2023) and "An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training"
(arXiv 2306.17165); written from the formulas. What is this project's own, says :class:`TaskRouter`.
"""
import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..ops.dispatch import concrete, no_autocast, numbers, transforming
from .auxiliary import AuxiliaryLosses, in_backward
from .full import attend
from .scripting import unscripted

__all__ = [
    "ExpertAttention", "ExpertMlp", "TaskRouter", "balance_loss", "cut_to_task", "expert_counts",
    "mutual_information_loss", "set_task", "z_loss",
]

_EPS = 1e-4  # the authors' in probabilities, in logarithms and under fractions
_LEAST_NOISE = 0.01
_DECAY = 0.95  # of the frequencies, per training forward

_Model = TypeVar("_Model", bound=nn.Module)


def set_task(model: nn.Module, task: str) -> None:
    """Makes all routers of ``model`` those of ``task``, until it is set anew.

    Raises:
        ValueError: The model has no routers, or they do not know the task.
    """
    for router in _found(model, TaskRouter):
        router.set_task(task)


def cut_to_task(model: _Model, task: str, threshold: float) -> _Model:
    """A copy of a trained model that has the experts of one task, and their columns of the task's routers, alone.

    It computes what ``model`` does for the task with the logits of the other experts at minus infinity: the
    probabilities of those that stay sum to 1 anew. The more often the dropped experts were chosen, the more changes.

    Args:
        model: Any model with layers of this module.
        task: Whose routers to keep; any name for routers that serve all tasks.
        threshold: Least share of the task's tokens, 0 to 1, that chose an expert in training (a moving average, see
            :class:`TaskRouter`) for it to stay. Of a layer those that a token needs at once stay in any case, the most
            frequent first.

    Raises:
        ValueError: The model has no experts, they do not know the task, or the threshold is no share.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a share of tokens, 0 to 1, got {threshold}")
    model = copy.deepcopy(model)
    set_task(model, task)
    for layer in _found(model, _Experts):
        layer.cut(threshold)
    return model


def expert_counts(model: nn.Module) -> dict[str, list[int]]:
    """Experts of each layer of the kinds ``attn`` and ``mlp``, in the model's order."""
    layers = _found(model, _Experts)
    return {kind: [layer.router.num_experts for layer in layers if isinstance(layer, cls)]
            for kind, cls in (("attn", ExpertAttention), ("mlp", ExpertMlp))}


def balance_loss(probability: Tensor, chosen: Tensor) -> Tensor:
    """Number of experts times the sum over them of share of probability times share of choices; 1 where both are even.

    Args:
        probability: Sum of each expert's probabilities over the tokens, ``[experts]``.
        chosen: How many tokens chose it, ``[experts]``.
    """
    return len(probability) * ((probability / probability.sum()) * (chosen / chosen.sum())).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of the squared logarithm of the sum of exponentials of ``logits [..., experts]``."""
    least = torch.full_like(logits[..., :1], _EPS).log()
    return torch.cat([logits, least], dim=-1).logsumexp(dim=-1).square().mean()


def mutual_information_loss(probability: Tensor, tokens: Tensor | float) -> Tensor:
    """Less the mutual information of tasks and experts: least where each task has experts of its own and all are used.

    Args:
        probability: Sums of probabilities over the tokens of one batch of each task, ``[tasks, experts]``.
        tokens: Number of tokens in these batches.
    """
    joint = probability / (tokens + _EPS)
    of_task = joint.sum(dim=1, keepdim=True) + _EPS
    of_expert = joint.sum(dim=0, keepdim=True) + _EPS
    return -(joint * (joint / of_task / of_expert + _EPS).log()).sum()


@register_notrace_module
class TaskRouter(AuxiliaryLosses, nn.Module):
    """Chooses ``topk`` experts for every token, by weights that each task has of its own.

    An expert's logit is linear in the token, without a bias, zero at first; in training Gaussian noise of a learnt
    spread comes on top. Gates are the chosen experts' probabilities, 1e-4 more than a softmax gives, and are not scaled
    anew. Equal logits go to the expert of lower number.

    A training forward offers the auxiliary losses ``expert_balance``, ``router_z`` and, of several tasks,
    ``expert_information``, see :func:`visionattn.layers.auxiliary_losses`, and learns how often the task chooses each
    expert, which :func:`cut_to_task` reads.

    This project's own: no noise in evaluation (the authors' code has it); and as a step is a batch of one task, mutual
    information takes the sums of the other tasks from their last batches, without gradients.

    Args:
        dim: Channels of the tokens.
        num_experts: Experts to choose from.
        topk: Experts of a token.
        tasks: Names of the tasks, the first of which is set; empty for one router that serves all.
        noise: Add noise to the logits in training.
        loss_weights: Of balance, z-loss and mutual information.
        device: Device of the parameters and buffers.
        dtype: Dtype of the parameters and buffers.

    Attributes:
        frequency: Share of a task's tokens that chose each expert, ``[tasks, experts]``, whose rows sum to ``topk``: a
            moving average over training forwards, of decay 0.95, from the even share on.
        sums: Sum of each expert's probabilities over the last batch of each task, ``[tasks, experts]``.

    Raises:
        ValueError: There are fewer experts than a token needs, or names of tasks are empty or the same.
    """

    frequency: Tensor
    sums: Tensor

    def __init__(
            self,
            dim: int,
            num_experts: int,
            topk: int,
            tasks: Sequence[str] = (),
            noise: bool = True,
            loss_weights: tuple[float, float, float] = (0.01, 0.001, 5e-4),
            device=None,
            dtype=None,
    ):
        super().__init__()
        if not 1 <= topk <= num_experts:
            raise ValueError(f"a token needs 1 to {num_experts} of {num_experts} experts, got {topk}")
        if len({*tasks, ""}) != len(tasks) + 1 or not all(isinstance(task, str) for task in tasks):
            raise ValueError(f"tasks must be names, each another one, got {list(tasks)}")
        dd = {"device": device, "dtype": dtype}
        self.num_experts = num_experts
        self.topk = topk
        self.tasks = list(tasks)
        self.task = 0  # number of the one that is set
        self.loss_weights = loss_weights
        rows = max(len(tasks), 1)
        self.noise = noise
        for row in range(rows):  # no list: scripted modules cannot look into one
            for kind in ("weight", "noise") if noise else ("weight",):
                self.register_parameter(f"{kind}_{row}", nn.Parameter(torch.empty(num_experts, dim, **dd)))
        self.register_buffer("frequency", torch.empty(rows, num_experts, **dd))
        self.register_buffer("sums", torch.empty(rows, num_experts, **dd))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Makes all experts alike for all tasks again."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.frequency.fill_(self.topk / self.num_experts)
        self.sums.zero_()

    @torch.jit.ignore
    def set_task(self, task: str) -> None:
        """Routes as ``task`` does from now on.

        Raises:
            ValueError: It is none of the tasks.
        """
        if self.tasks and task not in self.tasks:
            raise ValueError(f"the routers know the tasks {', '.join(self.tasks)}, got {task!r}")
        self.task = self.tasks.index(task) if self.tasks else 0

    @torch.jit.ignore
    def keep(self, experts: Tensor) -> None:
        """Drops all tasks but the one that is set, and all but these experts, given by ascending numbers."""
        own = {f"{kind}_0": getattr(self, f"{kind}_{self.task}") for kind in ("weight", "noise")[:1 + self.noise]}
        for name, _ in list(self.named_parameters()):
            delattr(self, name)
        for name, parameter in own.items():
            self.register_parameter(name, _picked(parameter, experts))
        for name in ("frequency", "sums"):
            setattr(self, name, getattr(self, name)[self.task, experts][None])
        self.tasks = self.tasks[self.task:self.task + 1]
        self.task = 0
        self.num_experts = len(experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and numbers of the experts ``[..., topk]`` of tokens ``[..., dim]``, the largest gate first."""
        return self._choose(x)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_experts={self.num_experts}, topk={self.topk}" + (f", tasks={self.tasks}" if self.tasks else "")

    @unscripted
    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with no_autocast(x.device.type):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            logits = F.linear(x, getattr(self, f"weight_{self.task}").to(x.dtype))
            if self.training and self.noise:
                spread = F.softplus(F.linear(x, getattr(self, f"noise_{self.task}").to(x.dtype))) + _LEAST_NOISE
                logits = logits + torch.randn_like(logits) * spread
            probability = logits.softmax(dim=-1) + _EPS
            # Runtimes choose differently among equal ones, which all are at first.
            handicap = 8 * torch.finfo(x.dtype).eps * torch.arange(self.num_experts, device=x.device, dtype=x.dtype)
            index = (logits - handicap).topk(self.topk, dim=-1).indices
            gates = probability.gather(-1, index)
            if self.training and not (isinstance(x.numel(), int) and x.numel() == 0):
                self._learn(logits.flatten(0, -2), probability.flatten(0, -2), index.flatten(0, -2))
        return gates, index

    def _learn(self, logits: Tensor, probability: Tensor, index: Tensor) -> None:
        """Offers the losses of tokens ``[tokens, experts]`` that chose ``index [tokens, topk]``; counts the choices."""
        if transforming():
            raise RuntimeError("routers count their choices in training, for which transforms of torch.func have no "
                               "place: call eval() before, or use torch.autograd")
        chosen = torch.zeros_like(probability).scatter(1, index, 1).sum(dim=0)
        mass = probability.sum(dim=0)
        balance, z, information = self.loss_weights
        losses = {"expert_balance": balance * balance_loss(mass, chosen), "router_z": z * z_loss(logits)}
        if len(self.tasks) > 1:
            sums = self.sums.to(mass.dtype)
            sums = torch.cat([sums[:self.task], mass[None], sums[self.task + 1:]])
            tokens = sums.detach().sum() / (1 + _EPS * self.num_experts)
            losses["expert_information"] = information * mutual_information_loss(sums, tokens)
        if in_backward():  # gradient checkpointing comes a second time
            return
        for name, loss in losses.items():
            self.keep_auxiliary_loss(name, loss)
        with torch.no_grad():
            self.frequency[self.task].lerp_((chosen / len(index)).to(self.frequency.dtype), 1 - _DECAY)
            last = self.sums[self.task]
            last.copy_(torch.where(mass.isfinite().all(), mass, last))


class _Experts(nn.Module):
    """A layer of experts: parameters with one row an expert, ``expert_parameters``, and their router."""

    expert_parameters: tuple[str, ...] = ()

    def __init__(self, router: TaskRouter):
        super().__init__()
        self.router = router

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the experts anew."""
        for name in self.expert_parameters:
            if name.endswith("_bias"):
                nn.init.zeros_(getattr(self, name))
            else:
                trunc_normal_(getattr(self, name), std=.02)

    @torch.jit.ignore
    def cut(self, threshold: float) -> None:
        """Drops experts that the task which is set chooses for a smaller share of its tokens, and the other tasks."""
        router = self.router
        frequency = router.frequency[router.task]
        frequent = frequency.sort(descending=True, stable=True)
        count = max(int((frequency >= threshold).sum()), router.topk)
        kept = frequent.indices[:count].sort().values
        for name in self.expert_parameters:
            setattr(self, name, _picked(getattr(self, name), kept))
        router.keep(kept)


@register_notrace_module
class ExpertMlp(_Experts):
    """A perceptron per expert; a token gets the sum of those that it chose, times their gates.

    Outside of graphs tokens are sorted by expert, and each expert sees its own. In graphs (exported files,
    ``torch.compile``) and transforms all experts see all tokens and gates of 0 leave out those that were not chosen,
    which gives the same numbers for ``num_experts / topk`` times the work.

    Args:
        dim: Channels of input and output.
        hidden_dim: Width of an expert.
        num_experts: Experts to choose from.
        topk: Experts of a token.
        drop: Dropout rate of the output.
        tasks: See :class:`TaskRouter`.
        noise: See :class:`TaskRouter`.
        loss_weights: See :class:`TaskRouter`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: There are fewer experts than a token needs, or names of tasks are empty or the same.
    """

    expert_parameters = ("fc1", "fc1_bias", "fc2", "fc2_bias")

    def __init__(
            self,
            dim: int,
            hidden_dim: int,
            num_experts: int = 16,
            topk: int = 2,
            drop: float = 0.,
            tasks: Sequence[str] = (),
            noise: bool = True,
            loss_weights: tuple[float, float, float] = (0.01, 0.001, 5e-4),
            device=None,
            dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(TaskRouter(dim, num_experts, topk, tasks, noise, loss_weights, device=device, dtype=dtype))
        self.fc1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, **dd))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, hidden_dim, **dd))
        self.fc2 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, **dd))
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, dim, **dd))
        self.drop = nn.Dropout(drop)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim]`` to the same."""
        gates, index = self.router(x)
        return self.drop(self._mix(x, gates, index))

    @unscripted
    def _mix(self, x: Tensor, gates: Tensor, index: Tensor) -> Tensor:
        experts, topk = *numbers(self.fc1.shape[:1]), *numbers(index.shape[-1:])
        if topk < experts and concrete(x, devices=True):
            order, back, counts = sort_by_expert(index, experts)
            rows = x.flatten(0, -2).index_select(0, order // topk)
            hidden = F.gelu(grouped_linear(rows, self.fc1, self.fc1_bias, counts))
            out = grouped_linear(hidden, self.fc2.transpose(1, 2), self.fc2_bias, counts).index_select(0, back)
            return (out.reshape(*index.shape, -1) * gates.to(out.dtype)[..., None]).sum(dim=-2)
        hidden = F.gelu(F.linear(x, self.fc1.flatten(0, 1), self.fc1_bias.flatten()))
        gates = gates.new_zeros(*index.shape[:-1], experts).scatter(-1, index, gates).to(hidden.dtype)
        hidden = hidden.unflatten(-1, (experts, -1)) * gates[..., None]
        return hidden.flatten(-2) @ self.fc2.flatten(0, 1) + gates @ self.fc2_bias


@register_notrace_module
class ExpertAttention(_Experts):
    """Attention whose heads are experts: a token's queries and outputs are those of the ``topk`` heads that it chose.

    Keys and values are the same for all experts, so that tokens of any heads attend to each other. Takes maps ``[batch,
    height, width, dim]`` and tokens ``[batch, tokens, dim]`` alike. Computes as :class:`ExpertMlp` does; in graphs the
    projections of all experts are computed, the attention only of those that were chosen. Attention maps are by slot:
    of a token's head of largest gate, of its second, and so on.

    Args:
        dim: Channels of input and output.
        head_dim: Channels of an expert.
        num_experts: Experts to choose from.
        topk: Experts of a token, its heads.
        proj_drop: Dropout rate of the output.
        tasks: See :class:`TaskRouter`.
        noise: See :class:`TaskRouter`.
        loss_weights: See :class:`TaskRouter`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: There are fewer experts than a token needs, or names of tasks are empty or the same.
    """

    expert_parameters = ("query", "proj")

    def __init__(
            self,
            dim: int,
            head_dim: int,
            num_experts: int = 24,
            topk: int = 6,
            proj_drop: float = 0.,
            tasks: Sequence[str] = (),
            noise: bool = True,
            loss_weights: tuple[float, float, float] = (0.01, 0.001, 5e-4),
            device=None,
            dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(TaskRouter(dim, num_experts, topk, tasks, noise, loss_weights, device=device, dtype=dtype))
        self.query = nn.Parameter(torch.empty(num_experts, head_dim, dim, **dd))
        self.kv = nn.Linear(dim, 2 * head_dim, **dd)
        self.proj = nn.Parameter(torch.empty(num_experts, head_dim, dim, **dd))
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of x's shape."""
        tokens = x.flatten(1, -2)
        gates, index = self.router(tokens)
        return self.proj_drop(self._mix(tokens, self.kv(tokens), gates, index).reshape(x.shape))

    @unscripted
    def _mix(self, x: Tensor, kv: Tensor, gates: Tensor, index: Tensor) -> Tensor:
        """What the experts make of tokens ``[batch, tokens, dim]`` with their keys and values."""
        experts, width, topk = *numbers(self.query.shape[:2]), *numbers(index.shape[-1:])
        slots = index[..., None].expand(-1, -1, -1, width)
        groups = topk < experts and concrete(x, devices=True)
        if groups:
            order, back, counts = sort_by_expert(index, experts)
            rows = x.flatten(0, 1).index_select(0, order // topk)
            q = grouped_linear(rows, self.query, None, counts).index_select(0, back).reshape(slots.shape)
        else:
            q = F.linear(x, self.query.flatten(0, 1)).unflatten(-1, (experts, width)).gather(2, slots)
        k, v = (t[:, None].expand(-1, topk, -1, -1) for t in kv.chunk(2, dim=-1))
        out = attend(q.transpose(1, 2), k, v).transpose(1, 2)
        out = out * gates.to(out.dtype)[..., None]
        if groups:
            rows = out.flatten(0, 2).index_select(0, order)
            out = grouped_linear(rows, self.proj.transpose(1, 2), None, counts).index_select(0, back)
            return out.reshape(*index.shape, -1).sum(dim=-2)
        out = out.new_zeros(*index.shape[:2], experts, width).scatter(2, slots, out)
        return out.flatten(2) @ self.proj.flatten(0, 1)


def sort_by_expert(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Sorts the choices of tokens by expert.

    Args:
        index: Experts of each token, ``[..., topk]``.
        num_experts: Their number.

    Returns:
        The places of the flat ``index`` by ascending expert, for each place where it went, and choices of each expert.
    """
    index = index.flatten()
    order = index.argsort(stable=True)
    return order, order.argsort(), index.bincount(minlength=num_experts).tolist()


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
    """Rows ``[rows, in]`` sorted by expert, each through its expert's ``weight [experts, out, in]`` and ``bias``."""
    biases = [None] * len(counts) if bias is None else bias.unbind()
    groups = zip(x.split(counts), weight.unbind(), biases, strict=True)
    return torch.cat([F.linear(part, w, b) for part, w, b in groups])


_Layer = TypeVar("_Layer", bound=nn.Module)


def _found(model: nn.Module, kind: type[_Layer]) -> list[_Layer]:
    found = [module for module in model.modules() if isinstance(module, kind)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no mixtures of experts")
    return found


def _picked(parameter: Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach()[rows].clone(), requires_grad=parameter.requires_grad)
