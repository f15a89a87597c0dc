"""What tests of integrations share: programs of others import much, and must not see what an earlier test did."""

import pytest
from integrations.forked import Forks


@pytest.fixture(scope="session")
def forks():
    with Forks() as forks:
        yield forks
