"""Options of the data loader and of all commands that read a data YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fourm.data.data_config import DataConfig, load_data_config
from fourm.data.shard_cache import RemoteOptions
from fourm.utils.errors import UserError
from fourm.utils.options import Options, option
from fourm.utils.paths import AnyPath, InputPath
from fourm.utils.plugin import PluginOptions, load_plugin
from fourm.utils.s3 import StoreOptions, check_endpoint


@dataclass(frozen=True, kw_only=True)
class RemoteDataOptions(StoreOptions):
    """Remote data"""

    s3_data_endpoint: str = option("endpoint for data if it differs from s3_endpoint", "")
    data_cache_dir: AnyPath = option(
        "folder of local copies of remote shards, shared by all processes", "~/.cache/fourm/shards"
    )
    data_cache_gb: float = option("maximum size of these copies, in 10^9 bytes", 50.0, above=0, at_most=1e9)

    def remote(self) -> RemoteOptions:
        """Return the options for reading and caching remote data."""
        return RemoteOptions(
            endpoint=self.s3_data_endpoint or self.s3_endpoint,
            cache_dir=self.data_cache_dir,
            cache_bytes=int(self.data_cache_gb * 1e9),
            part_bytes=self.s3_multipart_chunksize_mb * 2**20,
            split_above_bytes=self.s3_multipart_threshold_mb * 2**20,
            requests=self.s3_max_io_queue,
        )


@dataclass(frozen=True, kw_only=True)
class DataOptions(PluginOptions, RemoteDataOptions):
    """Data and token budgets"""

    data_config: InputPath = option("path of the data YAML", "")
    text_tokenizer_path: InputPath = option(
        "text vocabulary (also: tokenizer_path)",
        "fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json",
        alias="tokenizer_path",
    )
    num_input_tokens: int = option(
        "maximum number of input tokens of a sample, unless set by a data set",
        128,
        at_least=1,
        at_most=10**6,
        fixed=True,
    )
    num_target_tokens: int = option(
        "maximum number of target tokens of a sample, unless set by a data set",
        128,
        at_least=1,
        at_most=10**6,
        fixed=True,
    )
    min_input_tokens: int | None = option(
        "minimum number of input tokens (default: num_input_tokens)", None, at_least=0, fixed=True
    )
    min_target_tokens: int | None = option(
        "minimum number of target tokens (default: num_target_tokens)", None, at_least=0, fixed=True
    )

    def check(self) -> None:
        for role in ("input", "target"):
            low, high = getattr(self, f"min_{role}_tokens"), getattr(self, f"num_{role}_tokens")
            if low is not None and not 0 <= low <= high:
                raise UserError(f"'min_{role}_tokens' must lie between 0 and num_{role}_tokens ({high}), not {low}")

    def load_data(self, **options: Any) -> DataConfig:
        """Load the plugin and the data configuration.

        Args:
            options: Further arguments of :func:`load_data_config`.

        Raises:
            UserError: The configuration is invalid.
        """
        if not self.data_config:
            raise UserError("'data_config' is not set; set it to the path of the data YAML")
        load_plugin(self.plugin)
        data = load_data_config(
            self.data_config,
            num_input_tokens=self.num_input_tokens,
            num_target_tokens=self.num_target_tokens,
            min_input_tokens=self.min_input_tokens,
            min_target_tokens=self.min_target_tokens,
            remote=self.remote(),
            **options,
        )
        if any(dataset.data_path.startswith("s3://") for dataset in (*data.train.values(), *data.val.values())):
            check_endpoint(self, "s3_data_endpoint", "s3_endpoint")
        return data


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(Options):
    """Loader"""

    num_workers: int = option("loader processes per rank", 10, at_least=0, at_most=512)
    num_streams: int | None = option(
        "batches do not depend on processes x num_workers as long as this is a multiple of it (default: the product)",
        None,
        at_least=1,
        at_most=10**7,
    )
    pin_mem: bool = option("put batches in page-locked memory for faster copies to a GPU", True)
    data_timeout: float = option("minutes to wait for a batch before the run stops", 30.0, above=0)
    max_bad_fraction: float = option(
        "maximum share of unusable samples; more than this stops the run", 0.01, at_least=0, at_most=1
    )

    def streams(self, world_size: int) -> int:
        """Return the number of streams of the training data (see :mod:`fourm.data.unified_datasets`).

        Raises:
            UserError: ``num_streams`` is not a multiple of the workers of all ranks.
        """
        workers = world_size * max(1, self.num_workers)
        streams = self.num_streams or workers
        if streams % workers:
            raise UserError(
                f"'num_streams' {streams} must be a multiple of processes x num_workers, {world_size} x "
                f"{max(1, self.num_workers)}; choose another num_workers"
            )
        return streams
