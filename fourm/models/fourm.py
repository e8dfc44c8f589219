"""4M: one transformer encoder-decoder for all modalities (arXiv 2312.06647, 2406.09406).

Shapes: B batch, N encoder slots, R register tokens, M decoder slots, L tokens of one modality, n_m selected tokens of
modality m in the whole batch, D model width, V vocabulary size. Masks: True = masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourm.data.collate import ModDict
from fourm.data.modality_info import as_modality
from fourm.models.encoder import Encoder, drop_path_rates, set_trainable, tensor_of
from fourm.models.fm_utils import INIT_STD, BlockOptions, DecoderBlock, LayerNorm, Slots, additive, attendable
from fourm.models.modality_embedding import POS_TEMPERATURE, ModalityEmbedding
from fourm.models.token_selection import Selection, TokenSelection, select_inputs, select_tokens
from fourm.utils.errors import UserError, did_you_mean


class FourM(Encoder):
    """The 4M model, built from the embedding modules of its modalities.

    Args:
        encoder_embeddings, decoder_embeddings: Maps each modality that can be an input, or a target, to its embedding
            module.
        modality_info: Maps each modality to its entry in the modality table.
        dim, encoder_depth, decoder_depth, num_heads, mlp_ratio: Sizes of the trunk.
        qkv_bias, proj_bias, mlp_bias: Which linear layers of the blocks have biases.
        drop_path_rate_encoder, drop_path_rate_decoder: Stochastic depth rate of the last block; it grows linearly from
            0.
        shared_drop_path: Let the rate grow across encoder and decoder as if they were one stack.
        act_layer, norm_layer: Classes of the activation and of the norms; the norm is called with the width.
        gated_mlp, qk_norm: See :mod:`fourm.models.fm_utils`.
        decoder_causal_mask: Let a target see only the targets before it, regardless of ``decoder_attention_mask``.
        decoder_sep_mask: Let a target see only targets of its own modality.
        num_register_tokens: Number of learned tokens in front of the encoder tokens.
        use_act_checkpoint: Recompute the blocks in the backward pass instead of keeping their activations; a number k
            recomputes only every k-th block.
        share_modality_embeddings: Use the same modality vector for a modality in encoder and decoder.
        init_std: Standard deviation of the initial embedding vectors. The published models use 0.02, which is small
            compared to the position vectors, whose entries are about 0.7; with 0.5 a short run learns much sooner to
            read its tokens.
        pos_temperature: Temperature of the sine-cosine positions in images, see :func:`sincos_table`. With the
            published 10 000, the vectors of neighbours have a cosine similarity of 0.98. On small grids, a short run
            learns much sooner to look at the same place in another modality if the temperature is at most a few times
            the side of the grid.
    """

    def __init__(
        self,
        encoder_embeddings: Mapping[str, ModalityEmbedding],
        decoder_embeddings: Mapping[str, ModalityEmbedding],
        modality_info: Mapping[str, Mapping[str, Any]],
        dim: int = 768,
        encoder_depth: int = 12,
        decoder_depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        mlp_bias: bool = True,
        drop_path_rate_encoder: float = 0.0,
        drop_path_rate_decoder: float = 0.0,
        shared_drop_path: bool = False,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        gated_mlp: bool = False,
        qk_norm: bool = False,
        decoder_causal_mask: bool = False,
        decoder_sep_mask: bool = True,
        num_register_tokens: int = 0,
        use_act_checkpoint: bool | int = False,
        share_modality_embeddings: bool = True,
        init_std: float = INIT_STD,
        pos_temperature: float = POS_TEMPERATURE,
    ):
        options = BlockOptions(
            dim, num_heads, mlp_ratio, qkv_bias, proj_bias, mlp_bias, act_layer, norm_layer, gated_mlp, qk_norm
        )
        depth = encoder_depth + decoder_depth
        encoder_rates = drop_path_rates(drop_path_rate_encoder, depth if shared_drop_path else encoder_depth)
        decoder_rates = drop_path_rates(drop_path_rate_decoder, depth if shared_drop_path else decoder_depth)
        super().__init__(
            encoder_embeddings,
            options,
            encoder_rates[:encoder_depth],
            num_register_tokens,
            use_act_checkpoint,
            init_std,
            pos_temperature,
        )
        check_ids({name: modality_info[name] for name in {**encoder_embeddings, **decoder_embeddings}})
        self.modality_info = modality_info
        self.decoder_causal_mask, self.decoder_sep_mask = decoder_causal_mask, decoder_sep_mask
        self.share_modality_embeddings = share_modality_embeddings
        self.decoder_embeddings: Any = self.init_embeddings(decoder_embeddings, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_proj_context = nn.Linear(dim, dim)
        self.decoder = nn.ModuleList(
            DecoderBlock(options, rate) for rate in decoder_rates[len(decoder_rates) - decoder_depth :]
        )
        self.decoder_norm = options.norm()
        self.cross_entropy = CrossEntropy()
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise all parameters and buffers; models built on the meta device need ``to_empty`` before."""
        for embedding in self.decoder_embeddings.values():
            embedding.tie()
        if self.share_modality_embeddings:
            for name in self.encoder_embeddings.keys() & self.decoder_embeddings.keys():
                self.decoder_embeddings[name].mod_emb = self.encoder_embeddings[name].mod_emb
        super().init_weights()
        nn.init.normal_(self.mask_token, std=self.init_std)

    @property
    def encoder_modalities(self) -> dict[str, int]:
        """Modalities that can be inputs, and their ids."""
        return {name: as_modality(name, self.modality_info[name]).id for name in self.encoder_embeddings}

    @property
    def decoder_modalities(self) -> dict[str, int]:
        """Modalities that can be targets, and their ids."""
        return {name: as_modality(name, self.modality_info[name]).id for name in self.decoder_embeddings}

    def compile_blocks(self, **options: Any) -> None:
        """Compile every block and the cross-entropy in place, which keeps the parameter names.

        Args:
            options: Go to ``torch.compile``.
        """
        for block in (*self.encoder, *self.decoder):
            block.compile(**options)
        self.cross_entropy.compile(**options | {"dynamic": True})

    def forward(
        self,
        mod_dict: ModDict,
        num_encoder_tokens: int,
        num_decoder_tokens: int,
        loss_type: str = "mod",
        return_logits: bool = False,
        selection: TokenSelection | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]] | dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            mod_dict: Maps each modality to its tensor, input_mask, target_mask and decoder_attention_mask (method
                section 1).
            num_encoder_tokens, num_decoder_tokens: Slots per sample; ignored if ``selection`` is given.
            loss_type: ``mod`` averages the mean cross-entropies of the target modalities in ``mod_dict``, whether or
                not they have targets; ``token`` averages over all target tokens.
            return_logits: Return the logits of the selected targets instead of the loss.
            selection: The tokens to use, from :meth:`select_tokens`, on the device of the batch. If it is given, the
                forward pass never waits for the device.

        Returns:
            The loss, and the mean cross-entropy of each target modality of the model, which is 0 without targets. With
            ``return_logits``, {modality: (n_m, V)}.

        Raises:
            UserError: If ``loss_type`` is unknown.
        """
        if selection is None:
            selection = self.select_tokens(mod_dict, num_encoder_tokens, num_decoder_tokens)
        x, emb, masked = self.embed_encoder(mod_dict, selection.encoder)
        padding = None if selection.encoder.full else masked  # attention is faster without a mask
        slots = self.encoder_slots(selection.encoder) if selection.encoder.packed else None
        context = self.context(self.encode(x + emb, padding, slots), emb)
        y = self.decode(
            self.embed_decoder(mod_dict, selection.decoder),
            context,
            padding,
            self.target_mask(selection.decoder),
            selection.decoder.slots if selection.decoder.packed else None,
            slots,
        )
        logits = self.logits(y, selection.decoder)
        return logits if return_logits else self.loss(logits, mod_dict, selection.decoder, loss_type)

    def select_tokens(
        self,
        mod_dict: ModDict,
        num_encoder_tokens: int,
        num_decoder_tokens: int,
        generator: torch.Generator | None = None,
        pack: bool = False,
    ) -> TokenSelection:
        """Select the tokens that the model uses: :func:`select_tokens` for the modalities of the model."""
        inputs = {name: self.modality_info[name] for name in self.encoder_embeddings}
        targets = {name: self.modality_info[name] for name in self.decoder_embeddings}
        return select_tokens(mod_dict, inputs, targets, num_encoder_tokens, num_decoder_tokens, generator, pack)

    def pooled(self, mod_dict: ModDict) -> Tensor:
        """Encode all inputs of a batch and return the mean of the output over the input tokens, (B, D)."""
        inputs = {name: self.modality_info[name] for name in self.encoder_embeddings}
        x, emb, padding = self.embed_encoder(mod_dict, select_inputs(mod_dict, inputs))
        tokens, valid = (
            part[:, self.num_register_tokens :] for part in (self.encode(x + emb, padding), ~padding[..., None])
        )
        return (tokens * valid).sum(1) / valid.sum(1).clamp(min=1)

    def context(self, encoded: Tensor, emb: Tensor) -> Tensor:
        """Return what the decoder attends to, (B, R + N, D): the projected encoder output plus ``emb``."""
        return self.decoder_proj_context(encoded) + emb

    def embed_decoder(self, mod_dict: ModDict, selection: Selection) -> Tensor:
        """Embed the targets, (B, M, D) or packed: content + position + modality."""
        rows = selection.rows()
        # DDP needs a gradient for every parameter: zero rows keep the mask token in the graph without image targets.
        tokens = [(self.mask_token[0, :0], self.mask_token[0, :0])] + [
            embedding(tensor_of(mod_dict, name, embedding), rows[name], self.mask_token)
            for name, embedding in self.decoder_embeddings.items()
        ]
        x, emb = (selection.place(part) for part in zip(*tokens, strict=True))
        return x + emb

    def target_mask(self, selection: Selection) -> Tensor:
        """Return which targets each target must not see, (B, M, M).

        Target i sees target j if j < cumsum(attention)_i: with [4, 0, 0, 0], all four see each other; [1, 1, 1, 1] is
        causal.
        """
        column = torch.arange(selection.modality.shape[1], device=selection.modality.device)
        end = column + 1 if self.decoder_causal_mask else selection.attention.cumsum(1)
        masked = (column >= end[..., None]) | selection.padding[:, None]
        if self.decoder_sep_mask:
            masked = masked | (selection.modality[:, None] != selection.modality[..., None])
        return masked

    def decode(
        self,
        y: Tensor,
        context: Tensor,
        context_padding: Tensor | None,
        target_mask: Tensor | None,
        slots: Slots | None = None,
        context_slots: Slots | None = None,
    ) -> Tensor:
        """Run the decoder on the targets ``y`` (B, M, D) and the context (B, R + N, D); returns (B, M, D).

        With ``slots`` the targets, and with ``context_slots`` the context, are packed.
        """
        self_mask, context_mask = (
            None if mask is None else additive(attendable(mask), y) for mask in (target_mask, context_padding)
        )
        y, context = y.to(self.residual_dtype), context.to(self.residual_dtype)
        past = None
        y = self.run_blocks(self.decoder, y, context, self_mask, context_mask, past, slots, context_slots)
        return self.decoder_norm(y)

    def logits(self, y: Tensor, selection: Selection) -> dict[str, Tensor]:
        """Return the logits of each modality, (n_m, V), from its own positions in the decoder output."""
        return {name: self.decoder_embeddings[name].to_logits(rows) for name, rows in selection.take(y).items()}

    def loss(
        self, logits: dict[str, Tensor], mod_dict: ModDict, selection: Selection, loss_type: str = "mod"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss as in :meth:`forward`.

        The sum over no targets is 0, but it keeps the parameters of the modality in the graph.
        """
        sums = {}
        for name, rows in selection.rows().items():
            embedding = self.decoder_embeddings[name]
            targets = embedding.targets(tensor_of(mod_dict, name, embedding), rows)
            # torch.compile would compile variants of its own for no target and for one.
            compute = self.cross_entropy if len(targets) > 1 else self.cross_entropy.forward
            sums[name] = compute(logits[name], targets)
        means = {name: total / max(selection.counts[name], 1) for name, total in sums.items()}
        if loss_type == "mod":
            present = [mean for name, mean in means.items() if name in mod_dict]
            # The sums of the other modalities are 0. They give their parameters the gradient that DDP waits for.
            absent = [total for name, total in sums.items() if name not in mod_dict]
            mean = [torch.stack(present).mean()] if present else []
            return torch.stack([*mean, *absent]).sum(), means
        if loss_type == "token":
            return torch.stack(list(sums.values())).sum() / max(sum(selection.counts.values()), 1), means
        raise UserError(f"loss_type must be 'mod' or 'token', not {loss_type!r}")

    # Freezing. `frozen_embedding_domain` lists modalities joined by "-", as in the configurations.

    def get_num_layers_decoder(self) -> int:
        return len(self.decoder)

    def decoder_trunk(self) -> list[nn.Module | nn.Parameter]:
        return [self.mask_token, self.decoder_proj_context, self.decoder, self.decoder_norm]

    def freeze_encoder_except_specific_embeddings(self, frozen_embedding_domain: str) -> None:
        """Freeze the encoder trunk and the encoder embeddings of ``frozen_embedding_domain``."""
        embeddings = self._select_embeddings(self.encoder_embeddings, frozen_embedding_domain)
        set_trainable(False, *self.encoder_trunk(), *embeddings)

    def freeze_decoder(self, freeze_embeddings: bool = True) -> None:
        set_trainable(False, *self.decoder_trunk(), *([self.decoder_embeddings] if freeze_embeddings else []))

    def freeze_decoder_except_specific_embeddings(self, frozen_embedding_domain: str) -> None:
        """Freeze the decoder trunk and the decoder embeddings of ``frozen_embedding_domain``."""
        embeddings = self._select_embeddings(self.decoder_embeddings, frozen_embedding_domain)
        set_trainable(False, *self.decoder_trunk(), *embeddings)

    def unfreeze_decoder(self, unfreeze_embeddings: bool = True) -> None:
        set_trainable(True, *self.decoder_trunk(), *([self.decoder_embeddings] if unfreeze_embeddings else []))

    def freeze_shared_params(self) -> None:
        """Freeze everything except the embeddings."""
        set_trainable(False, *self.encoder_trunk(), *self.decoder_trunk())

    def unfreeze_shared_params(self) -> None:
        set_trainable(True, *self.encoder_trunk(), *self.decoder_trunk())

    def freeze_params_except_specific_embeddings(self, frozen_embedding_domain: str) -> None:
        """Freeze the trunk and the embeddings of ``frozen_embedding_domain``."""
        self.freeze_encoder_except_specific_embeddings(frozen_embedding_domain)
        self.freeze_decoder_except_specific_embeddings(frozen_embedding_domain)

    def unfreeze_all(self) -> None:
        set_trainable(True, self)

    def _select_embeddings(self, embeddings: Mapping[str, ModalityEmbedding], domains: str) -> list[ModalityEmbedding]:
        known = {**self.encoder_embeddings, **self.decoder_embeddings}
        for name in domains.split("-"):
            if name not in known:
                raise UserError(
                    f"frozen_embedding_domain: the model has no modality '{name}'{did_you_mean(name, known)}"
                )
        return [embeddings[name] for name in domains.split("-") if name in embeddings]


class CrossEntropy(nn.Module):
    """The sum of cross-entropies in float32. If it is compiled, no logits in float32 reach the memory."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum the cross-entropies of logits, (n, V), and the ids of the targets, (n,) → a scalar."""
        return F.cross_entropy(logits.float(), targets, reduction="sum")


def check_ids(modalities: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the ids of the modalities, by which the decoder tells them apart, are valid and unique.

    An id is 15 bits of a hash of the modality's name, unless its entry sets one.

    Raises:
        UserError: If two modalities have the same id, or an id is not a 15-bit number.
    """
    names: dict[int, str] = {}
    for name, modality in modalities.items():
        modality_id = modality["id"]
        if isinstance(modality_id, bool) or not isinstance(modality_id, int) or not 0 <= modality_id < 2**15:
            raise UserError(
                f"modality {name}: its id must be a whole number from 0 to {2**15 - 1}, not {modality_id!r}"
            )
        if modality_id in names:
            raise UserError(
                f"modalities {names[modality_id]} and {name} have the same id, {modality_id}, and would see each "
                "other's targets; give one of them another name, or another 'id' if its entry sets one"
            )
        names[modality_id] = name
