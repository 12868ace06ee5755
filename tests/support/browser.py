"""A real headless browser that opens a page as a person would."""

import shutil
import subprocess

import pytest


def chromium():
    """Return the path of a browser; skip the test if there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("chromium is missing: apt-get install --no-install-recommends chromium")
    return path


def browse(url, profile, budget_ms=4000):
    """Return the page's elements after its script has run, and the messages of its console."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", f"--virtual-time-budget={budget_ms}", "--dump-dom", url]
    browser = subprocess.run(command, capture_output=True, text=True, timeout=120)
    messages = [line for line in browser.stderr.splitlines() if "CONSOLE" in line]
    return browser.stdout, messages
