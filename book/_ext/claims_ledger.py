"""Judge the paper's claims by the stored results.

The ledger, ``book/results/claims.yml``, states what each claim would need to hold, as conditions
in a language of its own: numbers, comparisons, ``and``, ``or``, ``not``, ``+ - * /``, ``abs``,
``min``, ``max``, ``all``, ``any``, and the lookups of :class:`Store`, which take texts. ``{arm}``
stands for the arm that is judged. Nothing else is read, and nothing is ever handed to Python to
run. A claim is judged only if everything that its conditions name is stored: no part of a
condition is skipped because another part already decides it.

A claim about a screen that is too large to be fetched here has a command that runs what would
judge it, and is judged once, not by arm. Until that is stored it is *not run here*.
"""

import ast
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from smslib import metrics
from smslib import store as results

ARMS = {"released": "as released", "corrected": "corrected", "smslib": "smslib"}
REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not reproduced"
NOT_YET, NOT_RUN, NOT_HERE = "not run yet", "not run", "not run here"
UNTESTABLE = "cannot be tested here"
STATUSES = (REPRODUCED, PARTLY, NOT, NOT_YET, NOT_RUN, NOT_HERE, UNTESTABLE)
FEWEST_PAIRS = 3  # Student's factor is 12.7 for two values, 4.3 for three
LOWER_IS_BETTER = frozenset({"i_nll", "i_nll_after", "i_nll_gap", "shd", "calibration"})
WITH_INTERVAL = {"mean": ("low", "high"), "gain": ("gain_low", "gain_high")}

_OPERATORS: dict[type, Callable] = {
    ast.And: lambda *values: all(values),
    ast.Or: lambda *values: any(values),
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable] = {
    "abs": lambda number: abs(number),
    "min": lambda first, *rest: min([first, *rest]),
    "max": lambda first, *rest: max([first, *rest]),
    "all": lambda first, *rest: all([first, *rest]),
    "any": lambda first, *rest: any([first, *rest]),
}


class LedgerError(ValueError):
    """The ledger says something that cannot be read; the message says what and where."""


