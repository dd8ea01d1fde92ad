"""The training engine: DeepSpeed steps over packed micro-batches, without Ray.

This module imports nothing, so that reading a job file needs neither deepspeed nor a model class; import from
`settings`, `engine`, `checkpoint`, `metrics`.
"""
