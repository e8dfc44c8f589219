"""The table of modalities: what each one is, how long it may get, which modules embed it.

A modality is *declared*, not patched in: a ``modalities:`` block in a data YAML or a call of
:func:`register_modality` adds to this table or overrides it. Embedding modules are named, not imported; the models
resolve the names, so that data never depends on models.
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
MOST_TOKENS = 10**6  # of a modality
_MOST_PIXELS = 2**29  # values of a picture or a feature map


@dataclass(frozen=True)
class Modality(Mapping[str, Any]):
    """One modality. Reads like a mapping too: ``MODALITY_INFO["caption"]["type"]``.

    Attributes:
        name: as used in configs and batches; ``rgb@224`` is ``rgb`` at 224 pixels.
        type: ``img`` (a grid of pixels or tokens), ``seq`` (text vocabulary), ``seq_token`` (integer codes),
            ``seq_emb`` (embedding vectors).
        vocab_size: number of token ids; None for pixels and embedding vectors.
        input_size: side length in pixels of a grid.
        patch_size: side length in pixels of what one token of a grid stands for.
        num_channels: channels of a grid of pixels or of a feature map.
        max_tokens: most tokens of a sample. A grid's is (input_size / patch_size)².
        min_tokens: fewest tokens that a budget may give it.
        path: folder name where it differs from ``name``.
        transform: key in ``MODALITY_TRANSFORMS``; the part of the name before ``@`` unless given.
        transform_options: fields of the transform that differ from their defaults.
        pretokenized: its files hold token ids computed for the stored crops (``crop_settings``).
        vocab_offset: added to the ids of a ``seq_token`` file.
        encoder_embedding, decoder_embedding: class names in ``fourm.models.{encoder,decoder}_embeddings``; None for a
            modality that cannot be an input, or a target.
        embedding_options: further arguments of both classes.
        input_alphas, target_alphas, keep: one entry per component of the Dirichlet mixture; set by the data config.
    """

    name: str
    type: Literal["img", "seq", "seq_token", "seq_emb"]
    vocab_size: int | None = option("ids", None, at_least=1, at_most=10**8)
    input_size: int | None = option("pixels", None, at_least=1, at_most=100_000)
    patch_size: int | None = option("pixels", None, at_least=1, at_most=100_000)
    num_channels: int | None = option("channels", None, at_least=1, at_most=100_000)
    max_tokens: int | None = option("tokens", None, at_least=1, at_most=MOST_TOKENS)
    min_tokens: int = option("tokens", 0, at_least=0, at_most=MOST_TOKENS)
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
        fill = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (frozen)
        fill("transform", self.transform or self.name.split("@")[0])
        fill("path", self.path or self.name)
        if self.type == "img" and self.input_size and self.patch_size:
            if self.input_size % self.patch_size:
                raise UserError(
                    f"modality {self.name}: input_size {self.input_size} is not a multiple of patch_size {self.patch_size}"
                )
            fill("max_tokens", (self.input_size // self.patch_size) ** 2)
        self._check()

    def _check(self) -> None:
        """Raise a :class:`UserError` for sizes that no modality can have."""
        where = f"modality {self.name}"
        for item in dataclasses.fields(self):
            if "range" in item.metadata and (value := getattr(self, item.name)) != item.default:
                item.metadata["range"].check(value, f"{where}: '{item.name}'")
        if self.is_pixels and (self.num_channels or 0) * (self.input_size or 0) ** 2 > _MOST_PIXELS:
            raise UserError(
                f"{where}: {self.num_channels} channels of input_size {self.input_size} are too large to be read"
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
        """A grid of raw values (an image, a feature map) rather than of tokens."""
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
_SIZES = ("vocab_size", "num_channels", "patch_size", "image_size", "dim_tokens")
"""What embeddings take from the other fields of a modality."""


_PUBLISHED_KEYS = ("name", "id", "shared_vocab", "eval_input_alphas", "eval_target_alphas", "dim_tokens")
"""Of the dicts in published tables, what follows from the rest here, or is set elsewhere."""


def as_modality(name: str, entry: Mapping[str, Any]) -> Modality:
    """An entry of a table of modalities; a plain dict may hold fewer keys, or others too."""
    if isinstance(entry, Modality):
        return entry
    if "type" not in entry:
        raise UserError(f"modality {name}: 'type' is required ({KINDS})")
    fields = own_fields(name, {key: value for key, value in entry.items() if key in _FIELDS})
    if fields["type"] in ("seq", "seq_token", "seq_emb"):
        fields["embedding_options"] = {"max_length": fields.get("max_tokens")} | fields.get("embedding_options", {})
    return Modality(**{"name": name} | fields)


def _in_table(name: str) -> Modality:
    """The table's own entry.

    Raises:
        UserError: a plain dict with an unknown key or a value of the wrong type, or one that is not complete.
    """
    entry = MODALITY_INFO[name]
    return entry if isinstance(entry, Modality) else _complete(name, own_fields(name, entry), _TABLE)


def own_fields(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A plain dict of a table as the declaration of modality ``name``: modules by their names, with their arguments.

    Raises:
        UserError: an unknown key, or an embedding that is neither a class nor a name.
    """
    where = f"{_TABLE}: modality {name}"
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: expected a dict, not {entry!r:.80}")
    check_keys(entry, (*_FIELDS, *_PUBLISHED_KEYS), where)
    fields = {key: value for key, value in entry.items() if key not in _PUBLISHED_KEYS and value is not None}
    modality_type = fields.get("type")
    sizes = _SIZES if modality_type != "img" or fields.get("vocab_size") is None else (*_SIZES, "num_channels")
    for side in ("encoder_embedding", "decoder_embedding"):
        module = fields.get(side)
        if module is None:
            if side in entry:
                fields[side] = None  # it says that there is none
        elif not isinstance(module, str):
            cls = getattr(module, "func", module)  # a class, or a partial one
            if not isinstance(cls, type):
                raise UserError(f"{where}: '{side}' must be a class, a partial of one or its name, not {module!r:.80}")
            given = getattr(module, "keywords", {})
            fields[side] = cls.__name__
            for key in sizes:
                if key in given:
                    fields.setdefault(key, given[key])
            options = {key: value for key, value in given.items() if key not in (*_SIZES, "num_channels", "dim_tokens")}
            fields["embedding_options"] = dict(fields.get("embedding_options") or {}) | options
    if modality_type == "seq_emb":  # as published, where the embedding has this default
        fields["embedding_options"] = {"orig_emb_dim": 4096} | dict(fields.get("embedding_options") or {})
    return fields


