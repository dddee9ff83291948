"""Every script starts as a file, from any folder."""

import importlib.util
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
RUN_EACH = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    sys.argv, text = [script, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code and "sage: " in text.getvalue(), script
        print(script)
"""


def test_help_of_every_script(tmp_path: Path) -> None:
    """In one process, as each would import MLX anew."""
    scripts = [str(path) for path in sorted(SCRIPTS.glob("*.py")) if 'if __name__ == "__main__"' in path.read_text()]
    if importlib.util.find_spec("torch") is None:
        scripts = [script for script in scripts if not script.endswith("make_golden.py")]
    command = [sys.executable, "-c", RUN_EACH, *scripts]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == scripts
    assert len(scripts) > 10
