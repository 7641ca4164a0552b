"""Where positions, leases and API-made mappings are kept. To add a store, write its module and its case here."""

from contextlib import AsyncExitStack
from dataclasses import replace

from poller.aws.session import AwsClients
from poller.ports import CheckpointStore, StoreObserver
from poller.settings import AwsSettings, DynamoStoreSettings, Settings, StoreSettings
from poller.stores.dynamodb import DynamoStore
from poller.stores.sqlite import SqliteStore


async def open_store(
    settings: Settings, observer: StoreObserver, stack: AsyncExitStack, *, exclusive: bool = True
) -> CheckpointStore:
    """The store of a config, closed with the stack. `exclusive`: this process alone is to own what is in it, where the
    store knows such a thing (SQLite); without it nothing is made.

    StoreInUse, StoreIncompatible, StoreUnavailable; of DynamoDB only its first call can tell. ConfigError: no region.
    """
    match settings.store:
        case StoreSettings(path=path):
            store: CheckpointStore = await SqliteStore.open(path, observer, exclusive=exclusive)
        case DynamoStoreSettings() as dynamo:
            aws = AwsSettings(
                dynamo.region or settings.aws.region,
                dynamo.endpoint_url or settings.aws.endpoint("dynamodb"),
            )
            clients = await stack.enter_async_context(AwsClients(aws))
            store = DynamoStore(clients, replace(dynamo, region=aws.region), observer)
    stack.push_async_callback(store.close)
    return store