class NotStored(LookupError):
    """A number that a claim needs is not stored.

    Parameters
    ----------
    status : str
        What that makes of the claim: ``not run yet`` without the experiment, ``not run`` where the
        experiment is stored without these runs.
    reason : str
        What is missing.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


# ------------------------------------------------------------------ the stored numbers


class Store:
    """The numbers that conditions can name, read from a folder of results.

    A *prefix* is an arm, or ``arm.setting`` where an experiment has several settings.

    Parameters
    ----------
    folder : Path
        Holds ``<experiment>.json`` and ``paper_values.yml``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._experiments: dict[str, Mapping[str, Any]] = {}

    @cached_property
    def _published(self) -> Mapping[str, Any]:
        return yaml.safe_load((self.folder / "paper_values.yml").read_text())

    def _stored(self, experiment: str, key: str) -> Any:  # noqa: ANN401
        if experiment not in self._experiments:
            path = self.folder / f"{experiment}.json"
            if not path.is_file():
                raise NotStored(NOT_YET, f"{experiment} is not stored")
            self._experiments[experiment] = results.get(experiment, root=self.folder)
        if (found := self._experiments[experiment].get(key)) is None:
            raise NotStored(NOT_RUN, f"no finite run stored: {experiment}, {key}")
        return found

    def value(self, experiment: str, key: str) -> float:
        """Return one stored number."""
        found = self._stored(experiment, key)
        if not isinstance(found, int | float):
            message = f"{experiment}.{key} is {found!r}, not a number; name one, such as its .mean"
            raise LedgerError(message)
        return float(found)

    def paper(self, table: str, row: str, column: str) -> float:
        """Return one published mean."""
        try:
            return float(self._published[table]["rows"][row][column]["mean"])
        except KeyError as missing:
            message = f"no published {table}.{row}.{column}: there is no {missing.args[0]!r}"
            raise LedgerError(message) from None

    def mean(self, experiment: str, prefix: str, score: str, method: str) -> float:
        """Return the mean of a score over seeds."""
        return self.value(experiment, f"{prefix}.{method}.{score}.mean")

    def low(self, experiment: str, prefix: str, score: str, method: str) -> float:
        """Return the lower end of the 95 % interval of that mean."""
        return self.value(experiment, f"{prefix}.{method}.{score}.low")

    def high(self, experiment: str, prefix: str, score: str, method: str) -> float:
        """Return the upper end of the 95 % interval of that mean."""
        return self.value(experiment, f"{prefix}.{method}.{score}.high")

    def gain(
        self, experiment: str, prefix: str, score: str, better: str, rival: str, *rivals: str
    ) -> float:
        """Return by how much ``better`` leads, over paired seeds; of several rivals, the least.

        Positive always means that ``better`` is better, also for scores of which less is better.
        """
        leads = self._leads(experiment, prefix, score, better, rival, *rivals)
        return min(float(lead.mean()) for lead in leads)

    def gain_low(
        self, experiment: str, prefix: str, score: str, better: str, rival: str, *rivals: str
    ) -> float:
        """Return the lower end of the 95 % interval of the paired lead; of several, the least."""
        leads = self._leads(experiment, prefix, score, better, rival, *rivals)
        return min(float(lead.mean()) - _half_interval(lead) for lead in leads)

    def gain_high(
        self, experiment: str, prefix: str, score: str, better: str, rival: str, *rivals: str
    ) -> float:
        """Return the upper end of the 95 % interval of the paired lead; of several, the least."""
        leads = self._leads(experiment, prefix, score, better, rival, *rivals)
        return min(float(lead.mean()) + _half_interval(lead) for lead in leads)

    def wins(
        self, experiment: str, prefix: str, score: str, better: str, rival: str, *rivals: str
    ) -> float:
        """Return the share of the seeds shared by all in which ``better`` leads every rival."""
        methods = (better, rival, *rivals)
        runs = [self._runs(experiment, prefix, score, method) for method in methods]
        seeds = _shared(runs, f"{experiment}.{prefix}: {', '.join(methods)}")
        sign = _sign(score)
        best = [all(sign * (runs[0][s] - other[s]) > 0 for other in runs[1:]) for s in seeds]
        return float(np.mean(best))

    def _leads(
        self, experiment: str, prefix: str, score: str, better: str, *rivals: str
    ) -> list[np.ndarray]:
        """Return the lead over each rival, by shared seed."""
        ours, *others = (self._runs(experiment, prefix, score, m) for m in (better, *rivals))
        found = []
        for rival, theirs in zip(rivals, others, strict=True):
            seeds = _shared([ours, theirs], f"{experiment}.{prefix}: {better}, {rival}")
            found.append(_sign(score) * np.array([ours[s] - theirs[s] for s in seeds]))
        return found

    def _runs(self, experiment: str, prefix: str, score: str, method: str) -> dict[Any, float]:
        key = f"{prefix}.{method}.{score}"
        values = self._stored(experiment, key)
        some = f"{key}.seeds"  # there if some of the method's runs lack the score
        partial = some in self._experiments[experiment]
        seeds = self._stored(experiment, some if partial else f"{prefix}.{method}.seeds")
        if not isinstance(values, list) or len(values) != len(seeds):
            message = f"{experiment}.{key} is {values!r} for the seeds {seeds}; one value a seed"
            raise LedgerError(message)
        if None in values:
            raise NotStored(NOT_RUN, f"a run of {experiment}.{key} is not finite")
        return dict(zip(seeds, values, strict=True))


LOOKUPS = ("value", "paper", "mean", "low", "high", "gain", "gain_low", "gain_high", "wins")


def _sign(score: str) -> int:
    return -1 if score in LOWER_IS_BETTER else 1


def _shared(runs: list[dict[Any, float]], where: str) -> list:
    seeds = sorted(set.intersection(*(set(run) for run in runs)))
    if not seeds:
        raise NotStored(NOT_RUN, f"no seed in common, {where}")
    return seeds


def _half_interval(values: np.ndarray) -> float:
    """Return half the width of Student's 95 % interval of the mean."""
    n = len(values)
    if n < FEWEST_PAIRS:
        raise NotStored(NOT_RUN, f"{n} paired seed{'s' * (n != 1)}, too few for an interval")
    found = metrics.interval(values)
    return (found.high - found.low) / 2


# ------------------------------------------------------------------ the language


def parse(text: str, arm: str) -> ast.expr:
    """Read a condition or a number for one arm.

    Raises
    ------
    LedgerError
        If the text is no expression, or holds anything that the language does not have.
    """
    try:
        body = ast.parse(text.replace("{arm}", arm), mode="eval").body
    except (SyntaxError, ValueError) as problem:
        message = f"cannot read {text!r}: {problem}"
        raise LedgerError(message) from None
    for _ in _lookups(body):  # walks through all of it, refusing what is foreign
        pass
    return body


