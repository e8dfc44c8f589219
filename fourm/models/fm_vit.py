"""The RGB-only encoder of a 4M model, as a plain vision transformer.

Shapes: B batch, N patches, D model width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

from torch import Tensor, nn

from fourm.data.modality_info import resolve_modalities
from fourm.models.encoder import Encoder, drop_path_rates
from fourm.models.fm import CONFIG_KEYS, build_embedding, check_config
from fourm.models.fm_utils import BlockOptions, LayerNorm
from fourm.models.hub import Hub4M, trunk_options
from fourm.models.modality_embedding import ModalityEmbedding
from fourm.models.token_selection import Selection
from fourm.utils.errors import UserError


class FourMViT(Encoder):
    """A vision transformer, (B, 3, H, W) → (B, N, D) or the output of its head.

    Args:
        encoder_embedding: Embedding module of the pixels.
        modality: Name of the modality, as in the checkpoints to load.
        output_head: Module that is called with (B, N, D).

    The other arguments are those of :class:`fourm.models.fourm.FourM`.
    """

    def __init__(
        self,
        encoder_embedding: ModalityEmbedding,
        modality: str = "rgb@224",
        dim: int = 768,
        encoder_depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        mlp_bias: bool = True,
        drop_path_rate_encoder: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        gated_mlp: bool = False,
        qk_norm: bool = False,
        num_register_tokens: int = 0,
        use_act_checkpoint: bool = False,
        output_head: nn.Module | None = None,
    ):
        options = BlockOptions(
            dim, num_heads, mlp_ratio, qkv_bias, proj_bias, mlp_bias, act_layer, norm_layer, gated_mlp, qk_norm
        )
        rates = drop_path_rates(drop_path_rate_encoder, encoder_depth)
        super().__init__({modality: encoder_embedding}, options, rates, num_register_tokens, use_act_checkpoint)
        self.modality = modality
        self.init_weights()  # before the head is set, which keeps its own weights
        self.output_head = nn.Identity() if output_head is None else output_head

    def forward(self, x: Tensor) -> Tensor:
        """Encode the pixels, (B, 3, H, W) → (B, N, D), and apply the output head."""
        num_patches = self.encoder_embeddings[self.modality].num_positions
        selection = Selection.everything(self.modality, len(x), num_patches, x.device)
        tokens, emb, _ = self.embed_encoder({self.modality: {"tensor": x}}, selection)
        return self.output_head(self.encode(tokens + emb)[:, self.num_register_tokens :])


_VIT_KEYS = {*inspect.signature(FourMViT.__init__).parameters} & {*CONFIG_KEYS} | {"norm_bias"}


class FMViT(FourMViT, Hub4M):
    """A ViT from a hub configuration. It loads complete 4M checkpoints and drops the weights that it does not have.

    Args:
        config: Configuration of an :class:`fourm.models.fm.FM`, or only the keys of the encoder with ``image_size`` and
            ``patch_size``.
        output_head: See :class:`FourMViT`; its weights are not in the files of the model.

    Raises:
        UserError: If the configuration is invalid or has no RGB pixels.
    """

    summary = (
        "The encoder of a 4M model ([4M](https://arxiv.org/abs/2312.06647)) "
        "as a plain vision transformer for RGB images."
    )
    config_keys = CONFIG_KEYS

    def __init__(self, config: dict, output_head: nn.Module | None = None):
        options = check_config(config)
        sizes = {"image_size": options.get("image_size", 224), "patch_size": options.get("patch_size", 16)}
        if "domains_in" in options:
            names = [name for name in options["domains_in"] if name.split("@")[0] == "rgb"]
            if not names:
                raise UserError("model config: a ViT needs RGB pixels, but domains_in has no rgb@… modality")
            name, declarations = names[0], options.get("modalities")
        else:
            name = f"rgb@{sizes['image_size']}"
            size = {"input_size": sizes["image_size"], "patch_size": sizes["patch_size"]}
            declarations = {name: {"type": "img", "num_channels": 3, **size}}
        modality = resolve_modalities([name], declarations, "model config")[name]
        trunk = trunk_options({key: value for key, value in options.items() if key in _VIT_KEYS})
        super().__init__(build_embedding(modality, "encoder", sizes), name, **trunk, output_head=output_head)
        self.config = copy.deepcopy(config)

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the weights that a ViT does not have, and keep those of the head."""
        own = self.state_dict()
        head = {name: tensor for name, tensor in own.items() if name.startswith("output_head.")}
        return head | {name: tensor for name, tensor in state_dict.items() if name in own}
