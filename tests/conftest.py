"""For all tests."""

import signal


def pytest_configure(config):
    """A shell that starts us in the background has us ignore Ctrl-C, and our child processes would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Files that start Ray come first: they take longest, and those of milliseconds fill the gaps of the last (pytest-xdist hands out files in this order)."""
    slow = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in slow)
