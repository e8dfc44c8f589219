"""Parse untrusted YAML: bounded in depth and size, without duplicate keys, and with the types of JSON only."""

from __future__ import annotations

import re
from typing import Any

import yaml

_MAX_DEPTH = 100
_MAX_ALIASED = 100_000  # values that all aliases (*name) may expand to
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
# PyYAML also raises these, for example for `!!int x`, `!!bool x`, `!!float ''` and numbers with thousands of digits.
_PARSE_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class BadYaml(ValueError):
    """The text is not valid YAML, or uses features that are not allowed in configurations."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that ``1e-4`` is a number and dates stay text."""

    # Without timestamps, because `run_name: 2024-01-31` is a name.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: function
        for tag, function in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _TAGS
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise BadYaml(f"it is nested more than {_MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|^[-+]?(\d[\d_]*)?\.\d[\d_]*([eE][-+]?\d+)?$"
        r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Parse a YAML document.

    Raises:
        BadYaml: If the document is invalid; the message names the line if it is known.
    """
    loader = _Loader("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_aliases(node)
        return loader.construct_document(node)
    except BadYaml:
        raise
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        description = ", ".join(part for part in (error.context, error.problem) if part)
        raise BadYaml(f"{line}{description}") from error
    except _PARSE_ERRORS as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise BadYaml(reason.replace('in "<unicode string>", ', "")) from error
    finally:
        loader.dispose()


def _check_keys(node: yaml.MappingNode) -> None:
    """Reject duplicate keys, of which PyYAML would silently use the last one."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        name = (key.tag, key.value)
        if name in lines:
            raise BadYaml(f"line {line}: the key {key.value!r} is already set in line {lines[name]}; keep one")
        lines[name] = line


def _check_aliases(root: yaml.Node) -> None:
    """Reject aliases that would expand a small file to a huge number of values, or to an infinite one."""
    sizes: dict[int, int] = {}
    opened: set[int] = set()

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in opened:
            raise BadYaml(f"line {node.start_mark.line + 1}: the value contains itself")
        if id(node) not in sizes:
            opened.add(id(node))
            pairs = isinstance(node, yaml.MappingNode)
            children = [child for pair in node.value for child in pair] if pairs else node.value
            sizes[id(node)] = 1 + sum(map(size, children))
            opened.remove(id(node))
        return sizes[id(node)]

    written = 0
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        written += 1
        if isinstance(node, yaml.MappingNode):
            stack += [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            stack += node.value
    if size(root) > written + _MAX_ALIASED:
        raise BadYaml(f"its aliases (*name) expand to more than {_MAX_ALIASED:,} values")
