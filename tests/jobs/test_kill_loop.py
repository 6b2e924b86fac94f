"""A few kills of the loop that `python -m tests.kill_loop --times 50` runs at length."""

import subprocess
import sys


def test_killed_at_random_moments(tiny_dir, pytestconfig):
    """In a process of its own, which forks: this one may have started threads."""
    command = [sys.executable, "-m", "tests.kill_loop", "--times", "5", "--seed", "3"]
    done = subprocess.run(
        command, cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("killed 5 times")
