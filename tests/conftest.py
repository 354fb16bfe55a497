"""Settings that every test shares."""

from __future__ import annotations

import pytest
from hypothesis import settings

HELPERS = ("asserting", "builders", "e2e", "host_files", "luks_images", "shapes", "states")
pytest.register_assert_rewrite(*(f"tests.{name}" for name in HELPERS))  # so they tell in full what they found

settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=80)
settings.register_profile("explore", deadline=None, max_examples=5000, print_blob=True)
settings.load_profile("fixed")  # a run repeats exactly; --hypothesis-profile=explore looks further


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this project's own."""
    parser.addoption(
        "--power-cuts",
        type=int,
        default=2000,
        metavar="N",
        help="how many crash states to try (default 2000)",
    )


@pytest.fixture
def power_cuts(request: pytest.FixtureRequest) -> int:
    """How many crash states the tests try together."""
    count: int = request.config.getoption("--power-cuts")
    return count
