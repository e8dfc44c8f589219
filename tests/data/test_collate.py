"""What a batch is made of, and where its memory lies."""

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from fourm.data.collate import collate
from fourm.data.modality_info import MODALITY_INFO
from fourm.data.span_masking import padded, sequence_row

MODALITIES = {name: MODALITY_INFO[name] for name in ("t5_caption", "caption")}


def samples():
    """With 3, 0 and 77 vectors, and one without any."""
    rng = np.random.default_rng(0)
    vectors = [rng.random((count, 4096), np.float32) for count in (3, 0, 77)]
    text = sequence_row([5, 6, 7], [8, 9], 4, 256)
    return [{"caption": text, "t5_caption": sequence_row(v, [], len(v), 77)} for v in vectors] + [{"caption": text}]


def test_vectors_are_padded_and_absent_ones_are_zeros():
    found = collate(samples(), MODALITIES)["t5_caption"]
    assert found["tensor"].shape == (4, 156, 4096) and found["tensor"].dtype == torch.float32
    assert (~found["input_mask"]).sum(1).tolist() == [3, 0, 77, 0] and found["target_mask"].all()
    for row, sample in zip(found["tensor"][:3].numpy(), samples()[:3], strict=True):
        assert np.array_equal(row, padded(sample["t5_caption"]["tensor"], 156))
    assert not found["tensor"][3].any()


class Batches(IterableDataset):
    def __iter__(self):
        batch = collate(samples(), MODALITIES)
        yield batch, all(tensor.is_shared() for entry in batch.values() for tensor in entry.values())


def test_a_worker_makes_the_same_batch_where_the_main_process_reads_it():
    ((batch, shared),) = DataLoader(Batches(), batch_size=None, num_workers=1, collate_fn=lambda item: item)
    (expected, copied) = next(iter(Batches()))
    assert shared and not copied
    assert all(torch.equal(batch[m][k], expected[m][k]) for m in expected for k in expected[m])
    batch["caption"]["tensor"][:] = 1  # writable, as ever
