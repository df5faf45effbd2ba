from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def varied_reward() -> list[str]:
    """Overrides for a reward that differs between responses of an untrained model."""
    return [
        f"custom_reward_function.path={Path(__file__).with_name('runs.py')}",
        "custom_reward_function.name=digit_share",
    ]
