"""``visionattn fit|validate|test|predict``: LightningCLI with run folders.

A run folder is the trainer's ``default_root_dir``. ``fit`` fills it with ``config.yaml``, ``metrics.csv`` and
``checkpoints/{best,last}.ckpt`` and ends with a test of the best checkpoint: ``test_metrics.json``. The other commands
find the checkpoints there and add what they measured.
"""
import argparse
import inspect
import logging
import re
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.imports import RequirementCache

from .. import data  # noqa: F401  (the data modules may be named without their module)
from ..data.loading import LoadedData
from ..data.report import DataReport
from ..recipes import with_recipes
from ..runtime.say import one_line, say
from ..weights import read_checkpoint
from . import ClassificationTask  # noqa: F401  (the same for the tasks)
from .adapting import save_adapter
from .guarding import LossGuard, NotFiniteError
from .midepoch import FitLoop, MidEpochCheckpoint
from .rebuild import create_model
from .resuming import Resumable, is_complete, newest_checkpoint
from .run_folder import moved_run, new_run_folder, relocated, with_run, with_run_folders
from .saving import LatestBest, RunLogger, WholeConfig, WholeFiles, is_full
from .story import EpochLines, OneBar, figures
from .summary import add_test, draw_run, summarise, write_readme

__all__ = ["launch", "main"]

FROM_DATA = ("num_classes", "class_names", "in_chans", "multi_label")  # arguments of tasks that the data know


