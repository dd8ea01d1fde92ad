"""A probe of the nodes of a cluster before work starts: their packages, the folders of the job, their memory.

One small task runs on each node that the job may use, all at once and without CPUs, so that it also runs on a busy
node. It imports nothing large. A file with a random name, which exists only during the probe, shows whether a node sees
the same folders as this process.
"""

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmray.base.words import one_line
from mmray.config.job import Job
from mmray.errors import UserError
from mmray.storage import explained
from mmray.training.settings import load_deepspeed_overrides, offloads_optimizer
from pipelines.nodes import Node, labelled

log = logging.getLogger("mmray")

ROOT = Path(__file__).resolve().parent.parent
ANSWER_SECONDS = 60
PACKAGES = ("ray", "torch", "transformers")
"""Packages whose versions must be the same everywhere."""
ROOMS = ("mmray", "pipelines", "jobs")
Work = Literal["preparing", "training", "evaluating"]
"""The work of a job that nodes do a part of."""
LEAST_SHARED_MEMORY = 10**9
SHARED_MEMORY = "/dev/shm"
DRIVERS = {12: "525", 13: "580"}
"""The oldest Linux driver of each major version of CUDA, as NVIDIA's release notes list them."""


@dataclass(frozen=True)
class Answer:
    """A node's answer.

    versions: those of `python` and PACKAGES, None for a package that is not installed.
    missing: modules that are not installed.
    unseen: settings whose folder lacks the mark, or whose input is not there; closed: whose folder cannot be written.
    shared_memory: size of /dev/shm in bytes, None where a system has none.
    absent: programs that are not found.
    memory: bytes of the machine, or of the container that it is; gpu_memory: bytes of each GPU; free_disk: bytes that
    are free where TMPDIR is. None where they cannot be told.
    torch_cuda: the CUDA that torch is built for, such as (13, 0); None for a torch without CUDA.
    driver_cuda: the newest CUDA that the NVIDIA driver knows; None where there is no driver.
    """

    versions: dict[str, str | None]
    missing: list[str]
    unseen: list[str]
    closed: list[str]
    shared_memory: int | None
    absent: list[str] = field(default_factory=list)
    memory: int | None = None
    gpu_memory: list[int] = field(default_factory=list)
    free_disk: int | None = None
    torch_cuda: tuple[int, int] | None = None
    driver_cuda: tuple[int, int] | None = None


@dataclass(frozen=True)
class Machine:
    """The room that a node has: `Answer.memory`, `gpu_memory` and `free_disk`."""

    address: str
    memory: int | None
    gpu_memory: tuple[int, ...] = ()
    free_disk: int | None = None

    @classmethod
    def of(cls, address: str, answer: Answer) -> "Machine":
        """The room of a node by its answer."""
        return cls(address, answer.memory, tuple(answer.gpu_memory), answer.free_disk)


def check_nodes(
    nodes: Sequence[Node], labels: Mapping[str, str], outputs: Mapping[str, str], *,
    inputs: Mapping[str, str] | None = None, modules: Sequence[str] = (), programs: Sequence[str] = (),
    gpus: bool = False, machines: list[Machine] | None = None,
) -> None:  # fmt: skip
    """Raises UserError where a node cannot do its part of a job.

    labels: those of the nodes that the job uses.
    outputs: folders by the name of their setting.
    inputs: local files and folders that this process sees and nodes must see too, by the name of their setting.
    modules: modules, beside mmray's own, that nodes must be able to import.
    programs: programs that nodes must have, to compile DeepSpeed's optimizer for the host.
    machines: gets the room of each node that answers.

    A node that does not answer is only warned of.
    """
    if ray.get_runtime_context().runtime_env.get("working_dir") and (reason := shared_folder(nodes)):
        raise UserError(reason)
    used = [node for node in labelled(nodes, labels) if node.resources.get("CPU", 0) > 0]
    with _marks(outputs) as marks:
        answers = _ask(used, marks, [*ROOMS, *modules], programs, inputs or {})
    driver_answer = look({}, [])
    for node, answer in answers:
        if reason := problem(node, answer, driver_answer, {**outputs, **(inputs or {})}, gpus=gpus):
            raise UserError(reason)
        check_shared_memory(node, answer.shared_memory)
        if machines is not None:
            machines.append(Machine.of(node.address, answer))


