"""Norm, attention, MLPs and blocks: the parts of the trunk (method section 3, "Blocks").

Shapes: B batch, N tokens, M targets, Q queries, K keys, D width, H heads, C width of one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fourm.utils.errors import UserError

INIT_STD = 0.02


class LayerNorm(nn.LayerNorm):
    """Layer norm whose bias, when it is not learned, is a buffer of zeros: the published files carry one."""

    def __init__(self, dim: int, eps: float = 1e-6, bias: bool = True):
        super().__init__(dim, eps=eps, bias=bias)
        if not bias:
            del self.bias
            self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        # FSDP may hold the weight in less precision than x or the bias, which not every device can mix.
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps)


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a model have in common."""

    dim: int
    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    act_layer: Callable[[], nn.Module] = nn.GELU
    norm_layer: Callable[[int], nn.Module] = LayerNorm
    gated_mlp: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise UserError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if int(self.dim * self.mlp_ratio) < 2:
            raise UserError(f"mlp_ratio {self.mlp_ratio} leaves no hidden units at dim {self.dim}")

    def norm(self) -> nn.Module:
        return self.norm_layer(self.dim)

    def mlp(self) -> Mlp:
        return (GatedMlp if self.gated_mlp else Mlp)(self)


def attendable(masked: Tensor) -> Tensor:
    """Turn a mask of keys, (B, K) or (B, Q, K) with True = masked, into what attention wants: True = may attend.

    A query that may see no key sees all of them, so that its softmax stays finite. Where all keys are padding, they
    are equal, and it reads one padding token, however many there are.

    Returns:
        (B, 1, Q or 1, K) bool, the ``mask`` of the attention modules.
    """
    allowed = ~(masked if masked.ndim == 3 else masked[:, None])
    return (allowed | ~allowed.any(-1, keepdim=True))[:, None]


def additive(mask: Tensor, x: Tensor) -> Tensor:
    """A mask as from :func:`attendable` → 0 and −inf, to be added to the scores of attention over ``x``.

    Attention would do the same with a bool mask, but in every block anew, and keep each for the backward pass.
    """
    device = x.device.type
    lower = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if lower else x.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


class KeysValues(NamedTuple):
    """What queries attend to, ready for use: (B, H, K, C) each."""

    keys: Tensor
    values: Tensor


class Past(Protocol):
    """Remembers the keys and values of earlier tokens, see :mod:`fourm.generation.kv_cache`."""

    def extend(self, new: KeysValues) -> KeysValues:
        """Remember those of new tokens → those of all tokens so far."""


