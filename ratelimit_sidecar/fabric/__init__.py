"""A region's sidecars share their buckets through Redis or Valkey, and speak to other regions by one of them.

What lasts how long, and whose it is:

| Word | Of | Another one begins when |
|---|---|---|
| incarnation | a store: the random half of its `Origin` | the sidecar starts, or its clock is set back |
| life | a sidecar: the origin that it had first (`record.life_of`) | it starts |
| term | a gateway: the time of one lease, named by its token (`gateway.py`) | a sidecar gets the lease |
| epoch | a shard's buckets: a random text (`scripts.py`) | the server has lost them |
| era | a sidecar's own count of what it must tell in full (`sharing.py`) | it sees another epoch, or a call failed |
| lineage | a shard's accounts: a random text (`accounts.py`) | the server may have lost a call |
| generation | an account: `COUNTED_US` of the lineage's clock (`accounts.py`) | that time is over |
| caller id | a sidecar's numbered calls to accounts (`account_calls.py`) | it is silent, or sees another lineage |

The epoch of a *membership* of strict limits (`crdt/shares.py`) is a number in the configuration, and none of these.
"""