def shared_folder(nodes: Sequence[Node]) -> str | None:
    """The problem where nodes of one machine share Ray's folder, in one line; None where they do not.

    When a node first runs something of a job, Ray 2.60 deletes the job's working folder and unpacks it again
    (`overwrite=True` in its `runtime_env/working_dir.py`): under the driver, and under actors of the other nodes, if
    they share the folder.
    """
    sockets: dict[tuple[str, str], set[str]] = {}
    for node in nodes:  # socket: folder/session_…/sockets/raylet; a second in the same folder has another name
        folder = os.path.dirname(os.path.dirname(os.path.dirname(node.socket)))
        sockets.setdefault((node.address, folder), set()).add(node.socket)
    for (address, folder), node_sockets in sockets.items():
        if len(node_sockets) > 1:
            return (
                f"{len(node_sockets)} nodes on {address} share {folder}, where Ray would replace the submitted code "
                "under processes that run from it; start each with a folder of its own: ray start --address=… "
                f"--temp-dir={folder}-2"
            )
    return None


def packages_of(job: Job, work: Work) -> list[str]:
    """Modules that nodes need beside mmray's own: those of the model, of training and trackers, of its addresses."""
    quantizing = ["bitsandbytes"] if job.model.quantize else []
    training = job.training
    needed_by = {
        "peft": training.adapter, "bitsandbytes": job.model.quantize or training.optimizer == "adamw_8bit",
        "liger_kernel": training.fused_loss,
    }  # fmt: skip
    chosen = [name for name, is_needed in needed_by.items() if is_needed]
    trackers = [tracker.library for tracker in job.tracking.trackers().values()]
    rows = [uri for dataset in (*job.data.train, *job.data.eval) for uri in dataset.files]
    paths = job.output.prepared, job.output.run, *job.trained_paths("train")
    s3 = ["s3fs"] if any(text.startswith(("s3://", "s3a://")) for text in (*paths, *rows)) else []
    match work:
        case "preparing":
            return s3
        case "evaluating":
            return [*quantizing, *s3]
        case "training":
            return ["deepspeed", *chosen, *trackers, *s3]


def problem(
    node: Node, answer: Answer, driver_answer: Answer, paths: Mapping[str, str], *, gpus: bool = False
) -> str | None:
    """The problem with a node, with its remedy, in one line; None for none. driver_answer: the answer of this
    process; paths: the outputs and inputs."""
    where = f"node {node.address}"
    python, mine = str(answer.versions["python"]), str(driver_answer.versions["python"])
    if python.split(".")[:2] != mine.split(".")[:2]:
        return f"{where} runs Python {python}, this process {mine}; start its Ray with the same Python"
    for name in PACKAGES:
        version, wanted = answer.versions[name], driver_answer.versions[name] or ""
        if version is None or version.split("+")[0] != wanted.split("+")[0]:
            return (
                f"{where} has {f'{name} {version}' if version else f'no {name}'}, this process has {wanted}; install "
                f"the same there: pip install {name}=={wanted.split('+')[0]}"
            )
    if rooms := [name for name in answer.missing if name in ROOMS]:
        return (
            f"{where} cannot import {rooms[0]}; submit the job, `ray job submit --working-dir . -- python jobs/…`, "
            f"which takes the code there, or put the checkout at {ROOT} there too"
        )
    if answer.missing:
        return (
            f"{where} has no {answer.missing[0]}; install there what is installed here: pip install {answer.missing[0]}"
        )
    for name in answer.unseen:
        what = "does not see what this process writes there" if name.startswith("output.") else "does not see it"
        return (
            f"{name} {paths[name]}: {where} {what}; give a folder that all nodes share, or a URI such as "
            "s3://bucket/folder"
        )
    for name in answer.closed:
        return f"{name} {paths[name]}: {where} may not write there; let the user of its Ray write, or choose another"
    if answer.absent:
        return f"{where} {cannot_compile(answer.absent)}"
    return (
        f"{where} has GPUs, and {reason}"
        if gpus and node.resources.get("GPU", 0) and (reason := gpu_problem(answer))
        else None
    )


