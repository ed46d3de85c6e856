"""The command line: parse, call, print."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pruning.errors import VitfrontError

if TYPE_CHECKING:  # commands import what they need when they run, so that --help is quick
    from search.front import Front
    from search.views.console import Report

app = typer.Typer(
    help="Searches for the pruned vision transformers with the best accuracy and the best measured throughput.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _local_path(text: str) -> Path:
    """Reads a path, with `~` for the home folder, which a shell leaves alone in `--runs=~/x`."""
    if not str(text):
        raise typer.BadParameter("it is empty; give a path, or leave the option out")
    return Path(os.path.expanduser(text))  # leaves a user that there is not, where pathlib raises


AS_PATH: dict[str, Any] = {"parser": _local_path, "metavar": "PATH"}

Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe: digits, imagefolder.")]
Sweep = Annotated[str, typer.Argument(help="Name of the sweep.")]
Runs = Annotated[Path, typer.Option(help="Folder that holds all sweeps.", envvar="VITFRONT_RUNS", **AS_PATH)]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="Change a key of the recipe, such as search.trials=50. A text is taken as it stands, up to its end.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
AtLeast = Annotated[
    list[str], typer.Option(metavar="METRIC=VALUE", help="Keep only models whose metric is this or more: top1=0.9.")
]
AtMost = Annotated[
    list[str], typer.Option(metavar="METRIC=VALUE", help="Keep only models whose metric is this or less: macs=1e9.")
]
PICKS = "knee, fastest, most-accurate, or the id of a point."


@app.command()
def run(
    recipe: Recipe = "digits",
    name: Annotated[str | None, typer.Option(help="Name of the sweep; by default the recipe's.")] = None,
    trials: Annotated[
        int | None, typer.Option(help="Number of trials in all, those of an earlier run included.")
    ] = None,
    time_budget: Annotated[str | None, typer.Option(help="Start no trial after this time: 90s, 10m, 2h.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to run on: auto, or host:port. By default this machine alone.")
    ] = None,
    earlier: Annotated[
        list[str], typer.Option("--from", metavar="NAME", help="Learn from an earlier sweep of the same model.")
    ] = [],  # noqa: B006
    replay: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a finished sweep: search its recorded outcomes, without running a model.", **AS_PATH
        ),
    ] = None,
    sets: Sets = [],  # noqa: B006
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Search for a front, or continue a search that was stopped."""
    began = time.monotonic()  # what is imported now is a part of the time budget
    from search.commands.run import run_sweep
    from search.recipe import load_config
    from search.views.console import ERR
    from search.views.progress_line import ProgressLine

    config = load_config(recipe, name=name, trials=trials, time_budget=time_budget, earlier=earlier, sets=sets)
    if replay is not None:
        from search.commands.replay import Recorded, replay_sweep

        front = replay_sweep(config, runs, Recorded.read(replay, config))
    else:
        with ProgressLine(ERR) as line:
            front = run_sweep(config, runs, line, address=address, began=began)
    _print_front(front, runs, as_json)


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(help="Sweep names; X-0, X-1, ... are averaged as seeds of X.")],
    to: Annotated[Path | None, typer.Option(help="HTML file to write a figure to.", **AS_PATH)] = None,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Compare the hypervolumes of several sweeps, after trials and after seconds."""
    from search.commands.compare import compare_sweeps
    from search.records.files import write_atomically
    from search.views.comparison_plot import comparison_html
    from search.views.tables import comparison_report

    record = compare_sweeps(runs, names)
    if to is not None:
        write_atomically(to, comparison_html(record))
    _print(record, comparison_report(record), as_json)


@app.command()
def front(
    name: Sweep,
    at_least: AtLeast = [],  # noqa: B006
    at_most: AtMost = [],  # noqa: B006
    pick: Annotated[str | None, typer.Option(help=f"Show one model only: {PICKS}")] = None,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show the front of a sweep, or pick a point of it."""
    from search.records.folder import Folder

    front, bounds = Folder(runs, name).read_front(), (_parse_bounds(at_least), _parse_bounds(at_most))
    shown = front.within(*bounds) if pick is None else replace(front, points=(front.pick(pick, *bounds),))
    _print_front(shown, runs, as_json)


