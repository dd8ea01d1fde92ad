"""Settings of the cluster resources that a job uses."""

from typing import Annotated

from pydantic import Field, field_validator

from mmray.base.settings import Settings


class TileCacheSettings(Settings):
    """A cache of cut tiles on each machine that renders pages, so that later epochs need not cut them again."""

    folder: str
    """Cache folder on each machine's own disk, created if it does not exist. All render actors of a machine share
    it."""

    max_gigabytes: Annotated[float, Field(gt=0)]
    """Largest size of the cache on each machine, in units of 10^9 bytes. When it is full, entries unused for two days
    make room; no others are deleted."""

    @field_validator("folder")
    @classmethod
    def _is_local(cls, folder: str) -> str:
        if "://" in folder:
            raise ValueError("give a folder on each machine's own disk, not a URI")
        return folder

    @property
    def max_bytes(self) -> int:
        """`max_gigabytes` in bytes."""
        return int(self.max_gigabytes * 1e9)


LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
"""Value of a Ray node's label."""


class ResourceSettings(Settings):
    """Cluster resources the job uses. Actors are Ray actors; CPUs and GPUs are Ray's logical ones."""

    encode_actors: Annotated[int, Field(gt=0)] = 2
    """Prepare: number of actors that read headers and tokenise, one CPU each. The pool grows up to this number as CPUs
    become free. Eval rows of one chunk, up to 512, need none: the driver prepares them."""

    pack_actors: Annotated[int, Field(gt=0)] = 1
    """Prepare: number of actors that pack windows and write bins, one CPU each."""

    render_actors: Annotated[int, Field(gt=0)] = 1
    """Training: number of actors that decode and tile images, one CPU each."""

    mask_actors: Annotated[int, Field(gt=0)] = 1
    """Training: number of actors that compute labels and positions on CPUs, one CPU each, where no GPU trains or
    gpu_share is 0; never more than workers. Otherwise each GPU that trains has one."""

    gpu_share: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Fraction of each training GPU on which an actor computes labels and positions. The worker reserves the rest of
    its GPU, so that both fit. It must be under one half, so that two workers never share a GPU, and small enough that
    neither Ray Train nor the autoscaler counts more workers on a node than it has GPUs: 0.1 is, up to 8 GPUs a node. 0:
    labels are computed on CPUs, and workers have whole GPUs."""

    tile_cache: TileCacheSettings | None = None
    """Training: where each machine keeps cut tiles for later epochs. null: pages are cut again in each epoch."""

    workers: Annotated[int, Field(gt=0)] | tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = 1
    """Number of training workers, one rank each. A run can continue with any other number. `[min, max]` makes the run
    elastic: it uses as many workers as the cluster has room for, shrinks when a node leaves and grows when one joins,
    each time continuing from its last checkpoint."""

    resize_seconds: Annotated[float, Field(gt=0)] = 60
    """How often, in seconds, an elastic run (workers `[min, max]`) checks whether more workers fit."""

    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that each training worker uses."""

    use_gpu: bool | None = None
    """Train on GPUs, one per worker. null: if the cluster has any."""

    autoscaling: bool = False
    """Let a job that is larger than the cluster wait until the cluster adds nodes. false: such a job is refused."""

    prepare_labels: dict[str, LabelValue] = Field(default_factory=dict)
    """Prepare: labels, as given to `ray start --labels`, of the Ray nodes whose CPUs preparing uses. Empty: any
    node."""

    train_labels: dict[str, LabelValue] = Field(default_factory=dict)
    """Training: labels of the Ray nodes that run workers, render actors and mask actors. Empty: any node that has
    room."""

    @field_validator("workers")
    @classmethod
    def _least_before_most(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(workers, int) and workers[0] > workers[1]:
            raise ValueError(f"write [min, max], the smaller number first, not {list(workers)}")
        return workers

    @property
    def min_workers(self) -> int:
        """Smallest number of workers the run may have."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Largest number of workers the run may have."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def labels_on_gpus(self, gpus: bool) -> bool:
        """True if labels are computed on shares of the training GPUs. gpus: whether ranks train on GPUs."""
        return gpus and self.gpu_share > 0

    @property
    def is_elastic(self) -> bool:
        """True if the number of workers follows the cluster."""
        return not isinstance(self.workers, int)
