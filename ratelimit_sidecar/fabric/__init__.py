"""A region's sidecars share their buckets through Redis or Valkey, and speak to other regions by one of them."""
