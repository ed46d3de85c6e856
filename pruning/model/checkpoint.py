"""A user's checkpoint file, read without running any code that is in it.

What a file is shows in its first bytes, not in the ending of its name: `.bin` may be safetensors, `.pt` TorchScript.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from pruning.errors import CheckpointError, first_line_of

MAX_NESTING = 8
"""Number of mappings within each other that are searched for tensors: a mapping may hold itself."""

WAY_OUT = 'where it was made, save the weights alone: import torch; torch.save(model.state_dict(), "weights.pt")'

_make_scalar = np.float64(0).__reduce__()[0]
SAFE: list[Any] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
    (_make_scalar, "numpy.core.multiarray.scalar"),
    (_make_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
]
"""Plain values that training scripts save beside the weights and that torch.load would refuse: options, paths, and
numbers of NumPy. None of them runs code."""


@dataclass(frozen=True)
class Checkpoint:
    """The values of a checkpoint by name; names within mappings are joined by dots."""

    values: dict[str, Any]
    """Tensors, and whatever else the file holds under a name."""
    mappings: dict[str, str]
    """The dotted name of the mapping that each value is in: "" for the outermost, else `state_dict.`."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a .safetensors file or one of torch.save.

    Raises:
        CheckpointError: the file is missing, is something else, is damaged, or cannot be read without running code.
    """
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        raise CheckpointError(f"no checkpoint {path}: it is a folder; give a file in it{_listed(files)}")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    try:
        with path.open("rb") as file:
            head = file.read(2048)
        fault = _fault_of_file(path, head)
    except OSError as error:
        fault = first_line_of(error)
    if fault:
        raise CheckpointError(f"cannot read checkpoint {path}: {fault}")
    content = _read_safetensors(path) if _is_safetensors(head) else _read_torch(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, not tensors by name; {WAY_OUT}")
    values: dict[str, Any] = {}
    mappings: dict[str, str] = {}
    for mapping, name, value in _flat(content, "", MAX_NESTING):
        if name in values:
            raise CheckpointError(f"checkpoint {path} holds two values named {name}")
        values[name], mappings[name] = value, mapping
    if not any(isinstance(value, torch.Tensor) for value in values.values()):
        raise CheckpointError(f"checkpoint {path} holds no tensor by name{_listed(list(values))}; {WAY_OUT}")
    return Checkpoint(values, mappings)


def _flat(mapping: dict[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, str, Any]]:
    """Gives the dotted name of a value's mapping, its own dotted name and the value, for all values."""
    for key, value in mapping.items():
        if isinstance(value, dict) and depth > 1 and value and all(isinstance(inner, str) for inner in value):
            yield from _flat(value, f"{prefix}{key}.", depth - 1)
        else:
            yield prefix, f"{prefix}{key}", value


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f" ({', '.join(names[:4])}{more})" if names else ""


def _fault_of_file(path: Path, head: bytes) -> str | None:
    """Says what a file is that is no checkpoint, and the way out; None where it may be one."""
    shard = re.search(r"-\d{5}-of-(\d{5})", path.name)
    if shard and int(shard[1]) > 1:
        return f"it is one of {int(shard[1])} shards; {WAY_OUT}"
    if not head:
        return "it is empty; copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the weights themselves; run git lfs pull"
    if head.startswith(b"PK"):
        return _fault_of_archive(path)
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed (gzip); unpack it first"
    if head[257:262] == b"ustar":
        return f"it is a tar archive; unpack it, or if torch wrote it (before 0.2), {WAY_OUT}"
    if head.startswith((b"\x93NUMPY", b"\x89HDF")):
        return f"it is a file of {'NumPy' if head[1:2] == b'N' else 'HDF5 (Keras)'}, not of PyTorch or safetensors"
    return None if _is_safetensors(head) else _fault_of_text(path, head)


def _fault_of_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "it is cut off or damaged; copy or download it again"
    if any(name.endswith("/constants.pkl") for name in names):
        return f'it is a TorchScript archive; torch.save(torch.jit.load("{path.name}").state_dict(), "weights.pt")'
    if names and all(name.endswith(".npy") for name in names):
        return (
            "it is a NumPy archive (.npz); have timm convert it: "
            f'model.load_pretrained("{path.name}"); torch.save(model.state_dict(), "weights.pt")'
        )
    if not any(name.endswith("/data.pkl") for name in names):
        return f"it is a zip archive, but not of torch.save; {WAY_OUT}"
    return None


def _fault_of_text(path: Path, head: bytes) -> str | None:
    try:
        text = head[:-3].decode() if len(head) > 2000 else head.decode()  # the cut may be within a letter
    except UnicodeDecodeError:
        return None
    if any(ord(letter) < 9 for letter in text):
        return None
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith(("<!doctype html", "<html", "<?xml", "<head")):
        return "it is a web page, not the weights themselves; download the file again"
    if start.startswith("{"):
        try:
            shards = len(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return "it is JSON, not weights"
        return f"it is the index of a checkpoint in {shards} shards; {WAY_OUT}"
    return "it is text, not weights"


def _is_safetensors(head: bytes) -> bool:
    """Tells a safetensors file: the length of its header in 8 bytes, then the header, a JSON object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors has its own error type
        raise CheckpointError(
            f"cannot read checkpoint {path}: {first_line_of(error)}; it may be cut off: copy or download it again"
        ) from error


def _read_torch(path: Path) -> Any:
    with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch itself, about old formats
        try:
            with path.open("rb") as file:  # a path would be read as what its name says
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # its message tells how to run the file's code
            raise CheckpointError(f"cannot read checkpoint {path}: {_unsafe(path)}; {WAY_OUT}") from error
        except Exception as error:
            raise CheckpointError(
                f"cannot read checkpoint {path}: {_told(error)}; it may be damaged, or neither of torch.save "
                "nor of safetensors: copy or download it again"
            ) from error


def _told(error: Exception) -> str:
    """Gives the first sentence of an error of torch; the others tell how to run the file's code."""
    return first_line_of(error).split(". ", 1)[0]


def _unsafe(path: Path) -> str:
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a format older than torch 1.6, or no file of torch.save
        classes = []
    if not classes:
        return "it is not of torch.save or safetensors, or holds more than tensors and plain values"
    return f"it holds not only tensors but objects{_listed(classes)}, and making those could run any code"
