"""The only training loop: any method, any source, on one device or many, resumable at every step."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataloaders.base import CaseSource
from dataloaders.case_cache import CaseCache
from dataloaders.patches import Batch, PatchDataset, collate
from dataloaders.samplers import StepPlan, StepSampler
from myutils import build
from myutils.checkpoint import RunState, Stored, load_weights, write_checkpoint
from myutils.config import required
from myutils.distributed import (
    RankInfo,
    any_rank,
    autocast,
    barrier,
    data_parallel,
    mean_over_ranks,
    peak_memory_mb,
    resolve_amp,
)
from myutils.finite_watch import FiniteWatch, NonFiniteLossError
from myutils.host_memory import named_shortages
from myutils.methods.base import batch_dice
from myutils.methods.step_output import StepOutput, fingerprint, require_gradients, warn_if_still
from myutils.prototype_checks import NonFiniteFeaturesError
from myutils.run_log import RunLog, step_bar, step_scalars
from myutils.schedules import poly_lr
from myutils.seeding import derive_seed, seed_everything
from myutils.stop_signals import TrainingInterrupted, leave_stops_to_parent, stop_signals
from myutils.validation import Validation
from networks.compiling import compile_networks

logger = logging.getLogger(__name__)


class Trainer:
    """One run: builds everything from a state, trains to ``max_iteration``, writes checkpoints and logs.

    Args:
        state: Resolved configuration, data facts and split; its step is 0 for a new run.
        source: Where the cases come from.
        folder: The run's folder.
        ranks: This process among all.
        device: Where it computes.
    """

    def __init__(
        self, state: RunState, source: CaseSource, folder: Path, ranks: RankInfo, device: torch.device
    ) -> None:
        self.state, self.source, self.folder, self.ranks, self.device = state, source, folder, ranks, device
        config = state.config
        self.max_iteration: int = required(config.max_iteration, "max_iteration")
        self.amp = resolve_amp(config.amp, device)
        seed_everything(config.seed, deterministic=config.deterministic)
        self.method = build.build_method(config, state.facts).to(device)
        if config.compile:
            compile_networks(self.method)
        if self.method.uses_unlabeled and not state.split.unlabeled:
            raise ValueError(
                f"--labelnum {config.labelnum}: no unlabelled case is left for {config.method}; "
                "pass a lower --labelnum (some data have all labels by default) or use --method supervised"
            )
        self._sampler(state.step)  # refuses a batch that the ranks cannot share, before anything is written
        self.optimizer = build.build_optimizer(config, self.method)
        self._trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")
        self.validation = Validation(state, source, self.amp, device)
        self.watch = FiniteWatch(eager=device.type == "cpu", advice=self._advice)
        self._first_look = max(state.step, self.method.warmup)
        self.interrupted, self._clock = False, (0.0, 0)  # the clock: time and step of the last log entry

    @classmethod
    def resume(cls, stored: Stored, source: CaseSource, folder: Path, ranks: RankInfo, device: torch.device) -> Trainer:
        """Rebuild the run of ``folder``, in whose ``last.pt`` this was ``stored``; errors as in ``load_weights``."""
        state, tensors = stored
        trainer = cls(state, source, folder, ranks, device)
        load_weights(trainer.method, tensors, folder / "last.pt")
        for ours, before in zip(trainer.optimizer.param_groups, tensors["optimizer"]["param_groups"], strict=True):
            before["fused"] = ours["fused"]  # it decides how a gradient scaler treats the optimizer
        trainer.optimizer.load_state_dict(tensors["optimizer"])
        trainer.scaler.load_state_dict(tensors["scaler"])
        return trainer

    @cached_property
    def cache(self) -> CaseCache:
        """Prepared cases; made on first use, since a resumed run or a baseline may still be given other settings."""
        return build.build_cache(self.state.config, self.source)

    def read_labels(self) -> None:
        """Read the labels: a wrong one is named before training, the facts keep what they say; errors of ``load``."""
        labeled = self.state.split.labeled
        cases = (self.cache.get(name, with_label=True).volume for name in labeled)
        if self.state.config.spacing is None:
            self.state.facts = self.state.facts.with_labels(cases)
        else:  # on the grid of the file: resampled, two components may become one
            own = (self.source.load(name, with_label=True) for name in labeled)
            self.state.facts = self.state.facts.with_labels(own, cases)
        self.validation.check()

    def fit(self) -> RunState:
        """Train from the state's step to the end; the first checkpoint is written before the first step.

        Raises:
            NonFiniteLossError: Names the step, the terms and the cases.
            TrainingInterrupted: After Ctrl-C; the state is saved.
        """
        first = self.state.step
        network = self._wrapped().train()
        log = RunLog(self.folder, first, enabled=self.ranks.is_main)
        self._clock = (time.perf_counter(), first)
        before = fingerprint(self.method.inference_network())
        try:
            if first == 0:
                self._save(("last.pt",))
            shown = step_bar(self.state.config.method, first, self.max_iteration, disable=not self.ranks.is_main)
            with named_shortages(), stop_signals(self), shown as bar:
                if self.state.validates:
                    self._validate(log)
                for step, batch in self._batches(first):
                    output = self.train_step(network, batch.to(self.device), step)
                    self.state.step = step + 1
                    bar.update()
                    self.finish_step(log, bar, batch, output)
                    del output  # its logits are not to lie beside the next step's
                if self._stop_now(self.max_iteration):  # in the last validation, or the one that a resume began with
                    raise TrainingInterrupted
            if first < self.max_iteration:
                warn_if_still(self.method.inference_network(), before)
        finally:
            log.close()
        return self.state

    def train_step(self, network: nn.Module, batch: Batch, step: int) -> StepOutput:
        """Forward, backward, optimizer and teacher; a pure function of the weights, the patches and (seed, step)."""
        torch.manual_seed(derive_seed(self.state.config.seed, step, 0))  # equal on all ranks: see myutils.rank_batch
        lr = poly_lr(required(self.state.config.base_lr, "base_lr"), step, self.max_iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        cases = batch.cases_l + batch.cases_u
        try:
            with autocast(self.amp, self.device):
                output: StepOutput = network(batch, step)
        except NonFiniteFeaturesError as error:
            reason = f"the prototype term's {error}"
            raise NonFiniteLossError(self.watch.message(reason, step, cases)) from error
        self.watch.record(step, cases, {f"loss term {name}": term.value for name, term in output.terms.items()})
        self.backward(output)
        if step == self._first_look:
            require_gradients(self.method, self._trained)
        self.method.before_update(step)
        self.update_weights(step, cases)
        self.method.after_step(step)
        return output

    def backward(self, output: StepOutput) -> None:
        """Gradients of the step's loss."""
        self.scaler.scale(output.total()).backward()

    def update_weights(self, step: int, cases: tuple[str, ...]) -> None:
        """Clip the gradient and let the optimizer step; ``cases`` are those of the step, for an error's text."""
        self.scaler.unscale_(self.optimizer)
        limit = self.state.config.grad_clip
        norm = nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        if self.device.type != "cpu" or not norm <= limit:  # on the CPU looking costs less than multiplying by 1
            nn.utils.clip_grads_with_norm_(self._trained, limit, norm)
        if not self.scaler.is_enabled():  # the scaler skips such a step by itself
            self.watch.record(step, cases, {"the gradient": norm})
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _wrapped(self) -> nn.Module:
        """The method, behind DDP where there are several ranks; a warm-up leaves heads of unlabelled patches idle."""
        if self.ranks.world_size == 1:
            return self.method
        return data_parallel(self.method, self.device, find_unused_parameters=bool(self.state.config.warmup_iteration))

    def finish_step(self, log: RunLog, bar: tqdm[Any], batch: Batch, output: StepOutput) -> None:
        """Log, validate and save where it is time to; stop where it was asked for."""
        config, done = self.state.config, self.state.step
        last = done == self.max_iteration
        log_now, picture = done % config.log_every == 0 or last, last or done % config.image_every == 0
        stop, regular = self._stop_now(done), last or done % config.save_every == 0
        if log_now or picture or stop or regular:
            self.watch.check()
        if log_now:
            now, (before, logged) = time.perf_counter(), self._clock
            seconds, self._clock = (now - before) / max(1, done - logged), (now, done)
            bar.set_postfix(self._log_step(log, batch, output, done, seconds), refresh=False)
        if stop or regular:
            self._save_and_validate(log, validate=regular)
        if picture:  # last: what a new method gives it to draw may not fit
            log.pictures(done, batch, output)
        if stop:
            raise TrainingInterrupted

    @property
    def labeled_bs(self) -> int:
        """Labelled patches of a step, over all ranks."""
        config = self.state.config
        return required(config.labeled_bs, "labeled_bs") if self.method.uses_unlabeled else config.batch_size

    def _sampler(self, first: int) -> StepSampler:
        config, split, ranks = self.state.config, self.state.split, self.ranks
        warmup = required(config.warmup_iteration, "warmup_iteration")
        plan = StepPlan(split.labeled, split.unlabeled, config.batch_size, self.labeled_bs, config.seed, warmup)
        limits = {"first_step": first, "max_iteration": self.max_iteration}
        return StepSampler(plan, **limits, rank=ranks.rank, world_size=ranks.world_size)

    def loader(self, first: int) -> Iterator[Batch]:
        """The batches of the steps from ``first`` on."""
        config = self.state.config
        guides = self.state.split.labeled if config.place_prior else ()
        return iter(
            DataLoader(
                PatchDataset(self.cache, build.build_augmentation(config), guides),
                batch_sampler=self._sampler(first),
                num_workers=config.num_workers,
                collate_fn=collate,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator().manual_seed(config.seed),
                worker_init_fn=leave_stops_to_parent,
            )
        )

    def _batches(self, first: int) -> Iterator[tuple[int, Batch]]:
        """Steps from ``first`` on with their batches; if one cannot be had, the steps before it are saved."""
        try:
            yield from enumerate(self.loader(first), start=first)
        except Exception:
            self.watch.check()
            self._write(("last.pt",))  # other ranks may be in a step: nobody waits for them
            raise

    def _log_step(
        self, log: RunLog, batch: Batch, output: StepOutput, done: int, seconds_per_step: float
    ) -> dict[str, str]:
        values = step_scalars(output, self.optimizer.param_groups[0]["lr"])
        if output.logits_l is not None:
            values["Train/dice"] = batch_dice(output.logits_l, output.truth(batch).to(self.device))
        if self.scaler.is_enabled():
            values["Train/loss_scale"] = scale = self.scaler.get_scale()  # waits for the device
            self.watch.check_scale(scale, done, batch.cases_l + batch.cases_u)
        values |= {"Train/seconds_per_step": seconds_per_step, "Train/peak_memory_mb": peak_memory_mb(self.device)}
        if self.method.prototypes is not None:
            values["Memory/fill"] = self.method.prototypes.memory_fill()
        tensors = torch.stack([torch.as_tensor(value, dtype=torch.float32).cpu() for value in values.values()])
        named = dict(zip(values, mean_over_ranks(tensors.to(self.device)).tolist(), strict=True))
        log.scalars(done, named)
        shown = {"loss": named["Loss/total"], "dice": named.get("Train/dice")}
        return {name: f"{value:.3f}" for name, value in shown.items() if value is not None}

    def _save_and_validate(self, log: RunLog, *, validate: bool) -> None:
        """Save first: no step is lost to a case that cannot be scored; a resumed run begins with its validation."""
        self.state.validates = validate and bool(self.state.split.val)
        self._save(("last.pt",))
        if self.state.validates:
            self._validate(log)

    def _validate(self, log: RunLog) -> None:
        score = self.validation.dice(self.method.inference_network())  # the ranks share the cases out
        better, self.state.validates = score > self.state.best_dice, False
        self.state.best_dice = max(score, self.state.best_dice)
        self._save(("best.pt", "last.pt") if better else ("last.pt",))  # after a kill in between it validates again
        log.scalars(self.state.step, {"Validation/dice": score})

    def _save(self, names: Sequence[str]) -> None:
        self._write(names)
        barrier()

    def _write(self, names: Sequence[str]) -> None:
        if self.ranks.is_main:
            tensors = {name: getattr(self, name).state_dict() for name in ("method", "optimizer", "scaler")}
            for name in names:
                write_checkpoint(self.folder / name, self.state, tensors)

    def _advice(self) -> str:
        """What to do about a step that is not finite."""
        what = "Look at these images, for --resume repeats the step; a lower --base_lr or --amp no needs a new --exp"
        return f"{what}; the last good checkpoint is {self.folder / 'last.pt'}"

    def _stop_now(self, done: int) -> bool:
        """Whether any rank was asked to stop; with several ranks they confer at logging steps and at the last one."""
        if self.ranks.world_size == 1:
            return self.interrupted
        confer = done % self.state.config.log_every == 0 or done == self.max_iteration
        return confer and any_rank(self.interrupted, self.device)
