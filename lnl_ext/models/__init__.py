"""Networks of other libraries, split at a layer."""
