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
    """(B, 3, H, W) → (B, N, D), or what the output head makes of it.

    Args:
        encoder_embedding: of the pixels.
        modality: its name, as in the checkpoints to load.
        output_head: called with (B, N, D).

    The others are as in :class:`fourm.models.fm.FourM`.
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
        self.init_weights()
        self.output_head = nn.Identity() if output_head is None else output_head  # keeps the weights that it comes with

    def forward(self, x: Tensor) -> Tensor:
        num_patches = self.encoder_embeddings[self.modality].num_positions
        selection = Selection.everything(self.modality, len(x), num_patches, x.device)
        tokens, emb, _ = self.embed_encoder({self.modality: {"tensor": x}}, selection)
        return self.output_head(self.encode(tokens + emb)[:, self.num_register_tokens :])


_KEYS = {*inspect.signature(FourMViT.__init__).parameters} & {*CONFIG_KEYS} | {"norm_bias"}


class FMViT(FourMViT, Hub4M):
    """The ViT of a hub configuration; loads full 4M checkpoints and drops what it does not have.

    Args:
        config: that of an :class:`fourm.models.fm.FM`, or only the keys of the encoder with ``image_size`` and
            ``patch_size``.
        output_head: as in :class:`FourMViT`; no file holds its weights.
    """

    def __init__(self, config: dict, output_head: nn.Module | None = None):
        given, config = config, check_config(config)
        sizes = {"image_size": config.get("image_size", 224), "patch_size": config.get("patch_size", 16)}
        if "domains_in" in config:
            names = [name for name in config["domains_in"] if name.split("@")[0] == "rgb"]
            if not names:
                raise UserError("model config: domains_in holds no rgb@…, which a ViT needs")
            name, declarations = names[0], config.get("modalities")
        else:
            name = f"rgb@{sizes['image_size']}"
            declarations = {
                name: {
                    "type": "img",
                    "num_channels": 3,
                    "input_size": sizes["image_size"],
                    "patch_size": sizes["patch_size"],
                }
            }
        modality = resolve_modalities([name], declarations, "model config")[name]
        options = trunk_options({key: value for key, value in config.items() if key in _KEYS})
        super().__init__(build_embedding(modality, "encoder", sizes), name, **options, output_head=output_head)
        self.config = copy.deepcopy(given)

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        mine = self.state_dict()
        head = {name: tensor for name, tensor in mine.items() if name.startswith("output_head.")}
        return head | {name: tensor for name, tensor in state_dict.items() if name in mine}
