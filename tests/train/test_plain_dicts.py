"""Modalities and transforms that a program adds to the tables, as forks do, from the data to the loaded model."""

import functools

import numpy as np
import pytest
import yaml

from fourm.data.modality_info import MODALITY_INFO, MODALITY_TRANSFORMS, resolve_modalities
from fourm.data.modality_transforms import AbstractTransform
from fourm.models import FM
from fourm.models.decoder_embeddings import ImageTokenDecoderEmbedding, SequenceDecoderEmbedding
from fourm.models.encoder_embeddings import ImageTokenEncoderEmbedding, SequenceEncoderEmbedding
from fourm.utils.errors import UserError
from tests.data.dataset_files import npy, write_tar
from tests.train.toy_run import run_in_process, write_run

SEQUENCE = {"vocab_size": 40, "max_length": 6, "padding_idx": 0}
GRID = {
    "type": "img",
    "vocab_size": 16,
    "input_size": 32,
    "patch_size": 16,
    "min_tokens": 0,
    "max_tokens": None,
    "id": 7,
    "pretokenized": True,
}
ENTRIES = {
    "words": {
        "type": "seq_token",
        "vocab_size": 40,
        "max_tokens": 6,
        "min_tokens": 0,
        "id": 11,
        "encoder_embedding": functools.partial(SequenceEncoderEmbedding, **SEQUENCE),
        "decoder_embedding": functools.partial(SequenceDecoderEmbedding, **SEQUENCE),
    },
    "tok_a@32": GRID
    | {"encoder_embedding": ImageTokenEncoderEmbedding, "decoder_embedding": ImageTokenDecoderEmbedding},
    "tok_b@32": GRID | {"encoder_embedding": "ImageTokenEncoderEmbedding", "decoder_embedding": None},
}


class WordsTransform(AbstractTransform):
    """A fork's own, which knows the published four steps only."""

    def preprocess(self, sample):
        return sample + 20

    def image_augment(self, v, crop_coords, flip, orig_size, target_size, rand_aug_idx, resample_mode=None):
        return v

    def postprocess(self, v):
        return v.astype(np.int64)


def test_dicts_and_transforms_in_the_tables_train_and_come_back(tmp_path, monkeypatch):
    members = {name: [] for name in ("words", "tok_a", "tok_b")}
    for i in range(8):
        members["words"].append((f"{i}.npy", npy(np.arange(4, dtype=np.int16) + i)))
        for name in ("tok_a", "tok_b"):
            members[name].append((f"{i}.npy", npy(np.full((1, 4), i, np.int16))))
    for name, files in members.items():
        write_tar(tmp_path / "shards" / name / "0.tar", files)
    dataset = {
        "in_domains": "words-tok_a@32-tok_b@32",
        "out_domains": "words-tok_a@32",
        "input_alphas": 1.0,
        "target_alphas": 1.0,
        "use_wds": True,
        "data_path": f"{tmp_path}/shards/[words,tok_a,tok_b]/0.tar",
        "modality_name_map": {"tok_a": "tok_a@32", "tok_b": "tok_b@32"},
        "main_augment_domain": "tok_a@32",
    }
    config = write_run(tmp_path / "run", epochs=1, epoch_size=8, num_workers=0, eval_freq=0, warmup_epochs=0)
    main = yaml.safe_load(config.read_text())
    (tmp_path / "run" / "data.yaml").write_text(yaml.safe_dump({"train": {"datasets": {"d": dataset}}}))
    with monkeypatch.context() as added:
        for name, entry in ENTRIES.items():
            added.setitem(MODALITY_INFO, name, entry)
        added.setitem(MODALITY_TRANSFORMS, "words", WordsTransform())
        run_in_process(config)
        inside = FM.from_pretrained(main["output_dir"])
    outside = FM.from_pretrained(main["output_dir"])  # without the program that added them
    for model in (inside, outside):
        assert set(model.encoder_embeddings) == set(ENTRIES) and set(model.decoder_embeddings) == {"words", "tok_a@32"}
        assert model.modality_info["words"].vocab_size == 40 and model.modality_info["tok_b@32"].max_tokens == 4


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"vocab_size": 16}, "MODALITY_INFO: modality mine: the key 'type' is required|'type' is required"),
        (GRID | {"inputsize": 3}, r"unknown key 'inputsize' \(did you mean 'input_size'"),
        (GRID | {"encoder_embedding": 3}, "must be a class, a partial of one or its name"),
        (GRID | {"type": "picture"}, "'type' must be one of"),
        ("a name", "expected a dict"),
    ],
)
def test_a_bad_dict_is_one_sentence(monkeypatch, entry, message):
    monkeypatch.setitem(MODALITY_INFO, "mine", entry)
    with pytest.raises(UserError, match=message):
        resolve_modalities(["mine"])
