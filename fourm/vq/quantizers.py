"""Quantizers map latents to token ids, and token ids to the latents that a decoder reads.

They know nothing about processes. In training, a forward pass returns *statistics*. The training loop sums them over
the micro-batches and processes of a step and passes the sums to :meth:`Quantizer.update`, so that all processes have
the same codebook as a single process with the whole batch.

Shapes: B images, L latent width, h x w positions, n = B h w latents, K codes, G codebooks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fourm.utils.device import without_autocast
from fourm.utils.errors import UserError

_SCORES = 2**24  # number of latent-code pairs that are compared at a time, 64 MB


@dataclass(frozen=True)
class Part:
    """The number ``index`` of a micro-batch among the ``count`` micro-batches of a step, over all processes.

    Each micro-batch proposes latents as replacements of dead codes. The proposals are collected by a sum, for which
    each micro-batch fills rows of its own.
    """

    index: int = 0
    count: int = 1


WHOLE = Part()
"""A step that consists of one micro-batch."""


@dataclass(frozen=True)
class Quantized:
    """Quantized latents.

    Attributes:
        latents: The input of the decoder, (B, L, h, w); its gradient passes through to the encoder.
        loss: (1,), the loss that keeps the encoder close to the codes.
        ids: The token ids, (B, h, w), or (B, G, h, w) with several codebooks.
        statistics: Tensors whose sums over a step are passed to :meth:`Quantizer.update`; empty in evaluation mode.
    """

    latents: Tensor
    loss: Tensor
    ids: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module, ABC):
    """Maps latents (B, L, h, w) to :class:`Quantized` ones, always in float32.

    Attributes:
        codebook_size: K; ids are in [0, K).
        num_codebooks: G, the number of ids at each position.
    """

    codebook_size: int
    num_codebooks: int = 1

    def forward(self, z: Tensor, part: Part = WHOLE) -> Quantized:
        with without_autocast(z.device):
            return self.quantize(z.float(), part)

    @abstractmethod
    def quantize(self, z: Tensor, part: Part) -> Quantized:
        """Quantize latents (B, L, h, w) in float32."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Look up ids, (B, h, w) or (B, G, h, w) → latents (B, L, h, w), as in evaluation mode."""

    def update(self, statistics: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Update the codebook in place.

        Args:
            statistics: The sums of :attr:`Quantized.statistics` over a step.
            skipped: 1 on the device if nothing must change, otherwise 0.
        """


class CosineCodebook(nn.Module):
    """The buffers of :class:`LucidQuantizer` under their published names; ``initted`` is always 1."""

    initted: Tensor
    cluster_size: Tensor
    embed: Tensor

    def __init__(self, codebook_size: int, latent_dim: int):
        super().__init__()
        self.register_buffer("initted", torch.empty(1))
        self.register_buffer("cluster_size", torch.empty(codebook_size))
        self.register_buffer("embed", torch.empty(codebook_size, latent_dim))

    def reset_parameters(self) -> None:
        self.initted.fill_(1)
        self.cluster_size.zero_()
        nn.init.uniform_(self.embed, -1, 1)
        self.embed.copy_(F.normalize(self.embed, dim=-1))


class LucidQuantizer(Quantizer):
    """A codebook whose codes follow the mean direction of the latents that choose them (arXiv 1711.00937, 2110.04627).

    Latents choose a code by its direction but are replaced by the code itself, whose length is below 1 if the
    directions of its latents differ.

    Args:
        codebook_size: K.
        latent_dim: L.
        ema_decay: The share of the old codes in the new ones.
        commitment_weight: The weight of the loss that pulls latents to their codes.
        threshold_ema_dead_code: A code that fewer latents per step choose, on average, is replaced by one of the
            latents of the step; 0 keeps all codes. The average starts at 0, so that the first steps replace most codes,
            which initialises them.
    """

    def __init__(
        self,
        codebook_size: int,
        latent_dim: int,
        ema_decay: float,
        commitment_weight: float,
        threshold_ema_dead_code: float,
    ):
        super().__init__()
        self.codebook_size = codebook_size
        self.decay, self.commitment_weight = ema_decay, commitment_weight
        self.threshold = threshold_ema_dead_code
        self._codebook = CosineCodebook(codebook_size, latent_dim)

    def quantize(self, z: Tensor, part: Part) -> Quantized:
        latents = rearrange(z, "b l h w -> (b h w) l")
        directions = F.normalize(latents.detach(), dim=-1)
        ids = self._nearest(directions)
        grid = ids.view(len(z), *z.shape[2:])
        codes = self.embed(grid)
        if not self.training:
            return Quantized(codes, z.new_zeros(1), grid)
        loss = self.commitment_weight * F.mse_loss(z, codes)
        return Quantized(z + (codes - z).detach(), loss[None], grid, self._statistics(directions, ids, part))

    def embed(self, ids: Tensor) -> Tensor:
        return rearrange(self._codebook.embed[ids], "b h w l -> b l h w")

    @torch.no_grad()
    def _nearest(self, directions: Tensor) -> Tensor:
        """Return the ids of the nearest codes, (n, L) → (n,)."""
        codes = F.normalize(self._codebook.embed, dim=-1).T
        rows = max(1, _SCORES // self.codebook_size)
        return torch.cat([(chunk @ codes).argmax(1) for chunk in directions.split(rows)])

    @torch.no_grad()
    def _statistics(self, directions: Tensor, ids: Tensor, part: Part) -> dict[str, Tensor]:
        """Return how many latents chose each code, the sums of their directions, and candidates for dead codes.

        The candidates (K, L) are latents of the whole step, of which each micro-batch fills rows of its own.
        """
        counts = directions.new_zeros(self.codebook_size).index_add_(0, ids, torch.ones_like(directions[:, 0]))
        sums = torch.zeros_like(self._codebook.embed).index_add_(0, ids, directions)
        if not self.threshold:
            return {"counts": counts, "sums": sums}
        candidates = torch.zeros_like(sums)
        own = candidates[part.index :: part.count]
        own.copy_(directions[_draw(len(directions), len(own), directions.device)])
        return {"counts": counts, "sums": sums, "candidates": candidates}

    @torch.no_grad()
    def update(self, statistics: Mapping[str, Tensor], skipped: Tensor) -> None:
        book, counts = self._codebook, statistics["counts"]
        cluster_size = torch.lerp(counts, book.cluster_size, self.decay)
        chosen = (counts > 0)[:, None]
        directions = F.normalize(torch.where(chosen, statistics["sums"], book.embed), dim=-1)
        embed = torch.lerp(directions, book.embed, self.decay)
        if self.threshold:
            dead = cluster_size < self.threshold
            candidates = statistics["candidates"][(dead.cumsum(0) - 1).clamp(min=0)]
            embed = torch.where(dead[:, None], candidates, embed)
        book.cluster_size.copy_(torch.where(skipped > 0, book.cluster_size, cluster_size))
        book.embed.copy_(torch.where(skipped > 0, book.embed, embed))


class MemcodesQuantizer(Quantizer):
    """Several codebooks of keys and values that are learned by gradient descent.

    The latent is split into one part per codebook, and each part retrieves the value of its best key. Training adds
    Gumbel noise to the scores (arXiv 1611.01144).

    Args:
        codebook_size: K.
        latent_dim: L = G c.
        num_codebooks: G.

    Raises:
        UserError: L is not a multiple of G.
    """

    def __init__(self, codebook_size: int, latent_dim: int, num_codebooks: int):
        super().__init__()
        if latent_dim % num_codebooks:
            raise UserError(f"'latent_dim' {latent_dim} is not a multiple of 'num_codebooks' {num_codebooks}")
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        width = latent_dim // num_codebooks
        self.codes = nn.Parameter(torch.empty(num_codebooks, codebook_size, width))
        self.to_k, self.to_v = (_GroupedLinear(num_codebooks, width) for _ in range(2))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.codes)

    def quantize(self, z: Tensor, part: Part) -> Quantized:
        queries = rearrange(z, "b (g c) h w -> g (b h w) c", g=self.num_codebooks)
        scores = queries @ self.to_k(self.codes).mT * queries.shape[-1] ** -0.5  # (G, n, K)
        values = self.to_v(self.codes)  # (G, K, c)
        if self.training:
            scores = scores - torch.empty_like(scores).exponential_().log()
        ids = scores.argmax(-1)
        if self.training:
            soft = scores.softmax(-1)
            retrieved = (F.one_hot(ids, self.codebook_size) + soft - soft.detach()) @ values
        else:
            retrieved = _pick(values, ids)
        shape = {"b": len(z), "h": z.shape[2]}
        grid = rearrange(ids, "g (b h w) -> b g h w", **shape)
        latents = rearrange(retrieved, "g (b h w) c -> b (g c) h w", **shape)
        return Quantized(latents, z.new_zeros(1), grid if self.num_codebooks > 1 else grid[:, 0])

    def embed(self, ids: Tensor) -> Tensor:
        ids = ids if ids.ndim == 4 else ids[:, None]
        values = _pick(self.to_v(self.codes), rearrange(ids, "b g h w -> g (b h w)"))
        return rearrange(values, "g (b h w) c -> b (g c) h w", b=len(ids), h=ids.shape[2])


class _GroupedLinear(nn.Module):
    """A linear map for each codebook, (G, K, c) → (G, K, c)."""

    def __init__(self, groups: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width, width))

    def reset_parameters(self) -> None:
        bound = math.sqrt(3 / self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return x.float() @ self.weight.float()  # FSDP may gather the weights in a lower precision


_FSQ_RANGE = 1.5  # FSQ penalises latents beyond it


class FSQ(Quantizer):
    """Finite scalar quantization (arXiv 2309.15505): each channel of the latent is rounded to one of a few levels.

    It is recommended for new tokenizers, because it has no codebook to learn and no dead codes. Its one risk is that
    all latents drift to where tanh is flat, for example while the decoder learns the mean of the images through them;
    then they share one code for good. The loss prevents this: it is the mean square of the part of each channel beyond
    ±1.5, where tanh is 0.9, and is 0 for latents that use their levels. K is the product of the levels. Table 1 of the
    paper recommends at least 5 levels per channel: 8, 6, 5 for about 2^8 codes; 8, 5, 5, 5 for 2^10; 7, 5, 5, 5, 5 for
    2^12; 8, 8, 8, 6, 5 for 2^14.

    Args:
        levels: The number of levels of each of the L channels.
        commitment_weight: The weight of the loss.

    Raises:
        UserError: See :func:`fsq_codebook_size`.
    """

    levels: Tensor

    def __init__(self, levels: Sequence[int], commitment_weight: float = 1.0):
        super().__init__()
        self._weight = commitment_weight
        self.codebook_size = fsq_codebook_size(levels)
        self._levels = tuple(levels)
        # The levels follow from the configuration: they are in no file, and have values even on the meta device.
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32, device="cpu"), persistent=False)

    def reset_parameters(self) -> None:
        for number, level in enumerate(self._levels):
            self.levels[number] = level

    def quantize(self, z: Tensor, part: Part) -> Quantized:
        levels = self.levels[:, None, None]
        # tanh limits each channel to as many integers as it has levels. An even number of them is not centred around 0.
        reach = (levels - 1) * 1.001 / 2
        offset = (1 - levels % 2) / 2
        bounded = torch.tanh(z + torch.atanh(offset / reach)) * reach - offset
        rounded = bounded.round()
        digits = (rounded + levels // 2).long()
        ids = (digits * self._place_values()[:, None, None]).sum(1)
        loss = self._weight * F.relu(z.abs() - _FSQ_RANGE).square().mean()
        return Quantized((bounded + (rounded - bounded).detach()) / (levels // 2), loss[None], ids)

    def embed(self, ids: Tensor) -> Tensor:
        levels = self.levels[:, None, None]
        digits = ids[:, None] // self._place_values()[:, None, None] % levels.long()
        return (digits - levels // 2) / (levels // 2)

    def _place_values(self) -> Tensor:
        """Return the place value of each channel in an id, (L,); that of the first channel is 1."""
        levels = self.levels.long()
        return levels.cumprod(0) // levels


def fsq_codebook_size(levels: Sequence[int]) -> int:
    """Return the number of codes of :class:`FSQ`.

    Raises:
        UserError: There are no levels, fewer than 3 levels in a channel, or 2^31 codes or more.
    """
    size = math.prod(levels)
    if not levels or min(levels) < 3 or size >= 2**31:
        raise UserError(
            f"'levels' must be numbers of at least 3 whose product is below 2^31, such as [8, 5, 5, 5], "
            f"not {list(levels)}"
        )
    return size


def _pick(values: Tensor, ids: Tensor) -> Tensor:
    """Pick rows (G, n, c) from values (G, K, c) by ids (G, n)."""
    return values.gather(1, ids[..., None].expand(-1, -1, values.shape[-1]))


def _draw(count: int, wanted: int, device: torch.device) -> Tensor:
    """Draw ``wanted`` of ``count`` indices, without repetition if there are enough.

    The numbers come from torch's global generator, which a training run seeds with the number of the micro-batch.
    """
    if count < wanted:
        return torch.randint(count, (wanted,), device=device)
    return torch.randperm(count, device=device)[:wanted]
