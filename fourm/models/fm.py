"""4M: one transformer encoder-decoder for all modalities (arXiv 2312.06647, 2406.09406; method sections 2-4).

Shapes: B batch, N encoder slots, R register tokens, M decoder slots, L tokens of one modality, n_m selected tokens of
modality m in the whole batch, D model width, V vocabulary. Masks: True = masked.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourm.data.collate import ModDict
from fourm.data.modality_info import Modality, resolve_modalities
from fourm.models import decoder_embeddings, encoder_embeddings
from fourm.models.encoder import Encoder, drop_path_rates, set_trainable, tensor_of
from fourm.models.fm_utils import INIT_STD, BlockOptions, DecoderBlock, LayerNorm, additive, attendable
from fourm.models.hub import Hub4M, trunk_options
from fourm.models.modality_embedding import POS_TEMPERATURE, ModalityEmbedding
from fourm.models.token_selection import Selection, TokenPlan, plan_tokens
from fourm.utils.config import Range, check_keys, convert_arguments, convert_fields
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.memory import check_memory
from fourm.utils.options import option


class FourM(Encoder):
    """The model, from embedding modules on.

    Args:
        encoder_embeddings, decoder_embeddings: modality → embedding module, for every modality that can be an input,
            or a target.
        modality_info: modality → its entry of the modality table.
        dim, encoder_depth, decoder_depth, num_heads, mlp_ratio: sizes of the trunk.
        qkv_bias, proj_bias, mlp_bias: which linear maps of the blocks have biases.
        drop_path_rate_encoder, drop_path_rate_decoder: stochastic depth of the last block, growing linearly from 0.
        shared_drop_path: the rate grows over encoder and decoder as if they were one stack.
        act_layer, norm_layer: classes of the activation and of the norms; the latter is called with the width.
        gated_mlp, qk_norm: see :mod:`fourm.models.fm_utils`.
        decoder_causal_mask: a target sees those before it, whatever the batch's ``decoder_attention_mask`` says.
        decoder_sep_mask: a target sees only targets of its own modality.
        num_register_tokens: learned tokens in front of the encoder's.
        use_act_checkpoint: recompute each block in the backward pass instead of keeping its activations; a number k =
            only every k-th block.
        share_modality_embeddings: a modality that is input and target has one modality vector.
        init_std: of the embedding vectors at first. Published models have 0.02, which is small beside the position vectors,
            whose entries are about 0.7; with 0.5 a short run learns much sooner to read its tokens.
        pos_temperature: of the sine-cosine positions in images, see :func:`sincos_table`. With the published 10 000
            neighbours have vectors of a cosine of 0.98; on small grids a short run learns much sooner to look at the
            same place of another modality if it is a few times the side of the grid, or less.
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
            encoder_embeddings, options, encoder_rates[:encoder_depth], num_register_tokens, use_act_checkpoint, init_std,
            pos_temperature,
        )  # fmt: skip
        check_ids({name: modality_info[name] for name in {**encoder_embeddings, **decoder_embeddings}})
        self.modality_info = modality_info
        self.decoder_causal_mask, self.decoder_sep_mask = decoder_causal_mask, decoder_sep_mask
        self.share_modality_embeddings = share_modality_embeddings
        self.decoder_embeddings: Any = self.sized(decoder_embeddings, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_proj_context = nn.Linear(dim, dim)
        self.decoder = nn.ModuleList(
            DecoderBlock(options, rate) for rate in decoder_rates[len(decoder_rates) - decoder_depth :]
        )
        self.decoder_norm = options.norm()
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise everything; also for a model built on the meta device, after ``to_empty``."""
        for embedding in self.decoder_embeddings.values():
            embedding.tie()
        if self.share_modality_embeddings:
            for name in self.encoder_embeddings.keys() & self.decoder_embeddings.keys():
                self.decoder_embeddings[name].mod_emb = self.encoder_embeddings[name].mod_emb
        super().init_weights()
        nn.init.normal_(self.mask_token, std=self.init_std)

    def compile_blocks(self, **options: Any) -> None:
        """``torch.compile`` every block, in place and with the same parameter names; ``options`` are of that function."""
        for block in (*self.encoder, *self.decoder):
            block.compile(**options)

    def forward(
        self,
        mod_dict: ModDict,
        num_encoder_tokens: int,
        num_decoder_tokens: int,
        loss_type: str = "mod",
        return_logits: bool = False,
        plan: TokenPlan | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]] | dict[str, Tensor]:
        """Loss of a batch.

        Args:
            mod_dict: modality → tensor, input_mask, target_mask, decoder_attention_mask (method section 1).
            num_encoder_tokens, num_decoder_tokens: slots per sample; they are read only if there is no ``plan``.
            loss_type: ``mod`` = mean over the target modalities that ``mod_dict`` names, with or without targets, of each
                one's mean cross-entropy; ``token`` = mean over all target tokens.
            return_logits: return the logits of the kept targets instead, {modality: (n_m, V)}.
            plan: the tokens to use, from :meth:`plan`, on the device of the batch. With one, nothing here waits for
                the device.

        Returns:
            The loss and {modality: its mean cross-entropy} of all target modalities of the model, 0 for one without
            targets.
        """
        if plan is None:
            plan = self.plan(mod_dict, num_encoder_tokens, num_decoder_tokens)
        x, emb, padding = self.embed_encoder(mod_dict, plan.encoder)
        context = self.context(self.encode(x + emb, padding), emb)
        y = self.decode(self.embed_decoder(mod_dict, plan.decoder), context, padding, self.target_mask(plan.decoder))
        logits = self.logits(y, plan.decoder)
        return logits if return_logits else self.loss(logits, mod_dict, plan.decoder, loss_type)

    def plan(
        self,
        mod_dict: ModDict,
        num_encoder_tokens: int,
        num_decoder_tokens: int,
        generator: torch.Generator | None = None,
    ) -> TokenPlan:
        """The tokens of a batch that the model will use: :func:`plan_tokens` with the model's modalities."""
        inputs = {name: self.modality_info[name] for name in self.encoder_embeddings}
        targets = {name: self.modality_info[name] for name in self.decoder_embeddings}
        return plan_tokens(mod_dict, inputs, targets, num_encoder_tokens, num_decoder_tokens, generator)

    def context(self, encoded: Tensor, emb: Tensor) -> Tensor:
        """What the decoder attends to, (B, R + N, D): the encoder's output, told again where each token belongs."""
        return self.decoder_proj_context(encoded) + emb

    def embed_decoder(self, mod_dict: ModDict, selection: Selection) -> Tensor:
        """→ (B, M, D): content + position + modality of the targets."""
        rows = selection.rows()
        # Without image targets, no row of the mask token keeps it in the graph, as DDP needs.
        tokens = [(self.mask_token[0, :0], self.mask_token[0, :0])] + [
            embedding(tensor_of(mod_dict, name, embedding), rows[name], self.mask_token)
            for name, embedding in self.decoder_embeddings.items()
        ]
        x, emb = (selection.place(part) for part in zip(*tokens, strict=True))
        return x + emb

    def target_mask(self, selection: Selection) -> Tensor:
        """Which targets each target must not see, (B, M, M).

        Target i sees j iff j < cumsum(attention)_i: [4, 0, 0, 0] = all four see each other, [1, 1, 1, 1] = causal.
        """
        column = torch.arange(selection.modality.shape[1], device=selection.modality.device)
        end = column + 1 if self.decoder_causal_mask else selection.attention.cumsum(1)
        masked = (column >= end[..., None]) | selection.padding[:, None]
        if self.decoder_sep_mask:
            masked = masked | (selection.modality[:, None] != selection.modality[..., None])
        return masked

    def decode(self, y: Tensor, context: Tensor, context_padding: Tensor, target_mask: Tensor) -> Tensor:
        """(B, M, D), (B, R + N, D) → (B, M, D)."""
        masks = (additive(attendable(mask), y) for mask in (target_mask, context_padding))
        return self.decoder_norm(self.run_blocks(self.decoder, y, context, *masks))

    def logits(self, y: Tensor, selection: Selection) -> dict[str, Tensor]:
        """Decoder output (B, M, D) → {modality: (n_m, V)}, from the positions of that modality only."""
        return {name: self.decoder_embeddings[name].to_logits(rows) for name, rows in selection.take(y).items()}

    def loss(
        self, logits: dict[str, Tensor], mod_dict: ModDict, selection: Selection, loss_type: str = "mod"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`forward`. Sums over no targets are 0, but keep a modality's parameters in the graph."""
        sums = {}
        for name, rows in selection.rows().items():
            embedding = self.decoder_embeddings[name]
            targets = embedding.targets(tensor_of(mod_dict, name, embedding), rows)
            sums[name] = F.cross_entropy(logits[name].float(), targets, reduction="sum")
        means = {name: total / max(selection.counts[name], 1) for name, total in sums.items()}
        if loss_type == "mod":
            named = [mean for name, mean in means.items() if name in mod_dict]
            absent = [total for name, total in sums.items() if name not in mod_dict]  # zeros, with a gradient for DDP
            mean = [torch.stack(named).mean()] if named else []
            return (torch.stack([*mean, *absent]).sum() if absent else mean[0]), means
        if loss_type == "token":
            return torch.stack(list(sums.values())).sum() / max(sum(selection.counts.values()), 1), means
        raise UserError(f"loss_type must be 'mod' or 'token', not {loss_type!r}")

    # Freezing. `frozen_embedding_domain` is a list of modalities joined by "-", as in the configs.

    def get_num_layers_decoder(self) -> int:
        return len(self.decoder)

    def decoder_trunk(self) -> list[nn.Module | nn.Parameter]:
        return [self.mask_token, self.decoder_proj_context, self.decoder, self.decoder_norm]

    def freeze_encoder_except_specific_embeddings(self, frozen_embedding_domain: str) -> None:
        """Freeze the encoder; of its embeddings only those of ``frozen_embedding_domain``."""
        set_trainable(False, *self.encoder_trunk(), *self._of_domains(self.encoder_embeddings, frozen_embedding_domain))

    def freeze_decoder(self, freeze_embeddings: bool = True) -> None:
        set_trainable(False, *self.decoder_trunk(), *([self.decoder_embeddings] if freeze_embeddings else []))

    def freeze_decoder_except_specific_embeddings(self, frozen_embedding_domain: str) -> None:
        """Freeze the decoder; of its embeddings only those of ``frozen_embedding_domain``."""
        set_trainable(False, *self.decoder_trunk(), *self._of_domains(self.decoder_embeddings, frozen_embedding_domain))

    def unfreeze_decoder(self, unfreeze_embeddings: bool = True) -> None:
        set_trainable(True, *self.decoder_trunk(), *([self.decoder_embeddings] if unfreeze_embeddings else []))

    def freeze_shared_params(self) -> None:
        """Freeze all but the embeddings."""
        set_trainable(False, *self.encoder_trunk(), *self.decoder_trunk())

    def unfreeze_shared_params(self) -> None:
        set_trainable(True, *self.encoder_trunk(), *self.decoder_trunk())

    def freeze_params_except_specific_embeddings(self, frozen_embedding_domain: str) -> None:
        """Freeze all but the embeddings, and of these those of ``frozen_embedding_domain``."""
        self.freeze_encoder_except_specific_embeddings(frozen_embedding_domain)
        self.freeze_decoder_except_specific_embeddings(frozen_embedding_domain)

    def unfreeze_all(self) -> None:
        set_trainable(True, self)

    def _of_domains(self, embeddings: Mapping[str, ModalityEmbedding], domains: str) -> list[ModalityEmbedding]:
        known = {**self.encoder_embeddings, **self.decoder_embeddings}
        for name in domains.split("-"):
            if name not in known:
                raise UserError(
                    f"frozen_embedding_domain: the model has no modality '{name}'{did_you_mean(name, known)}"
                )
        return [embeddings[name] for name in domains.split("-") if name in embeddings]


def check_ids(modalities: Mapping[str, Mapping[str, Any]]) -> None:
    """The decoder tells modalities apart by their ids alone, 15 bits of a hash of their names.

    Raises:
        UserError: two have the same one, or an own one is no 15-bit number.
    """
    names: dict[int, str] = {}
    for name, modality in modalities.items():
        number = modality["id"]
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**15:
            raise UserError(f"modality {name}: its id must be a whole number from 0 to {2**15 - 1}, not {number!r}")
        if other := names.get(number):
            raise UserError(
                f"modalities {other} and {name} have the same id, {number}, and would see each other's targets; "
                "give one of them another name, or another 'id' where its entry sets one"
            )
        names[number] = name


@dataclass(kw_only=True)
class _ConfigKeys:
    """The keys of a hub configuration that are not those of :class:`FourM`, or of another type there."""

    domains_in: list[str]
    domains_out: list[str]
    image_size: int = option("side in pixels", 224, at_least=1, at_most=100_000)
    patch_size: int = option("side in pixels", 16, at_least=1, at_most=10_000)
    act_layer: str = option("class in torch.nn", "GELU")
    norm_bias: bool = True
    modalities: dict[str, Any] = option("declarations", {})
    share_embedding: bool = False


_SIZE, _RATE = Range(at_least=1, at_most=2**16), Range(at_least=0, below=1)
_RANGES = {
    "dim": _SIZE,
    "num_heads": _SIZE,
    "encoder_depth": Range(at_least=1, at_most=1000),
    "decoder_depth": Range(at_least=1, at_most=1000),
    "mlp_ratio": Range(above=0, at_most=100),
    "drop_path_rate_encoder": _RATE,
    "drop_path_rate_decoder": _RATE,
    "num_register_tokens": Range(at_least=0, at_most=100_000),
    "use_act_checkpoint": Range(at_least=0, at_most=1000),
    "init_std": Range(at_least=0, at_most=1000),
    "pos_temperature": Range(above=0, at_most=1e9),
}
_NOT_IN_CONFIGS = {"self", "encoder_embeddings", "decoder_embeddings", "modality_info", "norm_layer"}
_OWN_KEYS = tuple(field.name for field in dataclasses.fields(_ConfigKeys))
CONFIG_KEYS = (
    *(key for key in inspect.signature(FourM.__init__).parameters if key not in _NOT_IN_CONFIGS | {"act_layer"}),
    *_OWN_KEYS,
)
_MOST_PARAMETERS = 10**12


def check_config(config: Mapping[str, Any], where: str = "model config") -> dict[str, Any]:
    """The values of a hub configuration, or of a part of one, each of its type.

    Raises:
        UserError: an unknown key, a value of another type, or a number that makes no model.
    """
    check_keys(config, CONFIG_KEYS, where)
    own = {key: value for key, value in config.items() if key in _OWN_KEYS}
    trunk = {key: value for key, value in config.items() if key not in _OWN_KEYS}
    values = convert_arguments(FourM, trunk, where, _RANGES) | convert_fields(_ConfigKeys, own, where)
    return {key: value for key, value in values.items() if config[key] is not None}


def _check_memory(options: Mapping[str, Any], modalities: Iterable[Modality]) -> None:
    """Raise a :class:`UserError` for a model that this machine cannot hold: the system would end the process."""
    defaults = inspect.signature(FourM.__init__).parameters
    dim, encoder, decoder, ratio = (
        options.get(key, defaults[key].default) for key in ("dim", "encoder_depth", "decoder_depth", "mlp_ratio")
    )
    parameters = dim * dim * (encoder * (4 + 2 * ratio) + decoder * (8 + 2 * ratio))
    for modality in modalities:
        patch = (modality.num_channels or 0) * (modality.patch_size or 0) ** 2
        parameters += dim * max(modality.vocab_size or 0, patch, modality.max_tokens or 0)
    if parameters > _MOST_PARAMETERS:
        raise UserError(
            f"model config: about {parameters:.1e} parameters are more than any model has; lower 'dim' or the depths"
        )
    if torch.get_default_device().type == "cpu":
        check_memory("model config", parameters, "lower 'dim' or the depths")


class FM(FourM, Hub4M):
    """A 4M model from a hub configuration; ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``.

    Args:
        config: any argument of :class:`FourM` (``act_layer`` by its name in ``torch.nn``) and

            * ``domains_in``, ``domains_out``: modalities that can be inputs, and targets
            * ``image_size``, ``patch_size``: of images whose table entry leaves them open
            * ``norm_bias``: whether norms learn a bias
            * ``modalities``: declarations of modalities that are not in the table, or differ from it
            * ``share_embedding``: ``to_logits`` is tied to ``token_emb``, as in training (published files: untied)
    """

    def __init__(self, config: dict):
        options = check_config(config)
        try:
            domains_in, domains_out = options.pop("domains_in"), options.pop("domains_out")
        except KeyError as missing:
            raise UserError(f"model config: the key {missing} is required") from None
        declarations = options.pop("modalities", None)
        modalities = resolve_modalities([*domains_in, *domains_out], declarations, "model config")
        sizes = {key: options.pop(key, default) for key, default in (("image_size", 224), ("patch_size", 16))}
        share = options.pop("share_embedding", False)
        _check_memory(options, modalities.values())
        super().__init__(
            {name: build_embedding(modalities[name], "encoder", sizes) for name in domains_in},
            {name: build_embedding(modalities[name], "decoder", sizes, share_embedding=share) for name in domains_out},
            modalities,
            **trunk_options(options),
        )
        self.config = copy.deepcopy(config)


def own_embeddings(base: type[ModalityEmbedding] = ModalityEmbedding) -> dict[str, type[ModalityEmbedding]]:
    """Name → class of the embeddings that modules outside of this package define, wherever they have been imported from."""
    found = {}
    for cls in base.__subclasses__():
        if cls.__module__.split(".")[0] != __name__.split(".")[0]:
            found[cls.__name__] = cls
        found |= own_embeddings(cls)
    return found


_OF_EMBEDDINGS = dict.fromkeys(
    ("vocab_size", "max_length", "max_sincos_pos_emb", "dim_tokens", "num_channels", "patch_size", "image_size", "orig_emb_dim",
     "bottleneck_dim"), Range(at_least=1, at_most=10**8)
)  # fmt: skip


def build_embedding(modality: Modality, side: str, sizes: Mapping[str, int], **options: Any) -> ModalityEmbedding:
    """The embedding module that the modality table names.

    Args:
        side: ``encoder`` or ``decoder``.
        sizes: ``image_size`` and ``patch_size`` where the table leaves them open.
    """
    class_name = modality[f"{side}_embedding"]
    if class_name is None:
        raise UserError(f"modality {modality.name} cannot be {'an input' if side == 'encoder' else 'a target'}")
    classes = vars({"encoder": encoder_embeddings, "decoder": decoder_embeddings}[side]) | own_embeddings()
    if class_name not in classes:
        raise UserError(
            f"modality {modality.name}: no {side} embedding '{class_name}'{did_you_mean(class_name, classes)}; "
            "if it is your own, 'plugin' must name its module"
        )
    if modality.type == "img":
        options |= {"image_size": modality.input_size or sizes["image_size"]}
        options |= {"patch_size": modality.patch_size or sizes["patch_size"]}
    if modality.is_pixels:
        options["num_channels"] = modality.num_channels
    elif modality.type != "seq_emb":
        options["vocab_size"] = modality.vocab_size
    cls = classes[class_name]
    own = convert_arguments(
        cls, modality.embedding_options, f"modality {modality.name}: embedding_options", _OF_EMBEDDINGS
    )
    return cls(**options | own)
