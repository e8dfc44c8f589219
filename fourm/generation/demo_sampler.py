"""``Demo4MSampler``: from any modality to all others, with the published models and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fourm.data.images import open_image
from fourm.data.limits import MAX_ARRAY_BYTES
from fourm.data.modality_info import Modality, as_modality
from fourm.data.transforms.image import RGBTransform
from fourm.generation.batch_entries import custom_text, init_full_input_modality
from fourm.generation.chained_generation import GenerationSampler
from fourm.generation.decode_dict import decode_dict
from fourm.generation.figures import modality_to_pil, plot_pictures, title_of
from fourm.generation.inputs import read_pixels
from fourm.generation.schedules import build_chained_generation_schedules
from fourm.models.fm import FM
from fourm.utils.errors import UserError
from fourm.utils.tokenizer import load_text_tokenizer
from fourm.utils.tokenizer.special_tokens import EOS
from fourm.utils.web import WebStore
from fourm.vq import load_tokenizer

HUB = "EPFL-VILAB"
STEPS = 50  # of decoding by diffusion


@dataclass(frozen=True)
class Settings:
    """How a target is generated: the arguments of :func:`build_chained_generation_schedules`, in the singular.

    Attributes:
        tokens: Maximum number of tokens of a sequence; None means all tokens of an image.
    """

    scheme: str
    steps: int | None
    temp: float
    cfg_scale: float = 1.0
    tokens: int | None = None
    temp_schedule: str = "constant"
    token_schedule: str = "linear"


_FALLING = "onex:0.5:0.5"
_GIVEN = Settings("roar", 1, 0.01, 2.0)
_FEATURES, _GEOMETRY = Settings("roar", 8, 0.01, 2.0), Settings("roar", 8, 3.0, 2.0, temp_schedule=_FALLING)


def _sequence(temp: float, tokens: int) -> tuple[Settings, Settings]:
    return (Settings("autoregressive", None, temp, tokens=tokens),) * 2


TARGETS: dict[str, tuple[Settings, Settings]] = {
    "tok_clip": (_GIVEN, Settings("roar", 50, 5.0, 3.0, temp_schedule=_FALLING)),
    "tok_dinov2": (_GIVEN, _FEATURES),
    "tok_imagebind": (_GIVEN, _FEATURES),
    "tok_depth": (_GIVEN, _GEOMETRY),
    "tok_normal": (_GIVEN, _GEOMETRY),
    "tok_semseg": (_GIVEN, _GEOMETRY),
    "tok_canny_edge": (_GIVEN, _GEOMETRY),
    "tok_sam_edge": (_GIVEN, _GEOMETRY),
    "tok_rgb": (_GIVEN, Settings("roar", 25, 3.0, 2.0, temp_schedule=_FALLING)),
    "caption": _sequence(0.3, 256),
    "det": _sequence(0.3, 256),
    "human_poses": _sequence(0.1, 275),
    "sam_instance": _sequence(0.01, 256),
    "color_palette": _sequence(0.1, 23),
    "metadata": _sequence(0.1, 40),
}
"""Targets in the order of generation, and their settings if RGB is given and if it is not."""
SUPERRES = ("tok_clip", "tok_depth", "tok_normal", "tok_semseg", "tok_rgb")
"""Targets of super-resolution, in their order."""
SUPERRES_SETTINGS = Settings("maskgit", 8, 1.0, 2.0, token_schedule="cosine")


class Demo4MSampler(nn.Module):
    """Generates all modalities from any others.

    Args:
        fm: The model: an id on the Hugging Face hub, a folder or a ``.safetensors`` file.
        fm_sr: The super-resolution model, likewise; None leaves it out.
        tok_rgb, …, tok_human_poses: Tokenizers, likewise; what has none is not generated. ``tok_edge`` serves Canny and
            SAM edges.
        tok_text: File of the text vocabulary.
        mods, mods_sr: Names of the modalities that the models may generate; None means all.
        verbose: Show progress bars.

    Raises:
        UserError: If something cannot be loaded.
    """

    def __init__(
        self,
        fm: str = f"{HUB}/4M-21_XL_CC12M",
        fm_sr: str | None = f"{HUB}/4M-7-SR_L_CC12M",
        tok_rgb: str | None = f"{HUB}/4M_tokenizers_rgb_16k_224-448",
        tok_depth: str | None = f"{HUB}/4M_tokenizers_depth_8k_224-448",
        tok_normal: str | None = f"{HUB}/4M_tokenizers_normal_8k_224-448",
        tok_edge: str | None = f"{HUB}/4M_tokenizers_edge_8k_224-512",
        tok_semseg: str | None = f"{HUB}/4M_tokenizers_semseg_4k_224-448",
        tok_clip: str | None = f"{HUB}/4M_tokenizers_CLIP-B16_8k_224-448",
        tok_dinov2: str | None = f"{HUB}/4M_tokenizers_DINOv2-B14_8k_224-448",
        tok_imagebind: str | None = f"{HUB}/4M_tokenizers_ImageBind-H14_8k_224-448",
        tok_sam_instance: str | None = f"{HUB}/4M_tokenizers_sam-instance_1k_64",
        tok_human_poses: str | None = f"{HUB}/4M_tokenizers_human-poses_1k_8",
        tok_text: str = "./fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json",
        mods: Sequence[str] | None = None,
        mods_sr: Sequence[str] | None = None,
        verbose: bool = True,
    ):
        super().__init__()
        self.verbose, self.mods, self.mods_sr = verbose, mods, mods_sr
        self.text_tokenizer = load_text_tokenizer(tok_text)
        self.fm = FM.from_pretrained(fm)
        self.fm_sr = None if fm_sr is None else FM.from_pretrained(fm_sr)
        places = {
            "tok_rgb": tok_rgb,
            "tok_depth": tok_depth,
            "tok_normal": tok_normal,
            "tok_canny_edge": tok_edge,
            "tok_semseg": tok_semseg,
            "tok_clip": tok_clip,
            "tok_dinov2": tok_dinov2,
            "tok_imagebind": tok_imagebind,
            "sam_instance": tok_sam_instance,
            "human_poses": tok_human_poses,
        }
        self.toks = nn.ModuleDict({name: load_tokenizer(place) for name, place in places.items() if place is not None})
        if "tok_canny_edge" in self.toks:
            self.toks["tok_sam_edge"] = self.toks["tok_canny_edge"]

    @torch.no_grad()
    def forward(
        self,
        sample: Mapping[str, Any],
        seed: int | None = None,
        top_p: float = 0.8,
        top_k: int | float = 0.0,
        target_modalities: Sequence[str] | None = None,
        perform_sr: bool = True,
    ) -> dict[str, Any]:
        """Generate what is not given.

        Args:
            sample: Maps modalities to texts, or to tensors with a batch axis, such as normalised pixels
                (1, 3, 224, 224).
            seed: Seed of generation and decoding; super-resolution uses the one after it.
            top_p, top_k: See :class:`fourm.generation.token_sampling.TokenSampler`.
            target_modalities: Names of the modalities to generate; None means all.
            perform_sr: Generate the images at 448 pixels, too.

        Returns:
            The inputs and the targets, as :func:`decode_dict` returns them.

        Raises:
            UserError: If the sample is empty, or the model cannot read it or generate a target.
        """
        batch = self._batch(sample)
        options: dict[str, Any] = {
            "top_p": top_p,
            "top_k": top_k,
            "text_tokenizer": self.text_tokenizer,
            "verbose": self.verbose,
        }
        schedule = self._schedule(self.fm, [*batch], self._targets(batch, target_modalities))
        results = GenerationSampler(self.fm).generate(batch, schedule, seed=seed, **options)
        decoded = self._decode(results, 224, seed)
        if not perform_sr or self.fm_sr is None:
            return decoded
        known = {name: entry for name, entry in results.items() if name in self.fm_sr.encoder_modalities}
        targets = _named(SUPERRES, self.fm_sr.decoder_modalities, self.mods_sr)
        targets = [name for name in targets if name.replace("@448", "@224") in results and name not in results]
        if not known or not targets:
            return decoded
        schedule = self._schedule(self.fm_sr, [*known], dict.fromkeys(targets, SUPERRES_SETTINGS))
        next_seed = None if seed is None else seed + 1
        large = GenerationSampler(self.fm_sr).generate(known, schedule, seed=next_seed, **options)
        return decoded | self._decode({name: large[name] for name in targets}, 448, next_seed)

    def modalities_to_pil(
        self,
        result: Mapping[str, Any],
        use_fixed_plotting_order: bool = False,
        resize: int | tuple[int, int] | None = None,
    ) -> list[tuple[Image.Image, str]]:
        """Draw a result.

        Args:
            result: What the sampler returned. Of an image of two sizes, the larger one is drawn.
            use_fixed_plotting_order: Sort the modalities as they are generated, instead of inputs first.
            resize: Side, or width and height, in pixels.

        Returns:
            Pictures and titles.
        """
        keys = [key for key in result if "@448" in key or key.replace("@224", "@448") not in {*result} - {key}]
        if use_fixed_plotting_order:
            order = ["rgb", *TARGETS]
            keys.sort(key=lambda key: (order.index(name) if (name := key.split("@")[0]) in order else len(order), key))
        size = (resize, resize) if isinstance(resize, int) else resize
        pictures = [(modality_to_pil(result, key), title_of(key)) for key in keys]
        return [(picture.resize(size) if size else picture, title) for picture, title in pictures]

    def plot_modalities(
        self,
        result: Mapping[str, Any],
        ncols_max: int = 5,
        figscale: float = 4.0,
        save_path: str | Path | None = None,
        use_fixed_plotting_order: bool = False,
    ) -> None:
        """Show a result, or write it to ``save_path``; see :meth:`modalities_to_pil` and :func:`plot_pictures`."""
        plot_pictures(self.modalities_to_pil(result, use_fixed_plotting_order), ncols_max, figscale, save_path)

    def _batch(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Make a batch with all of ``sample`` as inputs."""
        if not sample:
            raise UserError("the sample is empty; give at least one modality")
        info, device = self.fm.modality_info, self.fm.mask_token.device
        batch: dict[str, Any] = {}
        for name, value in sample.items():
            if name not in self.fm.encoder_modalities:
                raise UserError(
                    f"'{name}' is not an input of the model; it reads {', '.join(self.fm.encoder_modalities)}"
                )
            if isinstance(value, str):
                batch = custom_text(batch, value, EOS, name, device, self.text_tokenizer)
            else:
                batch[name] = {"tensor": value}
            batch = init_full_input_modality(batch, info, name, device)
        return batch

    def _targets(self, batch: Mapping[str, Any], wanted: Sequence[str] | None) -> dict[str, Settings]:
        """Return the targets and their settings, in the order of generation."""
        rgb_given = any(name.split("@")[0] in ("rgb", "tok_rgb") for name in batch)
        possible = _named(TARGETS, self.fm.decoder_modalities, self.mods)
        possible = [
            name
            for name in possible
            if name not in batch and not (rgb_given and name.startswith("tok_rgb")) and self._can_decode(name)
        ]
        unknown = [name for name in wanted or () if not _named([name.split("@")[0]], possible, [name])]
        if unknown:
            raise UserError(f"target_modalities: '{unknown[0]}' is none of {', '.join(possible)}")
        targets = _named(TARGETS, possible, wanted)
        return {name: TARGETS[name.split("@")[0]][0 if rgb_given else 1] for name in targets}

    def _can_decode(self, name: str) -> bool:
        name = name.split("@")[0]
        return name in self.toks or not (name.startswith("tok_") or name in ("sam_instance", "human_poses"))

    def _schedule(self, model: FM, conditions: list[str], targets: Mapping[str, Settings]) -> list[dict[str, Any]]:
        modalities: list[Modality] = [as_modality(name, model.modality_info[name]) for name in targets]
        settings = [*targets.values()]
        return build_chained_generation_schedules(
            cond_domains=conditions,
            target_domains=[*targets],
            tokens_per_target=[
                min(s.tokens or m.max_tokens or 1, m.max_tokens or 1) for s, m in zip(settings, modalities, strict=True)
            ],
            autoregression_schemes=[s.scheme for s in settings],
            decoding_steps=[s.steps for s in settings],  # type: ignore[misc]  # None of sequences
            token_decoding_schedules=[s.token_schedule for s in settings],
            temps=[s.temp for s in settings],
            temp_schedules=[s.temp_schedule for s in settings],
            cfg_scales=[s.cfg_scale for s in settings],
            cfg_schedules=["constant"] * len(settings),
            cfg_grow_conditioning=True,
            modality_info=model.modality_info,
        )

    def _decode(self, batch: Mapping[str, Any], size: int, seed: int | None) -> dict[str, Any]:
        decodable = {name: entry for name, entry in batch.items() if self._can_decode(name)}
        return decode_dict(decodable, self.toks, self.text_tokenizer, image_size=size, decoding_steps=STEPS, seed=seed)


def _named(bases: Sequence[str] | Mapping[str, Any], names: Any, allowed: Sequence[str] | None) -> list[str]:
    """Return the ``names`` of modalities in the order of ``bases``, as far as they, or their bases, are ``allowed``."""
    return [
        name
        for base in bases
        for name in names
        if name.split("@")[0] == base and (allowed is None or name in allowed or base in allowed)
    ]


def img_from_url(url: str, img_size: int = 224) -> Tensor:
    """Download a picture and normalise its centre square: (1, 3, ``img_size``, ``img_size``).

    Raises:
        UserError: If the picture cannot be downloaded or read.
    """
    store = WebStore()
    item = store.describe(url)
    if item.size > MAX_ARRAY_BYTES:
        raise UserError(f"{url} has {item.size} bytes, which is too large for a picture")
    content = store.retries(lambda: b"".join(store.chunks(item, 0, item.size)), url)
    try:
        picture = open_image(content)
        picture.load()
    except OSError as error:
        raise UserError(f"{url} is not a picture: {error}") from error
    return read_pixels(picture, RGBTransform(), img_size)[None]