def main(argv: list[str]) -> None:
    """Runs a command as ``launch`` does or, of ``fit --launcher ray --workers N``, as ``fit_with_ray``."""
    parser = argparse.ArgumentParser(prog="visionattn fit", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--launcher", choices=["ray"])
    parser.add_argument("--workers", type=int)
    options, rest = parser.parse_known_args(argv)
    if options.launcher and argv[0] == "fit":
        if options.workers is None:
            raise ValueError("--launcher ray needs a number of processes: --workers N")
        from .ray_launcher import fit_with_ray

        fit_with_ray(rest, options.workers, launch)
    else:
        launch(argv)


def launch(argv: list[str]) -> pl.LightningDataModule:
    """Runs ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        argv: The command and its options, as they come from the shell; ``--config`` may name a shipped recipe.

    Returns:
        The data.

    Raises:
        argparse.ArgumentError: The options or the configuration cannot be read; the message is one line.
        ValueError: The data or a checkpoint is wrong; the message is one line.
        FileNotFoundError: A file that the configuration names does not exist.
        OSError: A disk is full; the message names the path and the command that goes on.
        KeyboardInterrupt: The run was stopped by SIGINT or SIGTERM: a line that has the command that goes on, and the
            exit code, 130 or 143.
    """
    _silence()
    argv = with_run_folders(with_recipes(with_run(argv)))
    try:
        return _RunCLI(
            pl.LightningModule, pl.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
            save_config_kwargs={"overwrite": True}, seed_everything_default=0, auto_configure_optimizers=False,
            load_from_checkpoint_support=False, parser_class=WholeConfig, parser_kwargs={"prog": "visionattn"},
            args=argv).datamodule
    except argparse.ArgumentError as error:
        raise argparse.ArgumentError(None, _parsing_fault(str(error))) from error
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise ValueError("a batch norm got a single value in each channel, of which it cannot take statistics: set "
                         "data.init_args.batch_size to 2 or more, or take larger images") from error


class _RunCLI(LightningCLI):
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**kwargs | {"exit_on_error": False})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--resume", type=Literal["auto", None], default=None, help="auto: go on with the newest checkpoint of "
                "the run folder that can be read; begin if there is none; do nothing if the run is finished")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in FROM_DATA:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Lightning would put the checkpoint's hyper-parameters over the configuration; ours are compared with it."""

    def _run_subcommand(self, subcommand: str) -> None:
        self._trained = False
        self._test_started: float | None = None
        if subcommand == "fit" and self._is_complete():
            return
        try:
            super()._run_subcommand(subcommand)
        except (KeyboardInterrupt, SystemExit) as stop:
            # Lightning ends in sys.exit after an interrupt, and in an exception of its own after SIGTERM.
            terminated = isinstance(stop, SIGTERMException)
            if not (terminated or KeyboardInterrupt in (type(stop), type(stop.__context__))):
                raise
            code = 143 if terminated else 130
            if not _is_first_process():
                raise SystemExit(code) from None
            raise KeyboardInterrupt(f"interrupted; {self._how_to_go_on()}", code) from None
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, OSError) and is_full(error):
                path = error.filename or self.trainer.default_root_dir
                raise OSError(f"{path} cannot be written: {error.strerror}; free some space, then "
                              f"{self._how_to_go_on()}") from error
            kept = Path(self.trainer.default_root_dir, "checkpoints", "last.ckpt")
            if subcommand != "fit" or self._trained or not self.trainer.global_step or not kept.is_file() or isinstance(
                    error, NotFiniteError):  # which would come again
                raise
            kind = next(kind for kind in (FileNotFoundError, OSError, ValueError, RuntimeError)
                        if isinstance(error, kind))
            raise kind(f"{one_line(error, 300)}; {kept} stays: once that is mended, {self._how_to_go_on()}") from error

    def _is_complete(self) -> bool:
        """Whether ``--resume auto`` finds nothing left to do, which is said."""
        trainer: Any = self.trainer
        run, found = Path(trainer.default_root_dir), self._found
        if not self._resumes:
            return False
        if found is None:
            say(f"{run} has no checkpoint yet: the training begins.")
            return False
        if not is_complete(run, found, trainer.max_epochs, trainer.max_steps, self._ends_with_test()):
            say(f"Going on with {found.path}, {found.place()}.")
            return False
        say(f"{run} is finished ({found.place()}): nothing is left to do. To train longer raise trainer.max_epochs.")
        return True

    def _how_to_go_on(self) -> str:
        """The command that goes on with a run which was stopped."""
        run = Path(self.trainer.default_root_dir)
        config, last = str(run / "config.yaml"), run / "checkpoints" / "last.ckpt"
        if self.subcommand != "fit":
            return f"run the same {self.subcommand} again"
        if self._trained:
            return f"what is trained is tested by: {shlex.join(['visionattn', 'test', '--config', config])}"
        if not Path(config).is_file():
            return "nothing was trained yet"
        if not last.is_file():
            return f"no epoch was finished, so start again: {shlex.join(['visionattn', 'fit', '--config', config])}"
        return f"go on with: {shlex.join(['visionattn', 'fit', '--config', config, '--ckpt_path', 'last'])}"

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self._found: Resumable | None = None
        self._resumes = self.subcommand == "fit" and config.pop("resume", None) == "auto"
        if self._resumes and config.ckpt_path:
            raise ValueError(f"--resume auto finds the checkpoint to go on with by itself; leave out it or --ckpt_path "
                             f"{config.ckpt_path}")
        if self._resumes and config.trainer.default_root_dir is None:
            raise ValueError("--resume auto needs a run folder that is the same each time: give "
                             "--trainer.default_root_dir; without it a run is named by the time")
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = new_run_folder()
        run = Path(config.trainer.default_root_dir)
        for file in config.get("config") or []:  # callbacks and loggers may name the place where a run was
            moved = moved_run(Path(str(file)))
            if moved and moved.now == run:
                config.trainer = relocated(config.trainer, moved)
        self._resumes = self._resumes and not config.trainer.fast_dev_run
        if self._resumes or (self.subcommand == "fit" and config.ckpt_path == "last"):
            self._found = newest_checkpoint(run)
            if self._found:
                config.ckpt_path = str(self._found.path)
        self._ckpt_path = _find_checkpoint(str(self.subcommand), config.ckpt_path, run, config.model.init_args)
        if self.subcommand != "fit" and self._ckpt_path:
            _take_classes(self._ckpt_path, (config.get("data") or {}).get("init_args"))
        config.ckpt_path = None  # config.yaml describes the run, not how it was resumed
        self._classes = {name: config.model.init_args.get(name) for name in FROM_DATA}
        self._config_to_save = self.config.clone()
        if self._ckpt_path:
            # The weights come from the checkpoint: nothing to download or read before.
            for key, value in {"pretrained": False, "checkpoint_path": None}.items():
                if key in config.model.init_args:
                    config.model.init_args[key] = value
        elif self.subcommand == "fit" and not config.trainer.fast_dev_run and _is_first_process():
            # What a run leaves that died in its first epoch is no reason to stop.
            results = ("checkpoints/*.ckpt", "test_metrics.json", "predictions.csv", "predictions.json", "predictions")
            found = [str(path.relative_to(run)) for pattern in results for path in sorted(run.glob(pattern))]
            if found:
                raise ValueError(f"{run} already holds a run ({', '.join(found)}): go on with it by --ckpt_path last, "
                                 "or choose another folder by --trainer.default_root_dir")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what a constructor raised in a report on the types it tried.
            raise error.__cause__ or error from None

    def after_instantiate_classes(self) -> None:
        known = inspect.signature(type(self.model)).parameters
        for name, given in self._classes.items():
            found = getattr(self.datamodule, name, given)
            if given != found and name in known and given != known[name].default:
                raise ValueError(f"model.init_args.{name} of the configuration is {given}, but that of the data is "
                                 f"{found}: leave it out, it is taken from the data")
        if self._ckpt_path:
            _check_checkpoint(self._ckpt_path, self.model)

    def before_fit(self) -> None:
        # What is wrong with the test data is said now, not after the training.
        self._show_data("fit", *["test"] * self._ends_with_test())

    def before_validate(self) -> None:
        self._show_data("validate")

    def after_validate(self) -> None:
        self._say_metrics("Validation", self._ckpt_path)
        self._say_left_out()

    def before_test(self) -> None:
        self._show_data("test")
        self._test_started = time.monotonic()

    def after_test(self) -> None:
        self._say_metrics("Test", self._ckpt_path)
        self._say_left_out()
        self._tidy(self._ckpt_path)

    def after_predict(self) -> None:
        self._say_left_out()
        self._tidy()

    def after_fit(self) -> None:
        self._trained = True
        trainer, model = self.trainer, self.model
        run = Path(trainer.default_root_dir)
        if self._keeps():
            run.mkdir(parents=True, exist_ok=True)
            summarise(run, trainer, model, self.datamodule, self.lines)
            draw_run(run, getattr(model, "monitor", None), self.lines.best_epoch)
        tested = self._test() if self._ends_with_test() else None
        if self._keeps() and getattr(model, "hparams", {}).get("adapter"):
            kept = [run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
            if found := next((path for path in kept if path.is_file()), None):
                save_adapter(create_model(None, found), run)
        self._say_left_out()
        self._tidy(tested)
        if _is_first_process() and (run / "README.txt").is_file():
            print(f"What is in {run} is listed in {run / 'README.txt'}", flush=True)

    def _tidy(self, tested: str | None = None) -> None:
        """Brings the summary and the list of the run's files up to date."""
        run = Path(self.trainer.default_root_dir)
        if self._keeps():
            if self._test_started is not None:
                add_test(run, time.monotonic() - self._test_started, tested)
            write_readme(run)

    def _keeps(self) -> bool:
        """Whether this process leaves files in the run folder."""
        trainer: Any = self.trainer
        return _is_first_process() and not trainer.fast_dev_run

    def _show_data(self, *stages: str) -> None:
        """Reads the data that the stages need and says what they are."""
        if not isinstance(self.datamodule, LoadedData):
            return
        for stage in stages:
            self.datamodule.setup(stage)
        if self.datamodule.report.splits:
            say(f"The data:\n{self.datamodule.report.text()}")
        self._write_left_out()

    def _say_left_out(self) -> None:
        """Says at the end how much of the data was left out or mended."""
        path = self._write_left_out()
        if path:
            count = self.datamodule.report.left_out()  # type: ignore[union-attr]
            rank_zero_info(f"{count} files or records were left out or mended: they are listed in {path}")

    def _write_left_out(self) -> Path | None:
        """Lists what was left out or mended in the run folder, if there is something."""
        report, trainer = getattr(self.datamodule, "report", None), self.trainer
        if not isinstance(report, DataReport) or not report.left_out() or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        name = "left_out.csv" if self.subcommand == "fit" else f"left_out_{self.subcommand}.csv"
        path = Path(trainer.default_root_dir, name)
        if _is_first_process():
            report.write(path)
        return path

    def _test(self) -> str | None:
        """Tests what ``visionattn test`` would test, the best checkpoint or else the last, and returns it."""
        trainer: Any = self.trainer  # some of its attributes are set out of sight of type checkers
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        kept = [Path(trainer.default_root_dir, "checkpoints", f"{name}.ckpt") for name in ("best", "last")]
        path = next((path for path in [*kept, *(Path(saver.best_model_path) for saver in savers)] if path.is_file()),
                    None)
        if path is None:
            rank_zero_info("No checkpoint was kept: there is nothing to test")
            return None
        # metrics.csv stays that of the training; an average of the weights, when a checkpoint is loaded, would put the
        # raw weights in place of the average that the checkpoint holds.
        trainer.loggers = []
        trainer.callbacks = [callback for callback in trainer.callbacks
                             if not isinstance(callback, (ModelCheckpoint, WeightAveraging, EpochLines))]
        self._test_started = time.monotonic()
        trainer.test(self.model, datamodule=self.datamodule, ckpt_path=str(path), verbose=False)
        self._say_metrics("Test", str(path))
        return str(path)

    def _say_metrics(self, what: str, checkpoint: str | None) -> None:
        """Says what a test or a validation measured."""
        metrics = {key: value for key, value in self.trainer.callback_metrics.items() if "/" in key}
        if metrics and _is_first_process():
            print(f"{what}{f' of {checkpoint}' if checkpoint else ''}: {figures(metrics)}", flush=True)

    def _ends_with_test(self) -> bool:
        trainer: Any = self.trainer
        return bool(not trainer.fast_dev_run and trainer.limit_test_batches and is_overridden("test_step", self.model)
                    and is_overridden("test_dataloader", self.datamodule or self.model))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        quiet = {"verbose": False} if subcommand in ("validate", "test") else {}  # the metrics are said in one line
        return super()._prepare_subcommand_kwargs(subcommand) | {"ckpt_path": self._ckpt_path} | quiet

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init[self.subcommand].trainer
        run, fitting = Path(config.default_root_dir), self.subcommand == "fit"
        given = config.callbacks or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if config.enable_model_summary is None:
            kwargs["enable_model_summary"] = False
        if config.enable_progress_bar is None and not sys.stdout.isatty():
            kwargs["enable_progress_bar"] = False
        elif config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(OneBar())
        if not fitting:
            # What they measure goes into files of its own; metrics.csv and config.yaml stay those of the training.
            self.save_config_callback = None
            # Said by a checkpoint callback of Lightning's own, which has nothing to do here.
            warnings.filterwarnings("ignore", "The dirpath has changed from")
            return super().instantiate_trainer(logger=False, callbacks=callbacks, **kwargs)
        self.config = self._config_to_save
        if config.logger is None or config.logger is True:
            kwargs["logger"] = [RunLogger(run, resumed=bool(self._ckpt_path))]
            if RequirementCache("tensorboard") or RequirementCache("tensorboardX"):
                kwargs["logger"].append(TensorBoardLogger(run, name="", version="tensorboard"))
        if config.enable_checkpointing is not False and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            common: dict[str, Any] = dict(
                dirpath=run / "checkpoints", enable_version_counter=False, save_on_train_epoch_end=True)
            monitor, mode = getattr(self.model, "monitor", None), getattr(self.model, "monitor_mode", "min")
            if monitor is not None:
                callbacks.append(LatestBest(**common, filename="best", monitor=monitor, mode=mode))
            callbacks.append(ModelCheckpoint(**common, filename="last"))
        self.lines = EpochLines()
        callbacks.append(self.lines)
        if not any(isinstance(callback, LossGuard) for callback in callbacks):
            callbacks.append(LossGuard())
        if config.enable_checkpointing is not False and not any(isinstance(c, MidEpochCheckpoint) for c in callbacks):
            callbacks.append(MidEpochCheckpoint())
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        trainer.fit_loop.__class__ = FitLoop
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            last = run / "checkpoints" / "last.ckpt"
            trainer.strategy.checkpoint_io = WholeFiles(last if self._found and self._found.path != last else None)
        return trainer


def _is_first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _find_checkpoint(command: str, wanted: str | None, run: Path, model_args: Any) -> str | None:
    """The file that ``best``, ``last`` or a path means; what evaluation uses if none is named."""
    if wanted in ("best", "last"):
        path = run / "checkpoints" / f"{wanted}.ckpt"
        if not path.is_file():
            raise FileNotFoundError(f"there is no checkpoint {path} (the run folder is trainer.default_root_dir)")
        return str(path)
    if wanted:
        if not Path(wanted).is_file():
            raise FileNotFoundError(f"checkpoint {wanted} does not exist (give best, last or a path)")
        return wanted
    if command == "fit":
        return None
    path = run / "checkpoints" / "best.ckpt"
    if path.is_file():
        rank_zero_info(f"No --ckpt_path was given: using {path}")
        return str(path)
    if model_args.get("pretrained") or model_args.get("checkpoint_path"):
        return None
    raise ValueError(f"there is nothing to {command}: {path} does not exist; give --ckpt_path, or set the model's "
                     "pretrained or checkpoint_path")


def _take_classes(path: str, data_args: Any) -> None:
    """Sets what the data would take from training images, which need not be there, to what a run was trained on."""
    _, saved = read_checkpoint(path, joint=True)
    for key in ("class_names", "multi_label"):
        if saved and data_args and saved.get(key) is not None and data_args.get(key, "not taken") is None:
            data_args[key] = saved[key]


def _check_checkpoint(path: str, model: pl.LightningModule) -> None:
    """Complains if the checkpoint cannot be read or is of another model or of other classes."""
    _, saved = read_checkpoint(path, joint=True)
    if saved is None:
        raise ValueError(f"{path} is not the checkpoint of a training run; weights alone go to the model's "
                         "checkpoint_path")
    for key in ("backbone", "detector", "head", "num_classes", "in_chans", "multi_label", "class_names"):
        theirs, ours = saved.get(key), model.hparams.get(key)
        if None not in (theirs, ours) and theirs != ours:
            raise ValueError(f"{path} is of another model: its {key} is {theirs}, the configuration's is {ours}")


def _parsing_fault(message: str) -> str:
    """What jsonargparse says is wrong, on one line and without the types it tried."""
    text = " ".join(message.split())
    tried = re.match(r'Parser key "(?P<key>[^"]+)": .* Errors: - (?P<fault>.*?)( - |$)', text)
    if not tried:
        return text
    fault, key = tried["fault"], tried["key"]
    of_class = re.match(r"Problem with given class_path '(?P<name>[^']+)': (?P<fault>.*)", fault)
    if of_class:
        name = of_class["name"].rpartition(".")[2]
        return f"{key}: {name}: {of_class['fault']} (visionattn fit --{key}.help {name} lists its options)"
    value = text.rpartition("Given value: ")[2]
    return f"{key}: {fault}, got {value}"


def _silence() -> None:
    """Hides what our users can do nothing about; nothing else."""
    for message in (".*jsonargparse.*", ".*add_instantiator.*", ".*instantiate_classes.*", ".*skip_none.*"):
        warnings.filterwarnings("ignore", message, DeprecationWarning)
    for message in _NO_NEWS_WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed",
                 "fabric.utilities.distributed", "pytorch.trainer.connectors.signal_connector"):
        logging.getLogger(f"lightning.{name}").addFilter(_has_news)


