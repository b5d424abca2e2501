"""Tests on several processes of this machine, which talk through gloo (`make test-distributed`).

One pool of processes serves the session, so these tests run in one pytest process: under pytest-xdist every worker
would start a pool of its own.
"""

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole-product", action="store_true", help="test_matrix.py: all 48 combinations, not six")
    parser.addoption("--write-table", action="store_true", help="write what test_matrix.py found into the docs")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()
