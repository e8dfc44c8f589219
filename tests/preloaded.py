"""What the processes of tests are forked with: a module that the fork server imports, so that none of them has to.

These objects live for ever. Frozen, they are not traversed by each garbage collection of each process, which would also
copy the memory that it shares with the fork server.
"""

import contextlib
import gc
import importlib

gc.disable()
for name in (
    "tests.train.toy_run",
    "torch._dynamo",  # which optimizers import at their first step
    "torchvision.transforms",
    "fourm.train.tasks.diffusion_tokenizer",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.controlnets.controlnet",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_pndm",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.enable()
gc.freeze()