class _MultiHead(nn.Module):
    """What self- and cross-attention share."""

    def __init__(self, options: BlockOptions):
        super().__init__()
        self.num_heads = options.num_heads
        norm = options.norm_layer if options.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(options.dim // options.num_heads) for _ in range(2))
        self.proj = nn.Linear(options.dim, options.dim, bias=options.proj_bias)

    def attend(self, q: Tensor, known: KeysValues, mask: Tensor | None) -> Tensor:
        """(B, H, Q, C) → (B, Q, D)."""
        y = F.scaled_dot_product_attention(self.q_norm(q), known.keys, known.values, attn_mask=mask)
        return self.proj(rearrange(y, "b h q c -> b q (h c)"))


class Attention(_MultiHead):
    """Multi-head self-attention."""

    def __init__(self, options: BlockOptions):
        super().__init__(options)
        self.qkv = nn.Linear(options.dim, 3 * options.dim, bias=options.qkv_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, past: Past | None = None) -> Tensor:
        """(B, N, D) → (B, N, D); with a ``past``, ``x`` also attends to the tokens before it."""
        q, k, v = rearrange(self.qkv(x), "b n (three h c) -> three b h n c", three=3, h=self.num_heads)
        known = KeysValues(self.k_norm(k), v)
        return self.attend(q, known if past is None else past.extend(known), mask)


class CrossAttention(_MultiHead):
    """Multi-head attention of ``x`` to ``context``."""

    def __init__(self, options: BlockOptions):
        super().__init__(options)
        self.q = nn.Linear(options.dim, options.dim, bias=options.qkv_bias)
        self.kv = nn.Linear(options.dim, 2 * options.dim, bias=options.qkv_bias)

    def keys_values(self, context: Tensor) -> KeysValues:
        k, v = rearrange(self.kv(context), "b k (two h c) -> two b h k c", two=2, h=self.num_heads)
        return KeysValues(self.k_norm(k), v)

    def forward(self, x: Tensor, context: KeysValues, mask: Tensor | None = None) -> Tensor:
        """(B, M, D) → (B, M, D); ``context`` is from :meth:`keys_values`."""
        return self.attend(rearrange(self.q(x), "b q (h c) -> b h q c", h=self.num_heads), context, mask)


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))``."""

    def __init__(self, options: BlockOptions):
        super().__init__()
        hidden = self.hidden_dim(int(options.dim * options.mlp_ratio))
        self.fc1 = nn.Linear(options.dim, hidden, bias=options.mlp_bias)
        self.act = options.act_layer()
        self.fc2 = nn.Linear(hidden, options.dim, bias=options.mlp_bias)

    @staticmethod
    def hidden_dim(width: int) -> int:
        return width

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class GatedMlp(Mlp):
    """``fc2(act(fc1(x)) · fc3(x))``, two thirds as wide, so that it has as many parameters as the plain one."""

    def __init__(self, options: BlockOptions):
        super().__init__(options)
        self.fc3 = nn.Linear(options.dim, self.fc1.out_features, bias=options.mlp_bias)

    @staticmethod
    def hidden_dim(width: int) -> int:
        return int(2 * width / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)) * self.fc3(x))


class DropPath(nn.Module):
    """Stochastic depth: training leaves a branch out for some samples and scales it up for the others, to keep the mean.

    Args:
        drop_prob: share of samples for which it is left out, in [0, 1].
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) → (B, ...)."""
        if self.drop_prob == 0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * (kept / keep_prob if keep_prob else kept)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


class Block(nn.Module):
    """Pre-norm encoder block: self-attention, then MLP."""

    def __init__(self, options: BlockOptions, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = options.norm()
        self.attn = Attention(options)
        self.norm2 = options.norm()
        self.mlp = options.mlp()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) → (B, N, D); ``mask`` as from :func:`attendable`."""
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    """Pre-norm decoder block: self-attention, cross-attention to the context, then MLP."""

    def __init__(self, options: BlockOptions, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = options.norm()
        self.self_attn = Attention(options)
        self.query_norm, self.context_norm = options.norm(), options.norm()
        self.cross_attn = CrossAttention(options)
        self.norm2 = options.norm()
        self.mlp = options.mlp()
        self.drop_path = DropPath(drop_path)

    def keys_values(self, context: Tensor) -> KeysValues:
        """What targets read of the context (B, N, D), whichever they are."""
        return self.cross_attn.keys_values(self.context_norm(context))

    def forward(
        self,
        y: Tensor,
        context: Tensor | KeysValues,
        self_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """(B, M, D) → (B, M, D); masks as from :func:`attendable`.

        Args:
            context: (B, N, D), or what :meth:`keys_values` made of it.
            past: the targets before ``y``, which see nothing of ``y``.
        """
        known = self.keys_values(context) if isinstance(context, Tensor) else context
        y = y + self.drop_path(self.self_attn(self.norm1(y), self_mask, past))
        y = y + self.drop_path(self.cross_attn(self.query_norm(y), known, context_mask))
        return y + self.drop_path(self.mlp(self.norm2(y)))


def init_weights(model: nn.Module, std: float = INIT_STD) -> None:
    """Initialise all submodules of ``model`` (method section 3), embedding vectors with ``std``.

    A tied output matrix is met twice, as an embedding first and as a linear map last, and so ends up Xavier-uniform.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # The matrices inside a fused weight are initialised as the separate maps that they are.
            fused = {"qkv": 3, "kv": 2}.get(name.rpartition(".")[2], 1)
            bound = math.sqrt(6 / (module.out_features // fused + module.in_features))
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif hasattr(module, "reset_embedding"):
            module.reset_embedding(std)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
