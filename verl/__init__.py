"""RiskPO: risk-sensitive RL post-training of language models. The distribution is `riskpo`, the package `verl`."""

from importlib import metadata


def _refuse_the_other_verl() -> None:
    """Another published distribution is called `verl` and installs a package of the same name over this one."""
    try:
        version = metadata.version("verl")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"this environment has the distribution verl {version} besides riskpo, and both provide the package `verl`: "
        "run `pip uninstall verl`, then install riskpo again, or use an environment of its own"
    )


_refuse_the_other_verl()
