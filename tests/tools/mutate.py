"""Mutation testing: which share of seeded mistakes in `pruning` and `search` does the suite notice?

    python -m pip install pytest-cov                # wanted for the first of the two steps alone
    python -m pytest -n 2 -p no:randomly -p pytest_cov --cov=pruning --cov=search --cov-context=test --cov-report= \
        --durations=0 -vv --ignore=tests/integration > durations.txt
    python tests/tools/mutate.py --durations durations.txt --json mutants.json
    python tests/tools/mutate.py --compare before.json after.json

A mutant is one changed operator, bound, integer, index, `and`/`or` or `not` in a function. It is noticed if a test
fails that executed its line in the first step, or if a test hangs. Whole sweeps run in other processes, where the first
step sees nothing, so the share is a lower bound. The mutants are drawn by hashes of names and source lines: files may
move and lines may shift, and the same ones are drawn.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

PACKAGES = ("pruning", "search")
HANG_S = 90
"""A test that takes longer hangs; the slowest take a tenth of it alone on a machine."""
TESTS_S = 100.0
"""The quickest tests of a line run, until they take as long as this in the first step."""
MUTANT_S = 300
"""All tests of a mutant together; who survives so long is told as survived."""

_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


@dataclass(frozen=True)
class Mutant:
    """One mistake. `node` and `change` find it: the number of its node in `ast.walk`, and which of its changes."""

    path: str
    line: int
    end_line: int
    function: str
    """The innermost one."""
    source: str
    """The line, stripped."""
    before: str
    after: str
    node: int
    change: int


def changes(node: ast.AST) -> list[ast.AST]:
    """Gives what `node` may become, each a copy of it with one mistake."""
    found: list[ast.AST] = []
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _OPERATORS:
        found.append(_with(node, op=_OPERATORS[type(node.op)]()))
    elif isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            ops = [*node.ops]
            ops[index] = _COMPARISONS[type(operator)]()
            found.append(_with(node, ops=ops))
    elif isinstance(node, ast.BoolOp):
        found.append(_with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And()))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        found.append(node.operand)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        found += [_with(node, value=node.value + 1), _with(node, value=node.value - 1)]
    elif isinstance(node, ast.Slice):
        for bound in ("lower", "upper"):
            index_ = getattr(node, bound)
            if index_ is not None and not isinstance(index_, ast.Constant):
                found.append(_with(node, **{bound: ast.BinOp(index_, ast.Add(), ast.Constant(1))}))
    elif isinstance(node, ast.If | ast.While | ast.IfExp) and isinstance(
        node.test, ast.Name | ast.Attribute | ast.Call
    ):
        found.append(_with(node, test=ast.UnaryOp(ast.Not(), node.test)))
    return found


def mutants_of(path: str, text: str) -> Iterator[Mutant]:
    """Yields every mistake that could be made in the functions of a file.

    Left out are defaults, decorators, annotations, docstrings, assertions, and all that runs when the file is imported.
    """
    tree = ast.parse(text)
    lines = text.splitlines()
    functions = _functions(tree)
    for number, node in enumerate(ast.walk(tree)):
        if node in functions:
            for index, after in enumerate(changes(node)):
                yield Mutant(
                    path, node.lineno, _end_of_head(node), functions[node], lines[node.lineno - 1].strip(),
                    _in_a_line(node), _in_a_line(after), number, index,
                )  # fmt: skip


def mutated(text: str, mutant: Mutant) -> str:
    """The text of the file with the mistake in it (comments are lost: nothing reads them)."""
    tree = ast.parse(text)
    target = next(node for number, node in enumerate(ast.walk(tree)) if number == mutant.node)
    changed = changes(target)[mutant.change]
    assert (_in_a_line(target), _in_a_line(changed)) == (mutant.before, mutant.after)

    class Change(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return changed if node is target else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Change().visit(tree)))


def choose(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """The `count` of least hash, one a line, each package in proportion to its size."""
    ranked = [mutants[index] for _, index in sorted(_hashes(mutants, seed))]
    chosen = []
    for package in PACKAGES:
        mine = [mutant for mutant in ranked if mutant.path.startswith(f"{package}/")]
        one_a_line = {(mutant.path, mutant.line): mutant for mutant in reversed(mine)}.values()
        chosen += sorted(one_a_line, key=mine.index)[: round(count * len(mine) / len(mutants))]
    return chosen


def key_of(mutant: Mutant) -> str:
    """Returns the key that a mutant keeps where files move and lines shift."""
    return f"{mutant.function}: {mutant.source}: {mutant.before} -> {mutant.after}"


def _hashes(mutants: Sequence[Mutant], seed: int) -> Iterator[tuple[str, int]]:
    occurrences: Counter[str] = Counter()
    for index, mutant in enumerate(mutants):
        name = key_of(mutant)
        yield hashlib.sha256(f"{seed}: {name}: {occurrences[name]}".encode()).hexdigest(), index
        occurrences[name] += 1


def _functions(tree: ast.Module) -> dict[ast.AST, str]:
    """The expressions and statements that run when a function is called, and the name of the innermost one."""
    names: dict[ast.AST, str] = {}

    def visit(node: ast.AST, function: str | None) -> None:
        if isinstance(node, ast.Assert):
            return
        if function is not None and hasattr(node, "lineno"):
            names[node] = function
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for child in node.body:
                visit(child, node.name)
            return
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "decorator_list", "args" if isinstance(node, ast.Lambda) else ""):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, function)

    visit(tree, None)
    return names


def _end_of_head(node: ast.AST) -> int:
    """The last line of a node, without the body of an `if` or `while`."""
    head = node.test if isinstance(node, ast.If | ast.While) else node
    end: int = head.end_lineno  # type: ignore[attr-defined]
    return end


def _in_a_line(node: ast.AST) -> str:
    if isinstance(node, ast.If | ast.While):
        return f"{type(node).__name__.lower()} {ast.unparse(node.test)}"
    return " ".join(ast.unparse(node).split())


def _with(node: ast.AST, **values: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


# What the first step saw


@dataclass(frozen=True)
class Coverage:
    """The tests that executed each line, and how many seconds each takes."""

    tests: Mapping[str, Mapping[int, Sequence[str]]]
    """File -> line -> names of the tests that executed it."""
    seconds: Mapping[str, float]

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that execute a line of the mutant: file by file, the quickest file and its quickest test first."""
        lines = self.tests.get(mutant.path, {})
        found = {test for line in range(mutant.line, mutant.end_line + 1) for test in lines.get(line, ())}
        quickest = sorted(found, key=lambda test: (self.seconds.get(test, 0.0), test))
        kept, total = [], 0.0
        for test in quickest:
            total += self.seconds.get(test, 0.0)
            if kept and total > TESTS_S:
                break
            kept.append(test)
        files: Counter[str] = Counter()
        for test in kept:
            files[_file_of(test)] += self.seconds.get(test, 0.0)  # type: ignore[assignment]
        return sorted(kept, key=lambda test: (files[_file_of(test)], _file_of(test), self.seconds.get(test, 0.0), test))


