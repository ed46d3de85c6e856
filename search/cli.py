"""The command line: parse, call, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pruning.errors import VitfrontError

if TYPE_CHECKING:  # commands import what they need when they run, so that --help is quick
    from search.front import Front
    from search.outcome import Measurement

app = typer.Typer(
    help="Finds the pruned vision transformers with the best accuracy and the best measured throughput.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True)

Recipe = Annotated[str, typer.Argument(help="A YAML file, or a shipped name.")]
Runs = Annotated[Path, typer.Option(help="Folder of all sweeps.", envvar="VITFRONT_RUNS")]
Sets = Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="Change a key of the recipe.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Bounds = Annotated[list[str], typer.Option(metavar="METRIC=VALUE")]


@app.command()
def run(
    recipe: Recipe = "digits",
    name: Annotated[str | None, typer.Option(help="Of the sweep; by default the recipe's.")] = None,
    trials: Annotated[int | None, typer.Option(help="In all, those of an earlier run included.")] = None,
    time_budget: Annotated[str | None, typer.Option(help="No trial starts later: 90s, 10m, 2h.")] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster: auto, or host:port.")] = None,
    earlier: Annotated[
        list[str], typer.Option("--from", metavar="NAME", help="Of an earlier sweep of the same model to learn from.")
    ] = [],  # noqa: B006
    replay: Annotated[
        Path | None, typer.Option(help="Folder of a finished sweep: search what was recorded there, without a model.")
    ] = None,
    sets: Sets = [],  # noqa: B006
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Search a front, or go on with a search that was stopped."""
    from search.commands.run import run_sweep
    from search.config import load_config
    from search.views.progress_line import ProgressLine

    config = load_config(recipe, name=name, trials=trials, time_budget=time_budget, earlier=earlier, sets=sets)
    if replay is not None:
        from search.commands.replay import Recorded, replay_sweep

        found = replay_sweep(config, runs, Recorded.read(replay, config))
    else:
        with ProgressLine(err) as line:
            found = run_sweep(config, runs, line, address=address)
    _show_front(found, runs, as_json)


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(help="Of sweeps; NAME-0, NAME-1, ... are one line, over its seeds.")],
    to: Annotated[Path | None, typer.Option(help="HTML file to write the figure to.")] = None,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Hypervolume of several sweeps, after trials and after seconds."""
    from search.commands.compare import compare_sweeps
    from search.records.files import write_atomically
    from search.views.comparison_plot import comparison_html

    record = compare_sweeps(runs, names)
    if to is not None:
        write_atomically(to, comparison_html(record))
    if as_json:
        print(json.dumps(record))
        return
    table = Table(title="Hypervolume: mean over the seeds, and its 95 % interval", title_justify="left")
    for column in ("", "seeds", *(f"{count} trials" for count in record["milestones"]), "all trials", "seconds"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for curve, end in zip(record["by_trial"], record["by_second"], strict=True):
        cells = ["-" if count > len(curve["x"]) else _with_spread(curve, count - 1) for count in record["milestones"]]
        table.add_row(
            curve["line"], str(curve["num_seeds"]), *cells, f"{_with_spread(curve, -1)} ({len(curve['x'])})",
            f"{end['x'][-1]:.0f}",
        )  # fmt: skip
    out.print(table)


def _with_spread(curve: dict[str, Any], index: int) -> str:
    mean, high = curve["mean"][index], curve["high"][index]
    return f"{mean:.4f}" if curve["num_seeds"] == 1 else f"{mean:.4f} ± {high - mean:.4f}"


@app.command()
def front(
    name: Annotated[str, typer.Argument(help="Of the sweep.")],
    at_least: Bounds = [],  # noqa: B006
    at_most: Bounds = [],  # noqa: B006
    pick: Annotated[str | None, typer.Option(help="knee, fastest, most-accurate, or an id.")] = None,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show the front of a sweep, or pick a point of it."""
    from search.records.folder import Folder

    found, bounds = Folder(runs, name).read_front(), (_bounds(at_least), _bounds(at_most))
    chosen = found.within(*bounds) if pick is None else replace(found, points=(found.pick(pick, *bounds),))
    _show_front(chosen, runs, as_json)


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="Of the sweep.")],
    to: Annotated[Path, typer.Option(help="Folder to make.")],
    pick: Annotated[str, typer.Option(help="knee, fastest, most-accurate, or an id.")] = "knee",
    format: Annotated[list[str], typer.Option(help="safetensors.")] = ["safetensors"],  # noqa: B006
    runs: Runs = Path("runs"),
) -> None:
    """Copy a model of the front out of its sweep."""
    from search.errors import ConfigError
    from search.records import folder

    unknown = [each for each in format if each != "safetensors"]
    if unknown:
        raise ConfigError(f"format {unknown[0]!r} is not known; give safetensors")
    point = folder.export(runs, name, pick, to)
    model = point.measurement
    assert model is not None
    out.print(f"{point.id} (top-1 {model.top1:.3f}, {model.speedup:.2f} x dense) is in {to}", highlight=False)


