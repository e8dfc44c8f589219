"""A sampler of toy size for the app."""

import numpy as np
from PIL import Image

from fourm.app.forms import read_picture
from fourm.generation import Sampler
from tests.generation.test_sequences import TOKENIZER
from tests.generation.toy_tokenizers import CHANNELS, CLASSES, SIZE, toy_model, toy_tokenizer

RGB, TOK_RGB, DEPTH, SEMSEG = (f"{name}@{SIZE}" for name in ("rgb", "tok_rgb", "tok_depth", "tok_semseg"))


def toy_sampler() -> Sampler:
    return Sampler(toy_model(), {name: toy_tokenizer(name) for name in CHANNELS}, TOKENIZER, CLASSES)


def write_photo(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def photo(sampler, folder):
    return read_picture(write_photo(folder / "photo.png"), RGB, sampler, 10**6)
