"""Collate masked samples into a batch. Samples may lack modalities, but all batches have the same ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourm.data.modality_info import Modality
from fourm.data.span_masking import padded

MaskedSample = Mapping[str, Mapping[str, np.ndarray]]
ModDict = Mapping[str, Mapping[str, Tensor]]
"""The input of a model as :func:`collate` returns it: modality → tensor, input_mask, target_mask, …"""


def collate(
    samples: Sequence[MaskedSample], modality_info: Mapping[str, Modality], shared: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Stack masked samples.

    Args:
        samples: Results of ``Masking.apply``.
        modality_info: The modalities of the batch in order. A sample without one of them gets a fully masked row.
        shared: Allocate the batch in shared memory. Otherwise a worker process has to copy it there to send it.

    Returns:
        {modality: {tensor, input_mask, target_mask, decoder_attention_mask}} with a leading dimension B. Ids are int64,
        and grids of tokens are (B, L).
    """
    batch = {}
    for name, modality in modality_info.items():
        present = next((sample[name]["tensor"].dtype for sample in samples if name in sample), None)
        absent = None if all(name in sample for sample in samples) else _masked_row(modality, present)
        rows: list[Any] = [sample.get(name, absent) for sample in samples]
        length = len(rows[0]["input_mask"]) if modality.type == "seq_emb" else None
        batch[name] = {field: _stack([row[field] for row in rows], length, shared) for field in rows[0]}
        if modality.type == "img" and not modality.is_pixels:
            batch[name]["tensor"] = batch[name]["tensor"].flatten(1)
    return batch


def single(sample: MaskedSample, modality_info: Mapping[str, Modality]) -> dict[str, dict[str, np.ndarray]]:
    """Return one masked sample as arrays: what :func:`collate` returns for it, without the leading dimension."""
    result = {}
    for name, modality in modality_info.items():
        row = dict(sample[name] if name in sample else _masked_row(modality, None))
        values = row["tensor"]
        if modality.type == "seq_emb":
            values = padded(values, len(row["input_mask"]))
        elif not (values.flags.carray and values.flags.owndata):
            values = values.copy()  # otherwise it would share the memory of a value that is kept for its next repeat
        row["tensor"] = values.reshape(-1) if modality.type == "img" and not modality.is_pixels else values
        result[name] = row
    return result


def as_tensors(sample: MaskedSample) -> dict[str, dict[str, Tensor]]:
    """Return the arrays of a sample as tensors that share their memory."""
    return {
        name: {field: torch.from_numpy(array) for field, array in fields.items()} for name, fields in sample.items()
    }


def _stack(rows: Sequence[np.ndarray], length: int | None, shared: bool) -> Tensor:
    """Stack rows; with a ``length``, shorter rows are padded with zeros."""
    if length is None:
        stack = _zeros((len(rows), *rows[0].shape), rows[0].dtype, shared)
        np.stack(rows, out=stack.numpy())
        return stack
    stack = _zeros((len(rows), length, *rows[0].shape[1:]), rows[0].dtype, shared)
    for target, row in zip(stack.numpy(), rows, strict=True):
        target[: len(row)] = row
    return stack


def _zeros(shape: tuple[int, ...], dtype: np.dtype, shared: bool) -> Tensor:
    if not shared:
        return torch.from_numpy(np.zeros(shape, dtype))  # pages of np.zeros cost nothing until they are written to
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.from_numpy(np.empty(0, dtype)).new_empty(0).set_(storage).view(shape)


def _masked_row(modality: Modality, dtype: np.dtype | None) -> dict[str, np.ndarray]:
    """Return the row of a modality that a sample lacks; ``dtype`` is that of the samples that have it, if any."""
    assert modality.max_tokens is not None
    length = modality.max_tokens if modality.type == "img" else (modality.max_tokens + 1) * 2
    shape: tuple[int, ...] = (length,)
    if modality.is_pixels:
        assert modality.num_channels and modality.input_size
        shape = (modality.num_channels, modality.input_size, modality.input_size)
    elif modality.type == "seq_emb":
        shape = (0, modality.embedding_options["orig_emb_dim"])
    return {
        "tensor": np.zeros(shape, dtype or (np.float32 if modality.vocab_size is None else np.int64)),
        "input_mask": np.ones(length, bool),
        "target_mask": np.ones(length, bool),
        "decoder_attention_mask": np.zeros(length, np.int32),
    }
