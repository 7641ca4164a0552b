"""`poller import`: event source mappings of an AWS account or a template as a config file of ours.

what is found (account.py, cloudformation.py, serverless.py) -> candidates -> judge.py, which asks `mappings.py`
-> render.py, the text. What a template does not tell stands in the text as `${NAME}`, a variable to set.
"""

from poller.importing.account import AccountOptions, import_account
from poller.importing.render import Imported
from poller.importing.templates import TemplateOptions, import_template

__all__ = ["AccountOptions", "Imported", "TemplateOptions", "import_account", "import_template"]
