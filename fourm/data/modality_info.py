"""The table of modalities: their types, maximum lengths and embedding modules.

A ``modalities:`` block in a data YAML or a call of :func:`register_modality` adds modalities to this table or overrides
entries. Embedding modules are given by name and resolved by the models, so that data does not depend on models.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fourm.data.modality_transforms import MODALITY_TRANSFORMS
from fourm.utils.config import build, check_keys, convert
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.options import option

__all__ = ["MODALITY_INFO", "MODALITY_TRANSFORMS", "Modality", "declare", "register_modality", "resolve_modalities"]

TEXT_VOCAB_SIZE = 30_000
MAX_MODALITY_TOKENS = 10**6
_MAX_IMAGE_VALUES = 2**29  # channels x height x width of an image or feature map


@dataclass(frozen=True)
class Modality(Mapping[str, Any]):
    """One modality, which can also be read like a mapping: ``MODALITY_INFO["caption"]["type"]``.

    Attributes:
        name: Name in configs and batches; ``rgb@224`` is ``rgb`` at 224 pixels.
        type: ``img`` (a grid of pixels or tokens), ``seq`` (text vocabulary), ``seq_token`` (integer codes),
            ``seq_emb`` (embedding vectors).
        vocab_size: Number of token ids; None for pixels and embedding vectors.
        input_size: Side length of a grid in pixels.
        patch_size: Side length in pixels of the patch that one token of a grid represents.
        num_channels: Number of channels of a grid of pixels or of a feature map.
        max_tokens: Maximum tokens of a sample; (input_size / patch_size)² for a grid.
        min_tokens: Minimum tokens of a budget.
        path: Folder name; ``name`` by default.
        transform: Key in ``MODALITY_TRANSFORMS``; the part of the name before ``@`` by default.
        transform_options: Fields of the transform that differ from their defaults.
        pretokenized: Whether its files hold token ids that were computed for the stored crops (``crop_settings``).
        vocab_offset: Number that is added to the ids of a ``seq_token`` file.
        encoder_embedding: Class name in ``fourm.models.encoder_embeddings``; None if the modality cannot be an input.
        decoder_embedding: Class name in ``fourm.models.decoder_embeddings``; None if the modality cannot be a target.
        embedding_options: Further arguments of both classes.
        input_alphas: Input alpha per component of the Dirichlet mixture; set by the data config.
        target_alphas: Target alpha per component of the Dirichlet mixture; set by the data config.
        keep: Keep scheme of a sequence per component of the Dirichlet mixture; set by the data config.
    """

    name: str
    type: Literal["img", "seq", "seq_token", "seq_emb"]
    vocab_size: int | None = option("ids", None, at_least=1, at_most=10**8)
    input_size: int | None = option("pixels", None, at_least=1, at_most=100_000)
    patch_size: int | None = option("pixels", None, at_least=1, at_most=100_000)
    num_channels: int | None = option("channels", None, at_least=1, at_most=100_000)
    max_tokens: int | None = option("tokens", None, at_least=1, at_most=MAX_MODALITY_TOKENS)
    min_tokens: int = option("tokens", 0, at_least=0, at_most=MAX_MODALITY_TOKENS)
    path: str | None = None
    transform: str | None = None
    transform_options: dict = field(default_factory=dict)
    pretokenized: bool = False
    vocab_offset: int = option("ids", 0, at_least=0, at_most=10**8)
    encoder_embedding: str | None = None
    decoder_embedding: str | None = None
    embedding_options: dict = field(default_factory=dict)
    input_alphas: tuple[float, ...] = option("one per component", (), at_least=0, at_most=1e9)
    target_alphas: tuple[float, ...] = option("one per component", (), at_least=0, at_most=1e9)
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # The class is frozen, so derived fields are set through object.__setattr__.
        object.__setattr__(self, "transform", self.transform or self.name.split("@")[0])
        object.__setattr__(self, "path", self.path or self.name)
        if self.type == "img" and self.input_size and self.patch_size:
            if self.input_size % self.patch_size:
                raise UserError(
                    f"modality {self.name}: input_size {self.input_size} is not a multiple of "
                    f"patch_size {self.patch_size}"
                )
            object.__setattr__(self, "max_tokens", (self.input_size // self.patch_size) ** 2)
        self._check()

    def _check(self) -> None:
        """Raise a :class:`UserError` for invalid sizes."""
        where = f"modality {self.name}"
        for item in dataclasses.fields(self):
            if "range" in item.metadata and (value := getattr(self, item.name)) != item.default:
                item.metadata["range"].check(value, f"{where}: '{item.name}'")
        if self.is_pixels and (self.num_channels or 0) * (self.input_size or 0) ** 2 > _MAX_IMAGE_VALUES:
            raise UserError(
                f"{where}: {self.num_channels} channels of input_size {self.input_size} exceed the maximum size "
                "of an image"
            )
        if self.vocab_size is not None and self.vocab_offset >= self.vocab_size:
            raise UserError(
                f"{where}: 'vocab_offset' {self.vocab_offset} leaves no ids of 'vocab_size' {self.vocab_size}"
            )

    @property
    def id(self) -> int:
        """A stable 15-bit number: SHA-256 of the name modulo 2^15."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 2**15

    @property
    def is_pixels(self) -> bool:
        """Whether this is a grid of raw values (an image, a feature map) rather than of tokens."""
        return self.type == "img" and self.vocab_size is None

    def __getitem__(self, key: str) -> Any:
        if key == "id" or key in _FIELDS:
            return getattr(self, key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter((*_FIELDS, "id"))

    def __len__(self) -> int:
        return len(_FIELDS) + 1


_FIELDS = tuple(f.name for f in dataclasses.fields(Modality))


_TABLE = "MODALITY_INFO"
_EMBEDDING_SIZES = ("vocab_size", "num_channels", "patch_size", "image_size", "dim_tokens")
"""Arguments of embeddings that come from the other fields of a modality."""


_PUBLISHED_KEYS = ("name", "id", "shared_vocab", "eval_input_alphas", "eval_target_alphas", "dim_tokens")
"""Keys of published tables that are derived from other fields here, or set elsewhere."""


def as_modality(name: str, entry: Mapping[str, Any]) -> Modality:
    """Convert an entry of a modality table; a plain dict may lack keys or have unknown ones."""
    if isinstance(entry, Modality):
        return entry
    if "type" not in entry:
        raise UserError(f"modality {name}: 'type' is required ({TYPES})")
    fields = published_fields(name, {key: value for key, value in entry.items() if key in _FIELDS})
    if fields["type"] in ("seq", "seq_token", "seq_emb"):
        fields["embedding_options"] = {"max_length": fields.get("max_tokens")} | fields.get("embedding_options", {})
    return Modality(**{"name": name} | fields)


def _table_entry(name: str) -> Modality:
    """Return the entry of ``MODALITY_INFO``.

    Raises:
        UserError: The entry is a plain dict that is incomplete, or has an unknown key or a value of the wrong type.
    """
    entry = MODALITY_INFO[name]
    return entry if isinstance(entry, Modality) else _complete(name, published_fields(name, entry), _TABLE)


def published_fields(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a published dict to the declaration of modality ``name``, with embedding modules given by name.

    Raises:
        UserError: A key is unknown, or an embedding is neither a class nor a name.
    """
    where = f"{_TABLE}: modality {name}"
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: expected a dict, not {entry!r:.80}")
    check_keys(entry, (*_FIELDS, *_PUBLISHED_KEYS), where)
    fields = {key: value for key, value in entry.items() if key not in _PUBLISHED_KEYS and value is not None}
    modality_type = fields.get("type")
    sizes = (
        _EMBEDDING_SIZES
        if modality_type != "img" or fields.get("vocab_size") is None
        else (*_EMBEDDING_SIZES, "num_channels")
    )
    for side in ("encoder_embedding", "decoder_embedding"):
        module = fields.get(side)
        if module is None:
            if side in entry:
                fields[side] = None  # explicitly set to None
        elif not isinstance(module, str):
            cls = getattr(module, "func", module)  # a class, or a partial one
            if not isinstance(cls, type):
                raise UserError(f"{where}: '{side}' must be a class, a partial of one or its name, not {module!r:.80}")
            arguments = getattr(module, "keywords", {})
            fields[side] = cls.__name__
            for key in sizes:
                if key in arguments:
                    fields.setdefault(key, arguments[key])
            options = {
                key: value
                for key, value in arguments.items()
                if key not in (*_EMBEDDING_SIZES, "num_channels", "dim_tokens")
            }
            fields["embedding_options"] = dict(fields.get("embedding_options") or {}) | options
    if modality_type == "seq_emb":  # the default of the published embedding
        fields["embedding_options"] = {"orig_emb_dim": 4096} | dict(fields.get("embedding_options") or {})
    return fields


def own_declarations(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the declarations that a model must save to be loaded without the program that added its modalities."""
    declarations = {}
    for name in names:
        entry = MODALITY_INFO.get(name)
        if name in REGISTERED:
            declarations[name] = REGISTERED[name]
        elif entry is not None and not isinstance(entry, Modality):
            declarations[name] = published_fields(name, entry)
    return declarations


def _pixels(name: str, num_channels: int, size: int | None = None, **options: Any) -> Modality:
    patch = 16 if size else None
    return Modality(
        name, "img", input_size=size, patch_size=patch, num_channels=num_channels,
        encoder_embedding="ImageEncoderEmbedding", **options,
    )  # fmt: skip


def _tokens(name: str, vocab_size: int, patch: int = 16, size: int | None = None, **options: Any) -> Modality:
    return Modality(
        name, "img", vocab_size, size or int(name.split("@")[1]), patch, pretokenized=True,
        encoder_embedding="ImageTokenEncoderEmbedding", decoder_embedding="ImageTokenDecoderEmbedding", **options,
    )  # fmt: skip


def _text(name: str, max_tokens: int, positions: int | None = None, **options: Any) -> Modality:
    return Modality(
        name, "seq", TEXT_VOCAB_SIZE, max_tokens=max_tokens, embedding_options={"max_length": positions or max_tokens},
        encoder_embedding="SequenceEncoderEmbedding", decoder_embedding="SequenceDecoderEmbedding", **options,
    )  # fmt: skip


def _global_feature(name: str) -> Modality:
    return _tokens(name, 8192, patch=56, size=224, embedding_options={"sincos_pos_emb": False})


_BUILTIN = (
    # Input pixels.
    *(_pixels(f"rgb@{size}", 3, size, path="rgb") for size in (224, 448)),
    # Grids of tokens.
    *(_tokens(f"tok_rgb@{size}", 16384) for size in (224, 448)),
    *(_tokens(f"tok_{kind}@{size}", 8192) for kind in ("depth", "normal", "clip") for size in (224, 448)),
    *(_tokens(f"tok_semseg@{size}", 4096) for size in (224, 448)),
    *(_tokens(f"tok_{kind}@224", 8192) for kind in ("canny_edge", "sam_edge")),
    *(_tokens(f"tok_{kind}@224", 8192, patch=14) for kind in ("dinov2", "imagebind")),
    *(_global_feature(f"tok_{kind}_global") for kind in ("dinov2", "imagebind")),
    # Sequences.
    _text("caption", 256),
    _text("det", 256),
    _text("metadata", 40),
    _text("human_poses", 275, positions=263, num_channels=207),
    _text("color_palette", 23),
    _text("sam_instance", 290, pretokenized=True),
    Modality(
        "t5_caption", "seq_emb", max_tokens=77, encoder_embedding="SequenceEmbEncoderEmbedding",
        embedding_options={"orig_emb_dim": 4096, "max_length": 77},
    ),
    # Training data of tokenizers.
    _pixels("rgb", 3), _pixels("depth", 1), _pixels("normal", 3), _pixels("canny_edge", 1),
    _pixels("semseg_coco", 64), _pixels("sam_mask", 1, 64),
    _pixels("CLIP-B16", 512), _pixels("DINOv2-B14", 768), _pixels("DINOv2-B14-global", 768),
    _pixels("ImageBind-H14", 1280), _pixels("ImageBind-H14-global", 1280),
)  # fmt: skip

MODALITY_INFO: dict[str, Modality | Mapping[str, Any]] = {modality.name: modality for modality in _BUILTIN}

REGISTERED: dict[str, dict[str, Any]] = {}
"""The arguments of :func:`register_modality`, which models of these modalities save in their configurations."""

_TYPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "pixels": {"encoder_embedding": "ImageEncoderEmbedding"},
    "img": {
        "encoder_embedding": "ImageTokenEncoderEmbedding",
        "decoder_embedding": "ImageTokenDecoderEmbedding",
        "pretokenized": True,
    },
    "seq": {
        "encoder_embedding": "SequenceEncoderEmbedding",
        "decoder_embedding": "SequenceDecoderEmbedding",
        "vocab_size": TEXT_VOCAB_SIZE,
    },
    "seq_token": {"encoder_embedding": "SequenceEncoderEmbedding", "decoder_embedding": "SequenceDecoderEmbedding"},
    "seq_emb": {"encoder_embedding": "SequenceEmbEncoderEmbedding"},
    # A number is a grid of one token, so it is queried by the mask token and needs no sentinels.
    "scalar": {
        "input_size": 1,
        "patch_size": 1,
        "vocab_size": 1000,
        "transform": "scalar",
        "encoder_embedding": "ImageTokenEncoderEmbedding",
        "decoder_embedding": "ImageTokenDecoderEmbedding",
    },
}
TYPES = "img, seq, seq_token, seq_emb or scalar"


def declare(name: str, fields: Mapping[str, Any], where: str = "modality declaration") -> Modality:
    """Build the modality that ``fields`` declare; defaults come from the table's entry or, without one, from the type.

    Raises:
        UserError: A field is unknown or has the wrong type, or the declaration is incomplete.
    """
    check_keys(fields, set(_FIELDS) - {"name"}, f"{where}: modality {name}")
    base = _table_entry(name) if name in MODALITY_INFO else None
    return _complete(name, fields, where, base)


def _complete(name: str, fields: Mapping[str, Any], where: str, base: Modality | None = None) -> Modality:
    """Implement :func:`declare` with defaults from ``base``."""
    where = f"{where}: modality {name}"
    if base is not None:
        # The max_tokens of a grid is derived from its sizes, so it must not be inherited.
        inherited = [key for key in _FIELDS if base.type != "img" or key != "max_tokens"]
        merged = {key: getattr(base, key) for key in inherited} | dict(fields)
    else:
        modality_type = fields.get("type")
        if modality_type is None:
            raise UserError(f"{where}: 'type' is required ({TYPES}){did_you_mean(name, MODALITY_INFO)}")
        pixels = modality_type == "img" and fields.get("vocab_size") is None
        merged = {"name": name} | _TYPE_DEFAULTS.get("pixels" if pixels else str(modality_type), {}) | dict(fields)
        if modality_type == "scalar":
            merged["type"] = "img"
        if modality_type in ("seq", "seq_token", "seq_emb"):
            options = dict(merged.get("embedding_options") or {})
            options.setdefault("max_length", merged.get("max_tokens"))
            merged["embedding_options"] = options
    modality = build(Modality, merged, where)
    needed = {"img": ("input_size", "patch_size"), "seq": ("max_tokens",), "seq_emb": ("max_tokens",)}
    for key in needed.get(modality.type, ("vocab_size", "max_tokens")):
        if getattr(modality, key) is None:
            raise UserError(f"{where}: '{key}' is required for type {modality.type}")
    if modality.max_tokens is not None and modality.max_tokens < modality.min_tokens:
        raise UserError(f"{where}: 'min_tokens' {modality.min_tokens} is more than its {modality.max_tokens} tokens")
    default_embedding = _TYPE_DEFAULTS["seq_emb"]["encoder_embedding"]
    if modality.encoder_embedding == default_embedding and "orig_emb_dim" not in modality.embedding_options:
        raise UserError(f"{where}: 'embedding_options' must have 'orig_emb_dim', the width of the vectors")
    if modality.is_pixels and modality.num_channels is None:
        raise UserError(f"{where}: a grid needs 'num_channels' (pixels) or 'vocab_size' (tokens)")
    return modality


def register_modality(name: str, **fields: Any) -> Modality:
    """Add a modality to the table, or override fields of an existing one. For the fields, see :class:`Modality`."""
    modality = declare(name, fields, "register_modality")
    MODALITY_INFO[name] = modality
    REGISTERED[name] = REGISTERED.get(name, {}) | fields
    return modality


def resolve_modalities(
    names: Iterable[str], declarations: Mapping[str, Mapping[str, Any]] | None = None, where: str = "config"
) -> dict[str, Modality]:
    """Return the modalities called ``names``; ``declarations`` (a ``modalities:`` block) override the table.

    Raises:
        UserError: A name is in neither of them; the message suggests a similar one.
    """
    declared = {
        name: declare(name, convert(fields or {}, dict, f"{where}: modality {name}"), where)
        for name, fields in (declarations or {}).items()
    }
    known = MODALITY_INFO.keys() | declared.keys()
    resolved = {}
    for name in names:
        if name not in known:
            raise UserError(
                f"{where}: unknown modality '{name}'{did_you_mean(name, known)}; declare it in a 'modalities:' block"
            )
        resolved[name] = declared[name] if name in declared else _table_entry(name)
    return resolved
