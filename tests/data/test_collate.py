"""What a batch is made of, and where its memory lies."""

import numpy as np
import torch

from fourm.data.collate import as_tensors, collate, single
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


def test_a_batch_in_shared_memory_is_the_same():
    batch, shared = (collate(samples(), MODALITIES, shared=shared) for shared in (False, True))
    for name, entry in batch.items():
        for field, tensor in entry.items():
            other = shared[name][field]
            assert other.is_shared() and not tensor.is_shared()
            assert other.dtype == tensor.dtype and torch.equal(other, tensor)


def test_a_single_sample_is_the_only_row_of_its_batch_in_memory_of_its_own():
    modalities = MODALITIES | {name: MODALITY_INFO[name] for name in ("rgb@224", "tok_rgb@224", "tok_depth@224")}
    kept, masks = np.arange(196).reshape(14, 14), np.zeros((3, 196), bool)
    pixels = np.random.default_rng(0).random((3, 224, 224), np.float32)
    for vectors in samples():
        fields = dict(zip(("input_mask", "target_mask", "decoder_attention_mask"), masks.copy(), strict=True))
        sample = vectors | {
            "rgb@224": {"tensor": pixels[:, ::-1]} | fields,
            "tok_rgb@224": {"tensor": kept[:]} | fields,
        }
        got, batch = as_tensors(single(sample, modalities)), collate([sample], modalities)
        assert list(got) == list(modalities)
        for name, entry in batch.items():
            assert got[name].keys() == entry.keys()
            for field, tensor in entry.items():
                assert got[name][field].dtype == tensor.dtype and torch.equal(got[name][field], tensor[0])
            got[name]["tensor"].fill_(7)
    assert kept.ravel().tolist() == [*range(196)] and pixels.max() < 1
