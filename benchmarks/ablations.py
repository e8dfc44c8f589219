"""Optimizations of the training step that the benchmark can switch off, one at a time, to measure what each gains.

They are not options of the code: a switch replaces what the code calls. The model must not be compiled or sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import PropertyMock, patch

from torch import Tensor

from fourm.models import FM, encoder, fm_utils, fourm
from fourm.models.token_selection import Selection

Switch = Callable[[FM], AbstractContextManager[Any]]


def _compute_padding(model: FM) -> AbstractContextManager[Any]:
    select = model.select_tokens
    return patch.object(model, "select_tokens", lambda *arguments, pack: select(*arguments, pack=False))


def _mask_everything(model: FM) -> AbstractContextManager[Any]:
    return patch.object(Selection, "full", PropertyMock(return_value=False))


@contextmanager
def _convert_masks_in_blocks(model: FM) -> Iterator[None]:
    with patch.object(encoder, "additive", _as_it_is), patch.object(fourm, "additive", _as_it_is):
        yield


def _as_it_is(mask: Tensor, x: Tensor) -> Tensor:
    return mask


def _keep_products(model: FM) -> AbstractContextManager[Any]:
    return patch.object(fm_utils, "keep_only_inputs", lambda function, *inputs: function(*inputs))


SWITCHES: dict[str, Switch] = {
    "packing": _compute_padding,
    "unmasked_attention": _mask_everything,
    "additive_masks": _convert_masks_in_blocks,
    "recomputed_products": _keep_products,
}
"""Maps each optimization to a function that returns a context without it:

* packing: linear layers skip padding; without, they compute every slot.
* unmasked_attention: attention has no mask where nothing is masked.
* additive_masks: masks are converted once per step; without, in every block.
* recomputed_products: MLPs recompute their element-wise products in the backward pass; without, they keep them.
"""


def effective(padding: float) -> list[str]:
    """Return the switches that change a step whose batch has this share of padding."""
    without_effect = "unmasked_attention" if padding else "packing"
    return [name for name in SWITCHES if name != without_effect]
