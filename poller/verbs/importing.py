"""`import`."""

import argparse
import re
import sys
from urllib.parse import urlsplit

from poller.errors import ConfigError, PollerError
from poller.verbs.common import OK, Verbs, add_verb, seconds

_IMPORT = """\
Print a config file with the event source mappings of an AWS account or of a template. Save it, check it with
`poller validate -c FILE`, and start the poller with it.

Without TEMPLATE: the account that the standard AWS chain's credentials are of (environment, AWS_PROFILE, role). Needs
lambda:ListEventSourceMappings, and for timeouts lambda:GetFunctionConfiguration. Mappings keep their UUID; tags are not
read. AWS's position in a stream cannot be read, so records are delivered again: a Kinesis mapping starts --overlap
seconds before now; a DynamoDB mapping, and a Kinesis mapping that is disabled or has a problem, at TRIM_HORIZON.

TEMPLATE is a CloudFormation or SAM template (YAML or JSON) or a serverless.yml. What only the deployed stack knows,
such as generated names, becomes ${NAME}, a variable to set; comments say which expression each stands for.

Each function is printed under `functions` with its Lambda ARN or name. For an HTTP endpoint, change that one line.
What cannot be carried over (other sources, BisectBatchOnFunctionError) is named on standard error and in comments.
"""
_EXITS = "Exit code: 0 printed, 2 a mistake, no mappings found, or AWS did not answer."


def add(verbs: Verbs) -> None:
    """Add it."""
    text = "print config mappings from an AWS account or a template"
    made = add_verb(verbs, "import", text, _import, description=_IMPORT, epilog=_EXITS)
    made.add_argument("template", metavar="TEMPLATE", nargs="?", help="a template file; without it the account is read")
    made.add_argument(
        "--region", type=_region, help="of the account or the stack (default: AWS_REGION, or the template's)"
    )
    account = made.add_argument_group("with an account")
    account.add_argument("--function", default="", metavar="NAME", help="only mappings of this function: name or ARN")
    account.add_argument("--endpoint-url", type=_endpoint, metavar="URL", help="of every AWS service, for emulators")
    account.add_argument(
        "--overlap",
        type=seconds,
        metavar="SECONDS",
        help="how long before now a Kinesis mapping starts (default: 3600)",
    )
    template = made.add_argument_group("with a template")
    template.add_argument("--account", type=_account, metavar="ID", help="AWS account of the stack")
    template.add_argument(
        "--parameter",
        type=_parameter,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the template, or AWS::StackName; may be given several times",
    )
    template.add_argument("--stage", help="of serverless.yml (default: the file's, else dev)")


def _region(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9-]{1,64}", text):
        raise argparse.ArgumentTypeError("this is not a Region such as eu-west-1")
    return text


def _endpoint(text: str) -> str:
    try:
        parts = urlsplit(text)
        good = parts.scheme in {"http", "https"} and parts.hostname and "@" not in parts.netloc and not parts.fragment
    except ValueError:
        good = False
    if not good or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError("this is not a URL such as http://127.0.0.1:4566, without a user name")
    return text


def _account(text: str) -> str:
    if len(text) != 12 or not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} is not an account number of 12 digits")
    return text


def _parameter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError("give NAME=VALUE")
    return name, value


def _import(given: argparse.Namespace) -> int:
    from poller.importing import AccountOptions, TemplateOptions, import_account, import_template

    if given.template is None:
        alien = {"--account": given.account, "--parameter": given.parameter, "--stage": given.stage}
        where = "belongs to a TEMPLATE; name the file"
    else:
        alien = {"--function": given.function, "--endpoint-url": given.endpoint_url, "--overlap": given.overlap}
        where = "is for an account; leave TEMPLATE out"
    if wrong := [f"{option}: {where}" for option, value in alien.items() if value]:
        raise ConfigError(wrong)
    try:
        if given.template is None:
            options = AccountOptions(given.region, given.endpoint_url, given.function, given.overlap or 3600.0)
            found = import_account(options)
        else:
            parameters = dict(given.parameter)
            found = import_template(
                given.template, TemplateOptions(given.region, given.account, given.stage, parameters)
            )
    except ConfigError:
        raise
    except PollerError as error:
        raise ConfigError([f"poller import: {error}"]) from None
    print(found.text, end="")
    for remark in found.remarks:
        print(remark, file=sys.stderr)
    return OK
