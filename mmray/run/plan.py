"""The driver's decisions for a training run, equal on all workers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmray.batches.plan import BatchPlan
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.prepared.joined import PreparedMixture
from mmray.run.attention import with_attention
from mmray.run.data import RunData
from mmray.run.place import place_in
from mmray.run.tracking import git_commit
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.balanced import BalancedSchedule
from mmray.schedule.cursor import Cursor, DataSpan
from mmray.schedule.mixture import WINDOW_BATCHES, MixedSchedule, Mixture
from mmray.schedule.order import NOTHING_TAKEN, Order, Taken
from mmray.schedule.schedule import Schedule
from mmray.training.model import load_config, text_attention


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
    mixture: Mixture | None = None
    """Datasets and weights of the training data; None for one dataset."""
    attention: str = "sdpa"
    """The attention of the model's text layers, by which costs are counted."""

    @property
    def schedule(self) -> Order | BalancedSchedule:
        """The order of the training data in a new run, from its own step 0."""
        return self._balanced(self._order(self.job.balance, 0, {}), self.job.balance)

    def schedule_at(self, cursor: Cursor) -> Order | BalancedSchedule:
        """The order of the plan's training data in a run that stands at `cursor`.

        On other data than the cursor's it begins at the cursor's step; each dataset of a mixture goes on where the run
        left it. Where the job does not set whether batches are made of bins of similar cost, the run continues as it
        began.
        """
        balance = self._balance_at(cursor)
        if cursor.fingerprint == self.train[1]:
            order = self._order(balance, cursor.first_step, cursor.taken_before())
        else:
            order = self._order(balance, cursor.step, cursor.taken_now() if self.mixture else {})
        return self._balanced(order, balance)

    def schedule_of(self, cursor: Cursor, span: DataSpan) -> Order | BalancedSchedule:
        """The order of one of the cursor's spans, also of other data than the plan's."""
        return self._balanced(cursor.order_of(span), self._balance_at(cursor))

    def _balance_at(self, cursor: Cursor) -> BalanceSettings | None:
        balance = self.job.balance
        if balance is not None and balance.across_batches is None and cursor.balance is not None:
            balance = balance.across(True)
        return balance

    def _order(self, balance: BalanceSettings | None, first_step: int, taken: Mapping[str, Taken]) -> Order:
        """The shuffled order. first_step: step of the run at which it begins; taken: how far the run is in each
        dataset, by its fingerprint; only a mixture goes on from there."""
        training = self.job.training
        if self.mixture is None:
            bins, fingerprint = self.train
            return Schedule(bins, training.global_batch_bins, training.seed, fingerprint)
        return MixedSchedule(
            self.mixture,
            training.global_batch_bins,
            training.seed,
            first_step,
            tuple(taken.get(dataset.fingerprint, NOTHING_TAKEN) for dataset in self.mixture.datasets),
            balance.window_batches if balance is not None and balance.sorts_batches else WINDOW_BATCHES,
        )

    def _balanced(self, order: Order, balance: BalanceSettings | None) -> Order | BalancedSchedule:
        return order if balance is None else BalancedSchedule(order, balance.for_attention(self.attention))

    def total_steps(self, cursor: Cursor) -> int:
        """Steps of the whole run; its epochs are those of the data it now trains on."""
        training = self.job.training
        if training.steps is not None:
            return training.steps
        return cursor.first_step + max(1, round((training.epochs or 1) * self.schedule.steps_per_epoch))

    def place(self, checkpoint: Path | None, prepared: RunData) -> Cursor:
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
        self, split_name: str, schedule: Order | BalancedSchedule, world_size: int, first_step: int = 0
    ) -> BatchPlan:
        """The batches of a split for a number of ranks. first_step: step of the run at which the schedule begins."""
        job = self.job
        return BatchPlan(
            prepared=job.trained_paths(split_name),
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


def run_plan(
    job: Job, prepared: Mapping[str, RunData], gpus: bool, continue_on: bool = False, *, checkpoint: Path | None = None
) -> RunPlan:
    """The plan of a run over prepared datasets.

    checkpoint: the one that the run continues from, which decides its attention where the job does not; None for a new
    run.
    """
    job = with_attention(job, checkpoint)
    shapes = {name: (len(dataset), dataset.fingerprint) for name, dataset in prepared.items()}
    data = prepared["train"]
    mixture = data.mixture if isinstance(data, PreparedMixture) else None
    return RunPlan(
        job, shapes["train"], shapes.get("eval"), gpus, continue_on, git_commit(Path.cwd()), mixture,
        text_attention(job.model),
    )  # fmt: skip
