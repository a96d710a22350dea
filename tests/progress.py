"""What runs, every ten seconds; and at the end what the tests took of their budget (tests/README.md)."""

from __future__ import annotations

import threading
import time

import pytest

EVERY_S = 10
BUDGET_MIN = 9  # on two cores; the other three of CI's twelve minutes are for installing


class Progress:
    """A pytest plugin for the process that reports. With -n 0 that is the one that tests, whose output is captured: then only
    the end is printed."""

    def __init__(self, config: pytest.Config):
        self._config, self._start = config, time.monotonic()
        self._total, self._done, self._running, self._over = 0, 0, {}, threading.Event()
        if config.getoption("numprocesses"):
            threading.Thread(target=self._report, daemon=True).start()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._total = len(ids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._total = len(session.items) or self._total

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._running.pop(nodeid, None)
        self._done += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        self._over.set()
        minutes = (time.monotonic() - self._start) / 60
        terminalreporter.write_line(f"tests took {minutes:.1f} min; the budget of CI is {BUDGET_MIN} min: see tests/README.md")

    def _report(self) -> None:
        while not self._over.wait(EVERY_S):
            now = time.monotonic()
            running = [f"{id.rpartition('::')[2][:80]} ({now - since:.0f} s)" for id, since in list(self._running.items())]
            reporter = self._config.pluginmanager.get_plugin("terminalreporter")
            reporter.ensure_newline()
            reporter.write_line(f"{now - self._start:4.0f} s: {self._done} of {self._total} done; at {', '.join(running)}")
