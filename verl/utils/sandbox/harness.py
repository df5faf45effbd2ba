"""What the sandboxed interpreter runs: the untrusted code as a program, or one call of a function in it.

Everything in this process can be read and overwritten by the untrusted code. It is given nothing that would help it:
no expected output, no checker.
"""

import builtins
import json
import os
import sys
import types

# What solutions of the published benchmark may use without importing it.
NAMES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json "
    "builtins typing"
)
STANDARD_MODULES = NAMES.split()
RECURSION_LIMIT = 50_000  # the published benchmark's


def load(source: str, path: str, name: str) -> types.ModuleType:
    """Run the code as the module `name`, with the standard modules that programs of contests take for granted."""
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    for standard in STANDARD_MODULES:
        exec(f"from {standard} import *", module.__dict__)
    for standard in STANDARD_MODULES:
        exec(f"import {standard}", module.__dict__)
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def plain(value: object) -> object:
    """For JSON: numbers and arrays of numpy as Python's."""
    to_list = getattr(value, "tolist", None)
    if to_list is None:
        raise TypeError(f"the function returned a {type(value).__name__}, which JSON cannot hold")
    return to_list()


def main() -> None:
    path, packages, call = sys.argv[1], sys.argv[2], sys.argv[3] == "call"
    del sys.argv[1:]
    sys.argv[0] = path
    sys.path.append(packages)
    sys.setrecursionlimit(RECURSION_LIMIT)
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # from `site`, which is not imported
    with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        source = file.read()
    if not call:
        load(source, path, "__main__")
        return
    with open(3, "rb") as file:
        request = json.load(file)
    module = load(source, path, "solution")
    owner = module.Solution() if hasattr(module, "Solution") else module
    value = getattr(owner, request["name"])(*request["arguments"])
    result = request["token"] + json.dumps(value, default=plain)
    with open(4, "w", encoding="utf-8") as answer:
        answer.write(result)
    sys.stdout.flush()
    os._exit(0)  # threads that the code left behind have no say


main()
