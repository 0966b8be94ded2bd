"""Small changes to the numeric core, one at a time: how many do its tests notice?

``python tests/torture/mutants.py --count N`` draws N of all changes (an operator, a comparison, a
number, a truth value, a sign), runs the tests of the changed module until the first that fails,
and lists the survivors.
"""

import argparse
import ast
import json
import random
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torture import planting

MODULES = ("distributions", "priors", "evaluate", "transfer", "metrics")
ALSO = {"distributions": ["tests/test_model.py"], "priors": ["tests/test_contract.py"]}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS = {
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


def changes(tree):
    """Yield every change as (line, what, start, end, text), offsets in bytes of the line."""
    for node in _worked(tree):
        changed, what = _changed(node)
        if changed is not None and node.lineno == node.end_lineno:
            text = f"({ast.unparse(changed)})"
            yield node.lineno, what, node.col_offset, node.end_col_offset, text


def _worked(tree):
    """Walk over what computes: no types, no messages, no lists of names."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
            skipped |= set(ast.walk(node))
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                skipped |= set(ast.walk(getattr(node, name)))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            skipped |= set(ast.walk(node))
    bodies = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = dict.fromkeys(
        inner for body in bodies for line in body.body for inner in ast.walk(line)
    )
    return [node for node in inside if node not in skipped]


def _changed(node):
    """Return a changed copy of a node, and what was changed; None if it is of no such kind."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        other = OPERATORS[type(node.op)]()
        return ast.BinOp(node.left, other, node.right), "operator"
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        other = COMPARISONS[type(node.ops[0])]()
        return ast.Compare(node.left, [other, *node.ops[1:]], node.comparators), "comparison"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        return node.operand, "sign"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return ast.Constant(not node.value), "truth"
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return ast.Constant(node.value + 1), "number"
    return None, ""


def mutants(name):
    """Return the changes of a module, and its text."""
    text = (planting.ROOT / "smslib" / f"{name}.py").read_text()
    return [(name, *change) for change in changes(ast.parse(text))], text


def changed_text(text, line, start, end, new):
    """Return a text with a piece of one line replaced."""
    lines = text.splitlines(keepends=True)
    old = lines[line - 1].encode()
    lines[line - 1] = (old[:start] + new.encode() + old[end:]).decode()
    return "".join(lines)


def kill_some(count, seed=0, log=None):
    """Try a number of changes; return flat values, and the survivors."""
    texts, everything = {}, []
    for name in MODULES:
        found, texts[name] = mutants(name)
        everything += found
    chosen = random.Random(seed).sample(everything, min(count, len(everything)))
    survivors, killed = [], dict.fromkeys(MODULES, 0)
    planting.prepare()
    with planting.copied() as copy:
        for name, line, what, start, end, new in chosen:
            text = changed_text(texts[name], line, start, end, new)
            tests = [f"tests/test_{name}.py", *ALSO.get(name, [])]
            with planting.planted(copy, f"smslib/{name}.py", text):
                noticed = planting.noticed_by(copy, tests)
            if noticed.startswith("ERROR"):
                raise RuntimeError(noticed)
            killed[name] += bool(noticed)
            was = texts[name].splitlines()[line - 1].encode()[start:end].decode()
            if not noticed:
                survivors.append(f"{name}.py:{line} {what}: {was} became {new}")
            if log:
                log(f"{name}:{line} {was} -> {new}: {noticed or 'SURVIVED'}\n")
    n_killed = sum(killed.values())
    values = {"possible": len(everything), "tried": len(chosen), "killed": n_killed}
    values |= {"share": n_killed / max(1, len(chosen)), "survivors": survivors}
    return {f"mutants.{key}": value for key, value in values.items()}, []


def main():
    """Try, and print the figures and each change's fate."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    values, _ = kill_some(given.count, given.seed, planting.say)
    sys.stdout.write(json.dumps(values, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
