"""The reading of a checkpoint file: no code of it runs, and each kind of file that is none is told what it is."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pruning.errors import CheckpointError
from pruning.model.checkpoint import WAY_OUT, read_checkpoint

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)}


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        for name in names:
            content.writestr(name, b"")
    return file.getvalue()


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "content", [save(WEIGHTS), saved(WEIGHTS), saved(WEIGHTS, _use_new_zipfile_serialization=False)]
)
@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pth", "w", "w-00001-of-00001.bin"])
def test_the_content_tells_the_format_whatever_the_name(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    checkpoint = read_checkpoint(tmp_path / name)
    assert checkpoint.values.keys() == WEIGHTS.keys()
    assert all(torch.equal(checkpoint.values[key], WEIGHTS[key]) for key in WEIGHTS)
    assert set(checkpoint.mappings.values()) == {""}


def test_names_within_mappings_are_joined_and_lists_are_values(tmp_path: Path) -> None:
    content = {"state_dict": WEIGHTS, "epoch": 3, "empty": {}, "numbered": {0: torch.ones(1)}, "list": [WEIGHTS]}
    (tmp_path / "w.pt").write_bytes(saved(content))
    checkpoint = read_checkpoint(tmp_path / "w.pt")
    names = ["state_dict.layer.weight", "state_dict.layer.bias", "epoch", "empty", "numbered", "list"]
    assert list(checkpoint.values) == names
    assert list(checkpoint.mappings.values()) == ["state_dict.", "state_dict.", "", "", "", ""]


def test_plain_values_of_training_scripts_do_not_hinder(tmp_path: Path) -> None:
    content = {
        "model": WEIGHTS, "args": argparse.Namespace(lr=0.1), "output": Path("runs"), "best": np.float64(0.5),
        "loss": np.float32(0.25), "step": np.int64(7),
    }  # fmt: skip
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        old_numpy = saved(content, **options).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        for data in (saved(content, **options), old_numpy if options else saved(content)):
            (tmp_path / "w.pt").write_bytes(data)
            values = read_checkpoint(tmp_path / "w.pt").values
            assert (values["best"], values["loss"], values["step"]) == (0.5, 0.25, 7)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
def test_a_checkpoint_runs_no_code_and_the_way_out_is_said(how: str, tmp_path: Path) -> None:
    path, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    content = {"state_dict": WEIGHTS, "config": Trap(str(sprung))}
    path.write_bytes(
        pickle.dumps(content, protocol=2) if how == "pickle"
        else saved(content, _use_new_zipfile_serialization=how == "torch")
    )  # fmt: skip
    assert refusal(path).endswith(WAY_OUT)
    assert not sprung.exists()


@pytest.mark.parametrize("zipped", [False, True])
def test_a_whole_pickled_module_is_told_how_to_save_its_weights(zipped: bool, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(saved(torch.nn.Linear(2, 2), _use_new_zipfile_serialization=zipped))
    said = refusal(tmp_path / "w.pt")
    assert said.endswith('import torch; torch.save(model.state_dict(), "weights.pt")')
    assert ("torch.nn.modules.linear.Linear" in said) == zipped


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(2))
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as content:
        content.addfile(tarfile.TarInfo("w.safetensors"))
    return file.getvalue()


INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty; copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "of Git LFS.* run git lfs pull"),
        (b"\n<!DOCTYPE html><html>" + b"x" * 3000, "it is a web page, .*; download the file again"),
        ("<html lang='de'>größer".encode(), "it is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "it is a web page"),
        (INDEX, "it is the index of a checkpoint in 2 shards; where it was made"),
        (b'{"error": "not found"}', "it is JSON, not weights"),
        (b"{broken", "it is JSON, not weights"),
        (b"not weights", "it is text, not weights"),
        (npz(), r"it is a NumPy archive .*model.load_pretrained\(\"w.pt\"\)"),
        (b"\x93NUMPY\x01\x00", "it is a file of NumPy"),
        (b"\x89HDF\r\n\x1a\n", "it is a file of HDF5"),
        (gzip.compress(b"weights", mtime=0), "it is compressed"),
        (tar(), r"it is a tar archive; unpack it, or if torch wrote it \(before 0\.2\), where it was made"),
        (archive("w/data.pkl", "w/constants.pkl", "w/code/a.py"), r"a TorchScript archive; torch.save\(torch.jit.load"),
        (archive("weights.pt", "readme"), "it is a zip archive, but not of torch.save; where it was made"),
        (saved(WEIGHTS)[:300], "it is cut off or damaged"),
        (save(WEIGHTS)[:-4], "it may be cut off"),
        (saved(WEIGHTS, _use_new_zipfile_serialization=False)[:-4], "may be damaged"),
        (bytes(range(256)), "where it was made, save the weights alone|may be damaged"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_told_what_it_is(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    said = refusal(tmp_path / "w.pt")
    assert said.startswith(f"cannot read checkpoint {tmp_path / 'w.pt'}: ")
    assert re.search(says, said)


def test_a_shard_a_folder_and_a_missing_file_are_told(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(save(WEIGHTS))
    assert "it is one of 3 shards; where it was made" in refusal(tmp_path / "model-00001-of-00003.safetensors")
    assert "it is a folder; give a file in it (model-00001-of-00003.safetensors)" in refusal(tmp_path)
    assert refusal(tmp_path / "nowhere.pth") == f"no checkpoint {tmp_path / 'nowhere.pth'}"
