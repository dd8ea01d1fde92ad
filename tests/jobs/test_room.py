"""A training that cannot fit, in memory or on a disk, is refused before it begins, with what would."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from jobs import room
from jobs.probe import Machine, look, programs_of
from jobs.room import check_disk, check_memory, memory_words, need_of
from mmray.config.job import Job
from mmray.errors import UserError
from tests.conftest import Inputs

GB = 10**9


def job_of(inputs: Inputs, folder: Path, **changes: Any) -> Job:
    return Job.model_validate(inputs.job(folder, **changes))


def parameters(inputs: Inputs, folder: Path) -> int:
    """Of the small model of these jobs."""
    from mmray.training.model import empty_model

    return sum(one.numel() for one in empty_model(job_of(inputs, folder).model).parameters())


def test_a_gpu_that_is_too_small_is_told_with_the_settings_that_would_fit(inputs: Inputs, tmp_path: Path) -> None:
    count = parameters(inputs, tmp_path)
    job = job_of(inputs, tmp_path, training__zero_stage=1, resources={"workers": 8, "use_gpu": True})
    needed = count * 4 + count * 4 + count * 12 // 8
    check_memory(job, True, [Machine("10.0.0.7", 100 * GB, (needed + 8,) * 8)])
    with pytest.raises(UserError) as error:
        check_memory(job, True, [Machine("10.0.0.7", 100 * GB, (needed - 1000,) * 8)])
    text = str(error.value)
    assert text.startswith("training does not fit: each of 8 takes ")
    assert text.endswith("set training.zero_stage: 2 or training.zero_stage: 3")
    assert "\n" not in text
    check_memory(job, True, [Machine("10.0.0.7", None)])  # GPUs that are not known are not refused


def test_workers_of_one_machine_share_its_memory(inputs: Inputs, tmp_path: Path) -> None:
    count = parameters(inputs, tmp_path)
    job = job_of(inputs, tmp_path, training__zero_stage=2, resources={"workers": 4, "use_gpu": False})
    each = count * 4 + count * 16 // 4
    check_memory(job, False, [Machine("this machine", 4 * each + 64)])
    with pytest.raises(
        UserError, match=r"A worker's part of the memory has .*set model\.dtype: bf16 or training\.zero_stage: 3"
    ):
        check_memory(job, False, [Machine("this machine", 4 * (each - count))])
    need = need_of(job, False, [Machine("a", 8 * GB), Machine("b", 6 * GB)])
    assert need.device == 3 * GB, "two of the four on the smaller machine"


def test_a_new_run_of_many_micro_batches_takes_stage_1_and_a_resumed_one_its_own(
    inputs: Inputs, tmp_path: Path
) -> None:
    job = job_of(inputs, tmp_path, training__zero_stage=None, training__global_batch_bins=8, resources={"workers": 2})
    machines = [Machine("this machine", 100 * GB)]
    assert need_of(job, False, machines).stage == 1
    assert need_of(job, False, machines, saved_stage=2).stage == 2
    assert "(ZeRO 1)" in memory_words(need_of(job, False, machines), gpus=False)
    few = job_of(inputs, tmp_path, training__zero_stage=None, training__global_batch_bins=6, resources={"workers": 2})
    assert need_of(few, False, machines).stage == 2


def test_disks_without_room_are_told(inputs: Inputs, tmp_path: Path) -> None:
    job = job_of(inputs, tmp_path, training__zero_stage=2, training__keep_checkpoints=2)
    size = need_of(job, False, []).bytes.checkpoint
    Usage = type(room.shutil.disk_usage("/"))

    def free(count: float) -> Any:
        return patch.object(room.shutil, "disk_usage", lambda _: Usage(10**12, 0, round(count)))

    with free(3 * size):
        words = check_disk(job, False, [Machine("10.0.0.7", None, (), size)])
        assert "up to 3 at once are in" in words
    with free(3 * size - 1), pytest.raises(UserError, match=r"up to 3 at once .*lower training.keep_checkpoints"):
        check_disk(job, False, [])
    (tmp_path / "run" / "checkpoint_00000005_ab").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint_00000005_ab" / "shard").write_bytes(b"0" * 1000)
    with free(3 * size - 1000):
        check_disk(job, False, [])  # those that are there make room for new ones
    with free(9 * size), pytest.raises(UserError, match=r"10\.0\.0\.7 has .* free in its TMPDIR.*set TMPDIR"):
        check_disk(job, False, [Machine("10.0.0.7", None, (), size - 1)])
    remote = job.model_copy(update={"output": job.output.model_copy(update={"run": "s3://bucket/run"})})
    with pytest.raises(UserError, match="free in its TMPDIR"):  # a resume copies a whole checkpoint
        check_disk(remote, False, [Machine("10.0.0.7", None, (), 2 * size - 1)])


def test_this_machine_tells_its_room() -> None:
    answer = look({}, [], ["sh", "no-such-compiler"])
    assert answer.absent == ["no-such-compiler"]
    assert answer.memory is not None
    assert answer.memory > 10**8
    assert answer.free_disk is not None


def test_what_offloading_compiles_with_is_asked_for(inputs: Inputs, tmp_path: Path) -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert programs_of(job_of(inputs, tmp_path), gpus=True) == []
    job = job_of(inputs, tmp_path, training__deepspeed=offload)
    with patch.dict("os.environ", {"CXX": "clang++"}):
        assert programs_of(job, gpus=True) == ["ninja", "clang++", "nvcc"]
        assert programs_of(job, gpus=False) == ["ninja", "clang++"]
