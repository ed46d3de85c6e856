"""ray_cluster.yaml against Ray's own checks: what `ray up` does before it calls the cloud."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
PROJECT = "/home/ray/vitfront"


def written() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def prepared() -> dict[str, Any]:
    return prepare_config(written())


def option(commands: list[str], name: str) -> str:
    """The value of an option of the one `ray start` among the commands."""
    [start] = [command for command in commands if "ray start" in command]
    [value] = re.findall(rf"--{name}[= ](\S+)", start)
    return value


def test_ray_accepts_the_cluster():
    validate_config(prepared())


def _unknown_key(config: dict[str, Any]) -> None:
    config["workers"] = 4


def _unknown_key_of_a_node_type(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["instance_type"] = "g5.xlarge"


def _no_resources(config: dict[str, Any]) -> None:
    del config["available_node_types"]["gpu"]["resources"]


def _head_of_no_type(config: dict[str, Any]) -> None:
    config["head_node_type"] = "boss"


def _more_workers_at_least_than_at_most(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["min_workers"] = config["max_workers"] + 1


@pytest.mark.parametrize(
    "broken",
    [
        _unknown_key,
        _unknown_key_of_a_node_type,
        _no_resources,
        _head_of_no_type,
        _more_workers_at_least_than_at_most,
    ],
)
def test_ray_refuses_a_broken_cluster(broken: Callable[[dict[str, Any]], None]):
    config = deepcopy(written())
    broken(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(config))


def test_the_dashboard_listens_on_loopback_only():
    assert option(prepared()["head_start_ray_commands"], "dashboard-host") == "127.0.0.1"


def test_workers_join_the_port_that_the_head_opens():
    config = prepared()
    port = option(config["head_start_ray_commands"], "port")
    assert option(config["worker_start_ray_commands"], "address") == f"$RAY_HEAD_IP:{port}"


def test_every_node_gets_and_installs_the_project():
    config = prepared()
    assert config["file_mounts"] == {PROJECT: "."}
    types = config["available_node_types"]
    setups = {name: kind.get("worker_setup_commands", config["worker_setup_commands"]) for name, kind in types.items()}
    setups[config["head_node_type"]] = config["head_setup_commands"]
    for commands in setups.values():
        [install] = [command for command in commands if "pip install" in command]
        assert f"cd {PROJECT} " in install
        assert "-c constraints.txt" in install
        assert re.search(r"-e '\.\[cluster\]'", install)


def test_what_is_large_or_private_to_a_machine_stays_there():
    assert {"/.git", "/.venv", "/runs"} <= set(prepared()["rsync_exclude"])


def test_gpu_workers_start_from_none_and_the_head_runs_no_trial():
    config = prepared()
    workers = dict(config["available_node_types"])
    head = workers.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert option(config["head_start_ray_commands"], "num-cpus") == "0"
    assert workers
    for kind in workers.values():
        assert kind["resources"]["GPU"] > 0
        assert 0 == kind["min_workers"] < kind["max_workers"] <= config["max_workers"]


def test_the_image_has_the_ray_that_is_tested():
    [version] = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f":{version}-" in prepared()["docker"]["image"]
