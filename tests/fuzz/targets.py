"""All of them."""

from tests.fuzz import answers, documents, files, filters, queues, records, requests, streams

TARGETS = {
    target.name: target
    for target in (
        streams.TARGET,
        queues.TARGET,
        answers.TARGET,
        requests.TARGET,
        records.TARGET,
        documents.TARGET,
        filters.TARGET,
        files.CONFIG,
        files.TEMPLATES,
    )
}
