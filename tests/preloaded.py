"""What the processes of tests are forked with: a module that the fork server imports, so that none of them has to.

These objects live for ever. Frozen, they are not traversed by each garbage collection of each process, which would also
copy the memory that it shares with the fork server.

diffusers asks for accelerators when it is imported, after which CUDA refuses to work in forked processes. Where there
is a GPU, each process therefore imports it when it needs it.
"""

import contextlib
import gc
import importlib
from pathlib import Path

NAMES = [
    "tests.train.toy_run",
    "torch._dynamo",  # which optimizers import at their first step
    "torchvision.transforms",
    "fourm.train.tasks.diffusion_tokenizer",
]
DIFFUSERS = [
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.controlnets.controlnet",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_pndm",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
]

gc.disable()
for name in NAMES if Path("/dev/nvidiactl").exists() else NAMES + DIFFUSERS:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.enable()
gc.freeze()
