"""Norm, attention, MLPs and blocks of the trunk.

Shapes: B batch, N tokens, M targets, S slots, T packed tokens of the whole batch, Q queries, K keys, D width, H heads,
C width of one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fourm.utils.errors import UserError

INIT_STD = 0.02


class LayerNorm(nn.LayerNorm):
    """Layer norm that keeps a buffer of zeros if its bias is not learned, because the published files contain one."""

    def __init__(self, dim: int, eps: float = 1e-6, bias: bool = True):
        super().__init__(dim, eps=eps, bias=bias)
        if not bias:
            del self.bias
            self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        # The kernel computes in float32 whatever the type of x. Autocast would convert a 16-bit x before F.layer_norm,
        # and the copy would be kept for the backward pass. FSDP may gather the weight in lower precision than x.
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return torch.native_layer_norm(x, self.normalized_shape, weight, bias, self.eps)[0]


@dataclass(frozen=True)
class BlockOptions:
    """Options that all blocks of a model share.

    Attributes:
        dim, num_heads, mlp_ratio: Width, attention heads, and hidden width of the MLP relative to ``dim``.
        qkv_bias, proj_bias, mlp_bias: Which linear layers have biases.
        act_layer, norm_layer: Classes of the activation and of the norms; the norm is called with the width.
        gated_mlp: Use :class:`GatedMlp` instead of :class:`Mlp`.
        qk_norm: Normalise the queries and keys of each head.

    Raises:
        UserError: If the sizes do not fit together.
    """

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
    """Convert a mask of keys, (B, K) or (B, Q, K) with True = masked, into the mask that attention takes.

    A query whose keys are all masked sees all of them instead, so that its softmax stays finite. If all keys are
    padding, they are equal, so the query reads one padding token regardless of their number.

    Returns:
        The ``mask`` of the attention modules, (B, 1, Q or 1, K) bool, True = may attend.
    """
    allowed = ~(masked if masked.ndim == 3 else masked[:, None])
    return (allowed | ~allowed.any(-1, keepdim=True))[:, None]


def additive(mask: Tensor, x: Tensor) -> Tensor:
    """Convert a mask from :func:`attendable` to 0 and −inf, which attention over ``x`` adds to its scores.

    Attention does the same with a bool mask, but again in every block, and it keeps each copy for the backward pass.
    """
    device = x.device.type
    lower = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if lower else x.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


@dataclass(frozen=True)
class Slots:
    """Where packed tokens lie in the batch.

    Packed tokens are the T rows of a matrix, without padding. Linear layers and norms work on the rows; only attention
    needs the slots of each sample.

    Attributes:
        index: (T,) Slot of each token, as an index into the B·S slots.
        shape: B and S.
        lengths: Number of tokens of each sample, if the tokens are sorted by slot and attention is to be computed for
            one sample after another. On a CPU that is faster than to place them, because it needs neither copies nor a
            mask.
    """

    index: Tensor
    shape: tuple[int, int]
    lengths: tuple[int, ...] | None = None

    def place(self, rows: Tensor) -> Tensor:
        """Scatter the tokens, (T, D), into their slots (B, S, D); padding is zero."""
        return _Placed.apply(rows, self.index, math.prod(self.shape)).view(*self.shape, -1)

    def take(self, slots: Tensor) -> Tensor:
        """Gather the tokens, (T, D), from their slots (B, S, D)."""
        return slots.flatten(0, 1).index_select(0, self.index)

    def samples(self, rows: Tensor) -> list[Tensor]:
        """Split sorted tokens, (T, D), into those of each sample, (1, n, D) each; with ``lengths`` only."""
        assert self.lengths is not None
        return [part[None] for part in rows.split(self.lengths)]

    def sample(self) -> Tensor:
        """Return the index of each token's sample, (T,)."""
        return self.index // self.shape[1]


