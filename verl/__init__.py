"""RiskPO: risk-sensitive RL post-training of language models. The distribution is `riskpo`, the package `verl`."""

import sys
from importlib import metadata


def _refuse_the_other_verl() -> None:
    """Another published distribution is called `verl` and installs a package of the same name over this one."""
    try:
        version = metadata.version("verl")
    except metadata.PackageNotFoundError:
        return
    message = (
        f"this environment has the distribution verl {version} besides riskpo, and both provide the package `verl`: "
        "run `pip uninstall verl`, then install riskpo again, or use an environment of its own"
    )
    if sys.argv[0] == "-m":  # python -m verl...: one line is all there is to say
        raise SystemExit(f"error: {message}")
    raise ImportError(message)


_refuse_the_other_verl()
