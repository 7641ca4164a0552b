"""What a function name can mean."""

from poller.aws.session import AwsClients
from poller.ports import Clock, Target
from poller.settings import FunctionSettings, HttpFunction, LambdaFunction
from poller.targets.http import HttpTarget
from poller.targets.lambda_ import LambdaTarget


def open_target(settings: FunctionSettings, region: str, clients: AwsClients, clock: Clock) -> Target:
    """The target of a function, inside a running event loop. Needs no network; ConfigError as `HttpTarget` has it.

    `region`: that of a function, or of a signature, which names none. `clients` must outlive the target.
    """
    match settings:
        case HttpFunction():
            return HttpTarget(settings, region, clients.credentials, clock)
        case LambdaFunction():
            return LambdaTarget(settings, region, clients, clock)