class _Placed(torch.autograd.Function):
    """Copies rows into a matrix of zeros.

    ``index_copy`` would keep the rows for its backward pass, and that of ``index_put`` takes twice as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(index)
        return rows.new_zeros(count, rows.shape[1]).index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, *ctx.saved_tensors), None, None


class KeysValues(NamedTuple):
    """The keys and values that queries attend to, (B, H, K, C) each."""

    keys: Tensor
    values: Tensor


Context = KeysValues | list[KeysValues]
"""The keys and values of a context, or those of each sample, (1, H, K_b, C) each."""


class Past(Protocol):
    """Stores the keys and values of earlier tokens, see :mod:`fourm.generation.kv_cache`."""

    def extend(self, new: KeysValues) -> KeysValues:
        """Append the keys and values of new tokens and return those of all tokens so far."""


class _MultiHead(nn.Module):
    """Base class of self- and cross-attention."""

    def __init__(self, options: BlockOptions):
        super().__init__()
        self.num_heads = options.num_heads
        norm = options.norm_layer if options.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(options.dim // options.num_heads) for _ in range(2))
        self.proj = nn.Linear(options.dim, options.dim, bias=options.proj_bias)

    def heads(self, x: Tensor, parts: int, slots: Slots | None) -> Tensor:
        """Split ``parts`` projections of the tokens into heads: (B, N, parts·D), or packed, → (parts, B, H, N, C)."""
        if slots is not None:
            x = slots.place(x)
        # These operations do what einops would; generation of texts calls them so often that its time would show.
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def mix(self, q: Tensor, keys_values: KeysValues, mask: Tensor | None = None) -> Tensor:
        """Compute attention for the queries, (B, H, Q, C) → (B, Q, D), without the final projection."""
        y = F.scaled_dot_product_attention(self.q_norm(q), keys_values.keys, keys_values.values, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, keys_values: KeysValues, mask: Tensor | None, slots: Slots | None) -> Tensor:
        """Compute attention for the queries, (B, H, Q, C) → (B, Q, D), or packed as ``slots`` says."""
        y = self.mix(q, keys_values, mask)
        return self.proj(y if slots is None else slots.take(y))


class Attention(_MultiHead):
    """Multi-head self-attention."""

    def __init__(self, options: BlockOptions):
        super().__init__(options)
        self.qkv = nn.Linear(options.dim, 3 * options.dim, bias=options.qkv_bias)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, past: Past | None = None, slots: Slots | None = None
    ) -> Tensor:
        """Attend within ``x``, (B, N, D) → (B, N, D); with a ``past``, ``x`` also attends to the tokens before it."""
        if slots is not None and slots.lengths is not None:
            y = [self._mix_sample(part) for part in slots.samples(self.qkv(x))]
            return self.proj(torch.cat(y, 1)[0])
        q, k, v = self.heads(self.qkv(x), 3, slots)
        keys_values = KeysValues(self.k_norm(k), v)
        return self.attend(q, keys_values if past is None else past.extend(keys_values), mask, slots)

    def _mix_sample(self, qkv: Tensor) -> Tensor:
        q, k, v = self.heads(qkv, 3, None)
        return self.mix(q, KeysValues(self.k_norm(k), v))


class CrossAttention(_MultiHead):
    """Multi-head attention from ``x`` to ``context``."""

    def __init__(self, options: BlockOptions):
        super().__init__(options)
        self.q = nn.Linear(options.dim, options.dim, bias=options.qkv_bias)
        self.kv = nn.Linear(options.dim, 2 * options.dim, bias=options.qkv_bias)

    def keys_values(self, context: Tensor, slots: Slots | None = None) -> Context:
        """Compute the keys and values of the context, (B, K, D) or packed; a list by sample if ``slots`` has them."""
        kv = self.kv(context)
        if slots is not None and slots.lengths is not None:
            return [self._normed(self.heads(part, 2, None)) for part in slots.samples(kv)]
        return self._normed(self.heads(kv, 2, slots))

    def forward(self, x: Tensor, context: Context, mask: Tensor | None = None, slots: Slots | None = None) -> Tensor:
        """Attend to ``context``, which :meth:`keys_values` returns: (B, M, D) → (B, M, D)."""
        (q,) = self.heads(self.q(x), 1, slots)
        if isinstance(context, KeysValues):
            return self.attend(q, context, mask, slots)
        y = torch.cat([self.mix(part, own) for part, own in zip(q.split(1), context, strict=True)])
        return self.proj(y if slots is None else slots.take(y))

    def _normed(self, keys_values: Tensor) -> KeysValues:
        k, v = keys_values
        return KeysValues(self.k_norm(k), v)


class Mlp(nn.Module):
    """The MLP ``fc2(act(fc1(x)))``."""

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
        return keep_only_inputs(self.project, self.fc1(x))

    def project(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(hidden))


class GatedMlp(Mlp):
    """The gated MLP ``fc2(act(fc1(x)) · fc3(x))``, narrowed to two thirds to have as many parameters as ``Mlp``."""

    def __init__(self, options: BlockOptions):
        super().__init__(options)
        self.fc3 = nn.Linear(options.dim, self.fc1.out_features, bias=options.mlp_bias)

    @staticmethod
    def hidden_dim(width: int) -> int:
        return int(2 * width / 3)

    def forward(self, x: Tensor) -> Tensor:
        return keep_only_inputs(self.project, self.fc1(x), self.fc3(x))

    def project(self, hidden: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc2(self.act(hidden) * gate)


def keep_only_inputs(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call ``function`` and keep nothing but its inputs for the backward pass.

    The backward pass recomputes the tensors that it needs, up to the input of the last linear layer; the product of
    that layer is not computed again. ``torch.compile`` itself decides which element-wise operations to recompute.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class DropPath(nn.Module):
    """Stochastic depth: drops a branch for some samples in training and scales it up for the others to keep the mean.

    Args:
        drop_prob: Probability of dropping the branch, in [0, 1].
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, slots: Slots | None = None) -> Tensor:
        """Drop the branch ``x``, (B, ...) → (B, ...), or of packed tokens."""
        if self.drop_prob == 0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        samples = len(x) if slots is None else slots.shape[0]
        kept = x.new_empty(samples, *[1] * (x.ndim - 1)).bernoulli_(keep_prob)
        if slots is not None:
            kept = kept[slots.sample()]
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

    def forward(self, x: Tensor, mask: Tensor | None = None, slots: Slots | None = None) -> Tensor:
        """Run the block, (B, N, D) → (B, N, D), or on tokens packed as ``slots`` says.

        Args:
            x: The tokens.
            mask: Mask of the slots from :func:`attendable`.
            slots: Slots of packed tokens.
        """
        x = x + self.drop_path(self.attn(self.norm1(x), mask, slots=slots), slots)
        return x + self.drop_path(self.mlp(self.norm2(x)), slots)


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

    def keys_values(self, context: Tensor, slots: Slots | None = None) -> Context:
        """Compute the keys and values of the context (B, N, D), which do not depend on the targets."""
        return self.cross_attn.keys_values(self.context_norm(context), slots)

    def forward(
        self,
        y: Tensor,
        context: Tensor | Context,
        self_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        past: Past | None = None,
        slots: Slots | None = None,
        context_slots: Slots | None = None,
    ) -> Tensor:
        """Run the block, (B, M, D) → (B, M, D), or on packed tokens.

        Args:
            y: The targets.
            context: The context (B, N, D), or its :meth:`keys_values`.
            self_mask, context_mask: Masks from :func:`attendable`.
            past: Keys and values of the targets before ``y``, which do not see ``y``.
            slots, context_slots: Slots of packed targets, and of a packed context.
        """
        keys_values = self.keys_values(context, context_slots) if isinstance(context, Tensor) else context
        y = y + self.drop_path(self.self_attn(self.norm1(y), self_mask, past, slots), slots)
        y = y + self.drop_path(self.cross_attn(self.query_norm(y), keys_values, context_mask, slots), slots)
        return y + self.drop_path(self.mlp(self.norm2(y)), slots)


def init_weights(model: nn.Module, std: float = INIT_STD) -> None:
    """Initialise all submodules of ``model``, the embedding vectors with ``std``.

    A tied output matrix is initialised twice, first as an embedding and then as a linear layer, and so ends up
    Xavier-uniform.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # Fused matrices are initialised like separate ones.
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
