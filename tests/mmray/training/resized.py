"""What a rank does in the tests of added tokens."""

from pathlib import Path

import torch

from mmray.training.checkpoint import save_state
from mmray.training.engine import TrainingEngine
from mmray.training.settings import ModelSettings, TrainingSettings

STEPS = 3


class AddedTokens:
    """A micro-batch of the last ids of a vocabulary."""

    def __init__(self, ids: int) -> None:
        self.labels = torch.arange(ids - 12, ids).repeat(3)[None]

    @property
    def num_tokens(self) -> int:
        return self.labels.numel()

    def model_inputs(self, device: torch.device, dtype: torch.dtype, config: object) -> dict[str, torch.Tensor]:
        positions = torch.arange(self.num_tokens).expand(4, 1, -1)
        return {"input_ids": self.labels, "position_ids": positions}


def trained_and_resumed(rank: int, world_size: int, folder: Path, scratch: Path) -> dict[int, tuple[list, list]]:
    """By ZeRO stage: the losses of all steps, and of those after the first from its checkpoint."""
    results = {}
    for stage in (0, 2, 3):
        engine = build(folder, stage)
        batch = AddedTokens(engine.model.config.get_text_config().vocab_size)
        losses = [engine.step([batch]).loss]
        save_state(engine, scratch / str(stage))
        losses += [engine.step([batch]).loss for _ in range(STEPS - 1)]
        engine.close()
        engine = build(folder, stage, scratch / str(stage))
        results[stage] = losses, [engine.step([batch]).loss for _ in range(STEPS - 1)]
        engine.close()
    return results


def build(folder: Path, stage: int, resume_from: Path | None = None) -> TrainingEngine:
    return TrainingEngine(
        ModelSettings(path=str(folder), dtype="fp32", attention="sdpa", resize_embeddings=True),
        TrainingSettings(steps=STEPS, global_batch_bins=1, learning_rate=3e-3, zero_stage=stage),
        total_steps=STEPS,
        grad_accumulation=1,
        resume_from=resume_from,
    )