def read_coverage(tree: Path, data: Path, durations: str) -> Coverage:
    """Reads what pytest-cov and `--durations=0` left; what a fixture executed counts for all tests of its file."""
    from coverage import CoverageData  # only here: what it costs to have it is worth it for this script alone

    seconds = read_durations(durations)
    record = CoverageData(str(data))
    record.read()
    tests_of_file: dict[str, set[str]] = {}
    for context in record.measured_contexts():
        test, _, when = context.rpartition("|")
        if when == "run":
            tests_of_file.setdefault(_file_of(test), set()).add(test)
    tests: dict[str, dict[int, list[str]]] = {}
    for name in sorted(record.measured_files()):
        path = Path(name).resolve()
        if path.is_relative_to(tree):
            by_line = tests[path.relative_to(tree).as_posix()] = {}
            for line, contexts in record.contexts_by_lineno(name).items():
                found: set[str] = set()
                for context in contexts:
                    test, _, when = context.rpartition("|")
                    found |= {test} if when == "run" else tests_of_file.get(_file_of(test), set()) if test else set()
                by_line[line] = sorted(found)
    return Coverage(tests, seconds)


def read_durations(text: str) -> dict[str, float]:
    """Seconds of each test, all its phases, from the table of `--durations=0`."""
    seconds: Counter[str] = Counter()
    for line in text.splitlines():
        row = re.match(r"([\d.]+)s (?:setup|call|teardown) +(.+)", line)
        if row:
            seconds[row[2]] += float(row[1])  # type: ignore[assignment]
    return dict(seconds)


def _file_of(test: str) -> str:
    return test.split("::")[0]


# The second step


@dataclass(frozen=True)
class Verdict:
    """The fate of a mutant."""

    mutant: Mutant
    state: str
    """noticed, hung (noticed too), survived, or not covered."""
    noticed_by: str | None
    num_tests: int

    @property
    def is_noticed(self) -> bool:
        """A test failed, or hung."""
        return self.state in ("noticed", "hung")