@app.command()
def prune(
    recipe: Recipe = "digits",
    target_ratio: Annotated[float, typer.Option(help="Share of the dense MACs to keep.")] = 0.6,
    budget: Annotated[float, typer.Option(help="Accuracy points that each block may cost.")] = 1.0,
    exit_block: Annotated[int | None, typer.Option(help="Answer after this many blocks.")] = None,
    cutoff_channel: Annotated[float, typer.Option(help="Cut-off of the channel score.")] = 0.1,
    cutoff_token: Annotated[float, typer.Option(help="Cut-off of the token score.")] = 0.85,
    token_share: Annotated[
        float,
        typer.Option(
            help="cascade: share of the budget that tokens may spend; global: 0 channels alone, 1 tokens alone."
        ),
    ] = 0.5,
    method: Annotated[
        str,
        typer.Option(
            help="global: one price of a multiply-add; cascade: VTC-LFC; constant, decreasing: a schedule of tokens."
        ),
    ] = "global",
    criterion: Annotated[str, typer.Option(help="Of the cascade's channels: lfs, taylor, obs, ...")] = "obs",
    token_reduction: Annotated[
        str, typer.Option(help="none, lfe, attention, merge, lfe-merge, attention-merge; auto: the best there is.")
    ] = "auto",
    round_to: Annotated[
        str, typer.Option(help="Widths are multiples of it; auto: those that this device is faster with.")
    ] = "auto",
    to: Annotated[Path | None, typer.Option(help="Folder to make for the model.")] = None,
    sets: Sets = [],  # noqa: B006
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Prune one model by one plan, without a search."""
    from search.commands.prune import prune_once
    from search.config import load_config

    config = load_config(recipe, sets=sets)
    with err.status("loading, pruning and measuring ..."):
        outcome, dense, blocks = prune_once(
            config, runs, to,
            target_ratio=target_ratio, budget=budget, exit_block=exit_block,
            cutoff_channel=cutoff_channel, cutoff_token=cutoff_token, token_share=token_share,
            method=method, criterion=criterion, token_reduction=token_reduction, round_to=round_to,
        )  # fmt: skip
    if as_json:
        print(json.dumps(outcome.to_json()))
        return
    _print_blocks(blocks, outcome.to_json(), asdict(dense))


@app.command()
def lottery(
    recipe: Recipe = "digits",
    name: Annotated[str | None, typer.Option(help="Of the lottery; by default the recipe's.")] = None,
    sparsity: Annotated[float, typer.Option(help="Share of the blocks' weights that go.")] = 0.8,
    rounds: Annotated[int, typer.Option(help="Of training and pruning, until they are gone.")] = 3,
    rewind_step: Annotated[int, typer.Option(help="Tickets go back to the weights after so many steps.")] = 0,
    seeds: Annotated[int, typer.Option(help="How often all of it is done.")] = 3,
    sets: Sets = [],  # noqa: B006
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Train sparse models from their first weights and from new ones: is it the mask that counts?"""
    from search.commands.lottery import lottery_folder, run_lottery_seeds
    from search.config import load_config

    config = load_config(recipe, name=name, sets=sets)
    with err.status("loading ...") as status:
        record = run_lottery_seeds(
            config, runs, sparsity=sparsity, rounds=rounds, rewind_step=rewind_step, seeds=seeds,
            on_stage=lambda stage: status.update(f"training {stage} ..."),
        )  # fmt: skip
    if as_json:
        print(json.dumps(record))
        return
    _print_lottery(record, lottery_folder(runs, config.name))


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="cutoff, noise, tokens, order, width-or-depth, budgets, or a YAML file.")],
    recipe: Recipe = "digits",
    sets: Sets = [],  # noqa: B006
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Ask one of the source papers' questions of a recipe: a table, a figure and a sentence."""
    from search.commands.study import run_study
    from search.config import load_config

    record = run_study(name, load_config(recipe, sets=sets), runs, _say)
    if as_json:
        print(json.dumps(record))
        return
    _print_study(record, runs)