def gpu_problem(answer: Answer) -> str | None:
    """The problem with torch on a node with GPUs, and its remedy; None for none.

    A driver runs what is built for its own CUDA or an older one, or for a later minor version of the same.
    """
    torch, built, known = answer.versions["torch"] or "", answer.torch_cuda, answer.driver_cuda
    if torch.endswith("+cpu"):
        return f"torch {torch}, which knows none; install there a torch for its GPUs"
    if built is None:  # for other GPUs than NVIDIA's
        return None
    if known is None:
        return (
            f"torch {torch} for CUDA {_dotted(built)}, but no NVIDIA driver (libcuda.so.1); install one, or start the "
            "container with the machine's: docker run --gpus all"
        )
    if known[0] < built[0]:
        version = torch.split("+")[0]
        return (
            f"torch {torch} is built for CUDA {_dotted(built)}, while the driver there knows CUDA {_dotted(known)}; "
            f"install a driver of {DRIVERS.get(built[0], 'that CUDA')} or newer, or a torch for CUDA {known[0]}: pip "
            f"install torch=={version} --index-url https://download.pytorch.org/whl/cu126, or another of PyTorch's page"
        )
    return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def cannot_compile(absent: Sequence[str]) -> str:
    """The problem with programs that are not found, in words that follow the name of a machine."""
    return (
        f"has no {' and no '.join(absent)}, with which DeepSpeed compiles its optimizer for the host "
        "(training.deepspeed, offload_optimizer): install a C++ compiler and ninja, and on GPUs the CUDA toolkit of "
        "torch's CUDA version; or leave offload_optimizer out"
    )


def programs_of(job: Job, gpus: bool) -> list[str]:
    """Programs that workers run: those with which DeepSpeed compiles its optimizer, where that is offloaded."""
    if not offloads_optimizer(load_deepspeed_overrides(job.training.deepspeed)):
        return []
    return ["ninja", os.environ.get("CXX", "c++"), *(["nvcc"] if gpus else [])]