def own_declarations(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a model must keep of its modalities ``names`` to be loaded without the program that added them to the table."""
    found = {}
    for name in names:
        entry = MODALITY_INFO.get(name)
        if name in REGISTERED:
            found[name] = REGISTERED[name]
        elif entry is not None and not isinstance(entry, Modality):
            found[name] = own_fields(name, entry)
    return found


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
    # Pixels that are inputs.
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
    # What tokenizers are trained on.
    _pixels("rgb", 3), _pixels("depth", 1), _pixels("normal", 3), _pixels("canny_edge", 1),
    _pixels("semseg_coco", 64), _pixels("sam_mask", 1, 64),
    _pixels("CLIP-B16", 512), _pixels("DINOv2-B14", 768), _pixels("DINOv2-B14-global", 768),
    _pixels("ImageBind-H14", 1280), _pixels("ImageBind-H14-global", 1280),
)  # fmt: skip

MODALITY_INFO: dict[str, Modality | Mapping[str, Any]] = {modality.name: modality for modality in _BUILTIN}

REGISTERED: dict[str, dict[str, Any]] = {}
"""What :func:`register_modality` was called with; a model of these modalities keeps it in its configuration."""

_KIND_DEFAULTS: dict[str, dict[str, Any]] = {
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
    # A number is a grid of one token: asked for by the mask token, without the sentinels of sequences.
    "scalar": {
        "input_size": 1,
        "patch_size": 1,
        "vocab_size": 1000,
        "transform": "scalar",
        "encoder_embedding": "ImageTokenEncoderEmbedding",
        "decoder_embedding": "ImageTokenDecoderEmbedding",
    },
}
KINDS = "img, seq, seq_token, seq_emb or scalar"


def declare(name: str, fields: Mapping[str, Any], where: str = "modality declaration") -> Modality:
    """The modality that ``fields`` declare; what they leave out comes from the table's entry, else from its kind.

    Raises:
        UserError: an unknown field, a value of the wrong type, or a declaration that is not complete.
    """
    check_keys(fields, set(_FIELDS) - {"name"}, f"{where}: modality {name}")
    base = _in_table(name) if name in MODALITY_INFO else None
    return _complete(name, fields, where, base)


def _complete(name: str, fields: Mapping[str, Any], where: str, base: Modality | None = None) -> Modality:
    """:func:`declare`, with what ``fields`` leave out from ``base``."""
    where = f"{where}: modality {name}"
    if base is not None:
        # A grid's max_tokens follows from its sizes and must not survive a change of them.
        merged = {key: getattr(base, key) for key in _FIELDS if base.type != "img" or key != "max_tokens"} | dict(
            fields
        )
    else:
        modality_type = fields.get("type")
        if modality_type is None:
            raise UserError(f"{where}: 'type' is required ({KINDS}){did_you_mean(name, MODALITY_INFO)}")
        pixels = modality_type == "img" and fields.get("vocab_size") is None
        merged = {"name": name} | _KIND_DEFAULTS.get("pixels" if pixels else str(modality_type), {}) | dict(fields)
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
        raise UserError(f"{where}: 'min_tokens' {modality.min_tokens} are more than its {modality.max_tokens} tokens")
    plain = _KIND_DEFAULTS["seq_emb"]["encoder_embedding"]
    if modality.encoder_embedding == plain and "orig_emb_dim" not in modality.embedding_options:
        raise UserError(f"{where}: 'embedding_options' must have 'orig_emb_dim', the width of the vectors")
    if modality.is_pixels and modality.num_channels is None:
        raise UserError(f"{where}: a grid needs 'num_channels' (pixels) or 'vocab_size' (tokens)")
    return modality


def register_modality(name: str, **fields: Any) -> Modality:
    """Add a modality to the table, or override fields of one that is there. Fields as in :class:`Modality`."""
    MODALITY_INFO[name] = modality = declare(name, fields, "register_modality")
    REGISTERED[name] = REGISTERED.get(name, {}) | fields
    return modality


def resolve_modalities(
    names: Iterable[str], declarations: Mapping[str, Mapping[str, Any]] | None = None, where: str = "config"
) -> dict[str, Modality]:
    """The modalities called ``names``, from ``declarations`` (a ``modalities:`` block) first, then the table.

    Raises:
        UserError: a name that neither knows, with the nearest one that they do.
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
        resolved[name] = declared[name] if name in declared else _in_table(name)
    return resolved
