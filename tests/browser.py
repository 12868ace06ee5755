"""A real headless browser, as a person would open a page."""

import shutil
import subprocess

import pytest


def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("chromium is missing: apt-get install --no-install-recommends chromium")
    return found


def browse(url, profile, budget_ms=4000):
    """The page's elements after its script has run."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", f"--virtual-time-budget={budget_ms}", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    refused = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, refused