def check_shared_memory(node: Node, size: int | None) -> None:
    """Warns where Ray's object store cannot be in shared memory, or that is small. size: of /dev/shm in bytes."""
    store = node.resources.get("object_store_memory", 0)
    if size is not None and size < max(store, LEAST_SHARED_MEMORY):
        log.warning(
            "node %s: %s has %.1f GB and Ray's object store %.1f GB: it may be on the disk and slow; in a container "
            "give --shm-size=%dg", node.address, SHARED_MEMORY, size / 1e9, store / 1e9, max(4, store // 10**9 + 1),
        )  # fmt: skip


def check_own_machine(nodes: Sequence[Node], gpus: bool) -> None:
    """Checks this machine, where this process has started Ray: warns where its shared memory is small, and raises
    UserError where its torch cannot use its GPUs.

    gpus: whether the job uses them.
    """
    answer = look({}, [])
    check_shared_memory(nodes[0], answer.shared_memory)
    if gpus and (reason := gpu_problem(answer)):
        raise UserError(f"this machine has GPUs, and {reason}")


def check_own_programs(programs: Sequence[str]) -> None:
    """Raises UserError where this machine lacks a program that workers run."""
    if absent := look({}, [], programs).absent:
        raise UserError(f"this machine {cannot_compile(absent)}")


def look(
    marks: Mapping[str, str], modules: Sequence[str], programs: Sequence[str] = (), inputs: Mapping[str, str] = {}
) -> Answer:
    """The answer of the machine that this runs on."""
    return Answer(**_looker()(dict(marks), list(modules), PACKAGES, SHARED_MEMORY, list(programs), dict(inputs)))


def _looker() -> Callable[..., dict[str, Any]]:
    """The task, as a function that is pickled whole: nodes may lack the module it is defined in."""

    def look(
        marks: dict[str, str], modules: list[str], packages: Sequence[str], shared_memory: str, programs: list[str],
        inputs: dict[str, str],
    ) -> dict[str, Any]:  # fmt: skip
        import ctypes
        import importlib.metadata
        import importlib.util
        import os
        import platform
        import runpy
        import shutil
        import subprocess
        import tempfile

        def memory() -> int | None:
            limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
            for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
                try:
                    with open(name) as file:
                        limits.append(int(file.read()))
                except (OSError, ValueError):  # there is no such limit
                    continue
            return min(limit for limit in limits if limit > 0)

        def gpu_memory() -> list[int]:
            asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
            if not shutil.which(asked[0]):
                return []
            try:
                output = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout
                return [int(line) << 20 for line in output.split()]
            except (OSError, ValueError, subprocess.SubprocessError):
                return []

        def torch_cuda() -> tuple[int, int] | None:
            spec = importlib.util.find_spec("torch")
            if spec is None or not spec.origin:
                return None
            content = runpy.run_path(
                os.path.join(os.path.dirname(spec.origin), "version.py")
            )  # without importing torch
            major, _, minor = (content.get("cuda") or "").partition(".")
            return (int(major), int(minor.partition(".")[0] or 0)) if major else None

        def driver_cuda() -> tuple[int, int] | None:
            number = ctypes.c_int()
            try:
                ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
            except (OSError, AttributeError):
                return None
            return number.value // 1000, number.value % 1000 // 10

        versions: dict[str, str | None] = {"python": platform.python_version()}
        for name in packages:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = None
        return {
            "versions": versions,
            "missing": [name for name in modules if importlib.util.find_spec(name) is None],
            "unseen": [name for name, path in (marks | inputs).items() if not os.path.exists(path)],
            "closed": [name for name, mark in marks.items() if not os.access(os.path.dirname(mark), os.W_OK)],
            "shared_memory": shutil.disk_usage(shared_memory).total if os.path.isdir(shared_memory) else None,
            "absent": [name for name in programs if shutil.which(name) is None],
            "memory": memory(),
            "gpu_memory": gpu_memory(),
            "free_disk": shutil.disk_usage(tempfile.gettempdir()).free,
            "torch_cuda": torch_cuda(),
            "driver_cuda": driver_cuda(),
        }

    return look


def _ask(
    nodes: Sequence[Node], marks: Mapping[str, str], modules: Sequence[str], programs: Sequence[str],
    inputs: Mapping[str, str],
) -> list[tuple[Node, Answer]]:  # fmt: skip
    """The answers of the nodes that answer in time."""
    task = ray.remote(num_cpus=0, max_retries=0)(_looker())
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(
            dict(marks), list(modules), PACKAGES, SHARED_MEMORY, list(programs), dict(inputs)
        ): node
        for node in nodes
    }
    if not asked:
        return []
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    answers = []
    for reference in ready:
        node = asked[reference]
        try:
            answers.append((node, Answer(**ray.get(reference))))
        except RuntimeEnvSetupError as error:
            raise UserError(f"node {node.address} cannot set up the job's environment: {one_line(error)}") from error
        except RayError as error:
            log.warning("node %s could not be asked and is not checked: %s", node.address, one_line(error))
    for reference in late:
        ray.cancel(reference, force=True)
        log.warning("node %s did not answer in %d s and is not checked", asked[reference].address, ANSWER_SECONDS)
    return answers


@contextmanager
def _marks(outputs: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Files with a random name in the folder of each setting, or in its nearest existing parent; URIs get none."""
    marks = {}
    for name, folder in outputs.items():
        if "://" in folder:
            continue
        path = Path(folder).absolute()
        nearest = next(parent for parent in (path, *path.parents) if parent.is_dir())
        marks[name] = str(nearest / f".mmray-{uuid.uuid4().hex}")
    try:
        for name, mark in marks.items():
            with explained(f"{name} {outputs[name]}"):
                Path(mark).touch(exist_ok=False)
        yield marks
    finally:
        for mark in marks.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(mark)