@app.command()
def export(
    name: Sweep,
    to: Annotated[Path, typer.Option(help="Folder to create for the model.", **AS_PATH)],
    pick: Annotated[str, typer.Option(help=f"Model to copy: {PICKS}")] = "knee",
    format: Annotated[list[str], typer.Option(help="File format of the weights: safetensors.")] = ["safetensors"],  # noqa: B006
    runs: Runs = Path("runs"),
) -> None:
    """Copy a model of the front out of its sweep."""
    from search.errors import ConfigError
    from search.records import folder
    from search.views.console import show

    unknown = [name for name in format if name != "safetensors"]
    if unknown:
        raise ConfigError(f"format {unknown[0]!r} is not known; give safetensors")
    point = folder.export(runs, name, pick, to)
    assert point.measurement is not None
    show([f"{point.id} (top-1 {point.measurement.top1:.3f}, {point.measurement.speedup:.2f} x dense) is in {to}"])


@app.command()
def prune(
    recipe: Recipe = "digits",
    target_ratio: Annotated[float, typer.Option(help="Share of the dense model's multiply-adds (MACs) to keep.")] = 0.6,
    budget: Annotated[
        float, typer.Option(help="Method cascade: accuracy points that pruning each block may cost.")
    ] = 1.0,
    exit_block: Annotated[int | None, typer.Option(help="Number of blocks to keep; by default all of them.")] = None,
    cutoff_channel: Annotated[
        float, typer.Option(help="Cut-off frequency of the image filter of criterion lfs, in (0, 1].")
    ] = 0.1,
    cutoff_token: Annotated[
        float, typer.Option(help="Cut-off frequency of the token filter of lfe and lfe-merge, in (0, 1].")
    ] = 0.85,
    token_share: Annotated[
        float,
        typer.Option(
            help="Method cascade: share of the budget that tokens may spend. Method global: weight of tokens against "
            "channels; 0 prunes channels alone, 1 tokens alone."
        ),
    ] = 0.5,
    method: Annotated[
        str,
        typer.Option(
            help="global: choose all widths jointly at one price of a multiply-add. cascade: go block by block within "
            "a budget (VTC-LFC). constant, decreasing: reduce tokens alone, by a schedule."
        ),
    ] = "global",
    criterion: Annotated[
        str, typer.Option(help="Channel score of method cascade: lfs, taylor, magnitude, activation, random, obs.")
    ] = "obs",
    token_reduction: Annotated[
        str,
        typer.Option(
            help="Way to reduce tokens: none, lfe, attention, merge, lfe-merge, attention-merge; auto takes the best "
            "one that the model allows."
        ),
    ] = "auto",
    round_to: Annotated[
        str,
        typer.Option(
            help="Number that widths are multiples of; auto uses only widths that measured faster than every larger "
            "one on this device."
        ),
    ] = "auto",
    to: Annotated[Path | None, typer.Option(help="Folder to create for the pruned model.", **AS_PATH)] = None,
    sets: Sets = [],  # noqa: B006
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Prune one model by one plan, without a search."""
    from search.commands.prune import PruneSettings, prune_once
    from search.recipe import load_config
    from search.views.console import ERR, say
    from search.views.tables import pruning_report

    config = load_config(recipe, sets=sets)
    with ERR.status("loading, pruning and measuring ..."):
        outcome, dense, blocks = prune_once(
            config, runs, to,
            PruneSettings(
                target_ratio=target_ratio, budget=budget, exit_block=exit_block,
                cutoff_channel=cutoff_channel, cutoff_token=cutoff_token, token_share=token_share,
                method=method, criterion=criterion, token_reduction=token_reduction, round_to=round_to,
            ),
            say,
        )  # fmt: skip
    _print(outcome.to_json(), pruning_report(blocks, outcome, dense), as_json)


@app.command()
def lottery(
    recipe: Recipe = "digits",
    name: Annotated[str | None, typer.Option(help="Name of the lottery; by default the recipe's.")] = None,
    sparsity: Annotated[float, typer.Option(help="Share of the blocks' weights to remove.")] = 0.8,
    rounds: Annotated[
        int, typer.Option(help="Number of rounds of training and pruning in which these weights are removed.")
    ] = 3,
    rewind_step: Annotated[
        int, typer.Option(help="Step of the first training that a ticket's weights are rewound to.")
    ] = 0,
    seeds: Annotated[int, typer.Option(help="Number of repetitions, each with a seed of its own.")] = 3,
    sets: Sets = [],  # noqa: B006
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Train sparse models from their first weights and from new ones, to see whether the mask alone counts."""
    from search.commands.lottery import lottery_folder, run_lottery_seeds
    from search.recipe import load_config
    from search.views.console import ERR
    from search.views.tables import lottery_report

    config = load_config(recipe, name=name, sets=sets)
    with ERR.status("loading ...") as status:
        record = run_lottery_seeds(
            config, runs, sparsity=sparsity, rounds=rounds, rewind_step=rewind_step, seeds=seeds,
            on_stage=lambda stage: status.update(f"training {stage} ..."),
        )  # fmt: skip
    _print(record, lottery_report(record, lottery_folder(runs, config.name)), as_json)


@app.command()
def study(
    name: Annotated[
        str,
        typer.Argument(help="A shipped study (cutoff, noise, tokens, order, width-or-depth, budgets), or a YAML file."),
    ],
    recipe: Recipe = "digits",
    sets: Sets = [],  # noqa: B006
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Answer one of the source papers' questions for a recipe: a table, a figure and a sentence."""
    from search.commands.study import run_study
    from search.commands.study_report import TABLE_COLUMNS, table_cells
    from search.recipe import load_config
    from search.views.console import say
    from search.views.tables import study_report

    record = run_study(name, load_config(recipe, sets=sets), runs, say)
    columns = [record["x_label"] if column == "x" else column for column in TABLE_COLUMNS]
    rows = [table_cells(record["x"], row) for row in record["rows"]]
    folder = runs / f"study-{record['name']}-{record['recipe']}"
    _print(record, study_report(record, columns, rows, folder), as_json)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
    runs: Runs = Path("runs"),
) -> None:
    """Serve MLflow's pages of all sweeps, on this machine alone."""
    from search.records.store import default_uri
    from search.records.tracking import serve_ui

    raise typer.Exit(serve_ui(default_uri(runs), runs / "mlartifacts", port))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; an error of the user's is one line on stderr and exit code 2.

    Args:
        arguments: by default those of the process.
    """
    try:
        app(arguments)
    except (VitfrontError, OSError) as error:  # a disk, a folder or a network is not as it should be
        from search.views.console import fail

        fail(f"vitfront: {error}")
        sys.exit(2)


def _parse_bounds(texts: Sequence[str]) -> dict[str, float]:
    from search.errors import ConfigError

    bounds = {}
    for text in texts:
        metric, _, value = text.partition("=")
        try:
            bounds[metric] = float(value)
        except ValueError:
            raise ConfigError(f"bound {text!r} is not of the form metric=number") from None
    return bounds


def _print_front(front: Front, runs: Path, as_json: bool) -> None:
    from search.views.tables import front_report

    _print(front.to_json(), front_report(front, runs / front.name), as_json)


def _print(record: Mapping[str, Any], report: Report, as_json: bool) -> None:
    """Prints a result, either as JSON or as its report for people."""
    from search.views.console import show

    if as_json:
        print(json.dumps(record))
    else:
        show(report)


if __name__ == "__main__":
    main()
