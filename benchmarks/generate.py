"""Compare cached, batched generation with a plain implementation that recomputes everything for each token.

``python benchmarks/generate.py`` prints JSON. Both variants share one model and alternate in one process. The plain one
follows the loops of the published code: it runs the encoder once per condition and sequence or step, and the decoder
over all tokens so far, with logits for all of them. Both must generate the same tokens. With ``--no_plain``, captions
are also generated in steps that a GPU replays as a CUDA graph (``graphs``).

``--before FOLDER`` compares the cached variant with that of another checkout instead, by processor time: both generate
in turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourm.generation.batch_entries import emptied, init_empty_target_modality, init_full_input_modality
from fourm.generation.chained_generation import GenerationSampler
from fourm.generation.schedules import build_chained_generation_schedules
from fourm.models import FM, model_config
from fourm.models.modality_embedding import Rows
from fourm.models.token_selection import select_inputs

RGB, IMAGE, TEXT = "rgb@224", "tok_rgb@224", "caption"
START = 5  # id of the token that starts a caption
Conditions = Sequence[tuple[float, Any]]
CASES: dict[str, tuple] = {
    "rgb_to_caption_256": (RGB, TEXT, 256, "autoregressive", 1, 1.0),
    "rgb_to_caption_256_guided": (RGB, TEXT, 256, "autoregressive", 1, 3.0),
    "caption_to_image_roar_49_guided": (TEXT, IMAGE, 196, "roar", 49, 3.0),
    "caption_to_image_maskgit_8": (TEXT, IMAGE, 196, "maskgit", 8, 1.0),
    "rgb_to_image_roar_25_guided": (RGB, IMAGE, 196, "roar", 25, 3.0),
    "rgb_to_image_maskgit_8_guided": (RGB, IMAGE, 196, "maskgit", 8, 3.0),
}


def encode(model: FM, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the encoder's context and its padding mask."""
    modalities = {name: model.modality_info[name] for name in model.encoder_embeddings}
    x, emb, padding = model.embed_encoder(batch, select_inputs(batch, modalities))
    return model.context(model.encode(x + emb, padding), emb), padding


def decode(model: FM, domain: str, context: Any, ids: Tensor, position: Tensor, causal: bool) -> Tensor:
    """Return the logits (1, K, V) under one condition."""
    count = len(position)
    rows = Rows(torch.zeros_like(position), torch.arange(count), position)
    embedding = model.decoder_embeddings[domain]
    y = sum(embedding(ids[None], rows, model.mask_token))[None]
    mask = torch.ones(1, count, count, dtype=torch.bool).triu(1) & causal
    return embedding.to_logits(model.decode(y, *context, mask))


def guide(logits: list[Tensor], conditions: Conditions) -> Tensor:
    """Combine the logits under all conditions by classifier-free guidance."""
    return logits[0] + sum(w * (other - logits[0]) for (w, _), other in zip(conditions[1:], logits[1:], strict=True))


@torch.no_grad()
def plain_caption(model: FM, conditions: Conditions, tokens: int) -> list[int]:
    contexts = [encode(model, batch) for _, batch in conditions]
    ids = torch.tensor([START])
    for _ in range(tokens):
        logits = [decode(model, TEXT, context, ids, torch.arange(len(ids)), causal=True) for context in contexts]
        ids = torch.cat([ids, guide(logits, conditions)[:, -1].argmax(-1)])
    return ids.tolist()


