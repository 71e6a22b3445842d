"""For all tests."""

import signal


def pytest_configure(config):
    """A shell that starts us in the background has us ignore Ctrl-C, and our child processes would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