def copy_tree(tree: Path, to: Path) -> None:
    """Copies what git tracks or would track, so that the tests run as in the checkout and cannot touch it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=tree,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (tree / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, to / name)


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[str, str | None]:
    """Runs the tests of a copy of the tree up to the first that fails: passed, noticed, hung; and which that was."""
    chosen, failed = tree / "chosen-tests", tree / "failed-test"
    chosen.write_text("\n".join(tests))
    failed.unlink(missing_ok=True)
    # No .pyc: Python takes one for fresh if the source has its size and second, as a mutant's may.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(Path(__file__).parent)]),
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "CHOSEN_TESTS": str(chosen), "FAILED_TEST": str(failed),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", "addopts=", "-p", "chosen_tests"]
    command += ["-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist", "--basetemp", str(tree / "tmp")]
    command += ["-o", f"faulthandler_timeout={HANG_S}", "-o", "faulthandler_exit_on_timeout=true"]
    process = subprocess.Popen(
        [*command, *sorted({_file_of(test) for test in tests})], cwd=tree, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=MUTANT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return "passed", None
    if process.returncode == 0:
        return "passed", None
    if process.returncode == 5 or "unrecognized arguments" in output:
        raise RuntimeError(f"no test ran:\n{output[-2000:]}")
    if failed.is_file():
        return "noticed", failed.read_text()
    return ("hung", None) if "Timeout (" in output else ("noticed", "while the tests were imported")


def judge(mutant: Mutant, tests: Sequence[str], tree: Path) -> Verdict:
    """Runs a mutant's tests in a copy of the tree, which is as before when it returns.

    A test that fails without the mistake too (a clock on a busy machine) is left out, and the others run again.
    """
    tests = list(tests)
    text = (tree / mutant.path).read_text(encoding="utf-8")
    while tests:
        (tree / mutant.path).write_text(mutated(text, mutant), encoding="utf-8")
        state, test = run_tests(tree, tests)
        (tree / mutant.path).write_text(text, encoding="utf-8")
        if test not in tests or run_tests(tree, [test])[0] == "passed":
            return Verdict(mutant, "survived" if state == "passed" else state, test, len(tests))
        tests.remove(test)
    return Verdict(mutant, "not covered", None, 0)


def judge_all(mutants: Sequence[Mutant], coverage: Coverage, tree: Path, jobs: int) -> list[Verdict]:
    """Judges the mutants, `jobs` at a time, each job in a copy of the tree; tells each on stderr."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copy_tree(tree, Path(folder, str(number)))
            copies.put(Path(folder, str(number)))

        def job(mutant: Mutant) -> Verdict:
            mine = copies.get()
            try:
                verdict = judge(mutant, coverage.tests_of(mutant), mine)
            finally:
                copies.put(mine)
            print(row(verdict), file=sys.stderr, flush=True)
            return verdict

        return list(pool.map(job, mutants))


# What is told


def row(verdict: Verdict) -> str:
    """A line of the table."""
    mutant = verdict.mutant
    place = f"{mutant.path}:{mutant.line}"
    return f"{verdict.state:11s} {place:40s} {mutant.before} -> {mutant.after}    in: {mutant.source}"


def share(verdicts: Sequence[Verdict]) -> str:
    """Counts the mutants that were noticed, of all and of each package."""
    lines = []
    for package in ("", *PACKAGES):
        mine = [verdict for verdict in verdicts if verdict.mutant.path.startswith(package)]
        noticed = sum(verdict.is_noticed for verdict in mine)
        lines.append(f"{package or 'all':8s} {noticed} of {len(mine)} noticed ({noticed / max(len(mine), 1):.0%})")
    return "\n".join(lines)


def write(verdicts: Sequence[Verdict], path: Path) -> None:
    """Writes the verdicts as JSON."""
    path.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> list[Verdict]:
    """Reads the verdicts."""
    return [
        Verdict(Mutant(**record.pop("mutant")), **record) for record in json.loads(path.read_text(encoding="utf-8"))
    ]


def compare(before: Sequence[Verdict], after: Sequence[Verdict]) -> str:
    """Both shares, those of the mutants drawn from both trees, and the mutants whose verdict differs."""
    was, now = ({key_of(verdict.mutant): verdict for verdict in verdicts} for verdicts in (before, after))
    both = [key for key in was if key in now]
    lines = ["before", share(before), "after", share(after), f"drawn from both: {len(both)}"]
    lines += ["before", share([was[key] for key in both]), "after", share([now[key] for key in both])]
    lines += [f"{was[key].state} before: {row(now[key])}" for key in both if was[key].is_noticed != now[key].is_noticed]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[2], help="a git checkout of the project")
    parser.add_argument("--coverage", type=Path, help="what pytest-cov wrote; .coverage in the tree if not given")
    parser.add_argument("--durations", type=Path, help="what pytest printed, with --durations=0 -vv")
    parser.add_argument("--json", type=Path, help="where to write the verdicts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--compare", type=Path, nargs=2, metavar="JSON", help="compare the verdicts of two runs")
    options = parser.parse_args()
    if options.compare:
        print(compare(*map(read, options.compare)))
        return
    tree = options.tree.resolve()
    mutants = [
        mutant
        for package in PACKAGES
        for path in sorted((tree / package).rglob("*.py"))
        for mutant in mutants_of(path.relative_to(tree).as_posix(), path.read_text(encoding="utf-8"))
    ]
    chosen = choose(mutants, options.count, options.seed)
    print(f"{len(chosen)} of {len(mutants)} mutants", file=sys.stderr)
    if options.durations is None:
        for mutant in chosen:
            print(row(Verdict(mutant, "drawn", None, 0)))
        return
    coverage = read_coverage(tree, options.coverage or tree / ".coverage", options.durations.read_text())
    verdicts = judge_all(chosen, coverage, tree, options.jobs)
    if options.json:
        write(verdicts, options.json)
    for verdict in sorted(verdicts, key=lambda verdict: verdict.state):
        print(row(verdict))
    print(share(verdicts))


if __name__ == "__main__":
    main()
