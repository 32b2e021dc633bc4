"""``visionattn fit --launcher ray``: Ray Train starts the processes, on this machine or on a cluster of Ray's."""
import os
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["fit_with_ray"]


def fit_with_ray(argv: list[str], workers: int, launch: Callable[[list[str]], Any]) -> None:
    """Runs ``fit`` in ``workers`` processes of Ray, with a GPU each where there are GPUs.

    Ray is the one that ``RAY_ADDRESS`` names, or one that is started here. Its strategy is DDP; the run folder and what
    is in it are those of any other run. On several machines all must see the folders that the configuration names.

    Args:
        argv: ``fit`` and its options, without those of the launcher.
        workers: Number of processes.
        launch: What runs a command in a process.

    Raises:
        ImportError: Ray is not installed.
        ValueError: ``workers`` is not positive, or ``argv`` names devices or a strategy.
        RuntimeError: A worker failed; the message is that of its error.
    """
    if workers < 1:
        raise ValueError(f"--workers must be 1 or more, got {workers}")
    for option in ("devices", "num_nodes", "strategy"):
        if any(argument.partition("=")[0] == f"--trainer.{option}" for argument in argv):
            raise ValueError(f"--launcher ray settles trainer.{option} itself: leave it out and give --workers")
    try:
        import ray
        from ray.train import ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise ImportError("--launcher ray needs Ray: pip install 'visionattn[ray]'") from error
    # A worker imports PyTorch before it answers, which may take longer than the minute that Ray waits.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    begun = not ray.is_initialized()
    if begun:
        ray.init(configure_logging=False)
    try:
        TorchTrainer(
            _work, train_loop_config={"launch": launch, "argv": argv, "folder": os.getcwd()},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=torch.cuda.is_available())).fit()
    except Exception as error:  # Ray's, which holds what each worker raised
        failures = getattr(error, "worker_failures", None) or {0: error.__cause__ or error}
        raise RuntimeError(str(next(iter(failures.values())))) from error
    finally:
        if begun:
            ray.shutdown()


def _work(config: dict[str, Any]) -> None:
    """What each process does: the command, with Ray's strategy and its knowledge of who is who."""
    import ray.train
    from lightning.pytorch.strategies import StrategyRegistry
    from lightning.pytorch.utilities import rank_zero_only
    from ray.train.lightning import RayDDPStrategy

    # Lightning was imported before it was known.
    rank_zero_only.rank = ray.train.get_context().get_world_rank()  # type: ignore[attr-defined]
    os.environ["VISIONATTN_RAY"] = "1"
    os.chdir(config["folder"])
    StrategyRegistry.register("ray_ddp", RayDDPStrategy, override=True)
    config["launch"]([
        *config["argv"], "--trainer.devices=1", "--trainer.strategy=ray_ddp",
        "--trainer.plugins=ray.train.lightning.RayLightningEnvironment"])
