"""Reward functions of all kinds, loaded by the pool from this file. The response says what happens."""

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


class TwoArguments(Exception):
    """Cannot be rebuilt from its pickle, as many libraries' own exceptions cannot."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Unpicklable:
    def __reduce__(self):
        raise TypeError("not this one")


def compute_score(data_source, solution_str, ground_truth, extra_info=None, marker="", **kwargs):
    what, _, argument = solution_str.partition(" ")
    if what == "hang":
        time.sleep(1000)
    elif what == "spin":
        while True:
            pass
    elif what == "regex":  # one call in C that never gives up the interpreter
        re.match(r"(a+)+$", "a" * 60 + "b")
    elif what == "stubborn":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(1000)
    elif what == "children":  # one in the worker's group, one that has left it, both with the argument as a mark
        for command in (["sleep", "1000"], ["setsid", "--fork", "sleep", "1000"]):
            subprocess.Popen(["env", f"MARK={argument}", *command])
        time.sleep(0.3)
        time.sleep(1000)
    elif what == "fork":  # and return twice
        os.fork()
    elif what == "exit":
        os._exit(3)
    elif what == "segfault":
        ctypes.string_at(0)
    elif what == "system_exit":
        sys.exit(5)
    elif what == "interrupt":
        raise KeyboardInterrupt
    elif what == "raise":
        raise ValueError(argument)
    elif what == "two":
        raise TwoArguments("this", "that")
    elif what == "unpicklable":
        return Unpicklable()
    elif what == "print":
        for _ in range(100):
            print("x" * 50_000)
    elif what == "sleep":
        time.sleep(float(argument))
    elif what == "once":  # append to a file, so that repetitions would show
        with Path(argument).open("a") as file:
            file.write("x")
    elif what == "threads":
        return {
            "score": 1.0,
            "omp": os.environ["OMP_NUM_THREADS"],
            "ignores": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        }
    elif what == "value":
        return {"score": float(argument), "source": data_source, "truth": ground_truth, "info": extra_info} | kwargs
    return 1.0


async def compute_async(data_source, solution_str, ground_truth, extra_info=None):
    what, _, argument = solution_str.partition(" ")
    if what == "hang":
        await asyncio.sleep(1000)
    elif what == "block":  # the event loop, for all calls in it
        time.sleep(1000)
    elif what == "stubborn":
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)
    elif what == "exit":
        os._exit(3)
    elif what == "raise":
        raise ValueError(argument)
    elif what == "sleep":
        await asyncio.sleep(float(argument))
    return {"score": 1.0, "said": solution_str}


def returns_awaitable(data_source, solution_str, ground_truth, extra_info=None):
    return compute_async(data_source, solution_str, ground_truth, extra_info)
