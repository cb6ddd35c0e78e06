"""Numbers written into a model's config, `configs/<model>.yaml`, of which every other byte stays as it was."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from factlens.errors import ConfigError

Entries = Mapping[tuple[str, ...], object]
"""Values by the keys that lead to them: `("fine_tuning", "ft", "layer")`."""


def with_entries(text: str, entries: Entries) -> str:
    """A YAML text with the entries set: one that is there is replaced in its place, another comes behind the last of its section.

    What is new at the top level comes behind everything else. Comments, order and spacing stay.

    Raises:
        ConfigError: no keys and values, or a way of writing them in which this would change something else.
    """
    made, wanted = text, yaml.safe_load(text)
    try:
        for keys, value in entries.items():
            made = _with_entry(made, keys, value)
            wanted = _put(wanted, keys, value)
        same = yaml.safe_load(made) == wanted
    except yaml.YAMLError:
        same = False
    if not same:
        raise ConfigError(
            "the config is written in a way (anchors, keys twice) that cannot be changed in place; write its sections as "
            "`name: {key: value}`"
        )
    return made


def _with_entry(text: str, keys: Sequence[str], value: object) -> str:
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    flowing = False
    for depth, key in enumerate(keys):
        if not isinstance(node, yaml.MappingNode):
            where = ".".join(keys[:depth]) or "the config"
            raise ConfigError(f"{where} must hold keys and values, as in {{{key}: ...}}")
        flowing = bool(node.flow_style)
        found = [held for name, held in node.value if name.value == key]
        if not found:
            return _inserted(text, node, keys[depth:], value)
        node = found[0]
    start, end = node.start_mark.index, node.end_mark.index
    return text[:start] + _written(value, flowing) + text[end:]


def _inserted(text: str, node: yaml.MappingNode, keys: Sequence[str], value: object) -> str:
    """The text with an entry behind the last one of a mapping that has another."""
    if node.flow_style:
        at = node.value[-1][1].end_mark.index if node.value else node.end_mark.index - 1
        made = (", " if node.value else "") + _entry(keys, value, True)
        return text[:at] + made + text[at:]
    line = text.find("\n", _end(node))  # Behind the comment of the last entry.
    line = len(text) if line < 0 else line - (text[line - 1] == "\r")
    margin = "\r\n" if "\r\n" in text else "\n"
    margin += " " * node.value[0][0].start_mark.column
    # A section of sections has a line for each, as they are written by hand.
    broken = len(keys) > 2
    made = _entry(keys[1:], value, False) if broken else _entry(keys, value, False)
    made = f"{keys[0]}:{margin}  {made}" if broken else made
    return text[:line] + margin + made + text[line:]


def _end(node: yaml.Node) -> int:
    """Where the last value in a mapping ends; of a block itself PyYAML says where the next token begins."""
    while isinstance(node, yaml.MappingNode) and not node.flow_style:
        node = node.value[-1][1]
    return int(node.end_mark.index)


def _entry(keys: Sequence[str], value: object, flowing: bool) -> str:
    """`ft: {layer: 3}`."""
    inner = _written(value, flowing or len(keys) > 1)
    for key in reversed(keys[1:]):
        inner = f"{{{key}: {inner}}}"
    return f"{keys[0]}: {inner}"


def _written(value: object, flowing: bool) -> str:
    """One value as YAML reads it back; numbers without an exponent, which YAML would often take for a word."""
    if isinstance(value, float):
        return str(np.format_float_positional(value, trim="-"))
    # One line, whatever is in it; commas mean something only between braces.
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    if flowing or style:
        return _dumped([value], default_flow_style=True, default_style=style)[1:-1]
    return _dumped(value).removesuffix("\n...")


def _dumped(value: object, **how: Any) -> str:
    return yaml.safe_dump(value, width=10**6, allow_unicode=True, **how).removesuffix("\n")


def _put(mapping: Mapping[str, Any], keys: Sequence[str], value: object) -> dict[str, Any]:
    """What was read, with an entry set; new dictionaries, since YAML's anchors make one of two."""
    first, *rest = keys
    inner = _put(mapping.get(first, {}), rest, value) if rest else value
    return {**mapping, first: inner}
