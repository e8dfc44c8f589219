"""Published import path of generation; the code is in :mod:`fourm.generation`."""

from fourm.generation.batch_entries import (
    custom_text,
    expand_to_batch,
    init_empty_target_modality,
    init_full_input_modality,
)
from fourm.generation.chained_generation import GenerationSampler
from fourm.generation.schedules import build_chained_generation_schedules

__all__ = [
    "GenerationSampler",
    "build_chained_generation_schedules",
    "custom_text",
    "expand_to_batch",
    "init_empty_target_modality",
    "init_full_input_modality",
]
