"""Tokenizers and images for save_vq_tokens.py, and what it has written."""

import io
import tarfile

import numpy as np
import torch

from fourm.vq import PatchCodebook, PatchCodebookConfig
from fourm.vq.save_tokens import SaveTokensOptions
from tests.vq.image_files import read_files, write_files, write_shards

COUNT, PER_SHARD, CROPS, SIDE, P, VOCAB = 10, 4, 3, 32, 8, 64
GRID = (SIDE // P) ** 2
CHANNELS = {"rgb": 3, "depth": 1, "normal": 3}


def write_tokenizers(root):
    """modality → folder of a tokenizer, whose codes are random: different patches get different ids."""
    for number, (modality, channels) in enumerate(CHANNELS.items()):
        codebook = PatchCodebook(PatchCodebookConfig(modality, VOCAB, P, channels, SIDE))
        codebook.codebook.normal_(generator=torch.Generator().manual_seed(number))
        codebook.save(root / modality)
    return {modality: str(root / modality) for modality in CHANNELS}


def write_data(root, kind):
    """A data set of one kind, ``shards`` or ``folders``."""
    for modality in ("rgb", "depth"):
        if kind == "shards":
            write_shards(root, modality, COUNT, PER_SHARD)
        else:
            write_files(root, modality, COUNT)
    return root


def options(tokenizer, data, **changes):
    defaults = {"num_crops": CROPS, "num_workers": 0, "batch_size": 3, "device": "cpu"}
    return SaveTokensOptions(tokenizer=tokenizer, data_root=str(data), **(defaults | changes))


def arrays(folder):
    """key → array, from shards or from files."""
    if not any(folder.glob("*.tar")):
        return read_files(folder)
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                found[member.name.removesuffix(".npy")] = np.load(io.BytesIO(tar.extractfile(member).read()))
    return found


def contents(folder):
    """Every file that counts, byte for byte."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def ids(root, name):
    return arrays(root / name)
