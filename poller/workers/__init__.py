"""`poller run --workers N`: one daemon as several processes, with one store, one port and one config file.

    parent: config file, lock of the store, HTTP server, slots that are lent      <-- signals, requests
      |  socket pair (channel.py)    |  Unix socket (server/remote.py)
      v                              v
    worker 0 .. N-1: a fleet over the one store (runtime/lease_keeper.py)

A worker that dies is started again under a new name; its leases are free at once, for the parent knows that it is dead.
Workers hold the store's lock with their parent: while one of them lives nobody else gets it. A worker whose parent dies
ends within seconds.
"""
