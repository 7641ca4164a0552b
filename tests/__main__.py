"""Everything that must be green: `python -m tests`. Arguments go to pytest; `-n 0` for one process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS = (
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["mypy"],
    # Much of it waits for other processes: a third keeps two cores busy. `testpaths` names the long ones first, so that
    # all end together.
    ["pytest", "-q", "-n", "3", "--dist", "worksteal"],
)


def main() -> int:
    """Run each step, the failed ones too; 1 if any failed."""
    failed = []
    for step in STEPS:
        command = [sys.executable, "-m", *step, *(sys.argv[1:] if step[0] == "pytest" else [])]
        print("$ python -m", *command[2:], flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(step[0])
    print(f"failed: {', '.join(failed)}" if failed else "all passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