def _has_news(record: logging.LogRecord) -> bool:
    return not re.sub(r"^\s*(\[rank: \d+\] )?", "", str(record.msg)).startswith(_NO_NEWS)


_NO_NEWS_WARNINGS = (  # the beginnings of warnings that a user of the command can do nothing about
    "LightningCLI's args parameter",
    "Be aware that when using `ckpt_path`, callbacks used to create",
    r".*treespec, LeafSpec.*",
    "(Experiment logs|Checkpoint) directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",  # an epoch's mean is always logged
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the norms that frozen_norms asks for
    "The '.*dataloader' does not have many workers",  # images/s are said; the data module's num_workers is its choice
    "Using `DistributedSampler` with the dataloaders",  # ours shows every image once
    r"It is recommended to use `self\.log\(",  # what is logged is of all processes already
    "Grad strides do not match bucket view strides",  # of depthwise convolutions on several devices
)
_NO_NEWS = (  # the beginnings of what Lightning logs: advertisements, what is said in lines of our own, what is usual
    "💡", "TPU available", "GPU available", "Seed set to", "Loading `train_dataloader` to estimate",
    "`Trainer.fit` stopped: `max_", "Restoring states from", "Loaded model weights", "Restored all states",
    "Found current_model_state",
    "LOCAL_RANK:", "You are using a CUDA device", "Using bfloat16 Automatic", "Using 16bit Automatic",
    "Initializing distributed:", "-----", "Detected KeyboardInterrupt", "Received SIGTERM",
    "SLURM auto-requeueing enabled",
)
