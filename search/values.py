"""Values of settings, read from a YAML file or from `a.b=c` on the command line by the types of their keys.

The types are those of pydantic's models, so that a text stays as it stands: a split `no`, a folder `2024`, a pattern
`2:4`. Where the type leaves it open, YAML 1.2 holds, not PyYAML's 1.1: `1e-3` is a number, `08` is 8, `1:30` is text.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from search.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_YES_OR_NO = "!yes-or-no"


def read_yaml(text: str, source: str, kind: Any = Any) -> Any:
    """Reads a YAML text.

    Args:
        source: name of the text in errors.
        kind: type that the text describes; keys of a pydantic model get values of their types.

    Returns:
        Dictionaries, lists and plain values, or None for an empty text; they are not validated yet.

    Raises:
        ConfigError: the text is not YAML, or gives a key twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _construct(loader, node, kind)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"cannot read {source}{line}: {what}") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ConfigError(f"cannot read {source}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"cannot read {source}: it nests its lists too deep") from None


def parse_value(text: str, kind: Any, source: str) -> Any:
    """Reads the value of one key from the command line.

    A text is taken as it stands, spaces, `#`, `:` and quotes included; only a key that may be empty takes `null` and
    nothing as None. A value of another type that begins with a bracket, brace or quote is YAML.

    Args:
        kind: type of the key.
        source: name of the value in errors.

    Raises:
        ConfigError: the value is not YAML, or empty where a text is needed.
    """
    branches = branches_of(kind)
    lists = [branch for branch in branches if get_origin(branch) is tuple]
    if is_text(kind) and not (lists and text.lstrip().startswith("[")):
        if lists and all(branch in lists or branch is NoneType for branch in branches):
            return [text] if text else []
        if NoneType in branches and text in ("", "null"):
            return None
        if not text:
            raise ConfigError(f"{source} gives no value; it needs a text")
        return text
    text = text.strip()
    if text.startswith(("[", "{", "'", '"')):
        return read_yaml(text, source, kind)
    loader = _Loader("")
    node = yaml.ScalarNode(yaml.SafeLoader.resolve(loader, yaml.ScalarNode, text, (True, False)), text)
    try:
        return _construct(loader, node, kind)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{source}: {error.problem}") from None


def branches_of(kind: Any) -> list[Any]:
    """Lists the types that a type allows, without what pydantic checks besides: `str | None` is str and NoneType."""
    if get_origin(kind) is Annotated:
        return branches_of(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [branch for part in get_args(kind) for branch in branches_of(part)]
    if get_origin(kind) is Literal:
        return list({type(value) for value in get_args(kind)})
    return [kind]


def section_of(kind: Any) -> type[BaseModel] | None:
    """Returns the pydantic model that a type allows, if there is one."""
    models = [branch for branch in branches_of(kind) if isinstance(branch, type) and issubclass(branch, BaseModel)]
    return models[0] if models else None


def is_text(kind: Any) -> bool:
    """Tells whether a type allows texts, paths or lists of these, and nothing else but None."""
    scalars = _scalars_of(kind) - {NoneType}
    return bool(scalars) and scalars <= {str, Path}


def _scalars_of(kind: Any) -> set[Any]:
    """Returns the types of single values that a type allows, those within its lists included."""
    found: set[Any] = set()
    for branch in branches_of(kind):
        found |= _scalars_of(_item_of(branch)) if get_origin(branch) in (tuple, list) else {branch}
    return found


def _item_of(branch: Any) -> Any:
    return get_args(branch)[0]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the types of YAML 1.2 and without keys that are given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _TAG + "merge":
                key.tag = _TAG + "str"  # all keys are names, 2024 and `no` too
                if first.setdefault(key.value, key) is not key:
                    line = first[key.value].start_mark.line + 1
                    problem = f"{key.value!r} is given twice, first in line {line}; keep one"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    try:
        return int(text, 0) if text[1:2] in ("o", "x") else int(text)
    except ValueError:  # of more digits than Python reads
        raise yaml.MarkedYAMLError(problem="a number has too many digits", problem_mark=node.start_mark) from None


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = node.value.replace("_", "").lower()
    if text == ".nan":
        return math.nan
    return float(text.replace(".inf", "inf"))


def _refuse_yes_or_no(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> None:
    meaning = "true" if node.value.lower() in ("yes", "on") else "false"
    problem = f"{node.value} is {meaning} to some readers of YAML and text to others; give {meaning}, or quote it"
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_Loader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (None, *(_TAG + name for name in ("null", "bool", "str", "seq", "map")))
}
_Loader.yaml_implicit_resolvers = {}
for _name, _pattern in {
    "merge": "<<",
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)
_Loader.add_implicit_resolver(_YES_OR_NO, re.compile(r"(?:yes|no|on|off)\Z", re.IGNORECASE), None)
_Loader.add_constructor(_TAG + "int", _integer)
_Loader.add_constructor(_TAG + "float", _float)
_Loader.add_constructor(_YES_OR_NO, _refuse_yes_or_no)


def _construct(loader: _Loader, node: yaml.Node, kind: Any) -> Any:
    _retag(node, kind)
    return loader.construct_document(node)


def _retag(node: yaml.Node, kind: Any) -> None:
    """Makes plain values texts where their keys take texts alone.

    Also `yes`, `no` and `true` where the type is known: pydantic reads them for a bool, and refuses them for a number,
    for which it would take a `true` as 1.
    """
    if isinstance(node, yaml.MappingNode):
        section = section_of(kind)
        fields = {} if section is None else section.model_fields
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in fields:
                _retag(value, fields[key.value].annotation)
    elif isinstance(node, yaml.SequenceNode):
        items = [_item_of(branch) for branch in branches_of(kind) if get_origin(branch) in (tuple, list)]
        for value in node.value if items else ():
            _retag(value, items[0])
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        is_word = node.tag in (_YES_OR_NO, _TAG + "bool") and Any not in _scalars_of(kind)
        if is_word or (is_text(kind) and node.tag != _TAG + "null"):
            node.tag = _TAG + "str"
