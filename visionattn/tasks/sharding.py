"""FSDP2 as a strategy of the Trainer, ``fsdp2``: every process holds a piece of the weights, gradients and moments."""
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

__all__ = ["FullySharded", "whole"]

_OPTIMIZERS = ("adamw", "adam", "nadam", "radam", "sgd", "momentum", "rmsprop")  # each number by itself
_BLOCKS = ("Block", "Bottleneck")  # how the class of what is gathered at a time ends


class FullySharded(ModelParallelStrategy):
    """``torch.distributed.fsdp.fully_shard`` for our tasks: ``--trainer.strategy fsdp2``.

    In training the backbone's blocks and the rest of the model are each gathered while they compute; in evaluation all
    are, from the first batch to the last, as processes may have different numbers of images and windows. A checkpoint
    is one file with whole tensors, that of one device: it may be resumed with any strategy and any number of processes.
    Buffers (a batch norm's statistics) are those of the first process, as with DDP.

    Raises:
        ValueError: A parameter is a scalar, which cannot be cut; ``trainer.precision`` is ``16-mixed``; the task has
            ``clip_agc``, ``compile`` or an optimiser that needs whole weights.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)
        self._gathered = False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning loads an optimiser through :meth:`load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Starts to talk with the other processes, all of which share the data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, task: Any) -> None:
        """Cuts the weights of ``task.model`` into pieces, unless they are."""
        model: nn.Module = task.model
        if isinstance(model, FSDPModule):
            return
        args = task.args
        refused = {
            "trainer.precision 16-mixed: take bf16-mixed": self.precision_plugin.precision == "16-mixed",
            "clip_agc, which needs whole weights: take trainer.gradient_clip_val": args.clip_agc,
            "compile: leave it out": args.compile,
            "mixing smmix and attention_labels, which run the model in parts: leave them out":
                args.get("mixing") == "smmix" or args.get("attention_labels"),
            f"the optimizer {args.optimizer}: take one of {', '.join(_OPTIMIZERS)}": args.optimizer not in _OPTIMIZERS,
        }
        for what, there in refused.items():
            if there:
                raise ValueError(f"fsdp2 does not take {what}, or set trainer.strategy to ddp")
        scalars = [name for name, parameter in model.named_parameters() if not parameter.ndim]
        if scalars:
            raise ValueError(f"fsdp2 cannot cut parameters that are single numbers, of which the model has some "
                             f"({', '.join(scalars[:3])}): take the strategy ddp")
        if self._layer_sync is not None:
            task.model = model = self._layer_sync.apply(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        # Resharded always: between steps the parameters are the pieces, which averages and checkpoints are made of.
        common: dict[str, Any] = dict(mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)
        for module in _parts(model):
            fully_shard(module, **common)
        fully_shard(model, **common)
        if task.freezing:
            pieces = dict(model.named_parameters())
            task.freezing.layers = [[pieces[names[id(parameter)]] for parameter in layer]
                                    for layer in task.freezing.layers]

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Takes a step, after which all processes have the buffers of the first."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        for module in self.lightning_module.model.modules():  # type: ignore[union-attr]
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    torch.distributed.broadcast(buffer, 0)
        return result

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates a batch with gathered weights."""
        self._gather()
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates a batch with gathered weights."""
        self._gather()
        return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts of a batch with gathered weights."""
        self._gather()
        return super().predict_step(*args, **kwargs)

    def on_validation_end(self) -> None:
        """Goes back to pieces."""
        self.scatter()

    def on_test_end(self) -> None:
        """Goes back to pieces."""
        self.scatter()

    def on_predict_end(self) -> None:
        """Goes back to pieces."""
        self.scatter()

    def scatter(self) -> None:
        """Lets go of weights that were gathered for an evaluation."""
        if self._gathered:
            self._gathered = False
            for module in self._sharded():
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()

    def _gather(self) -> None:
        if not self._gathered:
            self._gathered = True
            with torch.inference_mode(False), torch.no_grad():  # what is gathered here is used in training too
                for module in self._sharded():
                    module.set_reshard_after_forward(False, recurse=False)
                    module.unshard()

    def _sharded(self) -> list[FSDPModule]:
        return [module for module in self.lightning_module.modules()  # type: ignore[union-attr]
                if isinstance(module, FSDPModule)]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights."""
        return whole(self.lightning_module.state_dict())  # type: ignore[union-attr]

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The whole moments."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return whole(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """What the file holds, in every process."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes the pieces of this process from the whole weights."""
        self.lightning_module.load_state_dict(  # type: ignore[union-attr]
            self.cut(checkpoint["state_dict"]), strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes the pieces of this process from the whole moments."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            places = [place for group in saved["param_groups"] for place in group["params"]]
            pieces = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {place: {key: _like(value, piece) for key, value in saved["state"][place].items()}
                     for place, piece in zip(places, pieces, strict=True) if place in saved["state"]}
            optimizer.load_state_dict(saved | {"state": state})
            _optimizer_to_device(optimizer, self.root_device)

    def cut(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Whole weights by name as pieces, where the module's are."""
        pieces = self.lightning_module.state_dict()  # type: ignore[union-attr]
        return {name: _like(value, pieces.get(name)) for name, value in state.items()}


def whole(state: Any) -> Any:
    """A tree of values with whole tensors on the CPU in place of pieces; all processes must ask for it together."""
    return tree_map_only(DTensor, lambda piece: piece.full_tensor().cpu(), state)


def _like(value: Any, piece: Any) -> Any:
    """``value`` cut as ``piece`` is, if that is a piece of a tensor of its shape."""
    if isinstance(piece, DTensor) and isinstance(value, Tensor) and value.shape == piece.shape:
        return distribute_tensor(value.to(piece.device), piece.device_mesh, piece.placements)
    return value


def _parts(model: nn.Module) -> list[nn.Module]:
    """What is gathered by itself: blocks that lie in no other block."""
    parts: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside and type(module).__name__.endswith(_BLOCKS) and any(True for _ in module.parameters()):
            parts.append(module)
            inside.update(module.modules())
    return parts


StrategyRegistry.register("fsdp2", FullySharded, description="PyTorch's fully_shard for visionattn's tasks")
