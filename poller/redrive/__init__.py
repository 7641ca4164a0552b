"""`poller redrive`: what a failure destination holds is delivered again."""

from poller.redrive.run import Options, run

__all__ = ["Options", "run"]
