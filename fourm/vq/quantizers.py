"""Quantizers: latents → ids, and ids → the vectors that a decoder gets.

They know nothing of processes. In training a forward pass gives *statistics*, which the training sums over the micro-batches and
processes of a step and hands to :meth:`Quantizer.update`: all processes then have the same codebook, that of the whole batch.

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

from fourm.utils.errors import UserError

_SCORES = 2**24  # latent-code pairs compared at a time: 64 MB


@dataclass(frozen=True)
class Part:
    """Which micro-batch of a training step this is: number ``index`` of ``count``, those of all processes together.

    Each offers some of its latents in place of codes that are not used; so that sums can collect them, it must know which.
    """

    index: int = 0
    count: int = 1


WHOLE = Part()
"""A step that consists of one micro-batch."""


@dataclass(frozen=True)
class Quantized:
    """What becomes of latents.

    Attributes:
        latents: (B, L, h, w), what the decoder gets; their gradient reaches the encoder.
        loss: (1,), keeps the encoder close to the codes.
        ids: (B, h, w), or (B, G, h, w) with several codebooks.
        statistics: for :meth:`Quantizer.update`, once they are summed; none in evaluation mode.
    """

    latents: Tensor
    loss: Tensor
    ids: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module, ABC):
    """(B, L, h, w) → :class:`Quantized`; always computed in float32.

    Attributes:
        codebook_size: K, ids are in [0, K).
        num_codebooks: G, ids of one position.
    """

    codebook_size: int
    num_codebooks: int = 1

    def forward(self, z: Tensor, part: Part = WHOLE) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            return self.quantize(z.float(), part)

    @abstractmethod
    def quantize(self, z: Tensor, part: Part) -> Quantized:
        """The latents (B, L, h, w) in float32."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w), or (B, G, h, w) → (B, L, h, w), as :attr:`Quantized.latents` in evaluation mode."""

    def update(self, statistics: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Change the codebook, in place.

        Args:
            statistics: sums of :attr:`Quantized.statistics` over a step.
            skipped: 1 if nothing must change, otherwise 0; on the device.
        """


class CosineCodebook(nn.Module):
    """The buffers of :class:`LucidQuantizer`, under their published names. ``initted`` is 1: the codes can be used."""

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

    Latents choose by direction, but are replaced by the code as it is: its length is below 1 where its latents disagree.

    Args:
        codebook_size: K.
        latent_dim: L.
        ema_decay: share of the old codes in the new ones.
        commitment_weight: of the loss that pulls latents to their codes.
        threshold_ema_dead_code: a code that fewer latents choose in a step, on average, becomes one of the step's
            latents; 0 = never. The average begins at 0, so that the first steps replace most codes: that is what
            initialises them.
    """

    def __init__(
        self, codebook_size: int, latent_dim: int, ema_decay: float, commitment_weight: float,
        threshold_ema_dead_code: float,
    ):  # fmt: skip
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
        """(n, L) → ids (n,)."""
        codes = F.normalize(self._codebook.embed, dim=-1).T
        rows = max(1, _SCORES // self.codebook_size)
        return torch.cat([(chunk @ codes).argmax(1) for chunk in directions.split(rows)])

    @torch.no_grad()
    def _statistics(self, directions: Tensor, ids: Tensor, part: Part) -> dict[str, Tensor]:
        """How many latents chose each code, the sum of their directions, and latents (K, L) of the whole step to replace codes
        by, of which each micro-batch fills rows of its own."""
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
    """Several codebooks of keys and values, learned by gradient: each part of the latent retrieves the value of the best key.

    Training adds Gumbel noise to the scores (arXiv 1611.01144).

    Args:
        codebook_size: K.
        latent_dim: L = G c.
        num_codebooks: G.

    Raises:
        UserError: L is no multiple of G.
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
        found = _pick(self.to_v(self.codes), rearrange(ids, "b g h w -> g (b h w)"))
        return rearrange(found, "g (b h w) c -> b (g c) h w", b=len(ids), h=ids.shape[2])


class _GroupedLinear(nn.Module):
    """(G, K, c) → (G, K, c), a linear map for each codebook."""

    def __init__(self, groups: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width, width))

    def reset_parameters(self) -> None:
        bound = math.sqrt(3 / self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return x.float() @ self.weight.float()  # FSDP may hold them in less precision


_FSQ_RANGE = 1.5


class FSQ(Quantizer):
    """Finite scalar quantization (arXiv 2309.15505): each number of the latent is rounded to one of a few levels.

    There is no codebook to learn and no code that dies: the recommended choice for new tokenizers. The one thing that can
    go wrong is that all latents drift to where tanh is flat, such as when the decoder learns the mean of the images through
    them; then they share one code for good. The loss is the mean square of the part of each number beyond ±1.5, where
    tanh is 0.9, and is 0 for latents that use their levels. K is the product of the levels; the paper (table 1) recommends at least 5 of each: 8, 6, 5 for about 2^8 codes, 8, 5, 5, 5 for 2^10, 7, 5, 5, 5, 5
    for 2^12, 8, 8, 8, 6, 5 for 2^14.

    Args:
        levels: of each of the L numbers.
        commitment_weight: Weight of the loss.

    Raises:
        UserError: as :func:`fsq_codebook_size`.
    """

    levels: Tensor

    def __init__(self, levels: Sequence[int], commitment_weight: float = 1.0):
        super().__init__()
        self._weight = commitment_weight
        self.codebook_size = fsq_codebook_size(levels)
        self._levels = tuple(levels)
        # It follows from the configuration: it is in no file, and there from the beginning even on the meta device.
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32, device="cpu"), persistent=False)

    def reset_parameters(self) -> None:
        for number, level in enumerate(self._levels):
            self.levels[number] = level

    def quantize(self, z: Tensor, part: Part) -> Quantized:
        levels = self.levels[:, None, None]
        # tanh bounds each number to as many whole numbers as it has levels; an even number of them is not centred around 0.
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
        """(L,), by how much an id grows with a level: of the first number 1."""
        levels = self.levels.long()
        return levels.cumprod(0) // levels


def fsq_codebook_size(levels: Sequence[int]) -> int:
    """The number of codes of :class:`FSQ`.

    Raises:
        UserError: there are no levels, fewer than 3 of one number, or 2^31 codes or more.
    """
    size = math.prod(levels)
    if not levels or min(levels) < 3 or size >= 2**31:
        raise UserError(
            f"'levels' must be numbers of at least 3 whose product is below 2^31, such as [8, 5, 5, 5], not {list(levels)}"
        )
    return size


def _pick(values: Tensor, ids: Tensor) -> Tensor:
    """Rows (G, n, c) of values (G, K, c)."""
    return values.gather(1, ids[..., None].expand(-1, -1, values.shape[-1]))


def _draw(count: int, wanted: int, device: torch.device) -> Tensor:
    """``wanted`` of ``count`` indices, each at most once if there are enough; from torch's generator, which a training run seeds
    by the number of the micro-batch."""
    if count < wanted:
        return torch.randint(count, (wanted,), device=device)
    return torch.randperm(count, device=device)[:wanted]