def evaluate(text: str, store: Store, arm: str) -> float | bool:
    """Return the value of a condition or a number.

    Raises
    ------
    LedgerError
        If it cannot be read, names what cannot exist, or divides by zero.
    NotStored
        If a number that it names is not stored.
    """
    try:
        return _value(parse(text, arm), store)
    except ZeroDivisionError:
        message = f"{text!r} divides by zero for the arm {arm}"
        raise LedgerError(message) from None


def interval(text: str, store: Store, arm: str) -> tuple[float, float] | None:
    """Return the 95 % interval of an expression that is one mean or one gain, if it has one."""
    body = parse(text, arm)
    if not isinstance(body, ast.Call) or body.func.id not in WITH_INTERVAL:
        return None
    try:
        low, high = (
            getattr(store, name)(*(a.value for a in body.args))
            for name in WITH_INTERVAL[body.func.id]
        )
    except NotStored:
        return None
    return low, high


def lookups(text: str, arm: str = "released") -> list[tuple[str, ...]]:
    """Return every lookup of an expression as its name and its arguments."""
    return list(_lookups(parse(text, arm)))


def _lookups(node: ast.expr) -> Iterator[tuple[str, ...]]:
    """Walk through an expression, refusing whatever is not of the language."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in LOOKUPS:
            yield (name, *_texts(node, args))
            _count(node, getattr(Store, name), [None, *args])
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            _count(node, _FUNCTIONS[name], args)
            for inner in args:
                yield from _lookups(inner)
        case _:
            for inner in _operands(node)[1]:
                yield from _lookups(inner)


def _operands(node: ast.expr) -> tuple[list[type], list[ast.expr]]:
    """Return the operators and operands of an expression; a number has neither."""
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return [], []
        case ast.BoolOp(op=op, values=values):
            found, inner = [op], values
        case ast.UnaryOp(op=op, operand=operand):
            found, inner = [op], [operand]
        case ast.BinOp(op=op, left=left, right=right):
            found, inner = [op], [left, right]
        case ast.Compare(left=left, ops=found, comparators=others):
            inner = [left, *others]
        case _:
            raise _foreign(node)
    if any(type(op) not in _OPERATORS for op in found):
        raise _foreign(node)
    return [type(op) for op in found], inner


def _value(node: ast.expr, store: Store) -> float | bool:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Call):
        name = node.func.id
        if name in LOOKUPS:
            return getattr(store, name)(*(argument.value for argument in node.args))
        return _FUNCTIONS[name](*(_value(argument, store) for argument in node.args))
    found, inner = _operands(node)
    values = [_value(operand, store) for operand in inner]
    if isinstance(node, ast.Compare):
        steps = zip(found, values, values[1:], strict=False)
        return all(_OPERATORS[op](a, b) for op, a, b in steps)
    return _OPERATORS[found[0]](*values)


def _texts(node: ast.Call, args: list[ast.expr]) -> list[str]:
    if any(not isinstance(a, ast.Constant) or not isinstance(a.value, str) for a in args):
        message = f"{ast.unparse(node)!r}: a lookup takes texts in quotes and nothing else"
        raise LedgerError(message)
    return [argument.value for argument in args]


def _count(node: ast.Call, function: Callable, args: list) -> None:
    try:
        inspect.signature(function).bind(*args)
    except TypeError as problem:
        message = f"{ast.unparse(node)!r}: {problem}"
        raise LedgerError(message) from None


def _foreign(node: ast.AST) -> LedgerError:
    return LedgerError(
        f"{ast.unparse(node)!r} is not of the language of conditions: numbers, comparisons, "
        f"and, or, not, + - * /, {', '.join(_FUNCTIONS)}, {', '.join(LOOKUPS)}"
    )


# ------------------------------------------------------------------ the ledger


@dataclass(frozen=True)
class Figure:
    """A number shown with a claim; ``paper`` is its published counterpart, if it has one."""

    label: str
    value: str
    digits: int
    paper: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper in our words, and what would have to be true of the stored results."""

    id: str
    claim: str
    source: str
    criterion: str = ""
    reproduced: str = ""
    partly: str = ""
    untestable: str = ""
    needs: str = ""
    command: str = ""
    show: tuple[Figure, ...] = field(default=())

    @property
    def single(self) -> bool:
        """Whether the claim has one verdict, and not one for each arm."""
        return bool(self.untestable or self.command)

    @property
    def expressions(self) -> list[str]:
        """Every expression that the claim holds."""
        shown = [text for figure in self.show for text in (figure.value, figure.paper)]
        return [text for text in (self.reproduced, self.partly, *shown) if text]

    @property
    def experiments(self) -> set[str]:
        """The stored experiments that the claim is judged by."""
        found = (found for text in self.expressions for found in lookups(text))
        return {experiment for name, experiment, *_ in found if name != "paper"}


