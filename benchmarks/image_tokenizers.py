"""Benchmark learned tokenizers of images: tokenizing, decoding and training, compared with a plain implementation.

    python benchmarks/image_tokenizers.py                                 # everything on the CPU, at the published size
    python benchmarks/image_tokenizers.py --only decode_divae --batch_size 3 --steps 2
    python benchmarks/image_tokenizers.py --device cuda --dtype bfloat16 --compile --batch_size 1 16 --steps 50 \
        --repeats 10

It prints a JSON object per case and batch size. The cases are: ``tokenize`` and ``decode_vqvae`` (VQ-VAE B),
``decode_divae`` (DDIM with the patched UNet), ``unet_step`` (one of its steps, with weights that are already
transformed for fast convolutions, so that the ratios are those of many steps), ``train_vqvae`` and ``train_divae``
(``Trainer.train_step`` on one synthetic batch). The plain variant has the same weights and must compute the same. It is
written in the published way: attention is softmax(QK^T)V, images are decoded one at a time, the codebook's statistics
are products with one-hot vectors, AdamW is not fused, and nothing is compiled. ``one_at_a_time`` is our decoder on one
image after the other. The variants alternate in one process. Ratios of their times are the median, minimum and maximum
over the rounds. Besides the wall-clock time there is the CPU time of all threads (``cpu_seconds``), which other work
disturbs less.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from train_step import alternate, describe_device, step_memory

from fourm.data.modality_transforms import RGBTransform
from fourm.data.unified_datasets import Batch
from fourm.train.config import load_config
from fourm.train.device import DeviceOptions, autocast, peak_tflops
from fourm.train.optimizer import build_optimizer
from fourm.train.parallel import DDP
from fourm.train.schedules import build_schedule, run_length
from fourm.train.step import Trainer
from fourm.train.tasks.diffusion_tokenizer import DiVAEConfig, DiVAETraining
from fourm.train.tasks.pretrain import normalise
from fourm.train.tasks.tokenizer import VQVAEConfig, VQVAETraining
from fourm.utils.errors import run_cli
from fourm.utils.memory import keep_freed_memory
from fourm.vq.diffusion import DECODING_STEPS, set_steps
from fourm.vq.divae import DiVAE, precision
from fourm.vq.unet import PATCH, AttentionBlock, ResidualBlock, embed_timesteps
from fourm.vq.vit import ViT
from fourm.vq.vqvae import VQ, VQVAE
from fourm.vq.winograd import fast_convolutions

PUBLISHED = {"size": 224, "vit": "vit_b", "unet": "unet_patched", "codebook_size": 16384}
TOY = {"size": 32, "vit": "vit/B_1-Wi_32-H_2", "unet": "unet_patched/Wi_32", "codebook_size": 64}
SEED = 0
Variants = dict[str, Callable[[], Any]]


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries, keys and values (..., N, C) → (..., N, C)."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def plain_vit(vit: ViT, x: Tensor) -> Tensor:
    """Positions, blocks and last MLP of an encoder or decoder: (B, D, h, w) → (B, h w, D)."""
    x = (x + vit.pos_emb).flatten(2).transpose(1, 2)
    for block in vit.blocks:
        batch, count, dim = x.shape
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = x + attention.proj(plain_attention(*qkv).transpose(1, 2).reshape(batch, count, dim))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return vit.finish(x)


def plain_latents(model: VQ, x: Tensor) -> Tensor:
    """Images (B, C, H, W) → latents before quantization (B, L, h, w)."""
    x = model.encoder.proj(x)
    tokens = plain_vit(model.encoder, x)
    return model.quant_proj(tokens.transpose(1, 2).reshape(x.shape)).float()


def plain_ids(model: VQ, latents: Tensor) -> Tensor:
    """Latents (B, L, h, w) → ids (B, h, w)."""
    directions = F.normalize(latents.permute(0, 2, 3, 1), dim=-1)
    return (directions @ F.normalize(model.quantize._codebook.embed, dim=-1).T).argmax(-1)


def plain_codes(model: VQ, ids: Tensor) -> Tensor:
    """Ids (B, h, w) → latents (B, L, h, w)."""
    return F.embedding(ids, model.quantize._codebook.embed).permute(0, 3, 1, 2)


def plain_pixels(model: VQVAE, codes: Tensor) -> Tensor:
    """Latents (B, L, h, w) → images (B, C, H, W)."""
    height, width = codes.shape[2:]
    x = model.decoder.out_proj(plain_vit(model.decoder, model.post_quant_proj(codes)))
    p = model.decoder.patch_size
    x = x.reshape(len(x), height, width, -1, p, p).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(x), -1, height * p, width * p)


def plain_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps).to(x.dtype)


def plain_stage(stage: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    """Layers of the UNet in a row."""
    for layer in stage:
        if isinstance(layer, ResidualBlock):
            y = plain_conv(layer.in_layers[-1], F.silu(plain_norm(layer.in_layers[0], x)))
            y = y + layer.emb_layers(time)[:, :, None, None]
            y = plain_conv(layer.out_layers[-1], F.silu(plain_norm(layer.out_layers[0], y)))
            x = layer.skip_connection(x) + y
        elif isinstance(layer, AttentionBlock):
            qkv = layer.qkv(plain_norm(layer.norm, x).flatten(2)).transpose(1, 2).chunk(3, dim=-1)
            x = x + layer.proj_out(plain_attention(*qkv).transpose(1, 2)).reshape(x.shape)
        else:
            x = layer(x)
    return x


def plain_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)


def plain_unet(unet: Any, x: Tensor, timesteps: Tensor, codes: Tensor) -> Tensor:
    """Noised images (B, C, H, W) and latents of their tokens → what the UNet predicts, (B, C, H, W)."""
    x = torch.cat(
        [F.pixel_unshuffle(x, PATCH), F.interpolate(codes, scale_factor=x.shape[2] // PATCH / codes.shape[2])], 1
    )
    time = unet.time_embed(embed_timesteps(timesteps, unet.width))
    skipped = []
    for block in unet.input_blocks:
        x = plain_stage(block, x, time)
        skipped.append(x)
    x = plain_stage(unet.middle_block, x, time)
    for block in unet.output_blocks:
        x = plain_stage(block, torch.cat([x, skipped.pop()], dim=1), time)
    return F.pixel_shuffle(plain_conv(unet.out[-1], F.silu(plain_norm(unet.out[0], x))), PATCH)


def plain_sampling(model: DiVAE, ids: Tensor, steps: int, seed: int) -> Tensor:
    """Decode one image: ids (1, h, w) → (1, C, H, W)."""
    codes = plain_codes(model, ids)
    scheduler = model.noise_schedule.scheduler()
    set_steps(scheduler, steps)
    side = ids.shape[-1] * model.patch_size
    x = torch.randn(1, model.decoder_channels, side, side, generator=torch.Generator().manual_seed(seed)).to(ids.device)
    for step in scheduler.timesteps:
        prediction = plain_unet(model.decoder, x, step.to(ids.device)[None], codes)
        x = scheduler.step(prediction.float(), step, x).prev_sample
    return x


def plain_statistics(model: VQ, directions: Tensor, ids: Tensor) -> None:
    """Compute what a step makes of the codebook, from directions (n, L) and ids (n,), without changing it."""
    book, decay = model.quantize._codebook, model.quantize.decay
    chosen = F.one_hot(ids, model.vocab_size).float()
    counts, sums = chosen.sum(0), chosen.T @ directions
    cluster_size = book.cluster_size * decay + counts * (1 - decay)
    means = torch.where((counts > 0)[:, None], F.normalize(sums, dim=-1), book.embed)
    embed = book.embed * decay + means * (1 - decay)
    dead = cluster_size < model.quantize.threshold
    if dead.any():
        embed[dead] = directions[torch.randint(len(directions), (int(dead.sum()),), device=directions.device)]


def plain_loss(trainer: Trainer, images: Tensor) -> Tensor:
    """The forward pass of a training step on images (B, C, H, W)."""
    model: Any = trainer.model
    latents = plain_latents(model, images)
    ids = plain_ids(model, latents.detach())
    codes = plain_codes(model, ids)
    commitment = model.commitment_weight * F.mse_loss(latents, codes)
    quantized = latents + (codes - latents).detach()
    if isinstance(model, DiVAE):
        schedule = model.noise_scheduler
        noise = torch.randn_like(images)
        steps = torch.randint(schedule.config.num_train_timesteps, (len(images),), device=images.device)
        prediction = plain_unet(model.decoder, schedule.add_noise(images, noise, steps), steps, quantized)
    else:
        prediction = plain_pixels(model, quantized)
    with torch.no_grad():
        plain_statistics(model, F.normalize(latents.detach().permute(0, 2, 3, 1).flatten(0, 2), dim=-1), ids.flatten())
    return F.mse_loss(prediction.float(), images) + trainer.config.codebook_weight * commitment


def plain_step(trainer: Trainer, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    with autocast(trainer.config, trainer.parallel.device):
        loss = plain_loss(trainer, images)
    loss.backward()
    nn.utils.clip_grad_norm_(trainer.model.parameters(), float("inf")).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()


def build_trainer(options: argparse.Namespace, case: str, batch_size: int) -> Trainer:
    """A trainer without data."""
    diffusion, sizes = case == "train_divae", options.sizes
    config_class, task_class = (DiVAEConfig, DiVAETraining) if diffusion else (VQVAEConfig, VQVAETraining)
    config = load_config(
        config_class,
        None,
        {
            "domain": "rgb",
            "data_path": "none",
            "plan": True,
            "epoch_size": batch_size,
            "epochs": 1,
            "device": options.device,
            "batch_size": batch_size,
            "dtype": options.dtype,
            "blr": 1e-6,
            "peak_tflops": options.peak_tflops,
            "input_size_min": sizes["size"],
            "input_size_max": sizes["size"],
            "encoder_type": sizes["vit"],
            "decoder_type": sizes["unet"] if diffusion else sizes["vit"],
            "codebook_size": sizes["codebook_size"],
            "model_ema": False,
        },
    )
    parallel, task = DDP(config), task_class(config)
    torch.manual_seed(SEED)
    model = task.build_model()
    parallel.materialise(model, task.parts(model))
    if options.compile:
        task.compile(model, backend=options.backend)
    length = run_length(config, parallel.world_size)
    schedule = build_schedule(config, length, parallel.world_size)
    return Trainer(config, task, parallel, model, build_optimizer(model, config), schedule)


def build_tokenizer(options: argparse.Namespace, model_class: type[VQ]) -> Any:
    """A tokenizer for inference, in which no weights are zero."""
    sizes = options.sizes
    torch.manual_seed(SEED)
    decoder = sizes["unet"] if model_class is DiVAE else sizes["vit"]
    model = model_class(
        image_size=sizes["size"],
        enc_type=sizes["vit"],
        dec_type=decoder,
        codebook_size=sizes["codebook_size"],
        scheduler="ddim",
        post_mlp=True,
    ).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    if options.compile:
        for block in VQVAETraining.blocks(None, model):  # type: ignore[arg-type]
            block.compile(backend=options.backend)
    return model.to(options.device)


def measure_inference(options: argparse.Namespace, case: str, batch_size: int) -> dict[str, Any]:
    """Measure tokenizing or decoding."""
    model = build_tokenizer(options, DiVAE if case == "decode_divae" else VQVAE)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    images = torch.rand(batch_size, 3, options.sizes["size"], options.sizes["size"], device=device) * 2 - 1
    ids = model.tokenize(images)
    decoding = {"timesteps": options.steps, "dtype": dtype} if case == "decode_divae" else {}

    def ours(first: int, count: int) -> Tensor:
        if case == "tokenize":
            return model.tokenize(images[first : first + count])
        seed = {"seed": SEED + first} if decoding else {}
        return model.decode_tokens(ids[first : first + count], **decoding, **seed)

    def plain(first: int, count: int = 1) -> Tensor:
        part = slice(first, first + count)
        if case == "tokenize":
            return plain_ids(model, plain_latents(model, images[part]))
        if case == "decode_vqvae":
            return plain_pixels(model, plain_codes(model, ids[part]))
        return plain_sampling(model, ids[part], options.steps, SEED + first)

    def in_precision(run: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad(), precision(device, dtype):
            return run()

    def loop(run: Callable[[int, int], Tensor]) -> Tensor:
        return torch.cat([run(first, 1) for first in range(batch_size)])

    runs: dict[str, Callable[[], Tensor]] = {"ours": lambda: ours(0, batch_size)}
    if batch_size > 1:
        runs["one_at_a_time"] = lambda: loop(ours)
    if options.plain:
        # Like ours, the published code tokenizes batches.
        runs["plain"] = lambda: plain(0, batch_size) if case == "tokenize" else loop(plain)
    variants: Variants = {name: partial(in_precision, run) for name, run in runs.items()}
    with FlopCounterMode(display=False) as counter:
        in_precision(lambda: plain(0))
    result = {"difference": difference(variants["ours"](), variants["plain"](), options)} if options.plain else {}
    times = alternate(variants, options.alternation)
    per_image = median(times["ours"]["seconds"]) / batch_size
    result |= {
        "images_per_second": 1 / per_image,
        **compared(times, batch_size),
        **speed(options, counter.get_total_flops(), per_image),
    }
    if decoding:
        result["steps"] = options.steps
        for clock in ("seconds", "cpu_seconds"):
            step = result[f"{clock}_per_image"]["ours"] / options.steps
            result |= {
                f"{clock}_per_unet_step": step,
                f"{clock}_per_image_of_{DECODING_STEPS}_steps": step * DECODING_STEPS,
            }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        variants["ours"]()
        result["peak_memory"] = torch.cuda.max_memory_allocated()
    return result


def measure_unet_step(options: argparse.Namespace, case: str, batch_size: int) -> dict[str, Any]:
    """Measure one step of the UNet."""
    model = build_tokenizer(options, DiVAE)
    device, dtype, side = torch.device(options.device), getattr(torch, options.dtype), options.sizes["size"]
    ids = torch.randint(model.vocab_size, (batch_size, *[side // model.patch_size] * 2), device=device)
    x, codes = torch.randn(batch_size, 3, side, side, device=device), model.tokens_to_embedding(ids)
    steps = torch.arange(batch_size, device=device) * 7

    def loop(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return torch.cat([run(*(part[i : i + 1] for part in (x, steps, codes))) for i in range(batch_size)])

    variants: Variants = {"ours": lambda: model.decoder(x, steps, codes)}
    if batch_size > 1:
        variants["one_at_a_time"] = lambda: loop(model.decoder)
    if options.plain:
        variants["plain"] = lambda: loop(partial(plain_unet, model.decoder))
    with torch.no_grad(), precision(device, dtype):
        with FlopCounterMode(display=False) as counter:
            plain_unet(model.decoder, x[:1], steps[:1], codes[:1])
        with fast_convolutions(model.decoder):
            other = variants["plain" if options.plain else "one_at_a_time" if batch_size > 1 else "ours"]
            result = {"difference": difference(variants["ours"](), other(), options)}
            times = alternate(variants, options.alternation)
    per_image = median(times["ours"]["seconds"]) / batch_size
    flops = counter.get_total_flops()
    return result | compared(times, batch_size) | speed(options, flops, per_image)


def difference(own: Tensor, theirs: Tensor, options: argparse.Namespace) -> float:
    """The share of ids that differ, or the largest difference of pixels relative to their mean magnitude.

    Raises:
        AssertionError: It is more than rounding.
    """
    if own.dtype == torch.int64:
        value, limit = (own != theirs).float().mean().item(), 0.02 if options.dtype == "float32" else 0.3
    else:
        value = ((own - theirs).abs().max() / theirs.abs().mean()).item()
        limit = 1e-2 if options.dtype == "float32" else 1.0
    assert value <= limit, f"the variants differ by {value}"
    return value


def measure_training(options: argparse.Namespace, case: str, batch_size: int) -> dict[str, Any]:
    """Measure a training step."""
    trainer = build_trainer(options, case, batch_size)
    device, task, model = trainer.parallel.device, trainer.task, trainer.model
    side = options.sizes["size"]
    position = {"stream": 0, "epoch": 0, "draws": 0, "skipped": {}, "missing": {}}
    pixels = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8)
    batch = Batch(
        {"rgb": {"tensor": pixels}},
        position,
        {"rgb": RGBTransform(raw=True, imagenet_default_mean_and_std=False).scaling},
    )
    batch = batch.pin_memory() if device.type == "cuda" else batch
    images = normalise(pixels.to(device), *batch.scaling["rgb"])
    inputs = task.prepare(model, batch, device)

    def forward(loss: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(SEED)  # of the noise
        with autocast(trainer.config, device):
            return loss()

    forwards = {"ours": partial(forward, lambda: task.loss(model, inputs).total)}
    variants: Variants = {"ours": lambda: trainer.train_step([batch])}
    if options.plain:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=False)
        forwards["plain"] = partial(forward, lambda: plain_loss(trainer, images))
        variants["plain"] = lambda: plain_step(trainer, images, optimizer)
    losses = {name: run().item() for name, run in forwards.items()}
    tolerance = 1e-4 if options.dtype == "float32" else 0.02
    assert all(math.isclose(loss, losses["ours"], rel_tol=tolerance) for loss in losses.values()), losses
    memory = {name: step_memory(variants[name], run, trainer) for name, run in forwards.items()}
    times = alternate(variants, options.alternation)
    seconds = median(times["ours"]["seconds"])
    trainer.interval.means(trainer.parallel)
    variants["ours"]()
    means = trainer.interval.means(trainer.parallel)
    return {
        "seconds_per_step": seconds,
        "images_per_second": batch_size / seconds,
        **compared(times, batch_size),
        **speed(options, inputs.flops, seconds),
        "loss": losses,
        "step_memory": memory,
        "peak_memory": means.peak_memory,
        "seconds_in_phases": means.seconds,
    }


def compared(times: dict[str, dict[str, list[float]]], batch_size: int) -> dict[str, Any]:
    """Seconds per image of all variants, and how many times as long as ours the others take, over the rounds."""
    result: dict[str, Any] = {}
    for clock in ("seconds", "cpu_seconds"):
        result[f"{clock}_per_image"] = {name: median(all_[clock]) / batch_size for name, all_ in times.items()}
        for name in times.keys() - {"ours"}:
            ratios = [a / b for a, b in zip(times[name][clock], times["ours"][clock], strict=True)]
            result[f"speed_up_over_{name}_in_{clock}"] = [median(ratios), min(ratios), max(ratios)]
    return result


def speed(options: argparse.Namespace, flops: float, seconds: float) -> dict[str, float]:
    """Operations per second and, of a GPU, their share of its peak."""
    tflops = flops / seconds / 1e12
    peak = peak_tflops(options.device_options, torch.device(options.device))
    return {"flops": flops, "tflops": tflops} | ({"mfu": tflops / peak} if peak else {})


CASES = {
    "tokenize": measure_inference,
    "decode_vqvae": measure_inference,
    "decode_divae": measure_inference,
    "unet_step": measure_unet_step,
    "train_vqvae": measure_training,
    "train_divae": measure_training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to run")
    parser.add_argument("--batch_size", nargs="+", type=int, default=[1, 3], help="images per batch")
    parser.add_argument(
        "--steps", type=int, default=1, help="DDIM steps per image that are measured; an image takes 50"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="compile every block, not of the plain variant")
    parser.add_argument("--toy", action="store_true", help="use narrow networks and small images, to test the command")
    parser.add_argument("--peak_tflops", type=float, help="peak of the device for the MFU, if its name is unknown")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each variant")
    parser.add_argument("--repeats", type=int, default=1, help="runs per round; use 10 on a GPU")
    parser.add_argument("--free", action="store_true", help="return freed memory to the system, unlike the commands")
    parser.add_argument("--no_plain", dest="plain", action="store_false", help="do not measure the plain variant")
    options = parser.parse_args()
    if options.device == "cpu" and not options.free:
        keep_freed_memory()
    options.alternation = argparse.Namespace(rounds=options.rounds, steps=options.repeats, device=options.device)
    options.device_options = DeviceOptions(dtype=options.dtype, peak_tflops=options.peak_tflops)
    options.sizes = TOY if options.toy else PUBLISHED
    options.backend = "aot_eager" if options.toy else "inductor"
    for case in options.only:
        for batch_size in options.batch_size:
            row = CASES[case](options, case, batch_size)
            settings = {
                "benchmark": "image_tokenizers",
                "case": case,
                "batch_size": batch_size,
                "size": options.sizes["size"],
                "device": describe_device(torch.device(options.device)),
                "dtype": options.dtype,
                "compile": options.compile,
                "torch_threads": torch.get_num_threads(),
            }
            print(json.dumps(settings | row), flush=True)


if __name__ == "__main__":
    run_cli(main)
