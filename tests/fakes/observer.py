"""A MappingObserver that counts."""

from collections import Counter


class NullObserver:
    """Ignores everything."""

    def polled(self, operation, outcome, events):
        pass

    def filtered(self, events):
        pass

    def invoking(self, change):
        pass

    def invoked(self, outcome, events, seconds):
        pass

    def dropped(self, events):
        pass

    def reported(self, outcome, events):
        pass

    def deleted(self, events):
        pass

    def lost(self, shard, events):
        pass

    def saved(self, positions, seconds):
        pass


class CountingObserver(NullObserver):
    """Counts per name; `polled`, `invoked` also per outcome."""

    def __init__(self):
        self.counts = Counter()

    def polled(self, operation, outcome, events):
        self.counts[f"polled_{outcome}"] += 1
        self.counts["polled_events"] += events

    def invoked(self, outcome, events, seconds):
        self.counts[f"invoked_{outcome}"] += 1
        self.counts["invoked_events"] += events

    def dropped(self, events):
        self.counts["dropped"] += events

    def filtered(self, events):
        self.counts["filtered"] += events

    def reported(self, outcome, events):
        self.counts[f"reported_{outcome}"] += 1
        self.counts["reported_events"] += events if outcome == "success" else 0

    def deleted(self, events):
        self.counts["deleted"] += events

    def lost(self, shard, events):
        self.counts["lost"] += events
