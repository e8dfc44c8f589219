"""Models and images that depend on names and seeds alone, for which numbers of the published code were measured."""

import zlib

import numpy as np
import torch
from torch.nn import functional as F

GAINS = {"encoder.proj.weight": 6.0, "attn.proj.weight": 0.4, "mlp.fc2.weight": 0.4, "decoder.out_proj.weight": 0.5}


def fill(model):
    """Give each tensor values that depend on its name. Positions and ``initted`` stay as they are made."""
    for name, tensor in model.state_dict().items():
        if "pos_emb" not in name and not name.endswith("initted"):
            tensor.copy_(torch.from_numpy(_values(name, tuple(tensor.shape))))
    return model.eval()


def _values(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("cluster_size"):
        return rng.random(shape, dtype=np.float32) * 4
    normal = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("_codebook.embed"):
        return normal * 0.5
    if len(shape) > 1:
        gain = next((gain for end, gain in GAINS.items() if name.endswith(end)), 1.0)
        return normal * gain / np.sqrt(np.prod(shape[1:]), dtype=np.float64)
    return 1 + 0.1 * normal if name.endswith(".weight") else 0.1 * normal


def image(seed, *shape):
    """Noise on squares of 8 x 8 pixels."""
    rng = np.random.default_rng(seed)
    fine = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    coarse = torch.from_numpy(rng.standard_normal((*shape[:-2], shape[-2] // 8, shape[-1] // 8)).astype(np.float32))
    return (0.3 * fine + 0.7 * F.interpolate(coarse, shape[-2:], mode="nearest")).clamp(-2, 2)


def assert_probed(tensor, mean, mean_abs, values, tolerance=2e-4):
    """Compare the mean, the mean magnitude and values at places that depend on the size alone."""
    flat = tensor.detach().flatten()
    places = np.random.default_rng(flat.numel()).integers(0, flat.numel(), 12)
    found = [flat.mean().item(), flat.abs().mean().item(), *flat[places].tolist()]
    np.testing.assert_allclose(found, [mean, mean_abs, *values], rtol=0, atol=tolerance * mean_abs)
