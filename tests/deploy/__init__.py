"""What needs tools of the machine that PyPI does not have: runs with `--deploy` only; `.ci/run` installs them."""
