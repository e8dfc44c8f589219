"""A plain implementation of generation: one sample at a time, with the complete forward pass of training in every step.

Nothing is cached, every condition is a batch of its own, and guidance is the published formula.
"""

import torch

from fourm.generation.halton import halton_orders
from fourm.utils.tokenizer import merge_spans

S1 = 5
SENTINELS = range(S1, 10)  # of the toy vocabulary


def image_entry(ids, inputs, targets):
    """Make the entry of an image; ``inputs`` and ``targets`` are bool (L,), True where a token is one."""
    attention = torch.zeros(len(ids), dtype=torch.long)
    attention[targets.int().argmax()] = targets.sum()
    entry = {"tensor": ids, "input_mask": ~inputs, "target_mask": ~targets, "decoder_attention_mask": attention}
    return {key: value[None] for key, value in entry.items()}


def sequence_entry(inputs, targets):
    tensor = torch.tensor([[*inputs, *targets]])
    is_input = torch.arange(tensor.shape[1])[None] < len(inputs)
    return {
        "tensor": tensor,
        "input_mask": ~is_input,
        "target_mask": is_input,
        "decoder_attention_mask": (~is_input).long(),
    }


def as_input(entry):
    """Remove the targets of an entry, with the masks of training."""
    masked = torch.ones_like(entry["input_mask"])
    return {**entry, "target_mask": masked, "decoder_attention_mask": masked.long() * 0}


def emptied(model, batch, domains):
    def empty(name):
        kind, entry = model.modality_info[name]["type"], batch[name]
        if kind == "img":
            return {**entry, "input_mask": torch.ones_like(entry["input_mask"])}
        if kind == "seq_emb":
            lone = {
                "tensor": torch.zeros_like(entry["tensor"][:, :1]),
                "input_mask": torch.zeros(1, 1, dtype=torch.bool),
            }
            return as_input(lone)
        return as_input(sequence_entry([S1], []))

    return {**batch, **{name: empty(name) for name in domains}}


@torch.no_grad()
def logits_of(model, conditions, target, entry):
    """Return the weighted logits of the targets of ``entry``: the first condition + Σ w·(condition − the first)."""
    outputs = []
    for _, batch in conditions:
        batch = {name: as_input(value) for name, value in batch.items()} | {target: entry}
        outputs.append(model(batch, 500, 500, return_logits=True)[target])
    first = outputs[0]
    return first + sum((w * (logits - first) for (w, _), logits in zip(conditions[1:], outputs[1:], strict=True)))


def write(model, conditions, target, inputs, room, end):
    """Generate a sequence autoregressively, starting with [S_1], with at most ``room`` tokens."""
    written = [S1]
    while len(written) < room and (len(written) == 1 or written[-1] != end):
        logits = logits_of(model, conditions, target, sequence_entry(inputs, [*written, 0]))
        written.append(int(logits[-1].argmax()))
    return merge_spans(inputs, written, SENTINELS)


def paint(model, conditions, target, counts, seed, scheme):
    """Generate an image with MaskGIT, ROAR or in the Halton order at temperature 0."""
    length = model.modality_info[target].max_tokens
    ids, known = torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    grid = model.decoder_embeddings[target].grid
    fixed = halton_orders(grid, torch.rand(1, generator=generator))[0] if scheme == "halton" else None
    for count in counts:
        order = torch.rand(2, length, generator=generator)[0]
        order = order if fixed is None else fixed
        chosen = (~known).nonzero()[:, 0]
        if scheme in ("roar", "halton"):
            chosen = chosen[order[chosen].argsort()[:count]].sort().values
        asked = torch.zeros_like(known)
        asked[chosen] = True
        logits = logits_of(model, conditions, target, image_entry(ids, known, asked))
        best, likeliest = logits.softmax(-1).max(-1)
        kept = best.argsort(descending=True)[:count]
        ids[chosen[kept]], known[chosen[kept]] = likeliest[kept], True
    return ids
