"""The metrics of a tokenizer on a validation set.

Means over samples are computed batch by batch. The other metrics follow from *statistics*, which are summed over the
batches and the processes of an evaluation.

Shapes: B samples, C channels or classes, H x W pixels or positions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fourm.utils.errors import UserError
from fourm.utils.options import option
from fourm.utils.paths import InputPath
from fourm.vq.features import timm_network
from fourm.vq.frechet import FrechetDistance, torchmetrics
from fourm.vq.metrics import (
    MS_SSIM_SIDE,
    code_counts,
    codebook_metrics,
    metrics_of,
    region_counts,
    region_metrics,
    sample_metrics,
)
from fourm.vq.quantizers import Quantizer
from fourm.vq.training_data import ImageDataOptions

log = logging.getLogger("fourm")


@dataclass(frozen=True, kw_only=True)
class TokenizerEvaluationOptions(ImageDataOptions):
    """Evaluation of tokenizers"""

    num_eval_metrics_samples: int | None = option("number of samples to evaluate on (default: all)", None, at_least=1)
    batch_size_eval: int | None = option("samples per batch of an evaluation (default: batch_size)", None, at_least=1)
    num_logged_images: int | None = option(
        "number of originals and reconstructions in the picture of an evaluation; 0 or null = no picture",
        16,
        at_least=0,
    )
    ms_ssim: bool = option(
        f"also report MS-SSIM, for pictures of at least {MS_SSIM_SIDE} pixels (needs 'fourm[eval]')", False
    )
    fid_network: str = option(
        "also report FID with the pooled features of this network of timm, such as inception_v3 (needs 'fourm[eval]')",
        "",
    )
    fid_weights: InputPath = option("file of its weights under timm's names (default: downloaded by timm)", "")

    def check(self) -> None:
        for name in ("ms_ssim", "fid_network"):
            if getattr(self, name) and not self.bounded:
                raise UserError(f"'{name}' compares pictures with values in [-1, 1], which {self.domain} is not")
        if self.ms_ssim and self.evaluated_sizes()[-1] < MS_SSIM_SIDE:
            raise UserError(
                f"'ms_ssim' needs pictures of at least {MS_SSIM_SIDE} pixels, because it compares them at five scales; "
                f"set 'input_size_eval', or leave it out (the largest evaluated size is {self.evaluated_sizes()[-1]})"
            )


class EvaluationMetrics:
    """Computes the metrics that the options ask for.

    Raises:
        MissingDependency: The options need torchmetrics, which is not installed.
    """

    def __init__(self, options: TokenizerEvaluationOptions):
        if options.ms_ssim or options.fid_network:
            torchmetrics()
        self.options = options
        self._fid: FrechetDistance | None = None

    def load_networks(self) -> None:
        """Load the network of FID, so that a wrong name or file is noticed before the training starts.

        Raises:
            UserError: timm does not know the network, or its weights cannot be read or downloaded.
        """
        options = self.options
        if options.fid_network:
            self._fid = FrechetDistance(timm_network(options.fid_network, options.fid_weights))
        small = [size for size in options.evaluated_sizes() if size < MS_SSIM_SIDE] if options.ms_ssim else []
        if small:
            log.info("no MS-SSIM at %s pixels: it needs %d", " and ".join(map(str, small)), MS_SSIM_SIDE)

    def names(self, size: int) -> list[str]:
        """Return the names of the :meth:`means` of images of ``size`` pixels."""
        options = self.options
        names = metrics_of(options.domain_info, options.domain, options.bounded)
        depth_names = ["abs_rel", "abs_rel_fitted"] if options.keeps_depth(training=False) else []
        similarity = ["ms_ssim"] if options.ms_ssim and size >= MS_SSIM_SIDE else []
        return names + depth_names + similarity

    def means(self, prediction: Tensor, target: Tensor, depth: Tensor | None) -> dict[str, Tensor]:
        """Compute the means over the samples of a batch, see :func:`fourm.vq.metrics.sample_metrics`."""
        return sample_metrics(self.names(target.shape[-1]), prediction, target, depth)

    def statistics(self, prediction: Tensor, target: Tensor, ids: Tensor, quantizer: Quantizer) -> dict[str, Tensor]:
        """Compute the statistics of a batch.

        Args:
            prediction: (B, C, H, W) reconstruction.
            target: (B, C, H, W), or class ids (B, H, W).
            ids: The token ids, (B, h, w), or (B, G, h, w) with G codebooks.
            quantizer: The quantizer that made them.
        """
        statistics = {"codes": code_counts(ids, quantizer.num_codebooks, quantizer.codebook_size)}
        if self.options.labels:
            statistics |= region_counts(prediction, target, self.options.labels)
        if self._fid is not None:
            statistics |= self._fid.statistics(prediction.clamp(-1, 1), target)
        return statistics

    def summarise(self, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute the metrics that follow from the sums of the :meth:`statistics`."""
        metrics = codebook_metrics(statistics["codes"])
        if "class_both" in statistics:
            metrics |= region_metrics(statistics)
        if self._fid is not None:
            metrics["fid"] = self._fid.distance(statistics)
        return metrics