@torch.no_grad()
def plain_image(model: FM, conditions: Conditions, counts: list[int], scheme: str, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    length = model.modality_info[IMAGE].max_tokens
    ids, masked = torch.zeros(1, length, dtype=torch.long), torch.ones(1, length, dtype=torch.bool)
    for count in counts:
        order = torch.rand(2, length, generator=generator)[0]
        position = order.masked_fill(~masked[0], 2.0).argsort()[: count if scheme == "roar" else int(masked.sum())]
        generated = {"tensor": ids, "input_mask": masked}
        logits = [
            decode(model, IMAGE, encode(model, {**batch, IMAGE: generated}), ids[0], position, causal=False)
            for _, batch in conditions
        ]
        confidence, tokens = guide(logits, conditions)[0].softmax(-1).max(-1)
        best = confidence.argsort(descending=True)[:count]
        ids[0, position[best]] = tokens[best]
        masked[0, position[best]] = False
    return ids[0].tolist()


def inputs(model: FM, given: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        RGB: torch.randn(1, 3, 224, 224, generator=generator),
        TEXT: torch.randint(4204, 30000, (1, 20), generator=generator),
    }
    return init_full_input_modality(
        {given: {"tensor": tensors[given]}}, model.modality_info, given, model.mask_token.device
    )


def case(
    model: FM, given: str, target: str, tokens: int, scheme: str, steps: int, scale: float, dtype: Any = None
) -> dict[str, Callable]:
    """Return the variants of one task as functions that return tokens; ``dtype`` applies to all but ``plain``."""
    batch = inputs(model, given)
    positions = tokens + 2 if target == TEXT else tokens  # a text has two sentinels
    batch = init_empty_target_modality(batch, model.modality_info, target, 1, positions, model.mask_token.device)
    schedule = build_chained_generation_schedules(
        [given], [target], [tokens], [scheme], [steps], ["linear"], [0.0], ["constant"], [scale], ["constant"]
    )
    counts = [step["num_tokens"] for step in schedule]
    schedule = [{**step, "num_tokens": step["num_tokens"] if target == IMAGE else None} for step in schedule]
    conditions = [(1.0, batch)] if scale == 1 else [(0.0, emptied(batch, model.modality_info, [given])), (scale, batch)]

    def ours(sampler: GenerationSampler) -> list[int]:
        entry = sampler.generate(batch, schedule, seed=0)[target]
        return entry["tensor"][~entry["input_mask"]].tolist()

    cached = partial(ours, GenerationSampler(model, dtype))
    if target == TEXT:
        return {
            "cached": cached,
            "graphs": lambda: ours(GenerationSampler(model, dtype, cuda_graphs=True)),  # not in every older checkout
            "plain": lambda: plain_caption(model, conditions, tokens)[1:],
        }
    return {"cached": cached, "plain": lambda: plain_image(model, conditions, counts, scheme, 0)}


def timed(variants: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the variants alternately, and return the minimum seconds and the result of each."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    results = {}
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}, results


def serve(variants: Mapping[str, Callable[[], Any]]) -> None:
    """Run the variant that each line of the standard input names, and print its processor time and its tokens."""
    for line in sys.stdin:
        start = time.process_time()
        tokens = variants[line.strip()]()
        print(json.dumps([time.process_time() - start, tokens]), flush=True)


def against(before: Path, names: Sequence[str], options: Sequence[str], rounds: int) -> dict[str, Any]:
    """Run the cases of another checkout and of this one in turns; the first round warms up."""
    servers = [
        subprocess.Popen(
            [sys.executable, __file__, "--serve", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(folder)},
            cwd=folder,
        )
        for folder in (before.resolve(), Path(__file__).resolve().parents[1])
    ]
    results = {}
    for name in names:
        seconds, same = [], []
        for _ in range(rounds + 1):
            answers = []
            for server in servers:
                assert server.stdin and server.stdout
                print(name, file=server.stdin, flush=True)
                answers.append(json.loads(server.stdout.readline()))
            seconds.append([answer[0] for answer in answers])
            same.append(answers[0][1] == answers[1][1])
        ratios = [old / new for old, new in seconds[1:]]
        results[name] = {
            "before": statistics.median(old for old, _ in seconds[1:]),
            "now": statistics.median(new for _, new in seconds[1:]),
            "ratio": statistics.median(ratios),
            "ratios": [min(ratios), max(ratios)],
            "same_tokens": all(same),
        }
    for server in servers:
        server.communicate()  # ends its input
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    parser.add_argument("--model", default="fm_tiny_6e_6d_swiglu_nobias")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="precision of the cached variant, e.g. bfloat16")
    parser.add_argument(
        "--no_plain", dest="plain", action="store_false", help="run only the cached variant (required on a GPU)"
    )
    parser.add_argument(
        "--toy", action="store_true", help="use a model of one narrow block and short texts, to test the command"
    )
    parser.add_argument("--before", type=Path, help="compare with this checkout; run --repeats rounds")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.before:
        options = ["--model", arguments.model, *(["--toy"] * arguments.toy)]
        names = [name for name in CASES if arguments.only in name]
        report = {
            "benchmark": "generate",
            "model": arguments.model,
            "processor_seconds": against(arguments.before, names, options, arguments.repeats),
        }
        print(json.dumps(report))
        return
    torch.manual_seed(0)
    domains = [RGB, IMAGE, TEXT]
    toy = {"dim": 48, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2} if arguments.toy else {}
    model = FM(model_config(arguments.model, domains, domains[1:], **toy)).to(arguments.device).eval()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    # Prevent end-of-text and sentinel tokens, so that every caption has the maximum length.
    model.decoder_embeddings[TEXT].to_logits.weight.data[:204] = 0
    cases = {}
    for name, (given, target, tokens, *rest) in CASES.items():
        if arguments.only in name:
            tokens = min(tokens, 16) if arguments.toy and target == TEXT else tokens
            cases[name] = (tokens, case(model, given, target, tokens, *rest, dtype))
    if arguments.serve:
        return serve({name: variants["cached"] for name, (_, variants) in cases.items()})
    results = {}
    for name, (tokens, variants) in cases.items():
        if not arguments.plain:
            own = {variant: run for variant, run in variants.items() if variant != "plain"}
            times, generated = timed(own, arguments.repeats + 1)  # the first run warms up
            results[name] = {**times, "tokens": tokens}
            if "graphs" in own:
                results[name]["graphs_same_tokens"] = generated["graphs"] == generated["cached"]
            continue
        variants.pop("graphs", None)
        times, generated = timed(variants, arguments.repeats)
        same = sum(a == b for a, b in zip(*generated.values(), strict=True)) / len(generated["cached"])
        results[name] = {**times, "speed_up": times["plain"] / times["cached"], "same_tokens": same}
    lengths = (64, 128, 256) if arguments.plain else ()
    captions = {str(n): case(model, RGB, TEXT, n, "autoregressive", 1, 1.0)["cached"] for n in lengths}
    by_length, _ = timed(captions, arguments.repeats)
    report = {
        "benchmark": "generate",
        "seconds": results,
        "model": arguments.model,
        "device": torch.cuda.get_device_name() if model.mask_token.is_cuda else "cpu",
        "dtype": arguments.dtype or "float32",
        "cached_seconds_by_caption_length": by_length,
        "torch_threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=2 if arguments.plain else None))


if __name__ == "__main__":
    main()