@app.command()
def ui(port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 5000, runs: Runs = Path("runs")) -> None:
    """MLflow's pages of all sweeps, on this machine alone."""
    from search.records.tracking import default_uri, serve_ui

    raise typer.Exit(serve_ui(default_uri(runs), runs / "mlartifacts", port))


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: what the user got wrong is one line and exit code 2.

    Args:
        arguments: by default those of the process.
    """
    try:
        app(arguments)
    except (VitfrontError, OSError) as error:  # a disk, a folder or a network is not as it should be
        err.print(f"vitfront: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _bounds(texts: list[str]) -> dict[str, float]:
    from search.errors import ConfigError

    bounds = {}
    for text in texts:
        metric, _, value = text.partition("=")
        try:
            bounds[metric] = float(value)
        except ValueError:
            raise ConfigError(f"bound {text!r} is not of the form metric=number") from None
    return bounds


def _show_front(front: Front, runs: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(front.to_json()))
        return
    from search.goal import ACCURACIES

    goal, dense = front.goal, front.goal.dense
    others = {} if goal.accuracy == "top1" else {goal.accuracy: ACCURACIES[goal.accuracy]}
    counts = f"{len(front.points)} models from {front.trials} trials"
    table = Table(title=f"Front of {front.name}: {counts}; accuracy on val and test", title_justify="left")
    for column in ("", *others.values(), "val", "test", "speed-up", "95 %", "images/s", "ms/batch", "MACs", "exit"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)

    def row(label: str, model: Measurement, exit_block: str) -> None:
        table.add_row(
            label,
            *(f"{getattr(model, name):.4f}" for name in others),
            f"{model.top1:.4f}",
            "-" if model.top1_test is None else f"{model.top1_test:.4f}",
            f"{model.speedup:.2f}",
            f"{model.speedup_low:.2f}-{model.speedup_high:.2f}",
            f"{model.throughput_img_s:,.0f}",
            f"{model.latency_ms_p50:.2f}",
            f"{model.macs / dense.macs:.0%}",
            exit_block,
        )

    row("dense", dense, "")
    for point in front.points:
        assert point.measurement is not None
        assert point.plan is not None
        mark = " knee" if point.id == front.knee else ""
        row(point.id + mark, point.measurement, str(point.plan.exit_block))
    out.print(table)
    why = {
        "time": "the time was up",
        "saturation": "the hypervolume had stopped to grow",
        "interrupt": "it was interrupted",
        "exhaustion": "there was nothing new to try",
    }
    if front.ended_by in why:
        out.print(f"ended after {front.trials} trials: {why[front.ended_by]}", highlight=False)
    limits = " and ".join(limit.text for limit in goal.limits)
    if limits:
        what = f"of the models with {limits}" if front.points else f"no model has {limits}"
        out.print(what, markup=False, highlight=False)
    folder = runs / front.name
    what = "outcomes and plans" if front.conditions is None else "models, tables and plans"  # a replay has no models
    out.print(f"hypervolume {front.hypervolume:.4f}; {what} are in {folder}", highlight=False)
    if front.idle_share is not None:
        out.print(f"the workers waited for trials {front.idle_share:.1%} of their time", highlight=False)


def _say(text: str) -> None:
    err.print(text, markup=False, highlight=False)


def _print_study(record: dict[str, Any], runs: Path) -> None:
    from search.commands.study_report import TABLE_COLUMNS, table_cells

    table = Table(title=record["question"], title_justify="left")
    for column in TABLE_COLUMNS:
        called = record["x_label"] if column == "x" else column
        table.add_column(called, justify="left" if column == "series" else "right")
    for row in record["rows"]:
        table.add_row(*table_cells(record["x"], row))
    out.print(table)
    out.print(record["sentence"], highlight=False, markup=False)
    folder = runs / f"study-{record['name']}-{record['recipe']}"
    out.print(f"Tables and figure are in {folder}", highlight=False, markup=False)


def _print_blocks(blocks: list[dict[str, Any]], outcome: dict[str, Any], dense: dict[str, Any]) -> None:
    table = Table(title="What is kept, of what", title_justify="left")
    columns = ("block", "heads", "qk", "v", "hidden", "tokens", "drop", "MACs")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in blocks:
        table.add_row(*(str(row[column]) for column in columns))
    out.print(table)
    found = outcome["measurement"]
    dense_img_s = found["throughput_img_s"] / found["speedup"]
    out.print(
        f"top-1 {dense['top1']:.4f} -> {found['top1']:.4f}, MACs {dense['macs'] / 1e6:,.4g} M -> "
        f"{found['macs'] / 1e6:,.4g} M, images/s {dense_img_s:,.0f} -> {found['throughput_img_s']:,.0f}\n"
        f"{found['speedup']:.2f} x as fast ({found['speedup_low']:.2f}-{found['speedup_high']:.2f}) "
        f"with {found['macs'] / dense['macs']:.0%} of the MACs",
        highlight=False,
    )
    for note in outcome["notes"]:
        out.print(f"note: {note}; more data.calibration_images would help", highlight=False, markup=False)


def _print_lottery(record: dict[str, Any], folder: Path) -> None:
    table = Table(
        title=f"Lottery tickets of {record['name']}: top-1 on val; seeds {record['seeds']}, steps {record['steps']}",
        title_justify="left",
    )
    for column in ("", "round", "sparsity", "top-1", "of seeds", "first gradient", "mean gradient"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for arm in record["arms"]:
        table.add_row(
            arm["arm"],
            str(arm["round"]),
            f"{arm['sparsity']:.1%}",
            f"{arm['top1']:.4f}",
            f"{arm['top1_low']:.4f}-{arm['top1_high']:.4f}",
            f"{arm['gradient_norm_first']:.3g}",
            f"{arm['gradient_norm_mean']:.3g}",
        )
    out.print(table)
    out.print(f"the table, every gradient norm and lottery.html are in {folder}", highlight=False)


if __name__ == "__main__":
    main()
