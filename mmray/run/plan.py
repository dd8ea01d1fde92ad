"""The driver's decisions for a training run, equal on all workers."""

from dataclasses import dataclass
from pathlib import Path

from mmray.batches.plan import BatchPlan
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared import PreparedDataset
from mmray.run.place import place_in
from mmray.run.tracking import git_commit
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule
from mmray.schedule.cursor import Cursor
from mmray.schedule.schedule import Schedule
from mmray.training.model import load_config


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run over prepared datasets, which are given as (number of bins, fingerprint)."""

    job: Job
    train: tuple[int, str]
    eval: tuple[int, str] | None
    gpus: bool
    continue_on: bool = False
    """True if the job's data begins anew where the checkpoint was trained on other data."""
    commit: str | None = None
    """Git commit of the code, for trackers; None outside of git."""

    @property
    def schedule(self) -> Schedule | BalancedSchedule:
        """The order of the training data in a new run, from its own step 0."""
        return self._schedule(self.job.balance)

    def schedule_at(self, cursor: Cursor) -> Schedule | BalancedSchedule:
        """The order of the training data in a run that stands at `cursor`.

        Where the job does not set whether batches are made of bins of similar cost, the run continues as it began.
        """
        balance = self.job.balance
        if balance is not None and balance.across_batches is None and cursor.balance is not None:
            balance = balance.across(True)
        return self._schedule(balance)

    def _schedule(self, balance: BalanceSettings | None) -> Schedule | BalancedSchedule:
        bins, fingerprint = self.train
        training = self.job.training
        order = Schedule(
            num_bins=bins, global_batch_bins=training.global_batch_bins, seed=training.seed, fingerprint=fingerprint
        )
        return order if balance is None else BalancedSchedule(order, balance.for_attention(self.job.model.attention))

    def total_steps(self, cursor: Cursor) -> int:
        """Steps of the whole run; its epochs are those of the data it now trains on."""
        training = self.job.training
        if training.steps is not None:
            return training.steps
        return cursor.first_step + max(1, round((training.epochs or 1) * self.schedule.steps_per_epoch))

    def place(self, checkpoint: Path | None, prepared: PreparedDataset) -> Cursor:
        """The place at which the run continues from a checkpoint, or begins without one. Raises UserError where it does
        not fit."""
        if checkpoint is None:
            return Cursor.at(self.schedule, prepared=prepared.path)
        cursor = place_in(checkpoint, self.schedule_at, prepared, continue_on=self.continue_on)
        if cursor.step == cursor.first_step and cursor.step >= self.total_steps(cursor):
            raise UserError(
                f"training.steps is {self.job.training.steps}, and {cursor.step} are done: no step is left to train on "
                f"{prepared.path}. Raise training.steps, which counts those on the earlier data too"
            )
        return cursor

    def batches(
        self, split_name: str, schedule: Schedule | BalancedSchedule, world_size: int, first_step: int = 0
    ) -> BatchPlan:
        """The batches of a split for a number of ranks. first_step: step of the run at which the schedule begins."""
        job = self.job
        return BatchPlan(
            prepared=job.prepared_path(split_name),
            processor=job.model.processor_source,
            model_type=load_config(job.model).model_type,
            trust_remote_code=job.model.trust_remote_code,
            loss=job.loss,
            schedule=schedule,
            world_size=world_size,
            micro_batch_bins=job.training.micro_batch_bins,
            on_bad_row=job.data.on_bad_row,
            first_step=first_step,
        )


def run_plan(job: Job, prepared: dict[str, PreparedDataset], gpus: bool, continue_on: bool = False) -> RunPlan:
    """The plan of a run over prepared datasets."""
    shapes = {name: (len(dataset), dataset.fingerprint) for name, dataset in prepared.items()}
    return RunPlan(job, shapes["train"], shapes.get("eval"), gpus, continue_on, git_commit(Path.cwd()))