@dataclass(frozen=True)
class Verdict:
    """What becomes of a claim, and why where it was not judged."""

    status: str
    reason: str = ""


def load(path: Path) -> dict[str, Claim]:
    """Read the ledger.

    Parameters
    ----------
    path : Path
        A YAML file: a list of claims in the order of their ids, C01, C02, ...

    Returns
    -------
    dict
        Id to claim.

    Raises
    ------
    LedgerError
        If the file cannot be read, or a claim is incomplete, has unknown entries, is out of
        order, or holds a condition that cannot be read.
    """
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as problem:
        message = f"cannot read {path.name}: {problem}"
        raise LedgerError(message) from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        message = f"{path.name} holds {type(entries).__name__}; expected a list of claims"
        raise LedgerError(message)
    claims = [_claim(entry, f"C{number:02d}") for number, entry in enumerate(entries, start=1)]
    return {claim.id: claim for claim in claims}


def judge(claim: Claim, arm: str, store: Store) -> Verdict:
    """Return the verdict on a claim for one arm.

    Raises
    ------
    LedgerError
        If a condition cannot be evaluated.
    """
    if claim.untestable:
        return Verdict(UNTESTABLE, claim.untestable)
    if not claim.reproduced:
        return Verdict(NOT_HERE, claim.needs)
    try:
        conditions = (claim.reproduced, claim.partly)
        reproduced, *partly = [_condition(text, store, arm) for text in conditions if text]
    except NotStored as gap:
        if claim.command and gap.status == NOT_YET:
            return Verdict(NOT_HERE, claim.needs)
        return Verdict(gap.status, str(gap))
    if reproduced:
        return Verdict(REPRODUCED)
    return Verdict(PARTLY if any(partly) else NOT)


def _condition(text: str, store: Store, arm: str) -> bool:
    found = evaluate(text, store, arm)
    if not isinstance(found, bool):
        message = f"{text!r} is a number, {found}; a condition compares it with something"
        raise LedgerError(message)
    return found


def _claim(entry: Mapping[str, Any], expected: str) -> Claim:
    """Build a claim, checking it at the door."""
    name = entry.get("id")
    if name != expected:
        message = f"claim {name!r} stands where {expected!r} should; number them without gaps"
        raise LedgerError(message)
    _complete(entry, Claim, f"claim {name}")
    if bool(entry.get("untestable")) == bool(entry.get("reproduced") or entry.get("command")):
        message = (
            f"claim {name} needs either 'untestable', or 'reproduced' or 'command', and not both"
        )
        raise LedgerError(message)
    if bool(entry.get("command")) != bool(entry.get("needs")):
        message = f"claim {name} needs both 'command' and 'needs', or neither"
        raise LedgerError(message)
    show = tuple(_figure(shown, name) for shown in entry.get("show", []))
    claim = Claim(**{**entry, "show": show})
    for text in claim.expressions:
        parse(text, next(iter(ARMS)))
        if claim.single and "{arm}" in text:
            message = f"claim {name} is judged once, but {text!r} depends on the arm"
            raise LedgerError(message)
    return claim


def _figure(entry: Mapping[str, Any], name: str) -> Figure:
    _complete(entry, Figure, f"claim {name}, show")
    return Figure(**entry)


def _complete(entry: Mapping[str, Any], kind: type, where: str) -> None:
    known = {f.name: f for f in fields(kind)}
    needed = list(known)[:3]
    absent = [key for key in needed if entry.get(key) is None]
    unknown = sorted(entry.keys() - known.keys())
    if absent or unknown:
        message = f"{where}: missing {absent}, unknown {unknown}; it has {list(known)}"
        raise LedgerError(message)
