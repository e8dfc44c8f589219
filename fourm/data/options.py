"""Options of the commands that look at a data YAML: they read it as training does, so they are keys of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fourm.data.data_config import DataConfig, load_data_config
from fourm.data.shard_cache import RemoteOptions
from fourm.utils.config import settle
from fourm.utils.errors import UserError
from fourm.utils.options import option
from fourm.utils.paths import AnyPath, InputPath
from fourm.utils.plugin import load_plugin
from fourm.utils.transfer import check_url, shown


def remote_options(keys: Any) -> RemoteOptions:
    """The options about remote data of a run or of a command.

    Args:
        keys: a :class:`ReadOptions`, or whatever has attributes of these names.
    """
    return RemoteOptions(
        endpoint=keys.s3_data_endpoint or keys.s3_endpoint,
        cache_dir=keys.data_cache_dir,
        cache_bytes=int(keys.data_cache_gb * 1e9),
        part_bytes=keys.s3_multipart_chunksize_mb * 2**20,
        split_above_bytes=keys.s3_multipart_threshold_mb * 2**20,
        requests=keys.s3_max_io_queue,
    )


def check_endpoint(keys: Any, *names: str) -> None:
    """Judge endpoints, once something in a store is to be read: published files have placeholders in these keys.

    Raises:
        UserError: the first of the keys ``names`` that is set is no URL.
    """
    for name in names:
        if endpoint := getattr(keys, name):
            if not endpoint.startswith(("http://", "https://")):
                raise UserError(f"'{name}' must be a URL, https://HOST, not {shown(endpoint)!r}")
            check_url(endpoint, ("http", "https"))
            return


def read_data(keys: Any, **options: Any) -> DataConfig:
    """The data configuration of a run or of a command, with its token budgets where a data set has none of its own.

    Args:
        keys: as of :func:`remote_options`.
        options: further ones of :func:`load_data_config`.

    Raises:
        UserError: anything that cannot work.
    """
    data = load_data_config(
        keys.data_config, num_input_tokens=keys.num_input_tokens, num_target_tokens=keys.num_target_tokens,
        min_input_tokens=keys.min_input_tokens, min_target_tokens=keys.min_target_tokens, remote=remote_options(keys),
        **options,
    )  # fmt: skip
    if any(dataset.data_path.startswith("s3://") for dataset in (*data.train.values(), *data.val.values())):
        check_endpoint(keys, "s3_data_endpoint", "s3_endpoint")
    return data


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read a data YAML; names and defaults are those of training."""

    data_config: InputPath = option("data YAML")
    text_tokenizer_path: InputPath = option(
        "text vocabulary", "fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json"
    )
    plugin: str = option("module of your own modalities", "")
    num_input_tokens: int = option("input tokens of data sets that do not set it", 128, at_least=1, at_most=10**6)
    num_target_tokens: int = option("target tokens of data sets that do not set it", 128, at_least=1, at_most=10**6)
    min_input_tokens: int | None = option("fewest input tokens (default: always num_input_tokens)", None, at_least=0)
    min_target_tokens: int | None = option("fewest target tokens (default: always num_target_tokens)", None, at_least=0)
    s3_endpoint: str = option("URL of the object store (default: as boto3 is configured, else AWS)", "")
    s3_data_endpoint: str = option("the same for data, where it differs", "")
    s3_multipart_chunksize_mb: int = option("size of a part of a transfer", 512, at_least=1, at_most=5120)
    s3_multipart_threshold_mb: int = option("transfers above this are split", 512, at_least=0, at_most=10**7)
    s3_max_io_queue: int = option("requests that a process may have in flight", 100, at_least=1, at_most=10_000)
    data_cache_dir: AnyPath = option("local copies of remote shards, shared by all processes", "~/.cache/fourm/shards")
    data_cache_gb: float = option("most that these copies may take, in 10^9 bytes", 50.0, above=0, at_most=1e9)

    def __post_init__(self) -> None:
        settle(self)

    def load(self) -> DataConfig:
        """The data sets, the plugin's modalities among them.

        Raises:
            UserError: anything that cannot work.
        """
        load_plugin(self.plugin)
        return read_data(self)
